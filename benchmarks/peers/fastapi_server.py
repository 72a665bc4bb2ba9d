"""Plain FastAPI as everyone writes it: one request, one call of the model, no batching.

Tried on two cores, requests a second with 32 connections (TorchScript, OpenVINO): two processes of one thread 401, 591;
one process of two threads 120, 1171. The model in a thread pool instead of the event loop gained nothing.
"""

import uvicorn
from classifier import PORT, WORKERS, Answer, Classifier, decode
from fastapi import FastAPI, Request

app = FastAPI()
classifier = Classifier()


@app.post("/predict")
async def predict(request: Request) -> Answer:
    return classifier([decode(await request.body())])[0]


if __name__ == "__main__":
    uvicorn.run("fastapi_server:app", port=PORT, workers=WORKERS, log_level="warning", access_log=False)
