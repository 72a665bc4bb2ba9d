"""Knowledge distillation trains a student on the logits of published classifiers.

The method is that of Hinton et al. 2015, arXiv:1503.02531. The logits are targets beside the labels. Several versions
form one teacher, by the mean of their logits.

With `teacher_view=original` the teacher sees every image once, unchanged and mirrored, before training begins. The mean
of both logits is saved in the run folder. An epoch then costs the same as without a teacher, and a shifted image has
the targets of the unshifted image. With `teacher_view=augmented` the teacher sees the student's batch in every step
(Beyer et al. 2021, arXiv:2106.05237).
"""

from collections.abc import Callable, Generator

import torch
from torch import Tensor
from torch.nn import functional as F

from training.dataset import Dataset
from training.phase_report import PhaseReport, predict_with_reports
from training.recipes import Recipe
from training.run import Run
from training.runtimes.selection import Purpose, load
from training.store import Store

Teacher = Callable[[Tensor], Tensor]
"""A function from uint8 images [B, 3, 32, 32] to logits [B, classes]."""


def load_teacher(recipe: Recipe, store: Store, dataset: Dataset, device: torch.device) -> Teacher:
    """Load the teacher of a recipe, on the runtime that `runtimes.selection` gives to teachers.

    On a CPU with `teacher_view=augmented`, a version that has an int8 model uses it, because it runs in every step.

    Args:
        recipe: Recipe of the student.
        store: Model store of the teacher's versions.
        dataset: Data set of the student.
        device: Device of the student's batches.

    Returns:
        A function from uint8 images [B, 3, 32, 32] to the mean logits of the versions, float32 [B, classes].

    Raises:
        StoreError: A version cannot be used as teacher, see `Store.verify_source`.
        EngineError: The runtime cannot compute a version.
    """
    files = [
        store.verify_source(version, dataset.classes, dataset.fingerprint, recipe.validation_images)
        for version in recipe.teachers
    ]
    purpose: Purpose = "online-teaching" if recipe.teacher_view == "augmented" else "teaching"
    engines = [load(file, "cuda" if device.type == "cuda" else "cpu", purpose=purpose) for file in files]

    def compute_mean_logits(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([engine.compute_logits(images) for engine in engines]).mean(0)

    return compute_mean_logits


def compute_teacher_logits(
    name: str, load: Callable[[], Teacher], images: Tensor, fingerprint: str, run: Run
) -> Generator[PhaseReport, None, Tensor]:
    """Compute the teacher's logits of all training images, or load them from the run folder.

    Args:
        name: Name of the teacher, as in the recipe.
        load: Function that loads the teacher. It is called only if the run folder has no logits.
        images: uint8 [N, 32, 32, 3] on the teacher's device.
        fingerprint: Fingerprint of the images' data set.
        run: Run whose folder keeps the logits.

    Yields:
        Progress.

    Returns:
        float32 logits [N, classes] on the images' device, each the mean over an image and its mirror image.
    """
    if (saved := run.teacher_logits(name, fingerprint)) is not None and len(saved) == len(images):
        return saved.to(images.device)
    teacher = load()

    def compute_mirrored_mean(pixels: Tensor) -> Tensor:
        return (teacher(pixels) + teacher(pixels.flip(3))) / 2

    message = f"computing the logits of {name} on the training images"
    start = PhaseReport("features", message, images=len(images))
    logits = yield from predict_with_reports(compute_mirrored_mean, images, start)
    run.save_teacher_logits(logits, name, fingerprint)
    return logits.to(images.device)


def compute_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute the distillation loss between softened student and teacher predictions (Hinton et al. 2015).

    Args:
        logits: Logits of the student, float [B, classes].
        teacher_logits: Logits of the teacher, float [B, classes].
        temperature: Divisor of both logits.

    Returns:
        The Kullback-Leibler divergence, mean over the batch. It is multiplied by the square of the temperature, so that
        its gradients have the scale of a loss against labels.
    """
    student, teacher = ((each.float() / temperature).log_softmax(1) for each in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
