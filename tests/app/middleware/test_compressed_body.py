"""Test that compressed request bodies are decoded within all limits, and that other codings are refused by name."""

import asyncio
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api import MULTIPART, assert_problem, make_file_part, make_form, make_zip
from fastapi import FastAPI
from fastapi.testclient import TestClient
from local_client import make_local_client

from app.exceptions import MalformedBody, TooLarge
from app.main import create_app
from app.middleware.compressed_body import PIECE, Coding, CompressedBody
from app.settings import Settings

PNG = {"Content-Type": "image/png"}
GZIP = {"Content-Encoding": "gzip"}
LIMIT = 3 << 20


@pytest.fixture(scope="module")
def client(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = Settings(
        models=published_store,
        runs=tmp_path_factory.mktemp("runs"),
        data="synthetic:4",
        max_predict_bytes=LIMIT,
        max_pending_bytes=2 * LIMIT,
    )
    with make_local_client(create_app(settings)) as client:
        yield client


def decode(encoded: bytes, size: int = 1 << 16, coding: Coding = "gzip") -> list[bytes]:
    """Decode a body that arrives in parts of `size` bytes. Return the pieces."""
    parts = [encoded[at : at + size] for at in range(0, len(encoded), size)]
    messages = iter([{"type": "http.request", "body": part, "more_body": True} for part in parts] + [END])

    async def receive() -> Any:
        return next(messages)

    async def run() -> list[bytes]:
        body, pieces = CompressedBody(receive, coding), list[bytes]()
        while True:
            message = await body.receive()
            pieces.append(message["body"])
            if not message["more_body"]:
                return pieces

    return asyncio.run(run())


END = {"type": "http.request", "body": b"", "more_body": False}
CONTENTS = {
    "empty": b"",
    "one byte": b"a",
    "random": os.urandom(100_000),
    "zeros": bytes(300_000),
    "a piece": bytes(PIECE),
    "two pieces": os.urandom(2 * PIECE),
    "a piece and a byte": bytes(PIECE + 1),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
@pytest.mark.parametrize("size", [1, 7, 1000, 1 << 20])
def test_body_is_decoded_in_small_pieces_however_it_arrives(content: bytes, size: int) -> None:
    encoded = gzip.compress(content)
    if size == 1 and len(encoded) > 1000:
        encoded = gzip.compress(content := content[:1000])
    pieces = decode(encoded, size)
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= PIECE


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_deflate_body_is_decoded_and_has_one_end(content: bytes) -> None:
    encoded = zlib.compress(content)
    pieces = decode(encoded, 1000, "deflate")
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= PIECE
    for damaged, words in (
        (encoded[:-1], "the deflate body ends before"),
        (encoded + b"a", "bytes follow the end of the deflate body"),
        (gzip.compress(content), "is not deflate"),
    ):
        with pytest.raises(MalformedBody, match=words):
            decode(damaged, coding="deflate")


def test_body_of_several_members_is_decoded() -> None:
    assert b"".join(decode(gzip.compress(b"one") + gzip.compress(b"") + gzip.compress(b"two"))) == b"onetwo"
    with pytest.raises(MalformedBody, match="more than 100 members"):
        decode(gzip.compress(b"") * 101)


def test_body_that_is_cut_off_anywhere_says_so() -> None:
    encoded = gzip.compress(b"a gzip body" * 10)
    for length in range(len(encoded)):
        with pytest.raises(MalformedBody, match="ends before its end marker"):
            decode(encoded[:length])


def test_damaged_body_says_so() -> None:
    encoded = gzip.compress(content := os.urandom(200), mtime=0)
    refusals = 0
    for at in range(len(encoded)):
        try:
            decoded = b"".join(decode(encoded[:at] + bytes([encoded[at] ^ 0xFF]) + encoded[at + 1 :]))
        except MalformedBody:
            refusals += 1
        else:
            assert decoded == content  # the byte does not matter, such as one of the time
    assert refusals > len(encoded) - 10
    for encoded in (content, zlib.compress(content), gzip.compress(content) + b"more"):
        with pytest.raises(MalformedBody, match="is not gzip, as its Content-Encoding says"):
            decode(encoded)


def test_bomb_ends_early() -> None:
    with pytest.raises(TooLarge, match="more than 100 times its size"):
        decode(gzip.compress(bytes(64 << 20)), size=1000)
    encoded = gzip.compress(bytes(1 << 20))  # the first MiB may have any ratio
    assert len(encoded) < 2000
    assert len(b"".join(decode(encoded))) == 1 << 20


def test_every_body_may_be_gzip(client: TestClient, image: bytes) -> None:
    plain = client.post("/predict", content=image, headers=PNG).json()["predictions"][0]["classes"]
    for coding in ("gzip", "x-gzip", "GZIP", " gzip ", "identity, gzip"):
        answer = client.post("/predict", content=gzip.compress(image), headers=PNG | {"Content-Encoding": coding})
        assert answer.json()["predictions"][0]["classes"] == plain, coding
    for coding in ("identity", "Identity", ""):
        answer = client.post("/predict", content=image, headers=PNG | {"Content-Encoding": coding})
        assert answer.json()["predictions"][0]["classes"] == plain, coding
    deflated = client.post("/predict", content=zlib.compress(image), headers=PNG | {"Content-Encoding": "deflate"})
    assert deflated.json()["predictions"][0]["classes"] == plain
    encoded = gzip.compress(image)
    chunked = client.post("/predict", content=iter([encoded[:100], encoded[100:]]), headers=PNG | GZIP)
    assert chunked.json()["predictions"][0]["classes"] == plain
    upload = gzip.compress(make_form(make_file_part(image), make_file_part(b"5", b"name=top_k")))
    assert (
        client.post("/predict", content=upload, headers=MULTIPART | GZIP).json()["predictions"][0]["classes"] == plain
    )
    archive = gzip.compress(make_form(make_file_part(make_zip({"red_disc/1.png": image}))))
    assert client.post("/evaluate", content=archive, headers=MULTIPART | GZIP).json()["result"]["images"] == 1
    request = gzip.compress(json.dumps({"recipe": "vgg"}).encode())
    refused = client.post("/train", content=request, headers={"Content-Type": "application/json"} | GZIP)
    assert_problem(refused, 422, "choose one of")


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "utf-8", "gzip, gzip", "deflate, gzip"])
def test_other_codings_are_refused_by_name(client: TestClient, image: bytes, coding: str) -> None:
    refused = client.post("/predict", content=image, headers=PNG | {"Content-Encoding": coding})
    assert_problem(refused, 415, f"the Content-Encoding {coding!r} is not supported; send gzip, deflate, or no coding")
    assert refused.headers["Accept-Encoding"] == "gzip, deflate, identity"


