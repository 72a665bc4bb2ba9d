"""A client of the service in process, on the service's own machine."""

from fastapi import FastAPI
from fastapi.testclient import TestClient


def local(app: FastAPI) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000))
