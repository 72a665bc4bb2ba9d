"""Test the data set: its sources, refused files, and the split into training and validation images."""

import errno
import functools
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from torchvision.datasets import CIFAR100

from training.dataset import CLASSES, SUPERCLASSES, DataError, Dataset, Split, hold_out, load_dataset

Arrays = dict[str, NDArray[Any]]

# Class ids and names of the official archive.
KNOWN_LABELS = {
    0: "apple",
    1: "aquarium_fish",
    19: "cattle",
    52: "oak_tree",
    71: "sea",
    96: "willow_tree",
    99: "worm",
}


def arrays() -> Arrays:
    random = np.random.default_rng(0)
    return {
        "x_train": random.integers(0, 256, (6, 32, 32, 3), np.uint8),
        "y_train": np.array([0, 99, 5, 5, 7, 42], np.uint8),
        "x_test": random.integers(0, 256, (3, 32, 32, 3), np.uint8),
        "y_test": np.array([1, 2, 3], np.uint8),
        "classes": np.array(CLASSES),
    }


def written(folder: Path, content: Arrays) -> Path:
    np.savez_compressed(folder / "cifar100.npz", allow_pickle=True, **content)
    return folder / "cifar100.npz"


def assert_same(dataset: Dataset, content: Arrays) -> None:
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        np.testing.assert_array_equal(split.images, content[f"x_{part}"])
        np.testing.assert_array_equal(split.labels, content[f"y_{part}"])
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int64
    assert dataset.classes == CLASSES


def test_an_npz_is_loaded_as_it_is(tmp_path: Path) -> None:
    written(tmp_path, arrays())
    dataset = load_dataset(str(tmp_path))
    assert_same(dataset, arrays())
    assert dataset.superclasses[0] == "fruit_and_vegetables"
    assert dataset.superclasses[99] == "non-insect_invertebrates"


def test_the_folder_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, arrays())
    monkeypatch.setenv("CIFAR100_DATA", str(tmp_path))
    assert_same(load_dataset(), arrays())


def test_a_file_is_not_taken_for_the_folder(tmp_path: Path) -> None:
    written(tmp_path, arrays())
    with pytest.raises(DataError, match=r"cifar100\.npz is a file; give the folder that contains cifar100\.npz"):
        load_dataset(str(tmp_path / "cifar100.npz"))


def test_the_fingerprint_changes_with_one_pixel_and_with_one_label(tmp_path: Path) -> None:
    content = arrays()
    fingerprints = []
    for part, place in (("x_train", (0, 0, 0, 0)), ("y_test", (2,)), ("y_test", (2,))):
        written(tmp_path, content)
        fingerprints.append(load_dataset(str(tmp_path)).fingerprint)
        content[part][place] ^= 1
    assert len(set(fingerprints)) == 3


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("x_train", np.zeros((6, 3, 32, 32), np.uint8), r"'x_train' is uint8 \[6, 3, 32, 32\], expected"),
        ("x_test", np.zeros((0, 32, 32, 3), np.uint8), r"'x_test' is uint8 \[0, 32, 32, 3\], expected"),
        ("x_train", np.zeros((6, 32, 32, 3), np.float32), "'x_train' is float32"),
        ("y_train", np.zeros(5, np.uint8), r"'y_train' is uint8 \[5\], expected integers \[6\]"),
        ("y_test", np.zeros(3, np.float64), "'y_test' is float64"),
        ("y_train", np.array([0, 1, 2, 3, 4, 100]), "'y_train' contains class ids outside 0-99"),
        ("y_train", np.array([0, 1, 2, 3, 4, -1]), "'y_train' contains class ids outside 0-99"),
        ("classes", np.array(CLASSES[::-1]), "'classes' must be the 100 CIFAR-100 class names"),
        ("classes", np.array(CLASSES, object), "not a readable npz file without pickled objects"),
        ("y_train", np.array([{}] * 6), "not a readable npz file without pickled objects"),
        ("classes", np.array("apple"), "'classes' must be the 100 CIFAR-100 class names"),
    ],
)
def test_an_array_that_does_not_fit_is_an_error_naming_file_and_fault(
    key: str, value: NDArray[Any], fault: str, tmp_path: Path
) -> None:
    path = written(tmp_path, arrays() | {key: value})
    with pytest.raises(DataError, match=f"{path}.*{fault}"):
        load_dataset(str(tmp_path))


def test_a_missing_array_is_an_error_naming_file_and_array(tmp_path: Path) -> None:
    content = arrays()
    del content["y_test"]
    path = written(tmp_path, content)
    with pytest.raises(DataError, match=f"{path} has no array 'y_test'"):
        load_dataset(str(tmp_path))


