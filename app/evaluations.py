"""Measure a live model through the engine that also answers /predict.

In: labeled images from the data set or from an uploaded zip.  Out: an `Evaluation`, in the response or later.
Chunks of images go through the model's queue like other requests, so they do not delay predictions. Each measurement
writes its progress to a file below the runs folder, so that other server processes can report it too.
"""

import asyncio
import logging
import re
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from app import decoding, images
from app.decode_process import DecodeProcess
from app.errors import shortage
from app.exceptions import BadRequest, NotFound, Problem, TooLarge, Unavailable
from app.pool import Model
from app.settings import MIB, Settings
from app.threads import Threads
from training.dataset import DataError, load_dataset
from training.evaluate import evaluate
from training.store import Evaluation
from training.text import quote

log = logging.getLogger(__name__)

_CHUNK = 16  # images per turn in the model's queue
_KEPT = 100  # finished evaluations that stay available
_MAX_RUNNING = 4
_ID = re.compile(r"[0-9a-f]{12}")
_HEARTBEAT_S = 1.0  # interval at which a running measurement writes its file
_DEAD_S = 30.0  # a running measurement whose file is older counts as failed
# Python decompresses data of other methods at once, with unbounded memory.
_BOUNDED_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Exceptions that zipfile raises for damaged files. RuntimeError also stands for encrypted files.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    OSError,
    RuntimeError,
    ValueError,
    IndexError,
    EOFError,
)
_ENTRY_HEADER = struct.Struct("<26x2H")  # precedes an entry's data; ends with the lengths of its name and extra fields
_HEADER_SIGNATURE = b"PK\x03\x04"
_ENTRY_SIGNATURE = b"PK\x01\x02"  # begins every entry of a zip's directory


