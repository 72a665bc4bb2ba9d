"""Test the estimates of memory and disk: upper bounds within a factor of two. A run that does not fit is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from training import resources
from training.dataset import load_dataset, split_sizes
from training.recipes import RecipeError, make_recipe
from training.resources import MIB, available_memory, feature_bytes, require, training_bytes

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
PEAK = """
import sys, tempfile
from pathlib import Path
import torch
from training.dataset import load_dataset
from training.loop import train
from training.recipes import make_recipe
from training.run import Run
torch.set_num_threads(1)
name, *changes = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    run = Run(Path(folder))
    run.create(make_recipe(name, dict(change.split("=") for change in changes)))
    for _ in train(run.recipe(), load_dataset("synthetic:1"), run, torch.device("cpu")):
        pass
status = Path("/proc/self/status").read_text().splitlines()  # getrusage counts the parent's memory before exec
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""
GROUP = ("memory.max", "memory.current", "memory.stat")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet", {"width": 32, "batch_size": 100}),
        ("resnet18", {"image_size": 64, "batch_size": 100, "weights": "none", "finetune_epochs": 1}),
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_estimate_is_above_the_peak_of_an_epoch_and_below_twice_that(
    name: str, changes: dict[str, Any], precision: str
) -> None:
    changes = changes | {"epochs": 1, "validation_images": 0, "int8": False, "precision": precision}
    command = [sys.executable, "-c", PEAK, name, *(f"{field}={value}" for field, value in changes.items())]
    peak = 1024 * int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    estimate = training_bytes(make_recipe(name, changes), CPU, 100)
    assert peak < estimate < 2 * peak, f"peak {peak / MIB:.0f} MiB, estimate {estimate / MIB:.0f} MiB"


@pytest.mark.parametrize(
    ("name", "greater"),
    [
        ("resnet", {"width": 64}),
        ("resnet", {"batch_size": 1024}),
        ("resnet", {"precision": "float32"}),
        ("resnet18", {"image_size": 224}),
        ("resnet18", {"batch_size": 1024}),
        ("resnet18-seed", {"finetune_epochs": 1, "batch_size": 256}),
        ("resnet18-seed", {"trainable": "layer3,layer4,fc", "batch_size": 1024}),
        ("resnet18-seed", {"cache_features": False, "batch_size": 1024}),
    ],
)
def test_estimate_grows_with_all_that_takes_memory(name: str, greater: dict[str, Any]) -> None:
    common = {"precision": "bfloat16", "batch_size": 128} | {
        field: value for field, value in greater.items() if field == "batch_size" and len(greater) > 1
    }
    smaller, larger = make_recipe(name, common), make_recipe(name, common | greater)
    assert training_bytes(smaller, CPU, 50_000) < training_bytes(larger, CPU, 50_000)


def test_batch_has_no_more_images_than_the_data_set() -> None:
    chosen = make_recipe("resnet", {"batch_size": 8192})
    assert training_bytes(chosen, CPU, 100) < training_bytes(chosen, CPU, 50_000) / 10


def test_every_recipe_fits_into_a_machine_of_eight_gigabytes() -> None:
    for name in ("resnet-seed", "shared-resnet", "resnet", "resnet18-seed", "resnet18"):
        assert training_bytes(make_recipe(name, {"precision": "float32"}), CPU, 50_000) < 8e9, name


def test_recipe_that_does_not_fit_is_refused_with_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "available_memory", lambda: 4_000_000_000)
    large = make_recipe(
        "resnet18", {"image_size": 512, "batch_size": 1024, "precision": "float32", "cache_features": False}
    )
    with pytest.raises(RecipeError, match=r"about 1\d\d\.\d GB of memory, and 4\.0 GB are available; lower") as refused:
        require(large, CPU, 50_000, 10_000)
    assert "batch_size=1024 or image_size=512" in str(refused.value)
    wide = make_recipe("resnet", {"width": 128, "batch_size": 1024, "precision": "float32"})
    with pytest.raises(RecipeError, match="lower batch_size=1024 or width=128"):
        require(wide, CPU, 50_000, 10_000)
    require(wide, CPU, 50_000, 10_000, freed=20_000_000_000)
    require(make_recipe("resnet"), CPU, 50_000, 10_000)
    monkeypatch.setattr(resources, "available_memory", lambda: None)  # available memory is unknown except on Linux
    require(wide, CPU, 50_000, 10_000)


