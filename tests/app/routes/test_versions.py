"""Test the download of versions, and the upload to another service: its check and its refusals."""

import io
import stat
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from api import assert_problem, make_zip
from cascades import add_cascade, add_second_member, copy_version
from fastapi.testclient import TestClient
from local_client import make_local_client, services_of

from app.inference.check_process import CheckResult
from app.main import create_app
from app.settings import Settings
from training.store import CARD, CASCADE, MODEL, Cascade, CascadeReport, LocalStore, ModelCard, PinnedMember

KEY = "a-secret-of-the-tests"
REPORT = CascadeReport(members=["resnet/1", "resnet18/1"], engines=[], images=1, sent_on=0, test_sent_on=0)
CHECKED = CheckResult(engine="none", images=0, top1=None)

Files = dict[str, bytes]
Change = Callable[[Files], None]


def serve(models: Path, runs: Path, **settings: Any) -> TestClient:
    """Return a client of a service that accepts uploads. It sends a key."""
    chosen: dict[str, Any] = {"api_keys": KEY, "allow_uploads": True, "data": "synthetic:4"} | settings
    client = make_local_client(create_app(Settings(models=models, runs=runs, **chosen)))
    if chosen["api_keys"]:
        client.headers["Authorization"] = f"Bearer {KEY}"
    return client


