"""This module loads CIFAR-100 into arrays in memory, or draws a synthetic data set.

Input: a folder with `cifar100.npz`, or "synthetic". If the file is missing, it is made from the official archive.
Output: a `Dataset` with uint8 images [N, 32, 32, 3] and int64 labels [N] for train and test, and the class names.
"""

import hashlib
import os
import pickle
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from training.errors import ReportedError

ARCHIVE = "cifar100.npz"
DEFAULT_FOLDER = "~/.cache/cifar100"
FINGERPRINT = "fd2754fdbed833d679e4f4e3414b8e0172050e72c30b55bbb4865ba503480389"
"""Fingerprint of CIFAR-100, see `Dataset.fingerprint`."""

# Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
SUPERCLASSES: dict[str, tuple[str, ...]] = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
CLASSES = tuple(sorted(label for labels in SUPERCLASSES.values() for label in labels))
_SUPERCLASS_OF = {label: superclass for superclass, labels in SUPERCLASSES.items() for label in labels}

# All recipes and seeds share one validation split, so results are comparable and calibration sees no training image.
_SPLIT_SEED = 0


READ_ERRORS = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
"""Errors that numpy and zipfile raise for damaged files. TokenError comes from the parser of an array's header."""


class DataError(ReportedError, ValueError):
    """The data set is missing or damaged. The message gives the file, the fault and a remedy."""


@dataclass(frozen=True)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 [N, 32, 32, 3], RGB.
        labels: int64 [N], class ids.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> "Split":
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Extra:
    """Labeled images of an operator that are added to the training split, see `training.extra_data`.

    Attributes:
        split: The images and their labels.
        left_out: Number of images of the file that are left out, because they are test or held-out images.
        sha256: sha256 of the file.
    """

    split: Split
    left_out: int
    sha256: str


