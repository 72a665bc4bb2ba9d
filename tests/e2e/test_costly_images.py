"""Test images with a high decoding cost on a real server: they delay only their sender and leave no process."""

import io
import os
import threading
from pathlib import Path

import httpx
import jpegs
import pytest
from PIL import Image
from processes import list_children
from server import wait_for
from service import run_service

pytestmark = pytest.mark.slow

COSTLY = jpegs.with_scans(60, 5000)


def form(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{number}.jpg", image)) for number, image in enumerate(images)]


def photo() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (500, 375), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


def client_at(address: str, base_url: httpx.URL) -> httpx.Client:
    return httpx.Client(base_url=base_url, timeout=60, transport=httpx.HTTPTransport(local_address=address))


def test_a_costly_image_gets_the_answer_of_its_pixels(tmp_path: Path, models: Path) -> None:
    with run_service(models, tmp_path / "runs", tmp_path / "log") as (client, _):
        # Scans without data leave every coefficient at zero, so the image decodes to the same gray.
        gray = io.BytesIO()
        Image.new("RGB", (64, 64), (128, 128, 128)).save(gray, "PNG")
        answers = [client.post("/predict", files=form(image)).json() for image in (COSTLY, gray.getvalue())]
        assert answers[0]["predictions"][0]["classes"] == answers[1]["predictions"][0]["classes"]


@pytest.mark.parametrize("parts", [1, 32])
def test_one_address_with_costly_images_does_not_keep_others_from_being_served(
    tmp_path: Path, models: Path, parts: int
) -> None:
    stop, statuses = threading.Event(), list[int]()

    def attack(base_url: httpx.URL) -> None:
        with client_at("127.0.0.2", base_url) as attacker:
            while not stop.is_set():
                statuses.append(attacker.post("/predict", files=form(*[COSTLY] * parts)).status_code)

    with run_service(models, tmp_path / "runs", tmp_path / "log", max_queue="64") as (client, _):
        attackers = [threading.Thread(target=attack, args=(client.base_url,)) for _ in range(9)]
        for attacker in attackers:
            attacker.start()
        wait_for(lambda: statuses, 60)
        answers = [client.post("/predict", files=form(photo())).status_code for _ in range(30)]
        stop.set()
        for attacker in attackers:
            attacker.join()
    assert answers == [200] * 30
    assert statuses


def test_a_costly_image_takes_more_of_the_rate_limit(tmp_path: Path, models: Path) -> None:
    with run_service(models, tmp_path / "runs", tmp_path / "log", predict_rate_limit="20/hour") as (client, _):
        assert client.post("/predict", files=form(photo())).status_code == 200
        refused = client.post("/predict", files=form(COSTLY))
        assert refused.status_code == 429
        assert "Retry-After" in refused.headers
        assert client.post("/predict", files=form(photo())).status_code == 200


def test_the_decoder_ends_with_the_server_however_it_ends(tmp_path: Path, models: Path) -> None:
    def is_alive(process: int) -> bool:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        return True

    with run_service(models, tmp_path / "runs", tmp_path / "log") as (client, server):
        assert client.post("/predict", files=form(COSTLY)).status_code == 200
        (decoder,) = list_children(server.pid)
        server.kill()
        server.wait()
        wait_for(lambda: not is_alive(decoder), 30)
