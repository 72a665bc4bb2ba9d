"""Test the whole service as users run it: a `python -m app` process, and HTTP over a real socket."""

import io
import json
import re
import shutil
import socket
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest
from PIL import Image
from processes import count_open_files
from server import Server, wait_for
from service import TINY, run_service

from training.store import LocalStore

pytestmark = pytest.mark.slow


def test_predict_evaluate_and_train_until_the_new_version_is_live(tmp_path: Path, models: Path, image: Path) -> None:
    log = tmp_path / "log"
    with run_service(models, tmp_path / "runs", log, runtime="auto") as (client, _):
        assert client.get("/health/ready").status_code == 200
        answer = client.post("/predict", files={"file": image.read_bytes()}).raise_for_status().json()
        assert (answer["model"], answer["version"]) == ("resnet", 1)
        assert len(answer["predictions"][0]["classes"]) == 5
        measured = client.post("/evaluate").raise_for_status().json()
        assert measured["result"]["top1"] == client.get("/evaluate").json()[0]["test"]["top1"]

        accepted = client.post("/train", json={"recipe": "resnet", "overrides": TINY, "promote": "always"})
        assert accepted.status_code == 202
        place = accepted.headers["location"]
        queued = client.post("/train", json={"recipe": "resnet", "overrides": TINY}).json()
        assert queued["state"] == "queued"
        assert client.delete(f"/train/{queued['id']}").json()["state"] == "cancelled"

        events = client.get(f"{place}/events").text  # the stream ends with the job
        kinds = re.findall(r"^event: (\w+)$", events, re.MULTILINE)
        assert list(dict.fromkeys(kinds)) == ["phase", "tick", "epoch", "end"]
        phases = re.findall(r'"phase": "(\w+)"', events)
        assert list(dict.fromkeys(phases)) == ["loading", "training", "exporting", "measuring", "publishing"]
        replayed = client.get(f"{place}/events", headers={"Last-Event-ID": "3"}).text
        assert re.findall(r"^event: (\w+)$", replayed, re.MULTILINE) == kinds[3:]
        job = client.get(place).json()
        assert job["state"] == "succeeded", log.read_text()
        assert job["published"]["version"] == 2
        assert job["history"][0]["epoch"] == 1
        assert json.loads(events.rpartition("data: ")[2])["id"] == job["id"]
        assert client.post("/predict", files={"file": image.read_bytes()}).json()["version"] == 2

        assert client.get("/models").json()[0] == {"name": "resnet", "live": 2, "versions": [1, 2], "error": None}
        assert [each["id"] for each in client.get("/train").json()] == [queued["id"], job["id"]]


def test_the_log_is_json_whatever_pillow_thinks_of_an_image(tmp_path: Path, models: Path) -> None:
    content = io.BytesIO()
    cut_off = b"Exif\0\0II*\0\x08\0\0\0\x05\0\x0f\x01"
    Image.new("RGB", (32, 32)).save(content, "JPEG", exif=cut_off)
    log = tmp_path / "log"
    with run_service(models, tmp_path / "runs", log) as (client, _):
        headers = {"Content-Type": "image/jpeg", "X-Request-ID": "mine"}
        assert client.post("/predict", content=content.getvalue(), headers=headers).status_code == 200
        wait_for(lambda: "POST /predict 200" in log.read_text(), 60, log)  # logged after the answer
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["message"] for line in lines if line["request_id"] == "mine"] == ["POST /predict 200"]


def test_no_request_is_lost_while_versions_are_swapped_under_load(tmp_path: Path, models: Path, image: Path) -> None:
    store = LocalStore(models)
    for _ in range(2):
        with store.draft("resnet") as draft:
            (draft / "model.pt").write_bytes((models / "resnet" / "1" / "model.pt").read_bytes())
            store.publish(draft, store.card("resnet", 1))
    log = tmp_path / "log"
    content = image.read_bytes()
    answers: list[tuple[int, int | None]] = []
    stop = threading.Event()

    def load(address: httpx.URL) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not stop.is_set():
                response = client.post("/predict", content=content, headers={"content-type": "image/png"})
                answers.append((response.status_code, response.json().get("version")))

    def answered_by(version: int) -> bool:
        return bool(client.get("/health").json()["models"]["resnet"]["version"] == version)

    with run_service(models, tmp_path / "runs", log) as (client, _):
        threads = [threading.Thread(target=load, args=(client.base_url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for swap in range(10):
            version = swap % 3 + 1
            if swap % 2:
                client.put("/models/resnet/live", json={"version": version}).raise_for_status()
            else:  # another process promotes, and the service follows the store
                store.promote("resnet", version)
            # From here on the new version answers every new request.
            wait_for(partial(answered_by, version), 60, log)
            answer = client.post("/predict", content=content, headers={"content-type": "image/png"}).json()
            assert answer["version"] == version
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers} == {1, 2, 3}


@pytest.mark.skipif(not shutil.which("prlimit"), reason="needs prlimit")
def test_connections_leave_descriptors_for_everything_else(tmp_path: Path, models: Path, image: Path) -> None:
    log = tmp_path / "log"
    few = ("prlimit", "--nofile=200:200")
    with Server(models, tmp_path / "runs", log, few) as server, server.client() as client, ExitStack() as held:
        address = (client.base_url.host, client.base_url.port or 0)
        for number in range(400):
            source = (f"127.0.1.{number % 16 + 1}", 0)
            held.enter_context(socket.create_connection(address, source_address=source))
        for _ in range(5):
            answer = httpx.post(f"{client.base_url}/predict", files={"file": image.read_bytes()})
            assert answer.status_code == 200
        assert count_open_files(server.process.pid) < 120
    assert "Traceback" not in log.read_text()
