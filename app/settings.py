"""Every knob of the service, read from environment variables such as CIFAR100_PORT."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import limits
from limits import RateLimitItem
from pydantic import BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1 << 20

Style = Literal["auto", "text", "json"]
Device = Literal["auto", "cpu", "cuda"]
Runtime = Literal["auto", "int8", "openvino", "torchscript"]


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _rate_limit(value: Any) -> Any:
    return (limits.parse(value) if value else None) if isinstance(value, str) else value


ApiKey = Annotated[SecretStr, Field(min_length=16)]
RateLimit = Annotated[RateLimitItem | None, NoDecode, BeforeValidator(_rate_limit)]
CommaSeparated = BeforeValidator(_split_commas)


class Settings(BaseSettings):
    """Environment variables carry the prefix CIFAR100_."""

    model_config = SettingsConfigDict(
        env_prefix="CIFAR100_",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,  # which may be a key
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default=1, ge=0)
    """Processes that serve, each with its share of the processors and all models in memory; 0 takes one for each
    processor. What is counted or queued is so by each of them, but for metrics, which are added up."""

    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, CommaSeparated] = ()
    """Secrets, separated by commas, of those who may train, cancel, promote and measure. Without any, only requests of
    this machine may, and only while the service listens on a loopback address."""
    predict_needs_key: bool = False
    operator_rate_limit: RateLimit = limits.parse("60/minute")
    """Of calls that need a key, per client; empty for none."""
    predict_rate_limit: RateLimit = None
    trusted_proxies: str = ""
    """Addresses or networks, separated by commas, whose X-Forwarded-For tells the client; by default nobody's."""
    cors_origins: Annotated[tuple[str, ...], NoDecode, CommaSeparated] = ()
    """Other sites whose pages may call the service from a browser."""

    log_style: Style = "auto"
    """One JSON object per line, or text; auto is text on a terminal."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    drain_s: float = Field(default=0.0, ge=0)
    """How long the service still takes requests after SIGTERM, while /health/ready says no already."""

    keep_alive_s: int = Field(default=65, gt=0)
    """How long a connection may be idle; longer than with most load balancers (60), which would use it otherwise just
    when it is closed."""

    models: Path = Path("models")
    """The model store."""
    runs: Path = Path("runs")
    """Where training jobs keep their run folders."""
    data: str | None = None
    """Folder of cifar100.npz, or "synthetic"; by default ~/.cache/cifar100."""

    device: Device = "auto"
    runtime: Runtime = "auto"
    """auto takes TorchScript on the GPU; on the CPU OpenVINO, and there the int8 form where a model has one and the
    processor has instructions for it; openvino never takes that form, and torchscript computes there in float32."""
    default_model: str | None = None
    """What answers when a request names no model; by default the most accurate live one."""

    max_image_bytes: int = Field(default=10 * MIB, gt=0)
    max_image_pixels: int = Field(default=50_000_000, gt=0)
    max_images: int = Field(default=32, gt=0)
    """Per /predict request."""
    max_predict_bytes: int = Field(default=64 * MIB, gt=0)
    """Of the body of a /predict request."""
    max_archive_bytes: int = Field(default=256 * MIB, gt=0)
    """Of a zip sent to /evaluate, packed and unpacked."""
    max_archive_images: int = Field(default=20_000, gt=0)
    max_pending_bytes: int = Field(default=1024 * MIB, gt=0)
    """Of the bodies of all requests under way together."""

    max_batch: int = Field(default=64, gt=0)
    """Images computed together. A GPU is at its best with 256."""
    max_queue: int = Field(default=256, gt=0)
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
    max_event_streams: int = Field(default=100, gt=0)
    """Clients that follow training jobs at the same time."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.predict_needs_key and not self.api_keys:
            raise ValueError("CIFAR100_PREDICT_NEEDS_KEY needs CIFAR100_API_KEYS")
        return self
