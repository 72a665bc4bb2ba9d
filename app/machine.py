"""Report the CPUs and the memory that this process may use, and set how it uses them.

This module imports the standard library and `training.control_groups` only, so that the process that decodes costly
images starts quickly.
"""

import ctypes
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training.control_groups import PROC, ControlGroup, list_groups

MIB = 1 << 20
GIB = 1 << 30

# Files of control groups by version. Each quota is followed by its period.
_CPU_FILES = {1: ("cpu.cfs_quota_us", "cpu.cfs_period_us"), 2: ("cpu.max",)}
_MEMORY_FILES = {1: "memory.limit_in_bytes", 2: "memory.max"}

# Names and values from glibc's malloc.h
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 16 * MIB
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 4 * MIB


def cpu_count(proc: Path = PROC) -> int:
    """Return the number of CPUs that this process may use. The CPU quotas of its control groups lower it.

    Args:
        proc: Folder of the process information.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for group in list_groups("cpu", proc) if (quota := _read_cpu_quota(group))]
    return min([allowed, *map(math.ceil, quotas)])


def memory_bytes(proc: Path = PROC) -> int:
    """Return the memory in bytes that this process may use. The memory limits of its control groups lower it.

    Args:
        proc: Folder of the process information.
    """
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in list_groups("memory", proc):
        with suppress(OSError, ValueError):  # "max" if there is no limit
            limits.append(int((group.folder / _MEMORY_FILES[group.version]).read_text()))
    return min(limits)


def _read_cpu_quota(group: ControlGroup) -> float | None:
    """Return the CPUs that a control group may use, or None without a quota."""
    try:
        fields = [(group.folder / name).read_text() for name in _CPU_FILES[group.version]]
        quota, period = map(int, " ".join(fields).split())  # microseconds
    except (OSError, ValueError):  # "max" in version 2
        return None
    return quota / period if quota > 0 and period > 0 else None  # -1 for no quota in version 1


@contextmanager
def cpu_affinity(cpus: set[int]) -> Iterator[None]:
    """Restrict the calling thread, and the processes that it starts, to these CPUs inside the block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def set_niceness(pid: int, niceness: int) -> None:
    """Set the nice value of a process, and that of its session for the scheduler of Linux.

    With autogroups, which most distributions turn on, Linux shares the CPUs among sessions first. The nice value of a
    process then counts only within its session, see sched(7).

    Args:
        pid: Id of the process.
        niceness: Nice value, up to 19.

    Raises:
        ProcessLookupError: The process has ended.
    """
    os.setpriority(os.PRIO_PROCESS, pid, niceness)
    with suppress(OSError):  # the kernel has no autogroups
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


def bound_malloc() -> None:
    """Make glibc return large blocks to the system. By default its thresholds grow, and it keeps ever larger blocks."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)


def limit_memory(size: int) -> None:
    """Limit the address space of this process to `size` bytes beyond its current mappings. It works on Linux only."""
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + size, mapped + size))


def let_other_threads_run() -> None:
    """Release the interpreter's lock for 0.1 ms.

    A thread that waits for the lock gets it after 5 ms if its holder does not release it. A long loop over untrusted
    data calls this function every `LOOP_STEPS` steps, so that a thread that answers requests gets the lock sooner.
    """
    time.sleep(1e-4)


LOOP_STEPS = 256
"""Number of steps of a loop between two calls of `let_other_threads_run`. They take 0.1 to 1 ms."""
