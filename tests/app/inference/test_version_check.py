"""Test the check of uploaded versions: the output of a model, and the limits of the process that computes it."""

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from server import wait_for

from app.exceptions import BadRequest, Unavailable
from app.inference.check_process import CheckProcess
from app.inference.version_check import check_version
from app.machine import MIB
from app.settings import Settings
from training.runtimes.engine import EngineError
from training.store import CARD, MODEL, LocalStore

SOURCE = "synthetic:4"


class Endless(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.float().mean((1, 2, 3))[:, None].expand(-1, 100)
        while True:
            print("an endless output")
            total = total + 1
        return total


class Greedy(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((1, 2, 3))[:, None].expand(-1, 100) + torch.ones([1 << 28]).sum()


class Halved(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.half().mean((1, 2, 3))[:, None].expand(-1, 100)


class Short(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((1, 2, 3))[:, None].expand(-1, 10)


class Dependent(torch.nn.Module):
    """Its logits for an image depend on the other images of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().mean((2, 3)).cumsum(0).repeat(1, 34)[:, :100]


@pytest.fixture
def version(models: Path) -> Path:
    return models / "resnet" / "1"


def replace_model(version: Path, module: torch.nn.Module) -> None:
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        torch.jit.script(module.eval()).save(version / MODEL)


def set_card(version: Path, **fields: Any) -> None:
    card = LocalStore(version.parents[1]).card("resnet", 1)
    (version / CARD).write_text(card.model_copy(update=fields).model_dump_json())


def fault(version: Path) -> str:
    with pytest.raises(EngineError) as raised:
        check_version(version, LocalStore(version.parents[1]), "torchscript", SOURCE)
    return str(raised.value)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Halved(), "to float16 [16, 100]; it must map them to float32 [16, 100]"),
        (Short(), "to float32 [16, 10]; it must"),
        (Dependent(), "between a batch and the image alone"),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused(version: Path, module: torch.nn.Module, words: str) -> None:
    replace_model(version, module)
    assert words in fault(version)


def test_a_card_with_another_accuracy_or_other_classes_is_refused(version: Path) -> None:
    card = LocalStore(version.parents[1]).card("resnet", 1)
    set_card(version, test=card.test.model_copy(update={"top1": 0.99}))
    assert "its card says 99.0%" in fault(version)
    set_card(version, classes=card.classes[::-1])
    assert "other classes than its data set" in fault(version)
    set_card(version, data="of another data set")
    checked = check_version(version, LocalStore(version.parents[1]), "torchscript", SOURCE)
    assert (checked.images, checked.top1) == (0, None)


def make_check(**limits: Any) -> CheckProcess:
    return CheckProcess(Settings(runtime="torchscript", data=SOURCE), **limits)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_without_an_end_is_ended(version: Path) -> None:
    replace_model(version, Endless())
    with pytest.raises(BadRequest, match="more than 5 s of CPU time"):
        make_check(max_cpu_s=5).run(version, version.parents[1])
    with pytest.raises(Unavailable, match="takes more than 0 s"):
        make_check(max_wall_s=0).run(version, version.parents[1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_that_takes_too_much_memory_is_refused(version: Path) -> None:
    replace_model(version, Greedy())
    with pytest.raises(BadRequest, match=r"more than 0\.5 GiB of memory"):
        make_check(max_memory_bytes=512 * MIB).run(version, version.parents[1])


def test_a_check_gets_no_secret_of_the_service(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "CIFAR100_API_KEYS", "PGPASSWORD"):
        monkeypatch.setenv(name, "the secret of the service")
    process = make_check()._start()
    try:
        assert b"the secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        process.kill()
        process.communicate()


def test_a_check_ends_with_the_service(version: Path) -> None:
    check, errors = make_check(), list[Exception]()

    def run() -> None:
        try:
            check.run(version, version.parents[1])
        except Unavailable as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: check._process, 60)
    check.close()
    thread.join(60)
    assert "the service stops" in str(errors)