@dataclass(frozen=True)
class Dataset:
    """A train and a test split over the same classes.

    Attributes:
        classes: Name of each class id.
        superclasses: Superclass of each class id.
        fingerprint: sha256 over all images, labels and class names, without `extra`.
        extra: Further training images, if there are any.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    superclasses: tuple[str, ...]
    fingerprint: str
    extra: Extra | None = None


def load_dataset(source: str | None = None) -> Dataset:
    """Load CIFAR-100 from `source`/cifar100.npz, or make a synthetic data set.

    Args:
        source: A folder, "synthetic" or "synthetic:N" (N training images per class). The default is the value of the
            environment variable CIFAR100_DATA, or ~/.cache/cifar100. If the folder has no cifar100.npz, torchvision
            downloads the official archive (about 170 MB) and the file is written from it.

    Raises:
        DataError: The data set cannot be obtained, or the file is damaged.
    """
    archive = find_archive(source)
    if archive is None:
        count = _resolve(source).partition(":")[2]
        if count and not (count.isdecimal() and int(count) > 0):
            raise DataError(f"synthetic:{count} is not a positive number of images per class; give synthetic:20 for 20")
        return make_synthetic(int(count or 20))
    if not archive.exists():
        _download_archive(archive)
    return _read_archive(archive)


def is_at_hand(source: str | None = None) -> bool:
    """Return whether `load_dataset` needs no download. The file may be damaged nevertheless."""
    archive = find_archive(source)
    return archive is None or archive.is_file()


def find_archive(source: str | None = None) -> Path | None:
    """Return the path that the archive of `source` has or will have. None for a synthetic data set.

    Raises:
        DataError: The source is a file.
    """
    source = _resolve(source)
    if source.partition(":")[0] == "synthetic":
        return None
    folder = Path(source).expanduser()
    if folder.is_file():
        raise DataError(f"{source} is a file; give the folder that contains {ARCHIVE}")
    return folder / ARCHIVE


def _resolve(source: str | None) -> str:
    return source or os.environ.get("CIFAR100_DATA") or DEFAULT_FOLDER


def split_sizes(source: str | None = None) -> tuple[int, int]:
    """Return the number of training and test images of `source` without loading it.

    Every source other than "synthetic" is taken as CIFAR-100: 50,000 and 10,000 images.
    """
    name, _, count = _resolve(source).partition(":")
    if name != "synthetic" or not (count or "20").isdecimal():
        return 50_000, 10_000
    per_class = int(count or 20)
    return per_class * len(CLASSES), max(1, per_class // 4) * len(CLASSES)


def sample_rows(count: int, limit: int | None) -> NDArray[np.intp]:
    """Return `limit` of `count` rows in ascending order, chosen with a fixed seed. None or a larger limit returns all.

    The classes are mixed in a sample, also if the rows are sorted by class.
    """
    rows = np.random.default_rng(0).permutation(count)[:limit]
    rows.sort()
    return rows


def hold_out(split: Split, images: int) -> tuple[Split, Split]:
    """Cut a validation split off a training split, stratified by class and the same on every call.

    Args:
        images: Size of the validation split. The counts per class differ by at most one image.

    Returns:
        The remaining training split and the validation split.
    """
    random = np.random.default_rng(_SPLIT_SEED)
    order = random.permutation(len(split))
    # A stable sort of a shuffled order: rank counts the images of the same class that come earlier in the shuffle.
    by_class = order[np.argsort(split.labels[order], kind="stable")]
    starts = np.searchsorted(split.labels[by_class], split.labels[by_class])
    rank = np.arange(len(split)) - starts
    held_out = np.zeros(len(split), bool)
    held_out[by_class[np.argsort(rank, kind="stable")][:images]] = True
    return split[np.flatnonzero(~held_out)], split[np.flatnonzero(held_out)]


def _read_archive(archive: Path) -> Dataset:
    arrays: dict[str, NDArray[np.generic]] = {}
    try:
        # numpy stops reading at the end of an array, so it misses some checksum errors.
        with zipfile.ZipFile(archive) as container:
            if damaged := container.testzip():
                raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        with archive.open("rb") as raw, NpzFile(raw, allow_pickle=False) as file:
            for key in ("x_train", "y_train", "x_test", "y_test", "classes"):
                if key not in file:
                    raise DataError(f"{archive} has no array {key!r}; delete it, and the next run creates it again")
                arrays[key] = file[key]
    except DataError:
        raise
    except READ_ERRORS as error:
        raise DataError(
            f"{archive} is not a readable npz file without pickled objects ({error}); delete it, and the next "
            "run creates it again"
        ) from error

    classes = tuple(str(label) for label in arrays["classes"].ravel())
    if classes != CLASSES:
        raise DataError(f"{archive}: 'classes' must be the 100 CIFAR-100 class names in alphabetical order")
    splits: list[Split] = []
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3) or not len(images):
            raise DataError(
                f"{archive}: 'x_{part}' is {images.dtype} {list(images.shape)}, expected uint8 [N, 32, 32, 3]"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise DataError(
                f"{archive}: 'y_{part}' is {labels.dtype} {list(labels.shape)}, expected integers [{len(images)}]"
            )
        if labels.min() < 0 or labels.max() >= len(CLASSES):
            raise DataError(f"{archive}: 'y_{part}' contains class ids outside 0-{len(CLASSES) - 1}")
        splits.append(Split(images.astype(np.uint8, copy=False), labels.astype(np.int64)))
    train, test = splits
    return _make_dataset(train, test, classes, tuple(_SUPERCLASS_OF[label] for label in classes))


def _make_dataset(train: Split, test: Split, classes: tuple[str, ...], superclasses: tuple[str, ...]) -> Dataset:
    digest = hashlib.sha256("\n".join(classes).encode())
    for split in (train, test):
        digest.update(np.ascontiguousarray(split.images).data)
        digest.update(np.ascontiguousarray(split.labels).data)
    return Dataset(train, test, classes, superclasses, digest.hexdigest())


def _download_archive(archive: Path) -> None:
    # torchvision takes a second to import, and only the download needs it.
    from torchvision.datasets import CIFAR100

    folder = archive.parent
    partial = archive.with_suffix(f".{os.getpid()}.partial.npz")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = {part: CIFAR100(str(folder), train=part == "train", download=True) for part in ("train", "test")}
        np.savez(
            partial,
            x_train=parts["train"].data,
            y_train=np.asarray(parts["train"].targets, np.uint8),
            x_test=parts["test"].data,
            y_test=np.asarray(parts["test"].targets, np.uint8),
            classes=np.array(parts["train"].classes),
        )
        partial.replace(archive)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{folder} has no {ARCHIVE}, and CIFAR-100 could not be downloaded there ({error}). Either run once with "
            f"network access, or put {ARCHIVE} into a folder (numpy arrays x_train, y_train, x_test, y_test, classes; "
            "images in uint8 NHWC) and set CIFAR100_DATA to that folder."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


SHAPES = ("disc", "square", "diamond", "ring", "plus", "cross", "triangle", "bar", "pillar", "crescent")
COLORS = {
    "red": (210, 40, 40),
    "orange": (240, 140, 30),
    "yellow": (235, 225, 60),
    "green": (50, 160, 60),
    "cyan": (50, 200, 210),
    "blue": (50, 80, 210),
    "purple": (130, 50, 170),
    "pink": (240, 130, 190),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}


def make_synthetic(images_per_class: int, seed: int = 0) -> Dataset:
    """Make a verify_source substitute for CIFAR-100: ten shapes in ten colors on cluttered gray backgrounds.

    Position, size, shade and background vary from image to image. The test split has a quarter as many images.

    Args:
        images_per_class: Images per class in the training split.
    """
    random = np.random.default_rng(seed)
    classes = tuple(f"{color}_{shape}" for shape in SHAPES for color in COLORS)
    superclasses = tuple(shape for shape in SHAPES for _ in COLORS)
    train = _draw_split(images_per_class, random)
    test = _draw_split(max(1, images_per_class // 4), random)
    return _make_dataset(train, test, classes, superclasses)


def _draw_split(images_per_class: int, random: np.random.Generator) -> Split:
    labels = np.tile(np.arange(len(SHAPES) * len(COLORS)), images_per_class)
    n = len(labels)
    # The background is coarse gray clutter, enlarged without interpolation, plus a gradient.
    clutter = random.uniform(60, 190, (n, 4, 4, 1)).repeat(8, axis=1).repeat(8, axis=2)
    gradient = random.uniform(-40, 40, (n, 1, 1, 1)) * np.linspace(-1, 1, 32)[None, :, None, None]
    pixels = np.broadcast_to(clutter + gradient, (n, 32, 32, 3)).copy()

    center = random.uniform(11, 20, (2, n, 1, 1))
    radius = random.uniform(6, 11, (n, 1, 1))
    axis = np.arange(32)
    v = (axis[None, :, None] - center[0]) / radius
    u = (axis[None, None, :] - center[1]) / radius
    color = np.array(list(COLORS.values()))[labels % len(COLORS)] * random.uniform(0.8, 1.1, (n, 1))
    for shape, name in enumerate(SHAPES):
        rows = labels // len(COLORS) == shape
        inside = _shape_mask(name, u[rows], v[rows])[..., None]
        pixels[rows] = np.where(inside, color[rows, None, None, :], pixels[rows])
    pixels += random.normal(0, 12, pixels.shape)
    return Split(pixels.clip(0, 255).astype(np.uint8), labels.astype(np.int64))


def _shape_mask(shape: str, u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return a mask of the points that a shape covers.

    u points right and v points down, both in radii from the center.
    """
    r = np.hypot(u, v)
    box = np.maximum(abs(u), abs(v)) < 1
    match shape:
        case "disc":
            return r < 1
        case "square":
            return np.maximum(abs(u), abs(v)) < 0.85
        case "diamond":
            return abs(u) + abs(v) < 1.1
        case "ring":
            return (r < 1.05) & (r > 0.55)
        case "plus":
            return box & (np.minimum(abs(u), abs(v)) < 0.3)
        case "cross":
            return box & (abs(abs(u) - abs(v)) < 0.35)
        case "triangle":
            return (v < 0.8) & (2 * abs(u) - v < 0.9)
        case "bar":
            return (abs(u) < 1.1) & (abs(v) < 0.35)
        case "pillar":
            return (abs(u) < 0.35) & (abs(v) < 1.1)
        case _:  # crescent
            return (r < 1.05) & (np.hypot(u - 0.6, v) > 0.85)
