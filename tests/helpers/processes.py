"""Read memory, open files and child processes from the kernel. Linux only, except `find_processes`."""

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def memory_mib(process: int, field: str = "VmRSS") -> float:
    """Return the memory of a process in MiB.

    Args:
        field: "VmRSS" for resident memory now, "VmHWM" for its peak, "VmSize" for the address space.
    """
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:")) / 1024


def cpu_s(process: int) -> float:
    """Return the CPU time of a process in seconds, of all its threads."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def list_children(process: int) -> set[int]:
    """Return the child processes of a process. Linux lists them by the thread that started them."""
    found: set[int] = set()
    for thread in Path(f"/proc/{process}/task").iterdir():
        with suppress(FileNotFoundError):  # the thread has ended
            found |= set(map(int, (thread / "children").read_text().split()))
    return found


def count_open_files(process: int) -> int:
    """Return the number of open file descriptors of a process."""
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def read_command(process: int) -> str:
    """Return the command line of a process; empty if it has just ended."""
    try:
        return (PROC / str(process) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def find_processes(folder: Path, kind: str = "") -> list[int]:
    """Return the processes whose command line contains `kind` and the folder or a path in it; empty except on Linux."""
    found = []
    for entry in PROC.iterdir() if PROC.exists() else ():
        if entry.name.isdecimal():
            command = read_command(int(entry.name))
            if str(folder) in command and kind in command:
                found.append(int(entry.name))
    return sorted(found)
