"""Test the models in `models/`: the files are complete and described, and as accurate as their cards say.

Tests that need CIFAR-100 run if cifar100.npz is available (CIFAR100_DATA). Otherwise they are skipped.
"""

import io
import os
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from app.inference.batching import BatchOutput, Scores
from app.main import create_app
from app.routes.predict import PredictedClass, top_classes
from app.settings import Settings
from training import recipes
from training.dataset import ARCHIVE, CLASSES, DEFAULT_FOLDER, Dataset, load_dataset
from training.evaluate import evaluate, predict
from training.runtimes import torchscript
from training.store import MODEL, LocalStore

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parents[1] / "models"
STORE = LocalStore(MODELS)
CARDS = [STORE.card(name, version) for name in STORE.names() for version in STORE.versions(name)]
SHIPPED = [(card.name, card.version) for card in CARDS if not card.cascade]
CASCADES = [(card.name, card.version) for card in CARDS if card.cascade]

REAL_DATA = Path(os.environ.get("CIFAR100_DATA", DEFAULT_FOLDER)).expanduser()
needs_real_data = pytest.mark.skipif(not (REAL_DATA / ARCHIVE).exists(), reason="CIFAR-100 is not at hand")


@pytest.fixture(scope="module")
def cifar100() -> Dataset:
    return load_dataset(str(REAL_DATA))


# Top-1 of each live version on every tenth test image, in float32.
TOP1_OF_SAMPLE = {("resnet", 4): 0.775, ("resnet-seed", 3): 0.668, ("resnet18", 5): 0.819}


def test_each_network_is_shipped_and_live_with_at_most_two_versions() -> None:
    assert {name for name, _ in SHIPPED} == {"resnet", "resnet-seed", "resnet18"}
    for name in {name for name, _ in SHIPPED}:
        assert (name, STORE.live(name)) in TOP1_OF_SAMPLE
        assert len(STORE.versions(name)) <= 2


@pytest.mark.parametrize(("name", "version"), SHIPPED)
def test_files_match_their_card(name: str, version: int) -> None:
    card = STORE.card(name, version)
    folder = STORE.verify(card)
    assert (folder / MODEL).stat().st_size < 25e6
    assert tuple(card.classes) == CLASSES
    recipe = recipes.parse_recipe(card.recipe)
    assert recipe.model == name
    assert recipe.predecessor or "/" not in recipe.weights  # no file path of the training machine
    assert card.test.images == 10_000


@pytest.mark.parametrize(("name", "version"), CASCADES)
def test_a_cascade_pins_shipped_versions(name: str, version: int) -> None:
    card = STORE.card(name, version)
    STORE.verify(card)
    assert card.test.images == 10_000
    assert card.test.ece <= 0.02
    assert card.held_out >= 1000


@needs_real_data
@pytest.mark.parametrize(("name", "version"), TOP1_OF_SAMPLE)
def test_accuracy_is_what_the_card_says(name: str, version: int, cifar100: Dataset) -> None:
    card = STORE.card(name, version)
    assert card.data == cifar100.fingerprint
    tenth = cifar100.test[slice(None, None, 10)]
    logits = predict(torchscript.load(STORE.folder(name, version) / MODEL), torch.from_numpy(tenth.images))
    result = evaluate(logits, torch.from_numpy(tenth.labels))
    assert result.top1 == pytest.approx(TOP1_OF_SAMPLE[name, version], abs=0.002)


@needs_real_data
def test_predict_on_test_images_equals_offline_evaluation(cifar100: Dataset, tmp_path: Path) -> None:
    card = STORE.card("resnet", STORE.live("resnet") or 0)
    module = torchscript.load(STORE.folder("resnet", card.version) / MODEL)
    with TestClient(create_app(Settings(models=MODELS, runs=tmp_path))) as client:
        for row in range(0, 10_000, 500):
            buffer = io.BytesIO()
            Image.fromarray(cifar100.test.images[row]).save(buffer, "PNG")
            answer = client.post("/predict?model=resnet", files={"file": buffer.getvalue()}).json()
            with torch.inference_mode():
                logits = module(torch.from_numpy(cifar100.test.images[row]).permute(2, 0, 1)[None]).numpy()
            classes = [PredictedClass(**each) for each in answer["predictions"][0]["classes"]]
            assert [classes] == top_classes(Scores(BatchOutput(logits)), card, top_k=5)
