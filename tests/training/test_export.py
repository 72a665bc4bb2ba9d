"""Test export and publication: the file computes the same as the network, and the card describes the version."""

import hashlib
import importlib.metadata
import shutil
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch
from torch import Tensor, nn

from training import export
from training.dataset import Dataset
from training.evaluate import evaluate, expected_calibration_error, predict
from training.export import publish, recompute_batch_norm, restore, sample
from training.loop import make_splits, train
from training.networks import Classifier, build
from training.phase_report import PhaseReport
from training.provenance import describe_device
from training.recipes import make_recipe, parse_recipe
from training.run import Publication, Run, RunError
from training.runtimes import torchscript
from training.runtimes.openvino import OpenVinoEngine
from training.runtimes.torchscript import ExportError
from training.store import LocalStore

pytestmark = pytest.mark.slow


def random_classifier(name: str, **overrides: Any) -> Classifier:
    torch.manual_seed(0)
    classifier = build(make_recipe(name, overrides))
    for key, value in classifier.network.state_dict().items():
        if key.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
    torchscript.round_weights(classifier)
    return classifier.eval()


def noise(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def assert_close_to(classifier: Classifier, exported: torch.jit.ScriptModule) -> None:
    for count in (1, 7, 7, 7):  # the JIT compiler rewrites the graph during the first calls
        images = noise(count)
        with torch.inference_mode():
            logits, expected = exported(images), classifier(images)
        assert logits.dtype is torch.float32
        assert logits.shape == (count, 100)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"), [("resnet-seed", {"width": 8}), ("resnet18", {"weights": "none", "image_size": 64})]
)
def test_an_exported_file_computes_what_the_network_computes_temperature_and_upsampling_included(
    name: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    classifier = random_classifier(name, **overrides)
    images = noise(4)
    with torch.inference_mode():
        uncalibrated = classifier(images)
        classifier.temperature.fill_(2.5)
        torchscript.save(classifier, tmp_path / "model.pt")
        exported = torchscript.load(tmp_path / "model.pt")
        torch.testing.assert_close(exported(images), uncalibrated / 2.5, rtol=1e-5, atol=1e-5)
    assert_close_to(classifier, exported)


class Inconstant(nn.Module):
    """A network that returns a different result on its second call, which is the traced call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * images.float().mean((2, 3))


def test_a_file_that_disagrees_with_the_network_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"model\.pt: the logits of the exported file differ from those of eager mode by"
    ):
        torchscript.save(Inconstant().eval(), tmp_path / "model.pt")


class Warns(nn.Module):
    def __init__(self, category: type[Warning]) -> None:
        super().__init__()
        self.category = category

    def forward(self, images: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            warnings.warn("anything else", self.category, stacklevel=1)
        return images.float()


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning, UserWarning])
def test_exporting_silences_no_other_warning_than_the_deprecation_of_torch_jit(
    category: type[Warning], tmp_path: Path
) -> None:
    with pytest.raises(category, match="anything else"):
        torchscript.save(Warns(category), tmp_path / "model.pt")


def test_the_warnings_of_torch_jit_are_silenced_within_export_only(published_store: Path) -> None:
    torchscript.load(published_store / "resnet" / "1" / "model.pt")
    with pytest.warns(FutureWarning, match=r"torch\.jit\.load. is deprecated"):
        torch.jit.load(str(published_store / "resnet" / "1" / "model.pt"))


def test_the_published_file_computes_what_the_run_has_learned(
    published_store: Path, finished_run: Run, dataset: Dataset
) -> None:
    classifier, state = restore(finished_run, finished_run.recipe(), dataset)
    assert state["epoch"] == 1
    temperature = LocalStore(published_store).card("resnet", 1).temperature
    assert temperature != 1
    classifier.temperature.fill_(temperature)
    torchscript.round_weights(classifier)
    training, _, _ = make_splits(finished_run.recipe(), dataset)
    recompute_batch_norm(classifier, sample(training, 5120))
    assert_close_to(classifier, torchscript.load(published_store / "resnet" / "1" / "model.pt"))


def test_statistics_are_renewed_by_the_mean_over_batches_where_a_stage_has_trained() -> None:
    changes = {"weights": "none", "image_size": 32, "trainable": "layer3,layer4,fc"}
    classifier = random_classifier("resnet18", **changes)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    images = torch.randint(0, 256, (256, 32, 32, 3), dtype=torch.uint8)
    seen: list[Tensor] = []
    first = classifier.network.get_submodule("backbone.layer3.0.conv1")
    first.register_forward_hook(lambda *given: seen.append(given[2].transpose(0, 1).flatten(1)))
    recompute_batch_norm(classifier, images)
    after = classifier.state_dict()
    key = "network.backbone.layer3.0.bn1.running_"
    assert len(seen) == 2
    torch.testing.assert_close(after[key + "mean"], torch.stack([each.mean(1) for each in seen]).mean(0))
    torch.testing.assert_close(after[key + "var"], torch.stack([each.var(1) for each in seen]).mean(0))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(".layer3." in name or ".layer4." in name for name in changed)
    assert {name.rsplit(".", 1)[1] for name in changed} == {"running_mean", "running_var", "num_batches_tracked"}
    assert not any(module.training for module in classifier.modules())


def test_stages_that_a_second_stage_of_training_has_trained_are_renewed_as_well(
    dataset: Dataset, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    changes = {"weights": "none", "image_size": 32, "epochs": 1, "finetune_epochs": 1, "validation_images": 100}
    run.create(
        chosen := make_recipe("resnet18", changes | {"trainable": "fc", "cache_features": False, "batch_size": 100})
    )
    for event in train(chosen, dataset, run, torch.device("cpu")):
        if event.event == "epoch":
            classifier, state = restore(run, chosen, dataset)
            renewed = build(chosen.from_scratch)
            renewed.load_state_dict(state["classifier"])
            recompute_batch_norm(classifier, sample(dataset.train, 100))
            key = "network.backbone.layer1.0.bn1.running_mean"
            same = torch.equal(classifier.state_dict()[key], renewed.state_dict()[key])
            assert same == (state["epoch"] == 1)


def test_the_card_says_how_the_model_was_made_and_how_good_it_is(
    published_store: Path, finished_run: Run, dataset: Dataset
) -> None:
    store = LocalStore(published_store)
    card = store.card("resnet", 1)
    content = (published_store / "resnet" / "1" / "model.pt").read_bytes()
    assert card.files == {"model.pt": hashlib.sha256(content).hexdigest()}
    assert parse_recipe(card.recipe) == finished_run.recipe()
    assert card.classes == list(dataset.classes)
    assert card.superclasses == list(dataset.superclasses)
    assert card.data == dataset.fingerprint
    assert card.parameters == sum(each.numel() for each in build(finished_run.recipe()).parameters())
    assert card.libraries["torch"] == importlib.metadata.version("torch")
    assert card.device == describe_device()

    exported = torchscript.load(published_store / "resnet" / "1" / "model.pt")
    logits = predict(exported, torch.from_numpy(dataset.test.images))
    labels = torch.from_numpy(dataset.test.labels)
    assert card.test == evaluate(logits, labels)
    assert card.test.images == 100
    assert card.test_ece_uncalibrated == pytest.approx(expected_calibration_error(logits * card.temperature, labels))

    (epoch,) = finished_run.epochs()
    (point,) = card.curve
    assert point.model_dump() == {field: epoch[field] for field in point.model_dump()}
    assert card.training_seconds == epoch["seconds"]


@pytest.mark.parametrize(
    ("most_lost", "top1", "accepted", "float_first_layer"),
    [(1.0, None, True, False), (0.003, (0.5, 0.49, 0.498), True, True), (-1.0, None, False, True)],
    ids=["throughout", "but for the first layer", "refused"],
)
def test_a_quantized_form_is_published_if_it_is_as_accurate(
    finished_run: Run,
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most_lost: float,
    top1: tuple[float, ...] | None,
    accepted: bool,
    float_first_layer: bool,
) -> None:
    if top1:  # replaces the measured top-1: first of the floating-point form, then of each int8 form that is tried
        measured = iter(top1)

        def measure(*_: object) -> Generator[PhaseReport, None, float]:
            yield from ()
            return next(measured)

        monkeypatch.setattr(export, "_measure_top1_in_views", measure)
    monkeypatch.setattr(export, "MAX_ACCURACY_DROP", most_lost)
    monkeypatch.setattr(export, "CALIBRATION_IMAGES", 8)
    run = Run(shutil.copytree(finished_run.path, tmp_path / "run"))
    run.recipe_file.write_text(run.recipe().model_copy(update={"int8": True}).model_dump_json())
    before = len(list(run.metrics()))  # the run may have been published before
    publish(run, dataset, LocalStore(tmp_path / "models"))
    reports = [line for _, line in run.numbered_metrics(before)]
    assert list(dict.fromkeys(line["phase"] for line in reports)) == [
        "exporting", "quantizing", "measuring", "publishing"
    ]  # fmt: skip
    measuring = [line for line in reports if line["phase"] == "measuring"]
    assert (measuring[0]["done"], measuring[-1]["done"], measuring[-1]["images"]) == (0, 100, 100)
    folder = tmp_path / "models" / "resnet" / "1"
    card = LocalStore(tmp_path / "models").card("resnet", 1)
    assert card.int8 is not None
    assert (card.int8.accepted, card.int8.float_first_layer) == (accepted, float_first_layer)
    if top1:
        assert card.int8.lost_top1 == top1[0] - top1[-1]
    assert card.int8.images == 100
    assert {path.name for path in folder.iterdir()} - {"card.json"} == card.files.keys()
    if accepted:
        engine = OpenVinoEngine(folder / "int8.xml")
        images, labels = torch.from_numpy(dataset.test.images), torch.from_numpy(dataset.test.labels)
        result = evaluate(predict(engine.compute_logits, images), labels)
        assert card.int8.test
        assert card.int8.test.top1 == result.top1
        assert card.int8.test.loss == pytest.approx(result.loss, rel=0.01)  # int8 rounds by the CPUs in use
        assert card.files.keys() == {"model.pt", "int8.xml", "int8.bin"}
        assert _first_convolution_reads_int8(folder / "int8.xml") != float_first_layer
    else:
        assert card.int8.test is None
        assert card.files.keys() == {"model.pt"}


def _first_convolution_reads_int8(file: Path) -> bool:
    network = openvino.Core().read_model(file)
    first = next(node for node in network.get_ordered_ops() if node.get_type_name() == "Convolution")
    return bool(first.input_value(0).get_node().get_type_name() == "FakeQuantize")


@pytest.mark.parametrize(("eval_mode_after", "renewed"), [(0, True), (1, True), (2, False)])
def test_statistics_are_renewed_unless_the_weights_were_fitted_to_them(
    eval_mode_after: int, renewed: bool, dataset: Dataset, tmp_path: Path
) -> None:
    """The checkpoint comes from the first epoch or, for eval_mode_after=2, from the third."""
    fields = {"width": 8, "epochs": 3, "int8": False, "eval_mode_after": eval_mode_after}
    run = Run(tmp_path / "run")
    run.create(make_recipe("resnet-seed", fields))
    trained = build(run.recipe()).state_dict()
    run.save({"epoch": 1 if renewed else 3, "data": dataset.fingerprint, "classifier": trained})
    publish(run, dataset, LocalStore(tmp_path / "models"))
    published = torchscript.load_weights(tmp_path / "models" / "resnet-seed" / "1" / "model.pt")
    name = "network.blocks.3.bn.running_mean"
    assert torch.equal(published[name], trained[name]) != renewed


def test_a_run_notes_what_it_was_published_as(published_store: Path, finished_run: Run) -> None:
    published = finished_run.publication()
    assert published is not None
    assert (published.model, published.version, published.live) == ("resnet", 1, True)
    assert published.test == LocalStore(published_store).card("resnet", 1).test


class CrashingAfterPublishing(Run):
    def record_publication(self, publication: Publication) -> None:  # noqa: ARG002
        raise KeyboardInterrupt


def test_a_crash_after_publishing_does_not_publish_the_run_twice(
    finished_run: Run, dataset: Dataset, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path / "models")
    shutil.copytree(finished_run.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        publish(CrashingAfterPublishing(run.path), dataset, store)
    published = publish(run, dataset, store)
    assert (published.version, published.live) == (1, True)
    assert run.publication() == published
    assert publish(run, dataset, store).version == 2  # a second request publishes the run again


def test_a_run_without_a_finished_epoch_is_not_published(dataset: Dataset, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.create(make_recipe("resnet"))
    with pytest.raises(RunError, match="no epoch has been finished"):
        publish(run, dataset, LocalStore(tmp_path / "models"))
    assert not (tmp_path / "models").exists()


def test_a_failed_export_leaves_nothing_in_the_store(dataset: Dataset, tmp_path: Path) -> None:
    chosen = make_recipe("resnet", {"width": 8, "validation_images": 0})
    run = Run(tmp_path / "run")
    run.create(chosen)
    classifier = build(chosen)
    for parameter in classifier.parameters():
        parameter.data.fill_(float("nan"))
    run.save({"epoch": 1, "data": dataset.fingerprint, "classifier": classifier.state_dict()})
    with pytest.raises(ExportError, match="by up to nan"):
        publish(run, dataset, LocalStore(tmp_path / "models"))
    assert list((tmp_path / "models" / "resnet").iterdir()) == []
    assert run.publication() is None


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process() -> None:
    with pytest.raises(OSError, match="No space left"):
        torchscript.save(random_classifier("resnet", width=8), Path("/dev/full"))


def test_a_finished_run_needs_its_pretrained_weights_no_more(dataset: Dataset, tmp_path: Path) -> None:
    trained = build(make_recipe("resnet18", {"weights": "none"}))
    run = Run(tmp_path)
    run.create(make_recipe("resnet18", {"weights": "/gone/resnet18.pth", "reinitialize": "layer4"}))
    run.save({"epoch": 4, "data": dataset.fingerprint, "classifier": trained.state_dict()})
    classifier, state = restore(run, run.recipe(), dataset)
    assert state["epoch"] == 4
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in classifier.state_dict().items())


def test_the_card_tells_of_the_training_and_names_the_weights_file_but_not_where_it_lay(
    dataset: Dataset, tmp_path: Path
) -> None:
    chosen = make_recipe("resnet18", {"weights": "/home/somebody/resnet18.pth", "image_size": 32, "int8": False})
    run = Run(tmp_path / "run")
    run.create(chosen)
    trained = build(chosen.model_copy(update={"weights": "none"}))
    elsewhere = {"device": "a GPU", "libraries": {"torch": "2.0"}, "commit": "0" * 40}
    state = {"epoch": 1, "data": dataset.fingerprint, "classifier": trained.state_dict(), "provenance": elsewhere}
    run.save(state)
    publish(run, dataset, LocalStore(tmp_path / "models"))
    card = LocalStore(tmp_path / "models").card("resnet18", 1)
    assert card.recipe["weights"] == "resnet18.pth"
    assert (card.device, card.libraries, card.commit) == ("a GPU", {"torch": "2.0"}, "0" * 40)
    assert "somebody" not in (tmp_path / "models/resnet18/1/card.json").read_text()
