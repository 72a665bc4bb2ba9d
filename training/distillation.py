"""Learning from a teacher: published classifiers whose answers on the training images are targets beside the labels.

Hinton et al. 2015, arXiv:1503.02531. Several versions make one teacher, by the mean of their logits. There are two ways
to ask it. With `teacher_view=original` it sees every image once, as it is and mirrored, before training begins, and the
mean of both is kept in the run folder: an epoch then costs what it costs without a teacher, and a shifted image has the
targets of the image where it was. With `teacher_view=augmented` it sees, in every step, the batch that the student is
trained on (Beyer et al. 2021, arXiv:2106.05237).
"""

from collections.abc import Callable, Generator

import torch
from torch import Tensor
from torch.nn import functional as F

from training import openvino_ir, torchscript
from training.data import Dataset
from training.evaluate import BATCH_SIZES
from training.preparation import Pace, Preparation
from training.recipes import Recipe
from training.run import Run
from training.store import Store

Teacher = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, 32, 32] to logits [B, classes]."""


def load_teacher(recipe: Recipe, store: Store, dataset: Dataset, device: torch.device) -> Teacher:
    """The classifiers of the versions that a recipe names as one, on the fastest runtime there is for the device.

    On a CPU, a teacher that is asked in every step answers in its quantized form, if it was published with one.

    Args:
        dataset: that the student is trained on.

    Raises:
        StoreError: see `Store.learnable`.
    """
    files = [
        store.learnable(version, dataset.classes, dataset.fingerprint, recipe.validation_images)
        for version in recipe.teachers
    ]
    if device.type == "cpu" and recipe.teacher_view == "augmented":
        quantized = [file.with_name(openvino_ir.INT8) for file in files]
        files = [int8 if int8.exists() else file for int8, file in zip(quantized, files, strict=True)]
    teachers: list[Teacher] = [
        torchscript.load(file, device) if device.type == "cuda" else openvino_ir.Compiled(file).on_tensors
        for file in files
    ]

    def mean(images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=device.type == "cuda"):
            return torch.stack([teacher(images).float() for teacher in teachers]).mean(0)

    return mean


def teach(
    name: str, load: Callable[[], Teacher], images: Tensor, fingerprint: str, run: Run
) -> Generator[Preparation, None, Tensor]:
    """What a teacher makes of every training image, computed or found in the run folder; yields progress.

    Args:
        name: of the teacher.
        load: makes the teacher; called only if it is needed.
        images: uint8 [N, 32, 32, 3] on the teacher's device.
        fingerprint: of the data set that they are from.

    Returns:
        float32 logits [N, classes] on the same device.
    """
    if (known := run.teacher_logits(name, fingerprint)) is not None and len(known) == len(images):
        return known.to(images.device)
    teacher = load()
    message = f"{name} looks at the training images"
    yield Preparation(message, 0, len(images))
    parts, pace = list[Tensor](), Pace(message, len(images))
    for batch in images.split(BATCH_SIZES[images.device.type]):
        pixels = batch.permute(0, 3, 1, 2)
        with torch.inference_mode():
            parts.append((teacher(pixels) + teacher(pixels.flip(3))) / 2)
        if report := pace.advance(len(batch)):
            yield report
    logits = torch.cat(parts)
    run.save_teacher_logits(logits.cpu(), name, fingerprint)
    return logits


def loss(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """How far the student's softened answers are from the teacher's, at the scale of a loss against labels.

    Args:
        logits: the student's, float [B, classes].
        taught: the teacher's, float [B, classes].

    Returns:
        Kullback-Leibler divergence times the square of the temperature, mean over the batch.
    """
    student, teacher = ((each.float() / temperature).log_softmax(1) for each in (logits, taught))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
