"""Create an in-process test client that calls the service from its own machine, 127.0.0.1."""

from fastapi import FastAPI
from fastapi.testclient import TestClient


def make_local_client(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
