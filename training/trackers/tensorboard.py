"""`TensorBoardTracker` writes a run for TensorBoard.

Output: event files in RUN/tensorboard with scalars, hyperparameters, the graph of the network, and pictures.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from training.loop import Epoch, Event
from training.networks import build
from training.recipes import format_value
from training.run import Publication, Run
from training.runtimes.engine import example_images
from training.runtimes.torchscript import ignore_deprecation
from training.trackers.tracker import Status, Tracker

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardTracker(Tracker):
    """The TensorBoard events of a run.

    An epoch that is measured again after a crash replaces its earlier scalars and those of later epochs.

    Args:
        run: The run.
        classes: Number of classes.
    """

    def __init__(self, run: Run, classes: int):
        self._run = run
        self._classes = classes
        self._writer: SummaryWriter | None = None

    def log_event(self, event: Event) -> None:
        """Write the measures of an epoch, and the hyperparameters and the graph before the first one."""
        if not isinstance(event, Epoch):
            return
        if not self._writer:
            self._writer = self._open(purge_step=event.epoch)
            self._write_hyperparameters(self._writer, event.split)
            if event.epoch == 1:
                self._write_graph(self._writer)
        self._writer.add_scalar("loss/train", event.train_loss, event.epoch)
        self._writer.add_scalar(f"loss/{event.split}", event.loss, event.epoch)
        self._writer.add_scalar("top-1/train", event.train_accuracy, event.epoch)
        self._writer.add_scalar(f"top-1/{event.split}", event.top1, event.epoch)
        self._writer.add_scalar("top-5", event.top5, event.epoch)
        self._writer.add_scalar("learning rate", event.learning_rate, event.epoch)
        self._writer.add_scalar("images per second", event.images_per_s, event.epoch)
        self._writer.flush()

    def log_publication(self, published: Publication, version: Path) -> None:  # noqa: ARG002
        """Write the pictures of the run."""
        self._writer = self._writer or self._open()
        for name, file in self._run.files().items():
            if file.parent == self._run.pictures:
                with Image.open(file) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                self._writer.add_image(f"pictures/{Path(name).stem}", pixels, published.epoch, dataformats="HWC")
        self._writer.flush()

    def close(self, status: Status) -> None:  # noqa: ARG002
        """Close the event file."""
        if self._writer:
            self._writer.close()

    def _open(self, purge_step: int | None = None) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        return SummaryWriter(str(self._run.path / "tensorboard"), purge_step=purge_step)

    def _write_hyperparameters(self, writer: "SummaryWriter", split: str) -> None:
        """Write the recipe as hyperparameters. TensorBoard compares them by the last scalars of the evaluated split."""
        from torch.utils.tensorboard.summary import hparams

        fields = self._run.recipe().public_fields
        values = {name: format_value(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        # SummaryWriter.add_hparams would write them as another run, which has ended already.
        experiment, session_start, _ = hparams(values, {f"top-1/{split}": 0.0, f"loss/{split}": 0.0})
        file_writer: Any = writer.file_writer
        file_writer.add_summary(experiment)
        file_writer.add_summary(session_start)

    def _write_graph(self, writer: "SummaryWriter") -> None:
        with torch.random.fork_rng(devices=[]), ignore_deprecation():  # the run keeps its state of the random generator
            writer.add_graph(build(self._run.recipe().from_scratch, self._classes), example_images(1))
