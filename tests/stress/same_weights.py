"""Test that a change of the code leaves the weights of training runs equal to the last bit.

Both commits train each recipe for two epochs on the synthetic data set, with one thread, on this machine. The script
compares the classifier of the last checkpoint: names, shapes and bits of all tensors.

    python tests/stress/same_weights.py 8b07a1e              # that commit against HEAD
    python tests/stress/same_weights.py 8b07a1e --only resnet18

Time: eight minutes on two cores.
Table: results/same_weights.md. A variant that the old commit does not know is left out of it.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import torch
from results import Check, conclude

REPOSITORY = Path(__file__).parents[2]
_SMALL_TRANSFER = "weights=none image_size=64 batch_size=32"
VARIANTS = (
    "resnet-seed",
    "resnet-seed batch_norm_statistics=per-use eval_mode_after=1 crop_padding=4 crop_fill=zeros schedule=step",
    "resnet-seed shortcuts=identity flip_alternates=true average_decay=0.9",
    "resnet",
    "resnet optimizer=sgd weight_decay=5e-4 schedule=cosine mixup=0.2",
    "resnet optimizer=adam learning_rate=1e-3 cutmix=1 precision=bfloat16",
    "resnet teacher=resnet/1",
    "resnet teacher=resnet/1 teacher_view=augmented",
    f"resnet18-seed {_SMALL_TRANSFER}",
    f"resnet18 {_SMALL_TRANSFER} finetune_epochs=1",
    f"resnet18 {_SMALL_TRANSFER} cache_features=false",
)
_FIELDS = "epochs=2 validation_images=80"
_DATA = "synthetic:8"
_UNKNOWN = 2  # exit status of the command line for an invalid recipe


def main(old: str, only: str) -> int:
    """Train every variant at both commits and compare the weights."""
    new = _git("rev-parse", "HEAD")
    variants = [each for each in VARIANTS if only in each]
    checks = []
    with tempfile.TemporaryDirectory(prefix="cifar100-") as scratch:
        codes = [_check_out(commit, Path(scratch, name)) for name, commit in (("old", old), ("new", new))]
        store = Path(scratch, "models")
        try:
            run(
                codes[0],
                "resnet epochs=1 validation_images=80",
                "--models",
                str(store),
                "--run",
                str(store.with_name("teacher")),
            )
            for number, variant in enumerate(variants):
                before, after = (
                    train(code, variant, store, store.with_name(f"{code.name}-{number}")) for code in codes
                )
                if before is None:
                    print(f"{old} does not know: {variant}", flush=True)
                    continue
                same = before == after
                checks.append(Check(variant, after or "failed", "equal weights", same))
                print(f"{'equal' if same else 'DIFFERENT'}: {variant}", flush=True)
        finally:
            for code in codes:
                _git("worktree", "remove", "--force", str(code))
    return conclude(
        __file__,
        f"Two epochs of {len(checks)} recipes on synthetic data at {old} and {new[:7]}; sha256 of the weights.",
        checks,
        whole=not only,
    )


def train(code: Path, variant: str, store: Path, folder: Path) -> str | None:
    """Train a variant with the code of a worktree.

    Returns:
        The sha256 of the weights, or None if this code does not know the recipe.
    """
    if not run(code, f"{variant} {_FIELDS}", "--models", str(store), "--run", str(folder), "--no-publish"):
        return None
    return digest(torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["classifier"])


def run(code: Path, recipe: str, *options: str) -> bool:
    """Run the training command of a worktree. Return False if it does not know the recipe."""
    command = [sys.executable, "-m", "training", "train", *recipe.split(), "--data", _DATA, *options]
    environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True)
    if ended.returncode not in (0, _UNKNOWN):
        raise SystemExit(f"{recipe} failed at {code}:\n{ended.stderr[-2000:]}")
    return ended.returncode == 0


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Return the sha256, in hexadecimal, of the names, shapes and bits of all tensors."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha256.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha256.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()[:16]


def _check_out(commit: str, folder: Path) -> Path:
    _git("worktree", "add", "--detach", str(folder), commit)
    return folder


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the old commit")
    parser.add_argument("--only", default="", help="train only the variants that contain this text")
    given = parser.parse_args()
    sys.exit(main(given.commit, given.only))
