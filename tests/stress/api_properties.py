"""Test that every operation answers as its OpenAPI description says, for valid and invalid requests.

schemathesis reads the description of a running service and generates valid requests, invalid requests and sequences of
requests. It sends them with an API key and checks every answer: no 5xx; status, media type, headers and body as
described; undescribed methods are refused. The training jobs that it starts really train, on the synthetic data set.

    pip install -e '.[proof]' && python tests/stress/api_properties.py [--examples 700] [--seed 0]

Result: 11,676 requests to 16 operations, all answered as described (AMD EPYC, 2 cores, 2026-11-25).
Table: results/api_properties.md.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import tiny_models
from api_hooks import KEY
from results import Check, conclude, is_whole
from server import Server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "ignored_auth",
)
MIN_CASES = 10_000


def main(examples: int, seed: int, whole: bool) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = tiny_models.make_store(folder)
        # schemathesis reports a 503 of these limits as an error, so they are high here. Other tests cover them.
        limits = {"max_jobs": "1000000", "max_event_streams": "1000000"}
        with Server(store.root, folder / "runs", folder / "log", api_keys=KEY, **limits) as server:
            done = subprocess.run(
                [
                    str(Path(sys.executable).with_name("schemathesis")),
                    *("run", f"{server.address}/openapi.json", "--header", f"Authorization: Bearer {KEY}"),
                    *("--checks", ",".join(CHECKS), "--max-examples", str(examples), "--seed", str(seed)),
                    *("--phases", "examples,coverage,fuzzing,stateful", "--continue-on-failure", "--no-color"),
                ],
                cwd=folder,
                env=os.environ | {"SCHEMATHESIS_HOOKS": "api_hooks", "PYTHONPATH": str(Path(__file__).parent)},
                capture_output=True,
                text=True,
                check=False,
            )
            alive = server.client().get("/health/ready").status_code == 200
    print(done.stdout, done.stderr, file=sys.stderr)
    tested = re.search(r"Tested: (\d+)", done.stdout)
    total = re.search(r"Operations:\s+\d+ selected / (\d+) total", done.stdout)
    cases = re.search(r"([\d,]+) generated, ([\d,]+) passed", done.stdout)
    if not (tested and total and cases):
        raise SystemExit("schemathesis did not finish")
    generated, passed = (int(number.replace(",", "")) for number in cases.groups())
    return conclude(
        __file__,
        f"schemathesis with {examples} examples per operation, seed {seed}.",
        [
            Check("operations tested", tested[1], f"all {total[1]}", tested[1] == total[1]),
            Check("requests made up", f"{generated:,}", f"at least {MIN_CASES:,}", generated >= MIN_CASES),
            Check("answers as described, no 5xx", f"{passed:,}", "all", passed == generated and not done.returncode),
            Check("ready afterwards", "yes" if alive else "no", "yes", alive),
        ],
        whole=whole,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=700, help="per operation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(main(arguments.examples, arguments.seed, is_whole(parser, arguments)))
