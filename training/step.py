"""`TrainStep` is one optimization step on a batch. On a GPU it is recorded as a CUDA graph.

Input: a batch of images or cached features, and the indices of its images in the training split.
Output: changed weights, and the sums of the loss and of correct predictions since the start of the epoch.

    batch --trunk--> inputs --mixup, CutMix--> inputs --head--> logits --loss--> gradients --optimizer--> weights
                                                 |                        |                                 |
                                                 +-------teacher----------+                              average

The part from the head on is recorded. The CPU needs more time to launch the kernels of a small network than the GPU
needs to compute them.

In a group of processes, each computes its share of the batch and averages its gradients with the others. Such a step is
not recorded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from training import augment, distillation
from training.averaging import WeightAverage
from training.networks import Classifier
from training.optimizers import load_optimizer_state, make_optimizer, set_learning_rate
from training.phase import Phase
from training.process_group import ALONE, ProcessGroup
from training.recipes import Recipe
from training.runtimes.cuda_graph import GraphedFunction


class TrainStep:
    """The optimization step of a run, with all state that it changes.

    A CUDA graph reads and writes tensors at fixed addresses: the weights, the optimizer's state, `labels`, `loss_sum`
    and `correct`. They change in place only. A new phase or mode starts a new recording.

    Args:
        recipe: Recipe of the run.
        classifier: Classifier that is trained in place.
        labels: int64 [N], labels of the training split on the classifier's device.
        dtype: Data type of the activations.
        group: Processes that train the run together.

    Attributes:
        phase: The batches, trunk and head, set by `begin_phase`.
        average: Moving average of the weights; None without one.
        teacher: Teacher that runs in every step; None without one.
        teacher_logits: float [N, classes], logits of a teacher on the training split; None without one.
        learning_rate: Learning rate of the last step.
        loss_sum: Sum over the images since the start of the epoch, float scalar.
        correct: Number of correct predictions since the start of the epoch, float scalar.
        seen: Number of images since the start of the epoch. Like the sums, it counts the share of this process.
    """

    phase: Phase

    def __init__(
        self,
        recipe: Recipe,
        classifier: Classifier,
        labels: Tensor,
        dtype: torch.dtype,
        group: ProcessGroup = ALONE,
    ):
        device = labels.device
        self.group = group
        self.recipe = recipe
        self.classifier = classifier
        self.labels = labels
        self.autocast = partial(torch.autocast, device.type, dtype, enabled=dtype is not torch.float32)
        self.optimizer = make_optimizer(recipe, classifier)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.average = self._start_average()
        self.teacher: distillation.Teacher | None = None
        self.teacher_logits: Tensor | None = None
        self.learning_rate = 0.0
        self.loss_sum, self.correct = torch.zeros(2, device=device)
        self.seen = 0
        self._training = True

    def begin_phase(self, phase: Phase) -> None:
        """Train on the batches of a phase from now on."""
        self.phase = phase
        self._head = self.group.wrap(self.classifier, phase.head)
        self._start_recording()

    def begin_epoch(self, epoch: int) -> None:
        """Set the training or evaluation mode of an epoch, counted from 1, and set the sums to zero."""
        training = not self.recipe.trains_in_evaluation_mode(epoch)
        if training != self._training:  # a CUDA graph keeps the mode of its recording
            self._training = training
            self._start_recording()
        self.classifier.train(training)
        self.loss_sum.zero_()
        self.correct.zero_()
        self.seen = 0

    def __call__(self, batch: Tensor, indices: Tensor, learning_rate: float, generator: torch.Generator) -> None:
        """Train on one batch.

        Args:
            batch: uint8 images or cached features [B, C, H, W].
            indices: int64 [B], indices of the images in the training split.
            learning_rate: Learning rate of the schedule.
            generator: Generator on the CPU for mixup and CutMix.
        """
        self.learning_rate = learning_rate
        set_learning_rate(self.optimizer, learning_rate)
        count = len(indices)
        batch, indices = self.group.take_share(batch), self.group.take_share(indices)
        self.seen += len(indices)
        indices = indices.to(self.labels.device, non_blocking=True)
        with self.autocast():
            inputs = self.phase.trunk(batch)
        mixing: tuple[Tensor, ...] = ()
        if self.recipe.mixes_images:
            inputs, partners, share = augment.combine(inputs, self.recipe, generator)
            mixing = partners, torch.full((), share, device=self.labels.device)
        # The group averages the gradients of its processes, whose shares differ by an image at most.
        self._weight = len(indices) * self.group.size / count
        self._update(inputs, indices, self._get_teacher_logits(inputs, indices), *mixing)

    def add_up(self) -> None:
        """Add up `loss_sum`, `correct` and `seen` over the group. Every process calls this at the end of an epoch."""
        seen = torch.tensor(self.seen, device=self.labels.device)
        self.group.add_up(self.loss_sum, self.correct, seen)
        self.seen = int(seen)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `load_state_dict`, without the weights to publish ("classifier").

        With an average, "trained" holds the weights that training goes on with.
        """
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return state | ({"trained": self.classifier.state_dict()} if self.average else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the weights, the optimizer's state, the gradient scale and the average from a checkpoint."""
        self.classifier.load_state_dict(state["classifier"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if state["scaler"]:  # empty if the epochs ran in another precision, on another machine
            self.scaler.load_state_dict(state["scaler"])
        self.average = self._start_average()
        if self.average:  # the checkpoint's classifier holds the averaged weights
            self.classifier.load_state_dict(state["trained"])

    def _start_average(self) -> WeightAverage | None:
        decay = self.recipe.average_decay
        return WeightAverage(self.classifier, decay) if decay else None

    def _start_recording(self) -> None:
        # A gradient scaler reads back on the host whether gradients overflowed, which a CUDA graph cannot record. In a
        # group, the size of a share changes the weight of the loss.
        records = self.labels.is_cuda and not self.scaler.is_enabled() and self.group.size == 1
        self._update: Callable[..., None] = GraphedFunction(self._train_on) if records else self._train_on

    def _get_teacher_logits(self, inputs: Tensor, indices: Tensor) -> Tensor:
        """Return the teacher's logits for a batch, float [B, classes], or [B, 0] without a teacher."""
        if self.teacher is not None:
            return self.teacher(inputs)
        if self.teacher_logits is not None:
            return self.teacher_logits[indices]
        return self.labels.new_empty(len(indices), 0, dtype=torch.float32)

    def _train_on(self, inputs: Tensor, indices: Tensor, teacher_logits: Tensor, *mixing: Tensor) -> None:
        """Train on the inputs of the head. This is the recorded part of a step.

        For mixup and CutMix, `mixing` holds the partners int64 [B] and the share of the batch itself, 0-1.
        """
        with self.autocast():
            logits = self._head(inputs)
            loss = self._compute_loss(logits, indices, teacher_logits)
            if mixing:
                partners, share = mixing
                # A teacher that runs in every step saw the combined images, so its logits hold for both terms.
                theirs = teacher_logits if self.teacher is not None else teacher_logits[partners]
                loss = torch.lerp(self._compute_loss(logits, indices[partners], theirs), loss, share)
        self.optimizer.zero_grad()
        self.scaler.scale(loss if self.group.size == 1 else loss * self._weight).backward()
        with self.autocast():  # Muon's matrix products run in half precision too
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update()
        self.loss_sum.add_(loss.detach() * len(indices))
        self.correct.add_((logits.detach().argmax(1) == self.labels[indices]).sum())

    def _compute_loss(self, logits: Tensor, indices: Tensor, teacher_logits: Tensor) -> Tensor:
        """Compute the loss against the labels and, if there is a teacher, against its logits."""
        loss = F.cross_entropy(logits, self.labels[indices], label_smoothing=self.recipe.label_smoothing)
        if not self.recipe.teachers:
            return loss
        distilled = distillation.compute_loss(logits, teacher_logits, self.recipe.teacher_temperature)
        return torch.lerp(loss, distilled, self.recipe.teacher_weight)
