"""Every knob of the service, read from environment variables such as CIFAR100_PORT."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1 << 20


class Settings(BaseSettings):
    """Environment variables carry the prefix CIFAR100_."""

    model_config = SettingsConfigDict(env_prefix="CIFAR100_", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)

    models: Path = Path("models")
    """The model store."""
    runs: Path = Path("runs")
    """Where training jobs keep their run folders."""
    data: str | None = None
    """Folder of cifar100.npz, or "synthetic"; by default ~/.cache/cifar100."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    default_model: str | None = None
    """What /predict uses when the request names no model; by default the most accurate live one."""

    max_image_bytes: int = Field(default=10 * MIB, gt=0)
    max_image_pixels: int = Field(default=50_000_000, gt=0)
    max_images: int = Field(default=32, gt=0)
    """Per /predict request."""
    max_archive_bytes: int = Field(default=256 * MIB, gt=0)
    """Of a zip sent to /evaluate, packed and unpacked."""

    max_batch: int = Field(default=64, gt=0)
    """Images computed together."""
    max_queue: int = Field(default=512, gt=0)
    """Images waiting for one model; further ones are refused."""
    deadline_s: float = Field(default=10.0, gt=0)
    """A request that could not be started within this time is refused."""

    store_poll_s: float = Field(default=1.0, gt=0)
    """How often the store is looked at for newly promoted versions."""
    evaluate_wait_s: float = Field(default=5.0, ge=0)
    """POST /evaluate answers with the result if it is ready within this time, with 202 otherwise."""

    max_jobs: int = Field(default=100, gt=0)
    """Training jobs waiting."""
    max_job_epochs: int = Field(default=500, gt=0)
    """Of both stages together."""
    max_job_batch: int = Field(default=1024, gt=0)
    max_job_width: int = Field(default=128, gt=0)
    keep_versions: int | None = Field(default=None, gt=0)
    """Versions of a model that stay when a job has published another one; the live one always stays. Default: all."""
    training_threads: int = Field(default=0, ge=0)
    """Of a training process; 0 takes all processors but one, which is left to serving."""
