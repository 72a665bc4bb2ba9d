"""What the kernel tells about processes: memory, open files, who is alive. Linux only, but for `working_in`."""

from pathlib import Path

PROC = Path("/proc")


def memory_mib(process: int, field: str = "VmRSS") -> float:
    """Memory of a process in MiB: VmRSS is resident now, VmHWM was at most, VmSize is address space."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:")) / 1024


def children(process: int) -> set[int]:
    """Its child processes."""
    lists = Path(f"/proc/{process}/task").glob("*/children")  # of every thread
    return {int(child) for each in lists for child in each.read_text().split()}


def open_files(process: int) -> int:
    """How many file descriptors a process has open."""
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def working_in(folder: Path, kind: str = "") -> list[int]:
    """Processes whose command line names the folder or something in it, and has `kind` in it; none but on Linux."""
    found = []
    for entry in PROC.iterdir() if PROC.exists() else ():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has just ended
                continue
            if str(folder) in command and kind in command:
                found.append(int(entry.name))
    return sorted(found)
