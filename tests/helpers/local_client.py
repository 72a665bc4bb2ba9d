"""Create an in-process test client that calls the service from its own machine, 127.0.0.1."""

from typing import cast

from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.dependencies import Services


def make_local_client(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))


def services_of(client: TestClient) -> Services:
    """Return the objects of the service behind a client."""
    return cast(Services, client.app.state.services)  # type: ignore[attr-defined]
