"""Test a cascade in the service: answers, default, promotion, evaluation, health, metrics and deletion."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api import assert_problem
from cascades import add_cascade, add_second_member, copy_version
from fastapi.testclient import TestClient
from local_client import make_local_client, services_of

from app.inference.load_shedding import LoadShedder
from app.local import load
from app.main import create_app
from app.settings import Settings
from training.store import FamiliarityThreshold, LocalStore


@pytest.fixture
def store(models: Path) -> LocalStore:
    """A store in which resnet/1, its copy resnet18/1 and a cascade of both are live."""
    store = LocalStore(models)
    add_second_member(store)
    add_cascade(store)
    return store


@pytest.fixture
def client(store: LocalStore, tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(models=store.root, runs=tmp_path / "runs", data="synthetic:4", deadline_s=600)
    with make_local_client(create_app(settings)) as client:
        yield client


def ask(client: TestClient, image: bytes, **params: Any) -> Any:
    return client.post("/predict", files={"file": image}, params=params).json()


def metric(client: TestClient, name: str) -> float:
    (line,) = (line for line in client.get("/metrics").text.splitlines() if line.startswith(name))
    return float(line.split()[-1])


def test_a_live_cascade_is_the_default_and_sends_unsure_images_on(client: TestClient, image: bytes) -> None:
    answer, alone = ask(client, image), ask(client, image, model="resnet")
    assert (answer["model"], answer["version"]) == ("cascade", 1)
    (mean,), (first,) = answer["predictions"], alone["predictions"]
    assert mean["classes"][0]["label"] == first["classes"][0]["label"]
    assert mean["classes"][0]["probability"] < first["classes"][0]["probability"]  # at temperature 2


def test_a_cascade_answers_alike_without_a_server(store: LocalStore, tmp_path: Path, image: bytes) -> None:
    familiarity = FamiliarityThreshold(threshold=-1000.0, kept=0.95, images=100)
    store.amend(store.card("cascade", 1).model_copy(update={"familiarity": familiarity}))
    with make_local_client(create_app(Settings(models=store.root, runs=tmp_path / "runs"))) as client:
        (expected,) = ask(client, image)["predictions"]
    prediction = load("cascade", str(store.root), runtime="torchscript").predict(image)  # the service has this one too
    assert prediction.familiar
    assert prediction.familiarity == pytest.approx(expected["familiarity"], abs=1e-4)
    assert [each.label for each in prediction.classes] == [each["label"] for each in expected["classes"]]
    assert prediction.classes[0].probability == pytest.approx(expected["classes"][0]["probability"], abs=1e-5)


def test_full_familiarity_has_a_threshold_of_its_own_and_needs_a_cascade(
    store: LocalStore, tmp_path: Path, image: bytes
) -> None:
    thresholds = {
        field: FamiliarityThreshold(threshold=threshold, kept=0.95, images=100)
        for field, threshold in (("familiarity", -1000.0), ("full_familiarity", 1000.0))
    }
    store.amend(store.card("cascade", 1).model_copy(update=thresholds))
    with make_local_client(create_app(Settings(models=store.root, runs=tmp_path / "runs"))) as client:
        (fast,), (full,) = (ask(client, image, familiarity=kind)["predictions"] for kind in ("fast", "full"))
        assert (fast["familiar"], full["familiar"]) == (True, False)
        assert fast["classes"] == full["classes"]
        assert fast["familiarity"] == full["familiarity"]  # both members are the same network
        asked = {"model": "resnet", "familiarity": "full"}
        for refused in (
            client.post("/predict", params=asked, files={"file": image}),
            client.post("/predict", data=asked, files={"file": image}),
        ):
            assert_problem(refused, 422, "resnet is no cascade; leave familiarity out, or name a cascade")


def test_a_configured_default_precedes_the_cascade(store: LocalStore, tmp_path: Path, image: bytes) -> None:
    settings = Settings(models=store.root, runs=tmp_path / "runs", default_model="resnet")
    with make_local_client(create_app(settings)) as client:
        assert ask(client, image)["model"] == "resnet"


def test_promotion_and_rollback(client: TestClient, store: LocalStore, image: bytes) -> None:
    add_cascade(store, threshold=0.0)
    store.promote("cascade", 1)
    for version in (2, 1):
        assert client.put("/models/cascade/live", json={"version": version}).json()["live"] == version
        answer, alone = ask(client, image), ask(client, image, model="resnet")
        assert answer["version"] == version
        assert (answer["predictions"] == alone["predictions"]) == (version == 2)  # version 2 sends nothing on


def test_cards_health_and_metrics_describe_the_cascade(client: TestClient, image: bytes) -> None:
    health = client.get("/health").json()
    assert health["models"]["cascade"] | {"engine": None} == {
        "version": 1,
        "engine": None,
        "test_top1": health["models"]["resnet"]["test_top1"],
        "queued_images": 0,
        "members": ["resnet/1", "resnet18/1"],
    }
    assert health["models"]["resnet"]["members"] == []
    assert client.get("/models/cascade").json()["versions"] == [1]
    assert [each["recipe"] for each in client.get("/evaluate").json()] == ["cascade", "resnet", "resnet"]
    ask(client, image)
    ask(client, image, model="resnet")
    assert metric(client, 'cifar100_cascade_images_total{model="cascade"}') == 1
    assert metric(client, 'cifar100_sent_on_images_total{model="cascade"}') == 1
    assert metric(client, 'cifar100_batch_images_sum{model="resnet"}') == 2
    assert metric(client, 'cifar100_batch_images_sum{model="resnet18"}') == 1
    assert metric(client, 'cifar100_live_version{model="cascade"}') == 1


def test_evaluation_measures_the_cascade(client: TestClient) -> None:
    measured = client.post("/evaluate", params={"model": "cascade"}).json()
    assert (measured["state"], measured["model"]) == ("succeeded", "cascade")
    assert measured["engine"] == "torchscript-cpu + torchscript-cpu"
    assert measured["result"]["top1"] == client.get("/models/resnet/1").json()["test"]["top1"]
    assert metric(client, 'cifar100_sent_on_images_total{model="cascade"}') == measured["result"]["images"]


def test_members_are_loaded_once_and_stay_when_another_version_is_promoted(
    client: TestClient, store: LocalStore, image: bytes
) -> None:
    pool = services_of(client).pool
    cascade, member = pool.live()["cascade"], pool.live()["resnet"]
    assert cascade.members == (member, pool.live()["resnet18"])
    before = ask(client, image)["predictions"]
    copy_version(store, "resnet", "resnet")
    assert client.put("/models/resnet/live", json={"version": 2}).json()["live"] == 2
    assert pool.live()["cascade"] is cascade
    assert ask(client, image)["predictions"] == before
    assert client.get("/health").json()["models"]["cascade"]["members"] == ["resnet/1", "resnet18/1"]
    assert ask(client, image, model="resnet", version=1)["version"] == 1
    assert cascade.members[0] is member
    assert client.portal is not None
    assert client.portal.call(pool.get, "resnet", 1) is member
    assert client.put("/models/resnet/live", json={"version": 1}).json()["live"] == 1
    assert pool.live()["resnet"] is member


def test_a_pinned_version_is_not_deleted(client: TestClient, store: LocalStore) -> None:
    copy_version(store, "resnet", "resnet")
    assert client.put("/models/resnet/live", json={"version": 2}).status_code == 200
    assert_problem(client.delete("/models/resnet/1"), 409, "cascade/1 pins resnet/1; delete cascade/1 first")
    assert_problem(client.delete("/models/resnet/2"), 409, "resnet/2 is live")
    assert_problem(client.delete("/models/resnet/7"), 404, "no version 7 of resnet")
    assert_problem(client.delete("/models/vgg/1"), 404, "no version 1 of vgg")
    add_cascade(store)
    assert_problem(client.delete("/models/cascade/2"), 409, "cascade/2 is live")
    assert client.delete("/models/cascade/1").json()["versions"] == [2]
    assert client.delete("/models/resnet/1").json()["versions"] == [2]


def test_a_version_that_a_waiting_job_needs_is_not_deleted(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services_of(client).training_jobs, "required_versions", lambda _: {1})
    assert_problem(client.delete("/models/resnet/1"), 409, "a waiting training job needs resnet/1")


def test_a_cascade_that_has_lost_a_member_is_reported_and_served_from_memory(
    client: TestClient, store: LocalStore, image: bytes
) -> None:
    (store.folder("resnet18", 1) / "model.pt").unlink()
    assert client.portal is not None
    client.portal.call(services_of(client).pool.refresh)
    assert "model.pt is missing" in client.get("/health").json()["errors"]["cascade"]
    assert ask(client, image)["model"] == "cascade"


def test_images_that_wait_for_the_second_member_shed_load(client: TestClient) -> None:
    services = services_of(client)
    batcher = services.pool.live()["resnet18"].batcher
    assert services.pool.live()["cascade"].batcher.queued == 0
    batcher.queued = batcher.max_queue  # type: ignore[misc]  # the batcher of a member has no property
    shed = LoadShedder(services.pool, services.decoders, True, lambda *_: None).should_shed
    assert shed(b"/predict?model=cascade", "127.0.0.1")
    assert shed(b"/predict", "127.0.0.1")