@pytest.fixture(scope="module")
def client(published_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of a service with a shared store. It refuses more than 2 MB, and has no check that could accept it."""
    folder = tmp_path_factory.mktemp("service")
    with serve(published_store, folder, max_archive_bytes=2_000_000, operator_rate_limit="") as client:
        services_of(client).uploads._process.run = None  # type: ignore[method-assign, assignment]
        yield client


@pytest.fixture
def files(published_store: Path) -> Files:
    """The files of resnet/1 by name."""
    return {path.name: path.read_bytes() for path in (published_store / "resnet" / "1").iterdir()}


def upload(client: TestClient, content: bytes, name: str = "resnet", **params: str) -> httpx.Response:
    answer: httpx.Response = client.post(f"/models/{name}", files={"file": content}, params=params)
    return answer


def snapshot(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_file_is_downloaded_whole_in_ranges_and_only_if_it_has_changed(client: TestClient, files: Files) -> None:
    url, content = "/models/resnet/1/files/model.pt", files[MODEL]
    whole = client.get(url)
    assert whole.content == content
    assert whole.headers["content-length"] == str(len(content))
    etag = f'"{sha256(content).hexdigest()}"'
    assert whole.headers["etag"] == etag
    assert client.head(url).headers["content-length"] == str(len(content))
    assert client.get(url, headers={"If-None-Match": etag}).status_code == 304
    for asked, part in (("5-9", content[5:10]), (f"{len(content) - 3}-", content[-3:]), ("-4", content[-4:])):
        ranged = client.get(url, headers={"Range": f"bytes={asked}", "If-Range": etag})
        assert (ranged.status_code, ranged.content) == (206, part)
    for headers in ({"Range": "bytes=5-9", "If-Range": '"other"'}, {"Range": "bytes=9-5"}, {"Range": "lines=1-2"}):
        assert client.get(url, headers=headers).content == content
    behind = client.get(url, headers={"Range": f"bytes={len(content)}-"})
    assert_problem(behind, 416, f"{len(content):,} bytes")
    assert behind.headers["content-range"] == f"bytes */{len(content)}"
    assert client.get("/models/resnet/1/files/card.json").content == files[CARD]


def test_only_the_files_of_a_version_are_downloaded(client: TestClient) -> None:
    for path in ("1/files/live", "1/files/..%2Flive", "1/files/%2Fetc%2Fpasswd", "9/files/model.pt", "9/zip"):
        assert client.get(f"/models/resnet/{path}").status_code == 404
    assert_problem(client.get("/models/resnet/1/files/int8.xml"), 404, "it has: card.json, model.pt")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_version_moves_to_another_service_and_computes_the_same(
    client: TestClient, tmp_path: Path, image: bytes
) -> None:
    archive = client.get("/models/resnet/1/zip").content
    assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None
    with serve(tmp_path / "models", tmp_path / "runs") as other:
        first = upload(other, archive)
        assert first.status_code == 201, first.text
        assert first.headers["location"] == "/models/resnet/1"
        answer = first.json()
        assert (answer["name"], answer["version"], answer["live"]) == ("resnet", 1, False)
        card = client.get("/models/resnet/1").json()
        measured = answer["check"]
        assert (measured["engine"], measured["images"]) == ("torchscript-cpu", 100)
        assert measured["top1"] == pytest.approx(card["test"]["top1"])
        assert other.get("/models/resnet/1").json() == card
        assert_problem(other.post("/predict", files={"file": image}), 503, "")
        again = upload(other, archive, promote="if-better")
        assert (again.status_code, again.json()) == (200, {"name": "resnet", "version": 1, "live": True, "check": None})
        predictions = [each.post("/predict", files={"file": image}).json()["predictions"] for each in (client, other)]
        assert predictions[0] == predictions[1]


def drop(*names: str) -> Change:
    def change(files: Files) -> None:
        for name in names:
            del files[name]

    return change


def add(name: str, content: bytes = b"x") -> Change:
    return lambda files: files.update({name: content})


def set_card(**fields: Any) -> Change:
    def change(files: Files) -> None:
        files[CARD] = ModelCard.model_validate_json(files[CARD]).model_copy(update=fields).model_dump_json().encode()

    return change


def be_cascade(files: Files) -> None:
    member = PinnedMember(name="resnet", version=1, files={MODEL: "0" * 64})
    cascade = Cascade(members=(member, member), threshold=0.5, weights=(0.5, 0.5), temperature=1)
    del files[MODEL]
    files[CASCADE] = cascade.model_dump_json().encode()
    set_card(files={CASCADE: sha256(files[CASCADE]).hexdigest()}, cascade=REPORT)(files)


REFUSALS: dict[str, tuple[Change, int, str]] = {
    "a path": (add("../card.json"), 422, "'../card.json' is no file of a version"),
    "an absolute path": (add("/models/model.pt"), 422, "'/models/model.pt' is no file"),
    "a folder": (add("4/"), 422, "'4/' is no file"),
    "another file": (add("run.py"), 422, "'run.py' is no file of a version; a zip may have card.json, model.pt"),
    "many files": (lambda files: files.update({f"{each}": b"" for each in range(10_000)}), 413, "10,000 entries"),
    "a bomb": (add("int8.bin", bytes(2_000_001)), 413, "unpacks to more than 2,000,000 bytes"),
    "no card": (drop(CARD), 422, "the zip has no card.json"),
    "a large card": (add(CARD, bytes((1 << 20) + 1)), 413, "card.json is larger than"),
    "a damaged card": (add(CARD, b'{"name": 1}'), 422, "card.json is invalid: name: "),
    "no model": (drop(MODEL), 422, "the zip lacks 'model.pt'"),
    "another model": (add(MODEL), 422, "model.pt is damaged: its sha256 differs"),
    "a file too many": (add("int8.bin"), 422, "card.json does not list int8.bin"),
    "a card without files": (lambda files: (drop(MODEL)(files), set_card(files={})(files))[0], 422, "a version has"),
    "another name": (set_card(name="vgg"), 422, "the card is that of 'vgg'"),
    "other classes": (set_card(classes=[str(each) for each in range(100)]), 422, "other classes than the live models"),
    "a cascade without members": (be_cascade, 422, "upload resnet/1 first"),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_refused_upload_leaves_nothing_behind(
    fault: str,
    client: TestClient,
    files: Files,
    published_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change, status, words = REFUSALS[fault]
    change(files)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = snapshot(published_store)
    assert_problem(upload(client, make_zip(files, zipfile.ZIP_DEFLATED)), status, words)
    assert snapshot(published_store) == before
    assert snapshot(tmp_path) == []


def test_links_and_doubled_files_and_other_bodies_are_refused(client: TestClient, files: Files) -> None:
    link = zipfile.ZipInfo(MODEL)
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for entry, words in ((link, "'model.pt' is no file of a version"), (zipfile.ZipInfo(CARD), "twice")):
        buffer = io.BytesIO(make_zip({CARD: files[CARD]}))
        with zipfile.ZipFile(buffer, "a") as archive, pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # zipfile warns of a name that it has already
            archive.writestr(entry, b"/etc/passwd")
        assert_problem(upload(client, buffer.getvalue()), 422, words)
    assert_problem(upload(client, b"no zip"), 422, "the zip cannot be read")
    assert_problem(client.post("/models/resnet", content=b"x"), 415, "curl -F file=@")
    assert_problem(upload(client, make_zip(files), promote="yes"), 422, "promote")
    assert_problem(upload(client, make_zip(files), name="Other"), 422, "the card is that of 'resnet'")
    assert_problem(client.put("/models/resnet/live", content=bytes(2 << 20)), 413, "larger than 1,048,576 bytes")


def test_uploads_are_off_by_default_and_always_need_a_key(client: TestClient, models: Path, tmp_path: Path) -> None:
    content = make_zip({})
    stranger = make_local_client(client.app)  # type: ignore[arg-type]
    assert_problem(upload(stranger, content), 401, "API key")
    for keys in ("", KEY):
        with serve(models, tmp_path / "runs", api_keys=keys, allow_uploads=False) as service:
            assert_problem(upload(service, content), 403, "uploads are off")
            assert_problem(upload(service, bytes(2 << 20)), 413, "larger than 1,048,576 bytes")


def test_a_cascade_pins_the_versions_that_have_the_files_of_its_members(models: Path, tmp_path: Path) -> None:
    store = LocalStore(models)
    add_second_member(store)
    card = add_cascade(store)
    store.amend(card.model_copy(update={"cascade": REPORT}))
    copy_version(store, "resnet", "resnet")
    with serve(models, tmp_path / "runs") as client:
        services_of(client).uploads._process.run = lambda *_: CHECKED  # type: ignore[method-assign]
        answer = upload(client, client.get("/models/cascade/1/zip").content, "cascade", promote="always")
        assert answer.json() == {"name": "cascade", "version": 2, "live": True, "check": CHECKED.model_dump()}
        assert client.get("/health").json()["models"]["cascade"]["members"] == ["resnet/2", "resnet18/1"]
    uploaded = store.card("cascade", 2)
    assert uploaded.cascade
    assert uploaded.cascade.members == ["resnet/2", "resnet18/1"]


def test_a_second_upload_is_refused_while_one_is_checked(client: TestClient, files: Files) -> None:
    busy = services_of(client).uploads._busy
    with busy:
        assert_problem(upload(client, make_zip(files)), 503, "another upload is being checked")
    assert upload(client, make_zip(files)).status_code == 200
