"""Test `app.client` as users have it: copied alone to a folder, against a real server. `app.local` gives the same."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from server import Server
from service import TINY

from app import client as module
from app.client import AsyncClient, Client, Prediction, ServiceError
from app.local import load

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import client
modules = {name.partition(".")[0] for name in sys.modules}
assert not modules & {"app", "training", "numpy", "PIL", "torch", "pydantic"}, modules
with client.Client(sys.argv[1]) as service:
    one, several = service.predict(sys.argv[2], top_k=2), service.predict([sys.argv[2], open(sys.argv[2], "rb").read()])
    print(json.dumps([one.label, one.model, one.version, one.file, len(one.classes), [each.label for each in several]]))
"""


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Iterator[Server]:
    with Server(models, tmp_path / "runs", tmp_path / "log", feedback="true") as server:
        yield server


def test_the_file_alone_predicts_with_httpx_only(server: Server, image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copy(module.__file__, folder / "client.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", SCRIPT, str(server.address), str(image)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    label, *others = json.loads(done.stdout)
    assert others == ["resnet", 1, "image.png", 2, [label, label]]


def test_every_kind_of_image_gets_the_same_classes_also_without_a_server(
    server: Server, image: Path, models: Path
) -> None:
    with Image.open(image) as opened, Client(str(server.address)) as client:
        pixels = opened.convert("RGB")
        kinds: list[module.Image] = [str(image), image, image.read_bytes(), pixels, np.asarray(pixels)]
        expected = client.predict(image)
        names = [image.name, image.name, None, None, None]
        alone = [client.predict(each) for each in kinds]
        assert alone == [replace(expected, file=name) for name in names]
        together = client.predict(kinds)
        assert [(each.label, each.file) for each in together] == [(expected.label, name) for name in names]
        good, bad = client.predict_each([image, b"text"])
        assert isinstance(good, Prediction)
        assert good.label == expected.label
        assert isinstance(bad, ServiceError)
        assert bad.status == 415
        assert client.send_feedback(image, "red_ring").answer["predicted"] == expected.label
        assert client.download_version("resnet", 1).startswith(b"PK")
        local = load("resnet", models, runtime="torchscript")
        assert [local.predict(each) for each in kinds] == alone
        assert [each.file for each in local.predict(kinds)] == names
        with pytest.raises(ServiceError) as ours:
            local.predict(b"text")
        with pytest.raises(ServiceError) as theirs:
            client.predict(b"text")
        assert (ours.value.status, ours.value.title) == (theirs.value.status, theirs.value.title)

    async def predict() -> list[Prediction]:
        async with AsyncClient(str(server.address)) as service:
            return await asyncio.gather(*(service.predict(each) for each in kinds))

    assert [(each.label, each.file) for each in asyncio.run(predict())] == [(expected.label, name) for name in names]


def test_train_follow_evaluate_promote(server: Server, image: Path) -> None:
    with Client(str(server.address)) as client:
        job = client.train("resnet", promote="never", idempotency_key="one", **TINY)
        assert client.train("resnet", promote="never", idempotency_key="one", **TINY).id == job.id
        names = [event.name for event in job.follow()]
        assert names[-1] == "end"
        assert "epoch" in names
        assert job.latest.state == "succeeded"
        assert job.latest.published is not None
        assert client.predict(image).version == 1
        assert client.promote("resnet", 2).live == 2
        assert [(each.name, each.live, each.versions) for each in client.models()] == [("resnet", 2, (1, 2))]
        assert client.predict(image).version == 2
        evaluation = client.evaluate(limit=100)
        assert evaluation.result
        assert (evaluation.version, evaluation.result.images) == (2, 100)
        assert [each.id for each in client.jobs()] == [job.id]
        with pytest.raises(ServiceError, match="did you mean epochs") as raised:
            client.train("resnet", epoch=3)
        assert raised.value.status == 422


def test_follow_survives_a_restart_of_the_service(models: Path, tmp_path: Path) -> None:
    with Server(models, tmp_path / "runs", tmp_path / "log") as first:
        address = str(first.address)
        with Client(address) as client:
            job = client.train("resnet", promote="never", **TINY | {"epochs": 2})
            events = job.follow()
            next(events)
            first.stop()
            port = address.rpartition(":")[2]
            with Server(models, tmp_path / "runs", tmp_path / "log2", port=port):
                names = [event.name for event in events]
    assert names[-1] == "end"
    assert job.latest.state == "succeeded"
