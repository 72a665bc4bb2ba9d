"""Report the CPUs and the memory that this process may use, and set how it uses them.

This module imports only the standard library, so that the process that decodes costly images starts quickly.
"""

import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MIB = 1 << 20
GIB = 1 << 30

# Files of Linux control groups, version 2
_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_MAX = Path("/sys/fs/cgroup/memory.max")

# Names and values from glibc's malloc.h
_M_TRIM_THRESHOLD, _TRIM_BYTES = -1, 16 * MIB
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 4 * MIB


def cpu_count() -> int:
    """Return the number of CPUs that this process may use. A container's CPU quota lowers it."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else min(allowed, math.ceil(int(quota) / int(period)))


def memory_bytes() -> int:
    """Return the memory in bytes that this process may use. A container's memory limit lowers it."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(installed, int(_MEMORY_MAX.read_text()))
    except (OSError, ValueError):  # the file contains "max" if there is no limit
        return installed


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
