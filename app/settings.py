"""Every knob of the service, read from environment variables such as CIFAR100_PORT."""

import difflib
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import limits
from limits import RateLimitItem
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

MIB = 1 << 20
GIB = 1 << 30

Style = Literal["auto", "text", "json"]
Device = Literal["auto", "cpu", "cuda"]
Runtime = Literal["auto", "int8", "openvino", "torchscript"]


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _rate_limit(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        (limit,) = limits.parse_many(value)
    except ValueError:
        raise ValueError(f"{value!r} is not one rate: give one such as 60/minute, or nothing for no limit") from None
    if not (0 < limit.amount <= _MAX_RATE and 0 < limit.get_expiry() <= _YEAR_S):
        raise ValueError(
            f"{value!r} is out of range: give 1 to {_MAX_RATE:,} per at most a year, or nothing for no limit"
        )
    return limit


def _sendable(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x20-\x7e]*", key.get_secret_value()):
        raise ValueError("a key has printable ASCII characters only, as clients send it in an Authorization header")
    return key


def _proxies(value: str) -> str:
    for proxy in value.split(",") if value.strip() not in ("", "*") else ():
        try:
            ipaddress.ip_network(proxy.strip())
        except ValueError as error:
            raise ValueError(f"{error}; give addresses and networks such as 10.0.0.0/8, or * alone") from None
    return value.strip()


def _origin(value: str) -> str:
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@]+", value):
        raise ValueError(f"{value!r} is not an origin: give one such as https://example.org, without a path")
    return value


_MAX_RATE = 1_000_000
_YEAR_S = 366 * 24 * 3600

ApiKey = Annotated[SecretStr, Field(min_length=16), AfterValidator(_sendable)]
RateLimit = Annotated[RateLimitItem | None, NoDecode, BeforeValidator(_rate_limit)]
CommaSeparated = BeforeValidator(_split_commas)
Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]

OF_TRAINING = ("CIFAR100_FEATURES",)
"""Variables that only `training` reads."""

# Kubernetes sets such variables for each service of a namespace: CIFAR100_WEB_PORT for one called cifar100-web.
_SERVICE_LINK = re.compile(r".+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")


class Settings(BaseSettings):
    """Environment variables carry the prefix CIFAR100_. One with that prefix and an unknown name is refused.

    Every number has an upper bound beyond what one machine can use, so that a slip is refused at the start.
    """

    model_config = SettingsConfigDict(
        env_prefix="CIFAR100_",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,  # which may be a key
    )

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default=1, ge=0, le=1024)
    """Processes that serve, each with its share of the processors and all models in memory; 0 takes one for each
    processor, or fewer where memory does not suffice. A machine has a bound of its own, see
    `app.workers.choose_count`. What is counted or queued is so by each of them, but for metrics, which are added up."""

    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, CommaSeparated] = ()
    """Secrets, separated by commas, of those who may train, cancel, promote and measure. Without any, only requests of
    this machine may, and only while the service listens on a loopback address."""
    predict_needs_key: bool = False
    operator_rate_limit: RateLimit = limits.parse("60/minute")
    """Of calls that need a key, per client and key, and of wrong keys per client; empty for none."""
    predict_rate_limit: RateLimit = None
    """Of predictions, per client; by default none. A request costs one unit, and one more for each 10 ms of estimated
    decoding beyond the first 10 ms."""
    trusted_proxies: Annotated[str, AfterValidator(_proxies)] = ""
    """Addresses or networks, separated by commas, whose X-Forwarded-For tells the client; by default nobody's."""
    cors_origins: Annotated[tuple[Annotated[str, AfterValidator(_origin)], ...], NoDecode, CommaSeparated] = ()
    """Other sites whose pages may call the service from a browser."""

    log_style: Style = "auto"
    """One JSON object per line, or text; auto is text on a terminal."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    drain_s: Seconds = 0.0
    """How long the service still takes requests after SIGTERM, while /health/ready says no already."""

    keep_alive_s: int = Field(default=65, gt=0, le=3600)
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

    max_image_bytes: int = Field(default=10 * MIB, gt=0, le=GIB)
    max_image_pixels: int = Field(default=50_000_000, gt=0, le=500_000_000)
    max_images: int = Field(default=32, gt=0, le=1024)
    """Per /predict request."""
    max_predict_bytes: int = Field(default=64 * MIB, gt=0, le=4 * GIB)
    """Of the body of a /predict request."""
    max_archive_bytes: int = Field(default=256 * MIB, gt=0, le=16 * GIB)
    """Of a zip sent to /evaluate, packed and unpacked."""
    max_archive_images: int = Field(default=20_000, gt=0, le=1_000_000)
    max_pending_bytes: int = Field(default=GIB, gt=0, le=64 * GIB)
    """Of the bodies of all requests under way together; one client holds at most three quarters of it, and an equal
    share above that."""

    max_batch: int = Field(default=64, gt=0, le=4096)
    """Images computed together. A GPU is at its best with 256."""
    max_queue: int = Field(default=256, gt=0, le=100_000)
    """Images waiting for one model; further ones are refused."""
    deadline_s: Seconds = Field(default=10.0, gt=0)
    """A request that could not be started within this time is refused."""

    store_poll_s: Seconds = Field(default=1.0, ge=0.01)
    """How often the store is looked at for newly promoted versions."""
    evaluate_wait_s: Seconds = 5.0
    """POST /evaluate answers with the result if it is ready within this time, with 202 otherwise."""

    max_jobs: int = Field(default=100, gt=0, le=10_000)
    """Training jobs waiting."""
    max_job_epochs: int = Field(default=500, gt=0, le=100_000)
    """Of both stages together."""
    max_job_batch: int = Field(default=1024, gt=0, le=50_000)
    max_job_width: int = Field(default=128, gt=0, le=1024)
    keep_versions: int | None = Field(default=None, gt=0, le=1_000_000)
    """Versions of a model that stay when a job has published another one; the live one always stays. Default: all."""
    training_threads: int = Field(default=0, ge=0, le=1024)
    """Of a training process; 0 takes all processors but one, which is left to serving."""
    max_event_streams: int = Field(default=100, gt=0, le=10_000)
    """Clients that follow training jobs at the same time, per worker."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.predict_needs_key and not self.api_keys:
            raise ValueError("CIFAR100_PREDICT_NEEDS_KEY needs CIFAR100_API_KEYS")
        return self

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = [f"CIFAR100_{name.upper()}" for name in type(self).model_fields] + [*OF_TRAINING]
        unknown = [name for name in os.environ if name.upper().startswith("CIFAR100_") and name.upper() not in known]
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            unknown = [name for name in unknown if not _SERVICE_LINK.fullmatch(name)]
        if unknown:
            (nearest,) = difflib.get_close_matches(unknown[0].upper(), known, n=1, cutoff=0)
            raise ValueError(f"{', '.join(unknown)}: no such setting; did you mean {nearest}?")
        return self
