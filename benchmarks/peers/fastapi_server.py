"""Plain FastAPI as everyone writes it: one request, one call of the model, one process per core, no batching."""

import uvicorn
from classifier import CORES, PORT, Answer, Classifier, decode
from fastapi import FastAPI, Request

app = FastAPI()
classifier = Classifier(threads=1)


@app.post("/predict")
async def predict(request: Request) -> Answer:
    return classifier([decode(await request.body())])[0]


if __name__ == "__main__":
    uvicorn.run("fastapi_server:app", port=PORT, workers=CORES, log_level="warning", access_log=False)
