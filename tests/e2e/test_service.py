"""The whole service as its users meet it: `python -m app` as a process, HTTP over a real socket."""

import json
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from server import TINY, processes_of, service, wait_for

from training.data import Dataset
from training.store import Store


@pytest.fixture
def image(tmp_path: Path, dataset: Dataset) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(dataset.test.images[0]).save(path)
    return path


def test_predict_evaluate_and_train_until_the_new_version_is_live(tmp_path: Path, models: Path, image: Path) -> None:
    log = tmp_path / "log"
    with service(models, tmp_path / "runs", log) as (client, _):
        assert client.get("/health/ready").status_code == 200
        answer = client.post("/predict", files={"file": image.read_bytes()}).raise_for_status().json()
        assert (answer["model"], answer["version"]) == ("resnet", 1)
        assert len(answer["predictions"][0]["classes"]) == 5
        measured = client.post("/evaluate").raise_for_status().json()
        assert measured["result"]["top1"] == client.get("/evaluate").json()[0]["test"]["top1"]

        accepted = client.post("/train", json={"recipe": "resnet", "overrides": TINY, "promote": "always"})
        assert accepted.status_code == 202
        place = accepted.headers["location"]
        queued = client.post("/train", json={"recipe": "resnet", "overrides": TINY, "promote": "never"}).json()
        assert queued["state"] == "queued"

        events = client.get(f"{place}/events").text  # ends with the job
        kinds = re.findall(r"^event: (\w+)$", events, re.MULTILINE)
        assert kinds == ["tick", "epoch", "end"]
        replayed = client.get(f"{place}/events", headers={"Last-Event-ID": "1"}).text
        assert re.findall(r"^event: (\w+)$", replayed, re.MULTILINE) == ["epoch", "end"]
        job = client.get(place).json()
        assert job["state"] == "succeeded", log.read_text()
        assert job["published"]["version"] == 2
        assert job["history"][0]["epoch"] == 1
        assert json.loads(events.rpartition("data: ")[2])["id"] == job["id"]
        assert client.post("/predict", files={"file": image.read_bytes()}).json()["version"] == 2

        second = f"/train/{queued['id']}"
        wait_for(lambda: client.get(second).json()["state"] == "succeeded", 60, log)
        assert client.get("/models").json()[0] == {"name": "resnet", "live": 2, "versions": [1, 2, 3], "error": None}
        assert [each["id"] for each in client.get("/train").json()] == [queued["id"], job["id"]]


def test_no_request_is_lost_while_versions_are_swapped_under_load(tmp_path: Path, models: Path, image: Path) -> None:
    store = Store(models)
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

    with service(models, tmp_path / "runs", log) as (client, _):
        threads = [threading.Thread(target=load, args=(client.base_url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for swap in range(10):
            version = swap % 3 + 1
            if swap % 2:
                client.put("/models/resnet/live", json={"version": version}).raise_for_status()
            else:  # by another process: the service follows the store
                store.promote("resnet", version)
            # From here on every new request is answered by the new version.
            wait_for(lambda v=version: client.get("/health").json()["models"]["resnet"]["version"] == v, 30, log)
            answer = client.post("/predict", content=content, headers={"content-type": "image/png"}).json()
            assert answer["version"] == version
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers} == {1, 2, 3}


def test_sigterm_first_tells_load_balancers_and_goes_on_for_a_while(tmp_path: Path, models: Path, image: Path) -> None:
    log = tmp_path / "log"
    with service(models, tmp_path / "runs", log, drain_s="1.5") as (client, process):
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/health/ready").status_code == 503, 1, log)
        assert client.get("/health/live").status_code == 200
        assert client.post("/predict", files={"file": image.read_bytes()}).status_code == 200
        assert process.wait(30) == 0, log.read_text()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert "POST /predict 200" in [line["message"] for line in lines]


def test_sigterm_answers_what_was_accepted_and_stops_the_child(tmp_path: Path, models: Path, dataset: Dataset) -> None:
    log = tmp_path / "log"
    runs = tmp_path / "runs"
    with service(models, runs, log) as (client, process):
        job = client.post("/train", json={"recipe": "resnet", "overrides": {**TINY, "epochs": 500}}).json()
        wait_for(lambda: client.get(f"/train/{job['id']}").json()["history"], 60, log)
        big = tmp_path / "big.png"
        Image.fromarray(np.tile(dataset.test.images[0], (60, 60, 1))).save(big)
        statuses: list[int] = []

        def request() -> None:
            with httpx.Client(base_url=client.base_url, timeout=60) as other:
                files = [("file", big.read_bytes())] * 3
                statuses.append(other.post("/predict", files=files).status_code)

        thread = threading.Thread(target=request)
        thread.start()
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert process.wait(30) == 0, log.read_text()
        assert statuses == [200]
        assert not processes_of(runs)
