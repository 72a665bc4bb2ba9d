"""Defines the settings of the service and reads them from environment variables such as CIFAR100_PORT.

Input: the environment. Output: a validated `Settings`, or a pydantic ValidationError.
"""

import difflib
import ipaddress
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import limits
from limits import RateLimitItem
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.clients import UNIX_CLIENT
from app.machine import GIB, MIB
from app.path_prefix import parse_path_prefix
from training.runtimes import Device, Runtime

LogStyle = Literal["auto", "text", "json"]


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _empty_to_none(value: Any) -> Any:
    return value or None


def _parse_rate_limit(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        (limit,) = limits.parse_many(value)
    except ValueError:
        raise ValueError(
            f"{value!r} is not a rate; use 60/minute or the like, or an empty value for no limit"
        ) from None
    if not (0 < limit.amount <= _MAX_RATE and 0 < limit.get_expiry() <= _YEAR_S):
        raise ValueError(
            f"{value!r} is out of range; use 1 to {_MAX_RATE:,} per at most a year, or an empty value for no limit"
        )
    return limit


def _require_postgresql(url: SecretStr | None) -> SecretStr | None:
    if url is None:
        return None
    if not re.match(r"postgres(ql)?://", url.get_secret_value()):
        raise ValueError("it is not a PostgreSQL URL; use one such as postgresql://user:password@host/name")
    if not find_spec("psycopg"):
        raise ValueError("a PostgreSQL database needs the extra cloud: pip install 'cifar100[cloud]'")
    return url


def _require_ascii(key: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x20-\x7e]*", key.get_secret_value()):
        raise ValueError("a key may contain only printable ASCII characters, because it is sent in a header")
    return key


def _parse_proxies(value: str) -> str:
    proxies = [proxy.strip() for proxy in value.split(",")] if value.strip() not in ("", "*") else []
    for proxy in proxies:
        try:
            if proxy != UNIX_CLIENT:
                ipaddress.ip_network(proxy)
        except ValueError as error:
            raise ValueError(
                f"{error}; give addresses, networks such as 10.0.0.0/8 and {UNIX_CLIENT} for a unix socket, or * alone"
            ) from None
    return ",".join(proxies) or value.strip()


def _parse_location(value: Path | str) -> Path | str:
    return value if "://" in str(value) else Path(value)


def _parse_origin(value: str) -> str:
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^\s/?#@]+", value):
        raise ValueError(f"{value!r} is not an origin; use one such as https://example.org, without a path")
    return value


_MAX_RATE = 1_000_000
_YEAR_S = 366 * 24 * 3600

ApiKey = Annotated[SecretStr, Field(min_length=16), AfterValidator(_require_ascii)]
RateLimit = Annotated[RateLimitItem | None, NoDecode, BeforeValidator(_parse_rate_limit)]
CommaSeparated = BeforeValidator(_split_commas)
Seconds = Annotated[float, Field(le=3600, allow_inf_nan=False)]  # each field has its own lower bound

TRAINING_VARIABLES = ("CIFAR100_FEATURES", "CIFAR100_MODELS_CACHE")
"""Environment variables that only `training` reads."""

CLIENT_VARIABLES = ("CIFAR100_SERVER", "CIFAR100_API_KEY")
"""Environment variables that only the commands for a running service read."""

# Kubernetes sets these variables for each service of a namespace: CIFAR100_WEB_PORT for a service cifar100-web.
_SERVICE_LINK = re.compile(r".+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")


class Settings(BaseSettings):
    """The settings of the service, read from environment variables with the prefix CIFAR100_.

    A variable with this prefix and an unknown name is an error. Every number has an upper bound above any value that
    one machine can use, so that a typing error is reported at startup.
    """

    model_config = SettingsConfigDict(
        env_prefix="CIFAR100_",
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        hide_input_in_errors=True,  # the input may be an API key
    )

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on. 0 takes a free one."""
    uds: Annotated[Path | None, BeforeValidator(_empty_to_none)] = None
    """Path of a unix socket to listen on. The service then ignores `host` and `port`. No request over a unix socket
    counts as made on this machine."""
    workers: int = Field(default=1, ge=0, le=1024)
    """Number of server processes. 0 starts one per CPU, or fewer if memory is short. Each process has its share of the
    CPUs and holds all models in memory. A machine runs at most four per CPU, with 512 MiB of memory for each. Each
    process has its own rate limits, queues and other limits; only metrics are summed over all processes."""

    api_keys: Annotated[tuple[ApiKey, ...], NoDecode, CommaSeparated] = ()
    """API keys, separated by commas, that allow a client to train, cancel, promote and evaluate. Without keys, these
    calls are allowed only from this machine, and only while the service listens on a loopback address."""
    predict_needs_key: bool = False
    """Predictions need a key as well."""
    allow_uploads: bool = False
    """Accept versions of other services at POST /models/{name}. A client that may upload a model can run code, so this
    needs API keys."""
    operator_rate_limit: RateLimit = limits.parse("60/minute")
    """Rate limit for calls that need a key, per client and key. Wrong keys have the same limit per client. An empty
    value disables both."""
    predict_rate_limit: RateLimit = None
    """Rate limit for predictions, per client. Default: no limit. A request costs one unit. Estimated decoding time
    above 10 ms costs one more unit for each 10 ms."""
    trusted_proxies: Annotated[str, AfterValidator(_parse_proxies)] = ""
    """Proxy addresses or networks, separated by commas; "unix" for every client of the unix socket. The service takes
    the client address, the scheme and the path prefix from the X-Forwarded-For, X-Forwarded-Proto and
    X-Forwarded-Prefix headers of these proxies. Default: no proxy is trusted."""
    root_path: Annotated[str, AfterValidator(parse_path_prefix)] = ""
    """Path prefix under which a proxy publishes the service, such as /ml. X-Forwarded-Prefix of a trusted proxy
    replaces it. Default: none."""
    cors_origins: Annotated[tuple[Annotated[str, AfterValidator(_parse_origin)], ...], NoDecode, CommaSeparated] = ()
    """Origins, separated by commas, whose web pages may call the service from a browser."""

    log_style: LogStyle = "auto"
    """Log format. "json" writes one JSON object per line, "text" writes plain text. "auto" is text on a terminal and
    JSON elsewhere."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level of the lines in the log."""
    drain_s: Seconds = Field(default=0.0, ge=0)
    """Seconds to accept requests after SIGTERM, while /health/ready already reports that the service is not ready."""

    keep_alive_s: int = Field(default=65, gt=0, le=3600)
    """Seconds that a connection may be idle. Most load balancers use 60 s; a longer timeout here keeps them from
    reusing a connection at the moment it is closed."""

    models: Annotated[Path | str, AfterValidator(_parse_location)] = Path("models")
    """Folder of the model store, or a URL such as s3://bucket/models, with the extra `cloud`."""
    runs: Path = Path("runs")
    """Folder that contains the run folders of training jobs."""
    database: Annotated[SecretStr | None, BeforeValidator(_empty_to_none), AfterValidator(_require_postgresql)] = None
    """PostgreSQL database for the jobs of several machines, such as postgresql://user:password@host/name, with the
    extra `cloud`. Give it in the variable, because it has a password. Default: a SQLite file in the runs folder."""
    data: str | None = None
    """Folder that contains cifar100.npz, or "synthetic". Default: ~/.cache/cifar100."""

    feedback: bool = False
    """Accept corrections of predictions at POST /feedback, and keep them in the runs folder."""
    max_feedback: int = Field(default=10_000, gt=0, le=1_000_000)
    """Maximum number of corrections to keep. Each takes at most 4 KiB."""
    feedback_days: int | None = Field(default=None, gt=0, le=10_000)
    """Days after which a correction is deleted. Default: never."""

    device: Device = "auto"
    """Device for inference. "auto" is a GPU if there is one."""
    runtime: Runtime = "auto"
    """Inference runtime. "auto" uses TorchScript on the GPU and OpenVINO on the CPU. On the CPU it prefers the int8
    network if the model has one and the CPU has int8 instructions. "openvino" never uses the int8 network.
    "torchscript" computes in float32 on the CPU. "pt2" and "onnx" compute model.pt2 and model.onnx on the CPU."""
    default_model: str | None = None
    """Model for requests that name none. Default: a live cascade, or else the live model with the highest accuracy."""

    max_image_bytes: int = Field(default=10 * MIB, gt=0, le=GIB)
    """Maximum size of an image, in bytes."""
    max_image_pixels: int = Field(default=50_000_000, gt=0, le=500_000_000)
    """Maximum number of pixels of an image."""
    max_images: int = Field(default=32, gt=0, le=1024)
    """Maximum number of images per /predict request."""
    max_predict_bytes: int = Field(default=64 * MIB, gt=0, le=4 * GIB)
    """Maximum size of the body of a /predict request, in bytes."""
    max_archive_bytes: int = Field(default=256 * MIB, gt=0, le=16 * GIB)
    """Maximum size in bytes of a zip file sent to /evaluate, or of an uploaded version, both compressed and
    uncompressed."""
    max_archive_images: int = Field(default=20_000, gt=0, le=1_000_000)
    """Maximum number of entries of a zip file sent to /evaluate."""
    max_pending_bytes: int = Field(default=GIB, gt=0, le=64 * GIB)
    """Maximum total size in bytes of the bodies of all requests in progress. One client holds at most three quarters of
    it. When more than three quarters are in use, each client is limited to an equal share."""

    max_batch: int = Field(default=64, gt=0, le=4096)
    """Maximum number of images per batch. A GPU has its highest throughput with 256."""
    max_queue: int = Field(default=256, gt=0, le=100_000)
    """Maximum number of images that wait for one model. The service refuses further images."""
    deadline_s: Seconds = Field(default=10.0, gt=0)
    """Seconds that a request may wait for its computation to start. The service refuses it after that."""

    cluster: Annotated[str | None, BeforeValidator(_empty_to_none)] = None
    """Ray cluster that computes predictions, with the extra `ray`: "auto" for the cluster of this machine's node, the
    address of a head node, or "local" to start a cluster that ends with this process. Default: this process computes
    them."""
    cluster_min_replicas: int = Field(default=1, gt=0, le=10_000)
    """Smallest number of replicas of a model in the cluster."""
    cluster_max_replicas: int = Field(default=4, gt=0, le=10_000)
    """Largest number of replicas of a model in the cluster."""
    cluster_calls: float = Field(default=1.5, gt=0, le=10_000)
    """Number of calls in progress per replica to which the cluster adapts the number of replicas. A call has the images
    that have gathered. Each process has at most two calls per replica in progress."""
    cluster_cpus: float = Field(default=0.5, gt=0, le=1024)
    """CPUs that each replica reserves. A fraction lets several replicas share a CPU."""
    cluster_gpus: float = Field(default=0.0, ge=0, le=64)
    """GPUs that each replica reserves. A fraction lets several replicas share a GPU. With 0, the device "auto"
    is the CPU."""
    cluster_keep_s: Seconds = Field(default=300.0, ge=0)
    """Seconds after which the replicas of a version that is neither live nor pinned are stopped."""

    store_poll_s: Seconds = Field(default=1.0, ge=0.01)
    """Seconds between two checks of the store for newly promoted versions."""
    evaluate_wait_s: Seconds = Field(default=5.0, ge=0)
    """Seconds that POST /evaluate waits for its result. The response is 202 if the result takes longer."""

    jobs: Literal["local", "ray"] = "local"
    """Where training jobs run: in child processes of this service, or with the extra `ray` as jobs of a Ray cluster."""
    jobs_address: str = "http://127.0.0.1:8265"
    """Address of the job server of the Ray cluster, which is that of its dashboard."""
    job_cpus: float = Field(default=1.0, gt=0, le=1024)
    """CPUs that a training job of a Ray cluster reserves."""
    job_gpus: float = Field(default=0.0, ge=0, le=64)
    """GPUs that a training job of a Ray cluster reserves."""
    job_lease_s: Seconds = Field(default=30.0, ge=5)
    """Seconds after which another server takes over the jobs of one that no longer reaches the PostgreSQL database."""
    max_jobs: int = Field(default=100, gt=0, le=10_000)
    """Maximum number of training jobs in the queue."""
    max_job_epochs: int = Field(default=500, gt=0, le=100_000)
    """Maximum number of epochs of a job, summed over both stages."""
    max_job_batch: int = Field(default=1024, gt=0, le=50_000)
    """Maximum batch size of a job."""
    max_job_width: int = Field(default=128, gt=0, le=1024)
    """Maximum width of the network of a job."""
    keep_versions: int | None = Field(default=None, gt=0, le=1_000_000)
    """Number of versions of a model to keep when a job publishes a new one. The live version and those that cascades
    pin are always kept. Default: all."""
    training_threads: int = Field(default=0, ge=0, le=1024)
    """Threads of a training process. 0 uses all CPUs except one, which stays free for serving."""
    training_niceness: int = Field(default=15, ge=0, le=19)
    """Nice value of training processes above that of the service. With 0, training and serving share the CPUs evenly.
    """
    max_event_streams: int = Field(default=100, gt=0, le=10_000)
    """Maximum number of clients that follow training jobs at the same time, per worker."""

    @model_validator(mode="after")
    def _require_keys(self) -> Self:
        for setting in ("predict_needs_key", "allow_uploads"):
            if getattr(self, setting) and not self.api_keys:
                raise ValueError(f"CIFAR100_{setting.upper()} needs CIFAR100_API_KEYS")
        return self

    @model_validator(mode="after")
    def _check_cluster(self) -> Self:
        if self.cluster_min_replicas > self.cluster_max_replicas:
            raise ValueError(
                f"CIFAR100_CLUSTER_MIN_REPLICAS={self.cluster_min_replicas} exceeds CIFAR100_CLUSTER_MAX_REPLICAS="
                f"{self.cluster_max_replicas}"
            )
        if self.cluster == "local" and self.workers != 1:
            raise ValueError(
                "CIFAR100_CLUSTER=local needs CIFAR100_WORKERS=1, because each worker would start a cluster"
            )
        for name, needs_ray in (("CLUSTER", self.cluster), ("JOBS=ray", self.jobs == "ray")):
            if needs_ray and not find_spec("ray"):
                raise ValueError(f"CIFAR100_{name} needs the extra ray: pip install 'cifar100[ray]'")
        return self

    @model_validator(mode="after")
    def _require_known_names(self) -> Self:
        known = [f"CIFAR100_{name.upper()}" for name in type(self).model_fields]
        known += [*TRAINING_VARIABLES, *CLIENT_VARIABLES]
        unknown = [name for name in os.environ if name.upper().startswith("CIFAR100_") and name.upper() not in known]
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            unknown = [name for name in unknown if not _SERVICE_LINK.fullmatch(name)]
        if unknown:
            (nearest,) = difflib.get_close_matches(unknown[0].upper(), known, n=1, cutoff=0)
            raise ValueError(f"{', '.join(unknown)}: no such setting; did you mean {nearest}?")
        return self
