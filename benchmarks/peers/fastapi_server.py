"""Plain FastAPI as everyone writes it: one request, one call of the model, no batching.

Tried on two cores, requests a second with 32 connections (TorchScript, OpenVINO; `CLASSIFIER_WORKERS`): two processes
of one thread 300, 332; one process of two threads 107, 572. The model in a thread pool instead of the event loop gained
nothing.
"""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from classifier import PORT, WORKERS, Answer, Classifier, decode
from fastapi import FastAPI, Request


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.classifier = Classifier()
    yield


app = FastAPI(lifespan=lifespan)


@app.post("/predict")
async def predict(request: Request) -> Answer:
    return app.state.classifier([decode(await request.body())])[0]


if __name__ == "__main__":
    file = Path(__file__)
    command = [sys.executable, "-m", "uvicorn", f"{file.stem}:app", "--app-dir", str(file.parent)]
    command += ["--port", str(PORT), "--workers", str(WORKERS), "--log-level", "warning", "--no-access-log"]
    os.execv(sys.executable, command)  # noqa: S606  this very interpreter
