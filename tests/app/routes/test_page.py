"""Test the pages: the files of Swagger UI are unchanged, and no page loads anything from another host."""

import hashlib
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.errors import MEANINGS
from app.main import create_app
from app.routes.page import STATIC
from app.settings import Settings

SWAGGER = STATIC / "swagger-ui"


def test_files_of_swagger_ui_are_those_of_its_release() -> None:
    for line in (SWAGGER / "SHA256SUMS").read_text().splitlines():
        checksum, name = line.split()
        assert hashlib.sha256((SWAGGER / name).read_bytes()).hexdigest() == checksum, name
    for name in ("LICENSE", "NOTICE"):
        assert (SWAGGER / name).read_text()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    folder: Path = tmp_path_factory.mktemp("empty")
    return TestClient(create_app(Settings(models=folder, runs=folder)))


@pytest.mark.parametrize("path", ["/", "/docs", "/errors"])
def test_pages_load_nothing_from_other_hosts(path: str, client: TestClient) -> None:
    links = re.findall('(?:href|src)="([^"]+)"', client.get(path).text)
    assert links
    assert all(link.startswith(("./", "#")) for link in links)


def test_the_page_of_errors_has_a_section_for_every_status(client: TestClient) -> None:
    page = client.get("/errors").text
    assert re.findall(r'<section id="(\d+)">', page) == [str(status) for status in MEANINGS]
    problem = client.get("/nowhere").json()
    assert problem["type"] == "/errors#404"
    assert problem["detail"] == "there is no path '/nowhere'; GET /docs describes all calls"
    assert client.post("/metrics").json()["detail"] == "POST is not supported here; use GET"
