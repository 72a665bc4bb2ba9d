"""A plain FastAPI server without batching: each request is one call of the model.

Requests per second on two cores with 32 connections (TorchScript, OpenVINO) by `CLASSIFIER_WORKERS`: two processes with
one thread 300, 332; one process with two threads 107, 572. Running the model in a thread pool instead of the event loop
gained nothing.
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
    os.execv(sys.executable, command)  # noqa: S606  the same interpreter
