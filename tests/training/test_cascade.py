"""Test the fit of a cascade on predictions with a known optimum, its publication, and its members in a store."""

from pathlib import Path

import pytest
import torch
from cascades import MEMBERS, add_cascade, add_second_member, copy_version, make_cascade
from torch import Tensor

from training import cascade
from training.cascade import fit, publish, refit
from training.dataset import Dataset, hold_out, load_dataset
from training.run import Publication
from training.runtimes import selection
from training.runtimes.cascade import CascadeEngine, mix
from training.runtimes.engine import example_images
from training.store import CASCADE, MODEL, LocalStore, StoreError, VersionInUse


@pytest.fixture
def store(models: Path) -> LocalStore:
    """A store in which resnet/1 and resnet18/1 are live. They have held out the same 100 images."""
    store = LocalStore(models)
    add_second_member(store)
    return store


def random_logits(count: int, classes: int, seed: int) -> Tensor:
    return 2 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def certain(classes: list[int], probability: float) -> Tensor:
    """Return logits over 4 classes that give each of these classes a probability."""
    rest = (1 - probability) / 3
    return torch.full((len(classes), 4), rest).scatter(1, torch.tensor(classes)[:, None], probability).log()


def test_fit_finds_the_weights_and_the_temperature_that_drew_the_labels() -> None:
    first, second = (random_logits(20_000, 10, seed) for seed in (1, 2))
    drawn_from = torch.from_numpy(mix(first.numpy(), second.numpy(), (0.3, 0.7), temperature=0.8)).softmax(1)
    labels = torch.multinomial(drawn_from, 1, generator=torch.Generator().manual_seed(3))[:, 0]
    fitted = fit(first, second, labels)
    assert fitted.weights == (0.3, 0.7)
    assert fitted.temperature == pytest.approx(0.8, abs=0.02)


def test_fit_sends_on_as_few_images_as_the_tolerance_allows() -> None:
    # The members agree on the first 60 images. On the others the second one is sure of another class.
    agreed, contested = [0] * 60, [0] * 40
    first = torch.cat([certain(agreed, 0.9), certain(contested, 0.6)])
    second = torch.cat([certain(agreed, 0.9), certain([1] * 40, 0.99)])
    labels = torch.tensor([0] * 54 + [2] * 6 + [1] * 40)
    strict, lax, laxest = (fit(first, second, labels, tolerance) for tolerance in (0.0, 0.1, 1.0))
    assert strict.sent_on == 0.4
    assert 0.6 < strict.threshold < 0.9
    assert 0 < lax.sent_on < 0.4
    assert laxest.sent_on == 0
    assert laxest.threshold == pytest.approx(0.3)


def test_members_that_always_agree_send_nothing_on() -> None:
    first = random_logits(200, 5, seed=1)
    assert fit(first, first, first.argmax(1), tolerance=0.0).sent_on == 0


def test_only_images_without_a_confident_answer_get_the_mean_of_both_members(store: LocalStore) -> None:
    engine = selection.load(store.folder("resnet", 1) / MODEL, "cpu", "torchscript", "evaluation")
    images = example_images(8).numpy()
    alone = torch.from_numpy(engine(images))
    confidence = alone.softmax(1).amax(1)
    threshold = confidence.sort().values[3:5].mean().item()
    answers = torch.from_numpy(CascadeEngine(make_cascade(store, threshold=threshold), engine, engine)(images))
    sent_on = confidence < threshold
    assert sent_on.sum() == 4
    assert answers[~sent_on].equal(alone[~sent_on])
    torch.testing.assert_close(answers[sent_on].softmax(1), (alone[sent_on] / 2).softmax(1))  # at temperature 2


def test_publish_describes_the_fit_and_pins_both_members(store: LocalStore, dataset: Dataset) -> None:
    published = publish(store, dataset, MEMBERS, notes="a try")
    card = store.card("cascade", 1)
    assert published.live
    assert (published.model, published.version, published.test) == ("cascade", 1, card.test)
    assert store.verify(card) == store.folder("cascade", 1)
    assert [path.name for path in sorted(store.folder("cascade", 1).iterdir())] == ["card.json", CASCADE]
    assert card.cascade is not None
    assert card.cascade.members == ["resnet/1", "resnet18/1"]
    assert card.cascade.images == card.held_out == 100
    assert card.test.top1 == store.card("resnet", 1).test.top1  # both members are the same network
    assert (card.cascade.sent_on, card.cascade.test_sent_on) == (0, 0)
    assert card.parameters == 2 * store.card("resnet", 1).parameters
    assert [member.files for member in store.cascade(card).members] == [store.card(name, 1).files for name in MEMBERS]


def test_held_out_images_are_those_of_the_member_that_holds_out_fewer(store: LocalStore, dataset: Dataset) -> None:
    card = store.card("resnet", 1)
    other = card.model_copy(update={"recipe": {"validation_images": 150}})
    held_out = cascade.find_held_out([other, card], dataset)
    assert (held_out.images == hold_out(dataset.train, 100)[1].images).all()


