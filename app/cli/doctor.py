"""`cifar100 doctor`: check that a service and a training run have on this machine all that they need."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import typer

from app import version
from app.cli.options import Models, Runs, find_card, is_given, local_settings
from app.machine import GIB, cpu_count, memory_bytes
from app.server.startup import StartupError, format_authority, listen
from app.settings import Settings
from training.console import FAILED, Json, out, print_json, working
from training.dataset import DEFAULT_FOLDER, FINGERPRINT, find_archive, load_dataset
from training.errors import ReportedError
from training.store import StoreError, open_store

State = Literal["ok", "note", "problem"]

_STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "problem": "red"}
_NAMED_LIBRARIES = ("torch", "torchvision", "openvino", "nncf", "numpy", "pillow", "fastapi", "uvicorn")
_NAMED_INSTRUCTIONS = (
    "avx2",
    "avx512_f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "neon",
    "sve",
)
_LITTLE_BYTES = GIB  # less free memory or disk than this is a problem
_PROBE_S = 2.0


@dataclass(frozen=True)
class Finding:
    """The result of a check, and what to do about it."""

    state: State
    text: str
    remedy: str = ""


def doctor(context: typer.Context, models: Models = None, runs: Runs = None, as_json: Json = False) -> None:
    """Check this machine for a service and for training runs. The exit status is 1 if there is a problem."""
    findings = dict[str, Finding]()
    try:
        settings = local_settings(models=models, runs=runs)
    except StartupError as error:
        findings["settings"] = Finding("problem", str(error), "the rest is checked with the default settings")
        settings = Settings.model_construct()
    for topic, check in _CHECKS.items():
        with working(f"checking {topic}"):
            findings[topic] = _run(check, settings)
    values = [_describe_setting(context, settings, name) for name in Settings.model_fields]
    if as_json:
        listed = [{"topic": topic, **asdict(finding)} for topic, finding in findings.items()]
        print_json({"findings": listed, "settings": values})
    else:
        _print(findings, values)
    if any(finding.state == "problem" for finding in findings.values()):
        raise typer.Exit(FAILED)


def _run(check: Callable[[Settings], Finding], settings: Settings) -> Finding:
    try:
        return check(settings)
    except (ReportedError, OSError) as error:
        return Finding("problem", str(error))
    except Exception as error:  # a broken library may raise any exception, and the other checks must go on
        return Finding("problem", f"{type(error).__name__}: {error}", "install the package again")


def _check_versions(_: Settings) -> Finding:
    from packaging.requirements import Requirement  # a dependency of `limits`
    from packaging.utils import canonicalize_name

    installed = {canonicalize_name(each.name): each.version for each in importlib.metadata.distributions()}
    text = f"cifar100 {version()}, Python {platform.python_version()}, "
    text += ", ".join(f"{name} {installed.get(canonicalize_name(name))}" for name in _NAMED_LIBRARIES)
    faults = []
    needed = importlib.metadata.requires("cifar100") if "cifar100" in installed else None
    for requirement in map(Requirement, needed or ()):
        if requirement.marker is None or requirement.marker.evaluate():
            found = installed.get(canonicalize_name(requirement.name))
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                faults.append(f"{requirement} is needed, {found or 'nothing'} is installed")
    if faults:
        return Finding("problem", f"{text}; {'; '.join(faults)}", "install the package again: make .venv/installed")
    return Finding("ok", text)


def _check_processor(_: Settings) -> Finding:
    import torch

    from training.runtimes.openvino import computes_int8

    capabilities = torch.cpu.get_capabilities()
    has = [name for name in _NAMED_INSTRUCTIONS if capabilities.get(name)]
    name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    text = f"{name}: {', '.join(has) or 'no extensions'}"
    if computes_int8():
        return Finding("ok", text)
    return Finding("note", f"{text}; no int8 instructions, so models are served in floating point")


def _check_gpu(settings: Settings) -> Finding:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Finding("ok", f"{torch.cuda.get_device_name()}, {_gib(free)} of {_gib(total)} free")
    build = f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is built without CUDA"
    if settings.device == "cuda":
        return Finding(
            "problem", f"none that PyTorch can use; {build}", "set CIFAR100_DEVICE=auto, or install the GPU's driver"
        )
    if Path("/dev/nvidia0").exists():
        return Finding(
            "problem",
            f"PyTorch cannot use the GPU of this machine; {build}",
            "update the driver",
        )
    return Finding("ok", f"none, the CPU computes; {build}")


def _check_threads(_: Settings) -> Finding:
    import torch

    text = f"{cpu_count()} of {os.cpu_count()} CPUs may be used; PyTorch has {torch.get_num_threads()} threads"
    limit = os.environ.get("OMP_NUM_THREADS")
    return Finding("ok", f"{text}, because OMP_NUM_THREADS is {limit}" if limit else text)


def _check_memory(_: Settings) -> Finding:
    from training.resources import available_memory

    available = available_memory()
    text = f"{_gib(memory_bytes())} may be used"
    if available is None:
        return Finding("ok", text)
    text += f", {_gib(available)} are available"
    if available < _LITTLE_BYTES:
        return Finding("problem", text, "end other programs, or raise the memory limit of the container")
    return Finding("ok", text)


def _check_disk(settings: Settings) -> Finding:
    used = [settings.runs, Path(DEFAULT_FOLDER), *([settings.models] if isinstance(settings.models, Path) else [])]
    folders = {path.expanduser().absolute() for path in used}
    free = {folder: shutil.disk_usage(_nearest_existing(folder)).free for folder in sorted(folders)}
    text = ", ".join(f"{_gib(room)} for {folder}" for folder, room in free.items())
    if min(free.values()) < _LITTLE_BYTES:
        return Finding("problem", text, "delete old run folders, or name folders on another disk")
    return Finding("ok", text)


def _check_store(settings: Settings) -> Finding:
    store = open_store(settings.models)
    versions, live, faults = 0, [], []
    for name in store.names():
        try:
            if number := store.live(name):
                live.append(f"{name}/{number}")
                store.require(name, number)
        except StoreError as error:
            faults.append(str(error))
        for number in store.versions(name):
            versions += 1
            try:
                store.verify(store.card(name, number))
            except (StoreError, OSError) as error:
                faults.append(str(error))
    text = f"{store.location}: {versions} versions; live: {', '.join(live) or 'none'}"
    if faults:
        return Finding("problem", f"{text}; {'; '.join(faults)}", "restore the files, or delete the version")
    if not live:
        return Finding("note", text, "train a model, or promote a version: cifar100 models promote NAME/VERSION")
    try:
        store.require_writable()
    except (StoreError, OSError) as error:
        return Finding("note", f"{text}; all checksums match; nothing can be published, because {error}")
    return Finding("ok", f"{text}; all checksums match")


def _check_runtime(settings: Settings) -> Finding:
    from training.runtimes import selection

    try:
        store, card = find_card(settings, None)
    except StoreError:
        return Finding("note", "there is no model to load")
    engine = selection.load_version(store, card, settings.device, settings.runtime)
    return Finding("ok", f"{card.name}/{card.version} is computed by {engine.name}")


def _check_runs(settings: Settings) -> Finding:
    from sqlalchemy.exc import DBAPIError

    from app.jobs.database import Database

    folder = settings.runs.absolute()
    if not os.access(_nearest_existing(folder), os.W_OK):
        return Finding(
            "problem", f"{folder} cannot be written, so jobs are unavailable", "give another folder by CIFAR100_RUNS"
        )
    database = Database(folder, settings.database)
    if not database.backend.exists:
        return Finding("ok", f"{folder}: no jobs yet")
    try:
        database.connect()
    except DBAPIError as error:
        remedy = "check CIFAR100_DATABASE" if database.shared else "restore it from a backup, or move it away"
        return Finding("problem", f"{database.backend.label} cannot be used: {error.orig}", remedy)
    finally:
        database.close()
    return Finding("ok", f"{database.backend.label}: the job database can be used")


def _check_data(settings: Settings) -> Finding:
    archive = find_archive(settings.data)
    if archive is None:
        return Finding("note", "the data set is synthetic")
    if not archive.exists():
        return Finding(
            "note", f"there is no {archive.absolute()}; training and evaluation need it", "cifar100 data download"
        )
    if load_dataset(settings.data).fingerprint == FINGERPRINT:
        return Finding("ok", f"{archive.absolute()} is CIFAR-100")
    return Finding("note", f"{archive.absolute()} is not the original CIFAR-100")


def _check_port(settings: Settings) -> Finding:
    import httpx

    if settings.uds:
        return Finding("ok", f"the service would listen on {settings.uds.absolute()}")
    authority = format_authority(settings.host, settings.port)
    try:
        for each in listen(settings.host, settings.port):
            each.close()
    except StartupError as error:
        try:
            health = httpx.get(f"http://{authority}/health", timeout=_PROBE_S).json()
            return Finding("ok", f"a service of release {health['version']} answers at {authority}: {health['status']}")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
            return Finding("problem", str(error), "give another address to 'cifar100 serve' by --host and --port")
    return Finding("ok", f"{authority} is free")


_CHECKS: dict[str, Callable[[Settings], Finding]] = {
    "versions": _check_versions,
    "processor": _check_processor,
    "GPU": _check_gpu,
    "threads": _check_threads,
    "memory": _check_memory,
    "disk": _check_disk,
    "store": _check_store,
    "runtime": _check_runtime,
    "jobs": _check_runs,
    "data set": _check_data,
    "address": _check_port,
}


def _describe_setting(context: typer.Context, settings: Settings, name: str) -> dict[str, str]:
    """Return a setting with its value and the source of the value. Keys are hidden."""
    source = "default"
    if name in settings.model_fields_set:
        source = f"--{name}" if is_given(context, name) else f"CIFAR100_{name.upper()}"
    return {"name": name, "value": str(getattr(settings, name)), "source": source}


def _print(findings: dict[str, Finding], settings: list[dict[str, Any]]) -> None:
    width = max(len(topic) for topic in (*_CHECKS, "settings"))
    for topic, finding in findings.items():
        out.print(f"{finding.state:<8}", style=_STYLES[finding.state], end="")
        out.print(f"{topic:<{width}}  {finding.text}")
        if finding.remedy:
            out.print(f"{'':<{width + 10}}{finding.remedy}")
    chosen = [each for each in settings if each["source"] != "default"]
    for each in chosen:
        out.print(f"{'':<8}{'setting':<{width}}  {each['name']} = {each['value']}, from {each['source']}")
    out.print(
        f"{'':<8}{'setting':<{width}}  {len(settings) - len(chosen)} others have their defaults; --json lists them"
    )


def _nearest_existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
