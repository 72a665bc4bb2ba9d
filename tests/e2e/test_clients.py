"""Test that ordinary HTTP clients get an answer from a real server, however they send an image."""

import gzip
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Server

pytestmark = pytest.mark.slow

NODE = """
import {readFileSync} from "fs";
const [url, path] = process.argv.slice(2), image = readFileSync(path), form = new FormData();
form.append("file", new File([image], "ä.png", {type: "image/png"}));
form.append("top_k", "1");
const bodies = [form, image, new Blob([image]), new Blob([image], {type: "image/png"})];
const answers = await Promise.all(bodies.map(body => fetch(url, {method: "POST", body}).then(answer => answer.json())));
console.log(JSON.stringify(answers));
"""


@pytest.fixture(scope="module")
def url(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("service")
    with Server(published_store, folder / "runs", folder / "log") as server:
        yield f"{server.address}/predict"


def run(*command: str | Path, content: bytes | None = None) -> Any:
    done = subprocess.run(command, input=content, capture_output=True, check=True, timeout=60)
    return json.loads(done.stdout)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_every_usual_form_of_curl_is_answered(url: str, image: Path, tmp_path: Path) -> None:
    def curl(*options: str | Path) -> Any:
        return run("curl", "-sS", *options)

    compressed = tmp_path / "image.png.gz"
    compressed.write_bytes(gzip.compress(image.read_bytes()))
    expected = curl("-F", f"file=@{image}", url)["predictions"][0]["classes"]
    for options in (
        ("-F", f"file=@{image};type=image/png"),
        ("-F", f"file=@{image};filename=ä.png"),
        ("-F", f"file=<{image}"),
        ("-F", f"file=@{image}", "-F", "top_k=5", "-F", "model=resnet"),
        ("-H", "Content-Type: image/png", "--data-binary", f"@{image}"),
        ("--data-binary", f"@{image}"),
        ("-H", "Content-Type:", "--data-binary", f"@{image}"),
        ("-X", "POST", "-T", image),
        ("-X", "POST", "-H", "Transfer-Encoding: chunked", "-T", image),
        ("--compressed", "-F", f"file=@{image}"),
        ("-H", "Content-Encoding: gzip", "-H", "Content-Type: image/png", "--data-binary", f"@{compressed}"),
        ("--http1.0", "-F", f"file=@{image}"),
    ):
        answer = curl(*options, url)
        assert answer.get("predictions", [{}])[0].get("classes") == expected, (options, answer)
    refusals: list[tuple[tuple[str | Path, ...], str]] = [
        (("-T", image), "PUT is not supported here; use POST"),
        (("-F", "file=image.png"), "has the text 'image.png' in the field 'file'"),
        (("-F", f"file=@{image};encoder=base64"), "Content-Transfer-Encoding 'base64'"),
        (("-F", f"image=@{image}"), "a file in the field 'image'"),
        (("-d", "top_k=1"), "the content type is 'application/x-www-form-urlencoded'"),
    ]
    for refused, words in refusals:
        assert words in curl(*refused, url)["detail"], refused


@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_every_usual_body_of_node_is_answered(url: str, image: Path, tmp_path: Path) -> None:
    script = tmp_path / "client.mjs"
    script.write_text(NODE)
    form, *others = (answer["predictions"][0] for answer in run("node", script, url, image))
    assert (form["file"], len(form["classes"])) == ("ä.png", 1)
    for answer in others:
        assert (answer["file"], answer["classes"][0]["label"]) == (None, form["classes"][0]["label"])