@pytest.mark.parametrize(
    ("recipe", "fault"),
    [
        ({"validation_images": 0}, "resnet18/1 has held out 0 images"),
        ({}, "resnet18/1 has held out 0 images"),
        ({"validation_images": 99}, "cascade needs 100 that both members have held out; train it with"),
    ],
)
def test_members_without_enough_common_held_out_images_are_refused(
    store: LocalStore, dataset: Dataset, recipe: dict[str, int], fault: str
) -> None:
    path = store.folder("resnet18", 1) / "card.json"
    path.write_text(store.card("resnet18", 1).model_copy(update={"recipe": recipe}).model_dump_json())
    with pytest.raises(StoreError, match=fault):
        publish(store, dataset, MEMBERS)
    assert store.versions("cascade") == []


def test_members_trained_on_other_data_are_refused(store: LocalStore) -> None:
    with pytest.raises(StoreError, match="resnet/1 was trained on another data set"):
        publish(store, load_dataset("synthetic:2"), MEMBERS)


def test_a_cascade_is_neither_member_nor_teacher(store: LocalStore, dataset: Dataset) -> None:
    add_cascade(store)
    with pytest.raises(StoreError, match="cascade is a cascade, which has no weights of its own"):
        publish(store, dataset, ("cascade", "resnet18"))
    with pytest.raises(StoreError, match="cascade/1 is a cascade"):
        store.verify_source("cascade/1", dataset.classes, dataset.fingerprint, 0)


def test_a_promoted_member_is_fitted_again_and_another_promotion_changes_nothing(
    store: LocalStore, dataset: Dataset
) -> None:
    add_cascade(store)
    promoted = Publication(model="resnet", version=2, live=True, test=copy_version(store, "resnet", "resnet").test)
    assert refit(store, dataset, promoted.model_copy(update={"live": False}), "always") is None
    assert refit(store, dataset, promoted.model_copy(update={"model": "resnet-seed"}), "always") is None
    assert store.versions("cascade") == [1]
    refitted = refit(store, dataset, promoted, "always")
    assert refitted is not None
    assert (refitted.version, refitted.live) == (2, True)
    members = store.cascade(store.card("cascade", 2)).members
    assert [str(member) for member in members] == ["resnet/2", "resnet18/1"]


def test_without_a_live_cascade_no_promotion_fits_one(store: LocalStore, dataset: Dataset) -> None:
    promoted = Publication(model="resnet", version=1, live=True, test=store.card("resnet", 1).test)
    assert refit(store, dataset, promoted, "always") is None
    assert "cascade" not in store.names()


def test_pinned_versions_stay_until_no_cascade_pins_them(store: LocalStore) -> None:
    add_cascade(store)
    for _ in range(3):
        copy_version(store, "resnet", "resnet")
    assert store.pins("resnet") == {1: "cascade/1"}
    with pytest.raises(VersionInUse, match="cascade/1 pins resnet/1; delete cascade/1 first"):
        store.delete("resnet", 1)
    assert store.prune("resnet", 1) == [2, 3]
    assert store.versions("resnet") == [1, 4]
    add_cascade(store)
    store.delete("cascade", 1)
    assert store.pins("resnet") == {4: "cascade/2"}
    store.delete("resnet", 1)
    assert store.versions("resnet") == [4]


def test_the_live_and_the_newest_version_are_not_deleted(store: LocalStore) -> None:
    copy_version(store, "resnet", "resnet")
    with pytest.raises(VersionInUse, match="resnet/2 is live"):
        store.delete("resnet", 2)
    store.promote("resnet", 1)
    with pytest.raises(VersionInUse, match="resnet/2 is the newest version"):
        store.delete("resnet", 2)
    with pytest.raises(StoreError, match="there is no version 9 of resnet"):
        store.delete("resnet", 9)


def test_a_cascade_is_checked_with_its_members(store: LocalStore) -> None:
    card = add_cascade(store)
    store.verify(card)
    model = store.folder("resnet18", 1) / MODEL
    content = model.read_bytes()
    model.write_bytes(content + b"\0")
    with pytest.raises(StoreError, match=r"model\.pt is damaged"):
        store.verify(card)
    model.unlink()
    with pytest.raises(StoreError, match=r"model\.pt is missing"):
        store.require_files(card)
    model.write_bytes(content)
    member = store.card("resnet18", 1)
    changed = member.model_copy(update={"files": {MODEL: 64 * "0"}})
    (store.folder("resnet18", 1) / "card.json").write_text(changed.model_dump_json())
    with pytest.raises(StoreError, match="resnet18/1 has other files than those that a cascade has pinned"):
        store.verify(card)


def test_a_cascade_whose_member_is_gone_is_not_published(store: LocalStore) -> None:
    outdated = make_cascade(store)
    copy_version(store, "resnet18", "resnet18")
    store.delete("resnet18", 1)
    with pytest.raises(StoreError, match="there is no version 1 of resnet18"):
        add_cascade(store, members=outdated.members)
    assert store.versions("cascade") == []


def test_weights_whose_sum_is_not_1_are_refused(store: LocalStore) -> None:
    with pytest.raises(ValueError, match=r"not 1"):
        make_cascade(store, weights=(0.5, 0.4))