def test_coding_of_a_request_without_a_body_does_not_matter(client: TestClient) -> None:
    assert client.get("/health", headers={"Content-Encoding": "br"}).status_code == 200


def test_body_that_is_not_gzip_is_400(client: TestClient, image: bytes) -> None:
    for content, words in ((image, "is not gzip"), (gzip.compress(image)[:-9], "ends before its end marker")):
        assert_problem(client.post("/predict", content=content, headers=PNG | GZIP), 400, words)
        assert_problem(client.post("/train", content=content, headers=GZIP), 400, words)


def test_limits_count_decoded_bytes(client: TestClient, image: bytes) -> None:
    def send(path: str, content: bytes) -> Any:
        return client.post(path, content=gzip.compress(content, 1), headers=PNG | GZIP)

    assert_problem(
        send("/predict", os.urandom(1000) * (LIMIT // 1000 + 100)), 413, f"larger than {LIMIT + 65536:,} bytes"
    )
    assert_problem(send("/predict", bytes(LIMIT + (1 << 20))), 413, "")
    assert_problem(send("/train", bytes((1 << 20) + 1)), 413, "larger than 1,048,576 bytes")
    assert_problem(send("/predict", bytes(1 << 20)), 415, "not a supported image")


def test_pending_bytes_count_decoded_bytes(client: TestClient) -> None:
    app: Any = client.app
    while not hasattr(app, "pending"):
        app = app.middleware_stack if isinstance(app, FastAPI) else app.app
    encoded = gzip.compress(os.urandom(1 << 20))
    app.pending.add("another network", 2 * LIMIT - (1 << 19))
    try:
        refused = client.post("/predict", content=encoded, headers=PNG | GZIP)
        assert_problem(refused, 503, "too much data is being sent")
    finally:
        app.pending.remove("another network", 2 * LIMIT - (1 << 19))
    assert app.pending.total == 0