def as_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a zip at all"),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: (path.unlink(), path.mkdir()),
        as_npy,
    ],
    ids=["empty", "text", "half", "last byte missing", "a folder", "npy"],
)
def test_a_file_that_is_no_whole_npz_is_an_error_naming_it(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    path = written(tmp_path, arrays())
    damage(path)
    with pytest.raises(DataError, match=f"{path} is not a readable npz file.*delete it"):
        load_dataset(str(tmp_path))


def test_any_flipped_bit_is_either_harmless_or_a_data_error(tmp_path: Path) -> None:
    small = arrays() | {"x_train": np.zeros((6, 32, 32, 3), np.uint8), "x_test": np.zeros((3, 32, 32, 3), np.uint8)}
    path = written(tmp_path, small)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            damaged = load_dataset(str(tmp_path))
        except DataError:
            continue
        assert_same(damaged, small)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no server listens on this port
    monkeypatch.setenv("no_proxy", "")


def test_without_data_and_network_the_error_names_both_ways(offline: None, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(DataError, match=rf"{folder} has no cifar100\.npz.*run once with.*or put .*CIFAR100_DATA"):
        load_dataset(str(folder))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("source", ["synthetic:0", "synthetic:-1", "synthetic:many"])
def test_an_impossible_synthetic_size_is_an_error(source: str) -> None:
    with pytest.raises(DataError, match="positive number"):
        load_dataset(source)


class Archive(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def official_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder served over HTTP in place of the official archive, with the same structure but its own checksums."""
    site = tmp_path / "site"
    site.mkdir()
    content = arrays()
    files = {
        part: pickle.dumps(
            {
                "data": content[f"x_{part}"].transpose(0, 3, 1, 2).reshape(-1, 3072),
                "fine_labels": content[f"y_{part}"].tolist(),
                "coarse_labels": [0] * len(content[f"y_{part}"]),
            }
        )
        for part in ("train", "test")
    }
    files["meta"] = pickle.dumps({"fine_label_names": list(CLASSES), "coarse_label_names": list(SUPERCLASSES)})
    with tarfile.open(site / CIFAR100.filename, "w:gz") as archive:
        for name, pickled in files.items():
            entry = tarfile.TarInfo(f"cifar-100-python/{name}")
            entry.size = len(pickled)
            archive.addfile(entry, io.BytesIO(pickled))

    def md5(content: bytes) -> str:
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Archive, directory=str(site)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR100.filename}")
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5((site / CIFAR100.filename).read_bytes()))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(files["train"])]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(files["test"])]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(files["meta"])})
    yield site
    server.shutdown()
    server.server_close()


# torchvision extracts the archive without a filter argument; Python 3.12 and 3.13 warn about this.
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
def test_the_official_archive_is_downloaded_and_converted_once(official_site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert_same(load_dataset(str(folder)), arrays())
    (official_site / CIFAR100.filename).unlink()
    assert_same(load_dataset(str(folder)), arrays())
    with np.load(folder / "cifar100.npz", allow_pickle=False) as file:
        for key, value in arrays().items():
            np.testing.assert_array_equal(file[key], value)
    assert not list(folder.glob("*.partial*"))


def test_an_archive_with_another_checksum_is_an_error_and_nothing_is_converted(
    official_site: Path, tmp_path: Path
) -> None:
    with (official_site / CIFAR100.filename).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match="could not be downloaded there"):
        load_dataset(str(tmp_path / "data"))
    assert not list((tmp_path / "data").glob("*.npz"))


# torchvision extracts the archive without a filter argument; Python 3.12 and 3.13 warn about this.
@pytest.mark.filterwarnings("ignore:Python 3.14 will:DeprecationWarning")
def test_a_disk_that_is_full_is_an_error_and_no_partial_file_stays(
    official_site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_written(file: Path, **_: object) -> None:
        file.write_bytes(b"PK")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", half_written)
    with pytest.raises(DataError, match="No space left on device"):
        load_dataset(str(tmp_path / "data"))
    assert not list((tmp_path / "data").glob("*.npz"))


def numbered(per_class: int) -> Split:
    """Return a split whose images hold their row number in the first pixel."""
    n = 100 * per_class
    images = np.zeros((n, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    return Split(images, np.random.default_rng(3).permutation(np.repeat(np.arange(100), per_class)))


def rows(split: Split) -> NDArray[np.int64]:
    return split.images[:, 0, 0, 0].astype(np.int64) + 256 * split.images[:, 0, 0, 1].astype(np.int64)


@pytest.mark.parametrize("images", [0, 1, 100, 137, 450])
def test_the_validation_split_is_stratified_and_disjoint_from_the_rest(images: int) -> None:
    whole = numbered(per_class=5)
    remaining, validation = hold_out(whole, images)
    assert len(validation) == images
    np.testing.assert_array_equal(np.sort(np.concatenate([rows(remaining), rows(validation)])), np.arange(500))
    for part in (remaining, validation):
        np.testing.assert_array_equal(part.labels, whole.labels[rows(part)])
        counts = np.bincount(part.labels, minlength=100)
        assert counts.max() - counts.min() <= 1


def test_the_validation_split_is_the_same_on_every_call_and_no_mere_beginning() -> None:
    first, again = (rows(hold_out(numbered(per_class=5), 100)[1]) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    beginnings = [np.flatnonzero(numbered(per_class=5).labels == label)[0] for label in range(100)]
    assert set(first) != set(beginnings)


def test_the_synthetic_set_is_the_same_on_every_call() -> None:
    first, again, larger = (load_dataset(f"synthetic:{count}").fingerprint for count in (2, 2, 3))
    assert first == again != larger


def test_the_synthetic_set_has_100_classes_in_the_form_of_cifar100(dataset: Dataset) -> None:
    assert len(set(dataset.classes)) == len(dataset.superclasses) == 100
    for split, per_class in ((dataset.train, 4), (dataset.test, 1)):
        assert split.images.dtype == np.uint8
        assert split.images.shape == (100 * per_class, 32, 32, 3)
        assert split.labels.dtype == np.int64
        np.testing.assert_array_equal(np.bincount(split.labels), np.full(100, per_class))
    assert not (dataset.train.images[:100] == dataset.test.images).all(axis=(1, 2, 3)).any()


def test_the_superclasses_divide_the_100_labels_into_fives() -> None:
    assert len(SUPERCLASSES) == 20
    assert {len(labels) for labels in SUPERCLASSES.values()} == {5}
    assert len(set(CLASSES)) == 100
    assert list(CLASSES) == sorted(CLASSES)
    assert set(CLASSES) == {label for labels in SUPERCLASSES.values() for label in labels}
    assert {number: CLASSES[number] for number in KNOWN_LABELS} == KNOWN_LABELS