class Labelled(BaseModel, arbitrary_types_allowed=True):
    """Labeled images: uint8 [N, 3, 32, 32], with class ids int64 [N]."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    split: str


Read = Callable[[threading.Event], Labelled]
"""Function that reads the images of a measurement. It returns or raises early once the event is set."""


class EvaluationJob(BaseModel):
    """One measurement, running or finished."""

    id: str
    state: Literal["running", "succeeded", "failed"] = "running"
    model: str
    version: int
    engine: str
    split: str | None = None
    """Source of the images: test, train or zip."""
    created: datetime
    done: int = 0
    """Number of images computed so far."""
    result: Evaluation | None = None
    error: str | None = None


class Evaluations:
    """The running evaluations and the last 100 finished ones of all servers that share a runs folder.

    Args:
        settings: Runs folder, limits of images and archives, and how long a request waits for its result.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._folder = settings.runs / "evaluations"
        self._jobs: dict[str, EvaluationJob] = {}  # evaluations of this server
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._threads = Threads("the measurements", 2 * _MAX_RUNNING, patience_s=_DEAD_S)

    async def stop(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self._threads.close()

    async def start(self, model: Model, read: Read) -> EvaluationJob:
        """Start to measure a model. Return when it is done or after `evaluate_wait_s`, whichever comes first.

        Args:
            model: The version to measure. A promotion during the measurement does not change it.
            read: Function that reads the images. It is called in a thread.

        Raises:
            Unavailable: Too many evaluations are running.
            Exception: The error of the measurement, if it fails within `evaluate_wait_s`.
        """
        if len(self._tasks) >= _MAX_RUNNING:
            raise Unavailable(f"{len(self._tasks)} evaluations are running; try again later")
        now = datetime.now(UTC)
        job = EvaluationJob(
            id=uuid4().hex[:12],
            model=model.card.name,
            version=model.card.version,
            engine=model.batcher.engine.name,
            created=now,
        )
        self._jobs[job.id] = job
        while len(self._jobs) > _KEPT + _MAX_RUNNING:
            oldest = next(key for key in self._jobs if key not in self._tasks)
            del self._jobs[oldest]
        task = self._tasks[job.id] = asyncio.create_task(self._see_through(job, model, read))
        task.add_done_callback(lambda task: self._over(job.id, task))
        done, _ = await asyncio.wait([task], timeout=self._settings.evaluate_wait_s)
        if done and (error := task.exception()):
            raise error
        return job

    def _over(self, evaluation_id: str, task: "asyncio.Task[None]") -> None:
        del self._tasks[evaluation_id]
        if not task.cancelled():
            task.exception()  # the job reports the exception; asyncio would log one that is never retrieved

    async def get(self, evaluation_id: str) -> EvaluationJob:
        """Return the current state of an evaluation.

        Raises:
            NotFound: The evaluation does not exist, or its file has been pruned.
        """
        job = self._jobs.get(evaluation_id) or await self._threads.read(self._read, evaluation_id)
        if job is None:
            raise NotFound(f"there is no evaluation {quote(evaluation_id)}; it may be too long ago")
        return job

    def _read(self, evaluation_id: str) -> EvaluationJob | None:
        """Read an evaluation from the file that another server, or this one before a restart, has written.

        A running evaluation whose file is older than 30 s is returned as failed. Returns None if no file is readable.
        """
        if not _ID.fullmatch(evaluation_id):
            return None
        file = self._file(evaluation_id)
        try:
            silent_s = time.time() - file.stat().st_mtime
            job = EvaluationJob.model_validate_json(file.read_bytes())
        except (OSError, ValueError):  # the file does not exist, or a crash has damaged it
            return None
        if job.state == "running" and silent_s > _DEAD_S:
            job.state, job.error = "failed", "the server that measured has ended"
        return job

    def _write(self, job: EvaluationJob) -> None:
        """Write the state of an evaluation to its file, which is replaced atomically, for other servers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._file(job.id)
        partial = file.with_suffix(f".{uuid4().hex}.partial")
        partial.write_text(job.model_dump_json())
        partial.replace(file)

    def _prune(self) -> None:
        """Delete all evaluation files except the 100 newest."""
        with suppress(OSError):  # another server may delete the same files
            for old in sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
                old.unlink(missing_ok=True)

    def _file(self, evaluation_id: str) -> Path:
        return self._folder / f"{evaluation_id}.json"

    async def _see_through(self, job: EvaluationJob, model: Model, read: Read) -> None:
        measuring = asyncio.create_task(self._measure(job, model, read))
        try:
            await self._threads.run(self._prune)
            while not measuring.done():
                with suppress(OSError, Unavailable):
                    await self._threads.run(self._write, job)
                await asyncio.wait([measuring], timeout=_HEARTBEAT_S)
        except asyncio.CancelledError:
            measuring.cancel()
            if job.state == "running":
                job.state, job.error = "failed", "the service was stopped"
            raise
        finally:
            try:
                await self._threads.run(self._write, job)
            except (OSError, Unavailable) as error:
                log.warning("evaluation %s is known to this server only: %s", job.id, error)
        await measuring

    async def _measure(self, job: EvaluationJob, model: Model, read: Read) -> None:
        over = threading.Event()
        try:
            labelled = await self._threads.run(read, over)
            job.split = labelled.split
            chunk = min(_CHUNK, model.batcher.max_batch)
            logits = []
            for start in range(0, len(labelled.labels), chunk):
                logits.append(await self._logits(model, labelled.images[start : start + chunk]))
                job.done = start + len(logits[-1])
            everything = torch.from_numpy(np.concatenate(logits))
            job.result = await self._threads.run(evaluate, everything, torch.from_numpy(labelled.labels))
            job.state = "succeeded"
        except Problem as error:
            job.state, job.error = "failed", error.detail
            raise
        except Exception as error:
            if lacks := shortage(error):
                job.state, job.error = "failed", f"{lacks}; try again later"
            else:
                log.exception("evaluation %s failed", job.id)
                job.state, job.error = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            over.set()

    async def _logits(self, model: Model, chunk: NDArray[np.uint8]) -> NDArray[np.float32]:
        while True:
            try:
                return (await model.batcher.run(chunk)).logits
            except Unavailable:  # the queue is full; predictions have priority
                await asyncio.sleep(0.05)


def read_split(settings: Settings, split: Literal["test", "train"], limit: int | None, classes: list[str]) -> Labelled:
    """Read `limit` images of a split, chosen at random with a fixed seed so that the classes are mixed.

    Args:
        settings: The folder of the data set.
        split: "test" or "train".
        limit: Number of images. None reads all.
        classes: Class names of the model.

    Raises:
        Unavailable: The data set is missing or damaged.
        BadRequest: The model was trained for other classes.
    """
    try:
        dataset = load_dataset(settings.data)
    except DataError as error:
        raise Unavailable(str(error)) from error
    if list(dataset.classes) != classes:
        raise BadRequest("the model was trained for other classes than the data set has")
    part = dataset.test if split == "test" else dataset.train
    order = np.random.default_rng(0).permutation(len(part))[:limit]
    chosen = part[np.sort(order)]
    return Labelled(images=chosen.images.transpose(0, 3, 1, 2), labels=chosen.labels, split=split)


def read_zip(settings: Settings, file: BinaryIO, classes: list[str], over: threading.Event) -> Labelled:
    """Read and decode the images of a zip whose folders are named by class, such as `apple/1.png`.

    Args:
        settings: Limits of images and archives.
        file: The zip, seekable.
        classes: Class names of the model.
        over: Event that stops the reading.

    Raises:
        Unavailable: `over` was set.
        BadRequest: The file is not a zip, has no images, or has a folder that names no class.
        TooLarge: The zip has too many entries, or unpacks to more bytes than the limit.
        Problem: An image cannot be decoded.
    """
    ids = {_folder_name(label): number for number, label in enumerate(classes)}
    pixels, labels = [], []
    limits = settings.max_image_bytes, settings.max_image_pixels
    if _directory_entries(file) > settings.max_archive_images:
        raise TooLarge(f"the zip has more than {settings.max_archive_images:,} entries")
    try:
        with zipfile.ZipFile(file) as archive, closing(DecodeProcess(*limits)) as process:
            _require_apart(file, archive)
            entries = [entry for entry in archive.infolist() if not _ignored(entry)]
            if sum(entry.file_size for entry in entries) > settings.max_archive_bytes:
                raise TooLarge(f"the zip unpacks to more than {settings.max_archive_bytes:,} bytes")
            for entry in entries:
                if over.is_set():
                    raise Unavailable("the measurement was stopped")
                folder = entry.filename.split("/")[-2] if "/" in entry.filename else ""
                if _folder_name(folder) not in ids:
                    raise BadRequest(
                        f"{quote(entry.filename)}: the folder {quote(folder)} is not a class; "
                        "GET /models/{name} names them"
                    )
                if entry.file_size > settings.max_image_bytes:
                    raise TooLarge(f"{entry.filename} is larger than {settings.max_image_bytes:,} bytes")
                if entry.compress_type not in _BOUNDED_METHODS:
                    raise BadRequest(f"{entry.filename} is packed by an unusual method; pack with deflate")
                with archive.open(entry) as member:
                    content = member.read(settings.max_image_bytes + 1)
                try:
                    pixels.append(_decode(content, limits, process))
                except Problem as error:
                    error.detail = f"{entry.filename}: {error.detail}"
                    raise
                labels.append(ids[_folder_name(folder)])
    except _ZIP_ERRORS as error:
        raise BadRequest(f"the zip cannot be read: {error}") from None
    if not pixels:
        raise BadRequest("the zip has no images; put them into folders named by class, such as apple/1.png")
    return Labelled(images=np.stack(pixels), labels=np.array(labels, np.int64), split="zip")


def _decode(content: bytes, limits: tuple[int, int], process: DecodeProcess) -> NDArray[np.uint8]:
    """Decode an image to uint8 [3, 32, 32]. An image that costs more than `decoding.MEDIUM` goes to the process."""
    try:
        return images.decode(content, *limits, decoding.MEDIUM)
    except images.CostlyImage:
        return process.decode(content)


def _directory_entries(file: BinaryIO) -> int:
    """Return an upper bound on the entries of a zip: the number of entry signatures in the file.

    `zipfile` reads the whole directory and allocates memory for each entry, so the bound is checked first.
    """
    count, tail = 0, b""
    while chunk := file.read(MIB):
        chunk = tail + chunk
        count += chunk.count(_ENTRY_SIGNATURE)
        tail = chunk[-len(_ENTRY_SIGNATURE) + 1 :]
    return count


def _require_apart(file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Check that no two entries share bytes. Otherwise a few kilobytes could hold one image a thousand times.

    Later releases of Python check this when an entry is opened, but accept two entries at the same offset.

    Raises:
        BadRequest: An entry does not begin with a header, or overlaps the next entry or the directory.
    """
    end, following = archive.start_dir, "the directory"
    for entry in sorted(archive.infolist(), key=lambda each: each.header_offset, reverse=True):
        name = quote(entry.filename)
        if not 0 <= entry.header_offset < end:
            raise BadRequest(f"the zip cannot be read: {name} and {following} overlap")
        file.seek(entry.header_offset)
        header = file.read(_ENTRY_HEADER.size)
        if len(header) < _ENTRY_HEADER.size or not header.startswith(_HEADER_SIGNATURE):
            raise BadRequest(f"the zip cannot be read: {name} has no header at byte {entry.header_offset:,}")
        name_length, extra_length = _ENTRY_HEADER.unpack(header)
        if entry.header_offset + len(header) + name_length + extra_length + entry.compress_size > end:
            raise BadRequest(f"the zip cannot be read: {name} and {following} overlap")
        end, following = entry.header_offset, name


def _ignored(entry: zipfile.ZipInfo) -> bool:
    """Return True for folders and for the metadata files of macOS."""
    return entry.is_dir() or entry.filename.startswith("__MACOSX/") or entry.filename.endswith(".DS_Store")


def _folder_name(text: str) -> str:
    return text.strip().lower().replace(" ", "_")
