"""Check an uploaded version in a child process, because a TorchScript file is a program without limits.

    CheckProcess (in the server)  --request-->  child process (`main`)  --result or fault-->  CheckProcess

The kernel ends the process at a limit of CPU time and refuses it memory beyond a limit. The server kills it at a limit
of wall time. It runs at low priority on a few CPUs, cannot write to files, and gets no setting of the service, such as
the API keys. Where Linux allows user namespaces, it has no network. It ends with the server.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from app.exceptions import BadRequest, Problem, Unavailable
from app.machine import GIB, bound_malloc, limit_memory, set_niceness
from app.settings import Settings

_MAX_CPU_S = 240
_MAX_WALL_S = 600.0
_MAX_MEMORY_BYTES = 3 * GIB
_MAX_CPUS = 4  # each thread of a runtime takes address space
_NICENESS = 5
_PACKAGES = Path(__file__).parents[2]
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET of unshare(2)
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
# Prefixes of the environment variables that the child gets. Others may be secrets, such as the keys of an object store.
_VARIABLES = ("PATH", "HOME", "LANG", "LC_", "LD_LIBRARY_PATH", "PYTHON", "TMPDIR", "TZ", "OMP_", "MKL_")
_NO_MEMORY = ("out of memory", "allocate memory", "bad_alloc")  # parts of messages of the runtimes


class CheckResult(BaseModel, use_attribute_docstrings=True):
    """The result of the check of an uploaded version."""

    engine: str
    """Runtime, device and precision that computed the version."""
    images: int
    """Number of test images on which the accuracy was measured; 0 if the data set of the card is not at hand."""
    top1: float | None
    """Top-1 accuracy on these images, 0-1; None without images."""


class CheckProcess:
    """The check of uploaded versions. One thread at a time may call `run`.

    Args:
        settings: The runtime and the data set of the service.
        max_cpu_s: Limit of CPU time in seconds.
        max_wall_s: Limit of wall time in seconds.
        max_memory_bytes: Limit of the memory beyond that of the libraries.
    """

    def __init__(
        self,
        settings: Settings,
        max_cpu_s: int = _MAX_CPU_S,
        max_wall_s: float = _MAX_WALL_S,
        max_memory_bytes: int = _MAX_MEMORY_BYTES,
    ):
        self._settings = settings
        self._max_cpu_s = max_cpu_s
        self._max_wall_s = max_wall_s
        self._max_memory_bytes = max_memory_bytes
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, folder: Path, members: Path) -> CheckResult:
        """Check a version, see `app.inference.version_check`.

        Args:
            folder: Folder with the files of the version, among them its card.
            members: Folder of a model store with the members of a cascade.

        Raises:
            BadRequest: The version cannot be served, or its check takes more than a limit.
            Unavailable: The service stops.
        """
        request = {
            "folder": str(folder.absolute()),
            "members": str(members.absolute()),
            "runtime": self._settings.runtime,
            "data": self._settings.data,
            "max_memory_bytes": self._max_memory_bytes,
        }
        process = self._process = self._start()
        watchdog = threading.Timer(self._max_wall_s, process.kill)
        watchdog.start()
        try:
            reply, _ = process.communicate(json.dumps(request).encode())
        finally:
            watchdog.cancel()
            self._process = None
        if process.returncode or not reply:
            raise self._describe_end(process.returncode)
        answer: dict[str, Any] = json.loads(reply)
        if "fault" in answer:
            raise BadRequest(answer["fault"])
        return CheckResult.model_validate(answer)

    def close(self) -> None:
        """End a running check. Its call of `run` in another thread raises `Unavailable`."""
        if process := self._process:
            process.terminate()

    def _start(self) -> "subprocess.Popen[bytes]":
        # -P and PYTHONPATH select this package, even if the current folder contains another `app`.
        command = [sys.executable, "-P", "-m", __name__, str(self._max_cpu_s)]
        environment = {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}
        environment |= {"PYTHONPATH": str(_PACKAGES), "CUDA_VISIBLE_DEVICES": "", "MALLOC_ARENA_MAX": "2"}
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a model may print without an end
            env=environment,
            start_new_session=True,
        )

    def _describe_end(self, status: int) -> Problem:
        match -status:
            case signal.SIGTERM:
                return Unavailable("the service stops; try again")
            case signal.SIGXCPU:
                return BadRequest(f"the check of the version takes more than {self._max_cpu_s} s of CPU time")
            case signal.SIGKILL:
                return Unavailable(
                    f"the check of the version was killed: it takes more than {self._max_wall_s:g} s, or more memory "
                    "than the machine has; try again when the machine is less busy"
                )
        ended_by = signal.Signals(-status).name if status < 0 else f"status {status}"
        return BadRequest(f"the version crashes the process that computes it ({ended_by})")


def main(max_cpu_s: str) -> None:
    """Run the child process. The request is in the standard input, and the reply goes to the standard output."""
    _restrict(int(max_cpu_s))
    request = json.load(sys.stdin)
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints must not write into the reply
    folder = Path(request["folder"])
    try:
        # PyTorch is loaded here, because its threads would prevent new namespaces.
        from app.inference.version_check import check_version
        from training.store import LocalStore

        limit_memory(request["max_memory_bytes"])
        members = LocalStore(Path(request["members"]))
        result = check_version(folder, members, request["runtime"], request["data"])
        answer = result.model_dump()
    except Exception as error:  # a runtime may raise any exception
        reason = str(error).replace(f"{folder}/", "").strip() or type(error).__name__
        if isinstance(error, MemoryError) or any(sign in reason for sign in _NO_MEMORY):
            reason = f"it takes more than {request['max_memory_bytes'] / GIB:g} GiB of memory"
        # TorchScript describes the place of an error in the lines before the last.
        answer = {"fault": f"the version cannot be computed: {reason.splitlines()[-1]}"}
    with reply:
        json.dump(answer, reply)
    os._exit(0)  # threads of a runtime may still compute


def _restrict(max_cpu_s: int) -> None:
    """Limit this process. Its memory is limited later, because the limit does not count the libraries."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_DEATH_SIGNAL, signal.SIGKILL)
        libc.unshare(_NEW_USER | _NEW_NETWORK)  # fails where user namespaces are forbidden
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_MAX_CPUS])
    set_niceness(os.getpid(), min(os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS, 19))
    bound_malloc()
    resource.setrlimit(resource.RLIMIT_CPU, (max_cpu_s, max_cpu_s + 1))  # SIGXCPU, then SIGKILL
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


if __name__ == "__main__":
    main(*sys.argv[1:])
