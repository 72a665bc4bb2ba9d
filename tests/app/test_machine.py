"""Test the CPUs and the memory that control groups of version 1 and 2 leave to a process, in a made-up file tree."""

import os
from pathlib import Path

import pytest

from app import machine
from app.machine import MIB

CPUS = 8
V1 = "cgroup cgroup rw,cpu,cpuacct"
V1_MEMORY = "cgroup cgroup rw,memory"
V2 = "cgroup2 cgroup2 rw,nsdelegate"


class Tree:
    """The files of a kernel below a folder.

    Args:
        folder: Empty folder.
    """

    def __init__(self, folder: Path):
        self.proc = folder / "proc"
        self._mounts = folder / "sys" / "fs" / "a cgroup"
        (self.proc / "self").mkdir(parents=True)

    def process(self, *lines: str) -> None:
        """Set the groups of the process, such as "0::/job"."""
        (self.proc / "self" / "cgroup").write_text("".join(f"{line}\n" for line in lines))

    def mount(self, name: str, system: str, group: str = "/") -> Path:
        """Mount a group of a hierarchy in a folder, which is returned."""
        folder = self._mounts / name
        folder.mkdir(parents=True)
        point = str(folder).replace(" ", r"\040")
        with (self.proc / "self" / "mountinfo").open("a") as file:
            file.write(f"22 1 0:20 / / rw - ext4 /dev/root rw\n36 31 0:28 {group} {point} rw shared:9 - {system}\n")
        return folder


def write(folder: Path, **files: str) -> None:
    """Write files such as cpu.max, whose names have a dot for the first underscore."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CPUS)), raising=False)
    return Tree(tmp_path)


@pytest.mark.parametrize(
    ("limit", "cpus"),
    [
        ("max 100000", CPUS),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("1600000 100000", CPUS),
        ("", CPUS),
        ("0 0", CPUS),
    ],
)
def test_quota_of_version_2_limits_the_cpus(limit: str, cpus: int, tree: Tree) -> None:
    tree.process("0::/")
    write(tree.mount("", V2), cpu_max=limit)
    assert machine.cpu_count(tree.proc) == cpus


@pytest.mark.parametrize(
    ("quota", "period", "cpus"),
    [
        ("-1", "100000", CPUS),
        ("150000", "100000", 2),
        ("25000", "50000", 1),
        ("900000", "100000", CPUS),
        ("", "", CPUS),
    ],
)
def test_quota_of_version_1_limits_the_cpus(quota: str, period: str, cpus: int, tree: Tree) -> None:
    tree.process("5:memory:/", "3:cpu,cpuacct:/job", "0::/")
    write(tree.mount("cpu,cpuacct", V1) / "job", cpu_cfs_quota_us=quota, cpu_cfs_period_us=period)
    assert machine.cpu_count(tree.proc) == cpus


@pytest.mark.parametrize("tightest", ["a.slice", "a.slice/b.service", "a.slice/b.service/c", ""])
def test_least_quota_of_a_group_and_those_above_it_counts(tightest: str, tree: Tree) -> None:
    tree.process("0::/a.slice/b.service/c")
    root = tree.mount("", V2)
    for group in ("", "a.slice", "a.slice/b.service", "a.slice/b.service/c", "other"):
        write(root / group, cpu_max="max 100000", memory_max="max")
    write(root / "other", cpu_max="100000 100000", memory_max=str(MIB))
    assert machine.cpu_count(tree.proc) == CPUS
    write(root / "a.slice", cpu_max="500000 100000", memory_max=str(7 * MIB))
    write(root / tightest, cpu_max="300000 100000", memory_max=str(3 * MIB))
    assert machine.cpu_count(tree.proc) == 3
    assert machine.memory_bytes(tree.proc) == 3 * MIB


def test_least_limit_of_version_1_and_those_above_it_counts(tree: Tree) -> None:
    tree.process("4:memory:/a/b", "1:cpu:/a/b")
    cpu, memory = tree.mount("cpu", "cgroup cgroup rw,cpu"), tree.mount("memory", V1_MEMORY)
    installed = machine.memory_bytes(tree.proc)
    write(cpu / "a" / "b", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    write(memory / "a" / "b", memory_limit_in_bytes=str(0x7FFFFFFFFFFFF000))
    assert machine.cpu_count(tree.proc) == CPUS
    assert machine.memory_bytes(tree.proc) == installed
    write(cpu / "a", cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    write(memory / "a", memory_limit_in_bytes=str(5 * MIB))
    assert machine.cpu_count(tree.proc) == 2
    assert machine.memory_bytes(tree.proc) == 5 * MIB


@pytest.mark.parametrize(
    ("name", "mounted"),
    [("/docker/0123", "/docker/0123"), ("/docker/0123", "/"), ("/", "/"), ("/../../outside", "/")],
    ids=["bind mount", "hidden path", "namespace", "outside of the namespace"],
)
def test_container_has_its_own_limit_at_its_mount_point(name: str, mounted: str, tree: Tree) -> None:
    tree.process(f"4:memory:{name}", f"1:cpu,cpuacct:{name}")
    write(tree.mount("cpu", V1, mounted), cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    write(tree.mount("memory", V1_MEMORY, mounted), memory_limit_in_bytes=str(5 * MIB))
    assert machine.cpu_count(tree.proc) == 2
    assert machine.memory_bytes(tree.proc) == 5 * MIB


def test_hybrid_system_has_the_limits_of_both_versions(tree: Tree) -> None:
    tree.process("4:memory:/job", "1:cpu:/job", "0::/job")
    unified = tree.mount("unified", V2)
    write(tree.mount("cpu", V1) / "job", cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    assert machine.cpu_count(tree.proc) == 2
    write(unified / "job", memory_max=str(5 * MIB))
    assert machine.memory_bytes(tree.proc) == 5 * MIB


def test_system_without_control_groups_has_no_limit(tree: Tree) -> None:
    assert machine.cpu_count(tree.proc) == CPUS
    assert machine.memory_bytes(tree.proc) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_this_machine_has_a_cpu_and_memory() -> None:
    assert 1 <= machine.cpu_count() <= (os.cpu_count() or 1)
    assert machine.memory_bytes() > 100 * MIB