def test_features_are_as_large_as_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_FEATURES", str(tmp_path))
    changes = {"image_size": 48, "weights": "none", "epochs": 1, "finetune_epochs": 0, "validation_images": 0}
    for trainable in ("layer4,fc", "layer2,layer3,layer4,fc", "fc"):
        chosen = make_recipe("resnet18", changes | {"trainable": trainable})
        estimate = feature_bytes(chosen, *split_sizes("synthetic:1"))
        subprocess.run(
            [
                sys.executable,
                "-c",
                PEAK,
                "resnet18",
                *(f"{k}={v}" for k, v in (changes | {"trainable": trainable}).items()),
            ],
            check=True,
            capture_output=True,
        )
        (file,) = tmp_path.glob("*.float16")
        assert file.stat().st_size == estimate
    assert feature_bytes(make_recipe("resnet18", {"cache_features": False}), 100, 100) == 0
    assert feature_bytes(make_recipe("resnet18", {"crop_padding": 2}), 100, 100) == 0
    assert feature_bytes(make_recipe("resnet"), 100, 100) == 0


def test_features_for_which_the_disk_has_no_room_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setenv("CIFAR100_FEATURES", str(tmp_path / "features"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000_000))
    monkeypatch.setattr(resources, "available_memory", lambda: None)
    chosen = make_recipe("resnet18-seed")
    with pytest.raises(RecipeError, match=r"would take 11\.0 GB, and 1\.9 GB are free in .*cache_features=false"):
        require(chosen, CPU, 50_000, 10_000)
    require(make_recipe("resnet18-seed", {"cache_features": False}), CPU, 50_000, 10_000)
    require(chosen, CPU, 400, 100)
    (tmp_path / "features").mkdir()
    with (tmp_path / "features" / "earlier.float16").open("wb") as earlier:
        earlier.truncate(12_000_000_000)  # a sparse file uses no disk space
    require(chosen, CPU, 50_000, 10_000)


def test_sizes_are_those_of_the_data_set() -> None:
    for source in ("synthetic:1", "synthetic:9"):
        loaded = load_dataset(source)
        assert split_sizes(source) == (len(loaded.train), len(loaded.test))
    assert split_sizes("/somewhere") == (50_000, 10_000)


def test_available_memory_is_the_least_of_the_machine_and_every_control_group(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    assert available_memory(proc, groups) is None
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    (proc / "self" / "cgroup").write_text("0::/outer/inner\n")
    assert available_memory(proc, groups) == 8000 * 1024
    inner = groups / "outer" / "inner"
    inner.mkdir(parents=True)

    def limit(group: Path, *values: str) -> None:
        for name, value in zip(GROUP, values, strict=True):
            (group / name).write_text(f"{value}\n")

    limit(inner, "max", "700", "inactive_file 5")
    limit(inner.parent, "5000", "2000", "anon 10\ninactive_file 300")
    assert available_memory(proc, groups) == 3300
    limit(groups, "2500", "0", "anon 0")
    assert available_memory(proc, groups) == 2500
    (proc / "self" / "cgroup").write_text("12:cpu,cpuacct:/\n5:memory:/job\n")
    first = groups / "memory" / "job"
    first.mkdir(parents=True)
    for name, value in (("limit_in_bytes", "900"), ("usage_in_bytes", "400"), ("stat", "total_inactive_file 100")):
        (first / f"memory.{name}").write_text(value)
    assert available_memory(proc, groups) == 600


def test_this_machine_has_memory_and_this_process_holds_some() -> None:
    if not Path("/proc/meminfo").exists():
        pytest.skip("there is no /proc")
    assert (available_memory() or 0) > 100 * MIB
    assert resources.resident_memory(os.getpid()) > 10 * MIB
    assert resources.resident_memory(2**22 + 1) == 0
