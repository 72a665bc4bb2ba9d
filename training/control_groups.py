"""This module finds the Linux control groups that limit this process, of version 1 and 2.

Input: `/proc/self/cgroup` and `/proc/self/mountinfo`. Output: folders, whose files have the limits. The limits of a
group apply to all groups below it, so the least of all folders counts.

It imports only the standard library, so that the process that decodes costly images starts quickly.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class ControlGroup:
    """A control group.

    Attributes:
        version: Version of its hierarchy, 1 or 2.
        folder: Folder of its files. It may not exist.
    """

    version: int
    folder: Path


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy.

    Attributes:
        controllers: Its controllers and other options, empty for version 2.
        group: Group that is mounted, in a container often the container's own.
        folder: Mount point.
    """

    controllers: frozenset[str]
    group: PurePosixPath
    folder: Path


def list_groups(controller: str, proc: Path = PROC, root: Path = CGROUPS) -> list[ControlGroup]:
    """List the visible groups of this process, from its own to the topmost one, in every hierarchy.

    Args:
        controller: "cpu" or "memory".
        proc: Folder of the process information.
        root: Folder of the hierarchies where the mounts cannot be read.

    Returns:
        The groups. Empty if the system has no control groups.
    """
    try:
        lines = (proc / "self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return []
    mounts = list(_read_mounts(proc))
    found: dict[ControlGroup, None] = {}
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        wanted = {controller} if controllers else set()
        usual = _Mount(frozenset(), PurePosixPath("/"), root / controller if controllers else root)
        fitting = [each for each in mounts if wanted <= each.controllers and bool(each.controllers) == bool(wanted)]
        for mount in fitting or [usual]:
            found |= {ControlGroup(version, folder): None for folder in _folders(PurePosixPath(name), mount)}
    return list(found)


def _folders(group: PurePosixPath, mount: _Mount) -> Iterator[Path]:
    """Iterate over the folders of a group and of the groups above it, up to the mount point."""
    inner = group.relative_to(mount.group) if group.is_relative_to(mount.group) else group.relative_to("/")
    if ".." in inner.parts:  # the group is outside of this process's namespace
        inner = PurePosixPath()
    for each in (inner, *inner.parents) if inner.parts else (inner,):
        yield mount.folder / each


def _read_mounts(proc: Path) -> Iterator[_Mount]:
    """Iterate over the mounted hierarchies. The format is described in proc(5)."""
    lines: list[str] = []
    with suppress(OSError):
        lines = (proc / "self/mountinfo").read_text(errors="replace").splitlines()
    for line in lines:
        mount, _, system = line.partition(" - ")
        kind, *more = system.split(" ")
        if kind in ("cgroup", "cgroup2"):
            group, folder = (_unescape(field) for field in mount.split(" ")[3:5])
            controllers = frozenset(more[-1].split(",")) if kind == "cgroup" else frozenset[str]()
            yield _Mount(controllers, PurePosixPath(group), Path(folder))


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
