"""Test that faults of the environment are reported clearly, damage nothing, and end when their cause ends.

Every scene starts real servers on its own store with two versions of a tiny model. It takes one thing away: disk space,
write permission, the data set, a model file, the correct time, or sole use of the store. It checks the answers of the
service, restores the thing, and checks that everything works again, mostly without a restart. Small and read-only disks
are tmpfs mounts, which need root. The clock is libfaketime. A scene whose requirements are missing on this machine is
skipped and reported as skipped.

    python tests/stress/hostile_surroundings.py [SCENE ...]

Result: nine scenes, each with clear errors, intact files and a recovery (AMD EPYC, 2 cores, 2026-11-24).
Table: results/hostile_surroundings.md.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import httpx
import numpy as np
import tiny_models
from mutations import samples
from results import Check, conclude
from server import DATA, Server, wait_for
from tiny_models import NAME, TINY

from training.dataset import ARCHIVE, CLASSES, load_dataset
from training.store import MODEL, LocalStore, StoreError

DISK_MIB = 24
JOB_S = 60.0
FOLLOWS_S = 10.0
JOB = {"recipe": NAME, "overrides": TINY, "promote": "never"}
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
NO_NETWORK = ("/usr/bin/env", "https_proxy=http://127.0.0.1:9", "http_proxy=http://127.0.0.1:9")
PICTURE = samples()["png rgb 32x32"]


class Skipped(Exception):
    """This machine lacks a requirement of the scene."""


@dataclass
class Scene:
    """The folders and the findings of one scene.

    Attributes:
        folder: Folder with a copy of the model store.
        said: Answers of the service.
        missed: Expectations that did not hold.
    """

    folder: Path
    said: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)

    @property
    def store(self) -> LocalStore:
        return LocalStore(self.folder / "models")

    def server(self, wrapper: tuple[str, ...] = (), **settings: str) -> Server:
        return Server(self.store.root, self.folder / "runs", self.folder / "log", wrapper, **settings)

    def expect(self, claim: str, holds: object) -> None:
        if not holds:
            self.missed.append(claim)

    def expect_problem(self, response: httpx.Response, statuses: tuple[int, ...], *words: str) -> None:
        """Expect a problem with one of the statuses whose detail has one of the words."""
        request = f"{response.request.method} {response.request.url.path}"
        detail = response.json().get("detail", "") if "json" in response.headers.get("content-type", "") else ""
        self.said.append(f"{request}: {response.status_code} {detail}")
        self.expect(f"{request} answers {statuses}, not {response.status_code}", response.status_code in statuses)
        self.expect(f"it says {words}", any(word in detail for word in words))

    def expect_failure(self, http: httpx.Client, *words: str) -> None:
        """Train a job and expect that it fails with one of the words in its error."""
        job = _trained(http)
        self.said.append(f"job: {job['state']}, {job['error']}")
        self.expect(f"the job fails, not {job['state']}", job["state"] == "failed")
        self.expect(f"it says {words}", any(word in (job["error"] or "") for word in words))

    def expect_success(self, http: httpx.Client) -> None:
        """Train a job and expect that it succeeds."""
        job = _trained(http)
        self.expect(f"a later job succeeds, not {job['state']}: {job['error']}", job["state"] == "succeeded")

    def expect_service(self, http: httpx.Client, version: int) -> None:
        """Expect that a version of the model answers predictions."""
        response = http.post("/predict", files={"file": PICTURE})
        answered = response.json().get("version") if response.status_code == 200 else response.text
        self.expect(f"version {version} predicts, not {answered}", answered == version)

    def expect_intact(self) -> None:
        """Expect that the store has no damage and no leftover files."""
        for version in self.store.versions(NAME):
            try:
                self.store.verify(self.store.card(NAME, version))
            except StoreError as error:
                self.missed.append(str(error))
        left = [path.name for path in (self.store.root / NAME).glob(".*") if path.name != ".lock"]
        self.expect(f"nothing is left over, but {left}", not left)


def disk_full_while_training(scene: Scene) -> None:
    with _small_disk(scene.folder / "runs"), scene.server() as server, server.client() as http:
        with _filled(scene.folder / "runs", leaving=300_000):
            scene.expect_failure(http, "No space left", "full")
            scene.expect_service(http, 2)
            left = [path.name for path in scene.folder.glob("runs/*/*.partial")]
            scene.expect(f"no half-written file takes up the rest of the disk, but {left}", not left)
        scene.expect_success(http)


def disk_full_while_publishing(scene: Scene) -> None:
    with _small_disk(scene.store.root), scene.server() as server, server.client() as http:
        with _filled(scene.store.root, leaving=500_000):
            scene.expect_failure(http, "No space left", "full")
            scene.expect_service(http, 2)
            scene.expect("no version appears", scene.store.versions(NAME) == [1, 2])
            scene.expect_intact()
        scene.expect_success(http)
        scene.expect_intact()


def disk_full_for_the_database(scene: Scene) -> None:
    with _small_disk(scene.folder / "runs"), scene.server() as server, server.client() as http:
        with _filled(scene.folder / "runs", leaving=0):
            for _ in range(200):  # until the free pages of the database are used up
                response = http.post("/train", json=JOB)
                if response.status_code != 202:
                    break
            scene.expect_problem(response, (503,), "full")
            scene.expect_service(http, 2)
            scene.expect("jobs can be listed", http.get("/train").status_code == 200)
        accepted = http.get("/train", params={"limit": 1000}).json()
        scene.said.append(f"{len(accepted)} jobs were accepted before")
        for job in accepted:
            scene.expect("queued jobs can be cancelled", http.delete(f"/train/{job['id']}").status_code == 200)
        scene.expect_success(http)


def disk_full_when_the_server_starts(scene: Scene) -> None:
    runs = scene.folder / "runs"
    with _small_disk(runs):
        with _filled(runs, leaving=0), scene.server() as server, server.client() as http:
            scene.expect_service(http, 2)
            scene.expect_problem(http.post("/train", json=JOB), (503,), "full", "cannot be used")
        with scene.server() as server, server.client() as http:
            scene.expect_success(http)


def read_only_store(scene: Scene) -> None:
    root = scene.store.root
    with _small_disk(root), scene.server() as server, server.client() as http:
        _mount("-o", "remount,ro", str(root))
        scene.expect_service(http, 2)
        promoted = http.put(f"/models/{NAME}/live", json={"version": 1})
        scene.expect_problem(promoted, (503, 507), "ead-only", "cannot be written")
        scene.expect_service(http, 2)
        scene.expect_failure(http, "ead-only", "cannot be written")
        _mount("-o", "remount,rw", str(root))
        scene.expect("promotion works", http.put(f"/models/{NAME}/live", json={"version": 1}).status_code == 200)
        scene.expect_service(http, 1)
        scene.expect_success(http)
        scene.expect_intact()


def data_set_missing(scene: Scene) -> None:
    folder = scene.folder / "data"
    with scene.server(NO_NETWORK, data=str(folder)) as server, server.client() as http:
        scene.expect_service(http, 2)
        scene.expect_problem(http.post("/evaluate", params={"limit": 10}), (503,), "cifar100.npz")
        scene.expect_failure(http, "cifar100.npz")
        made = load_dataset(DATA)
        folder.mkdir(exist_ok=True)
        np.savez(
            folder / ARCHIVE,
            x_train=made.train.images,
            y_train=made.train.labels,
            x_test=made.test.images,
            y_test=made.test.labels,
            classes=np.array(CLASSES),
        )
        scene.expect_success(http)
        # The earlier versions have other classes.
        measured = http.post("/evaluate", params={"limit": 10, "version": 3})
        scene.expect(f"the new version is measured, not {measured.text}", measured.status_code == 200)


def live_model_damaged(scene: Scene) -> None:
    file = scene.store.root / NAME / "2" / MODEL
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + bytes(100))
    with scene.server() as server, server.client() as http:
        health = http.get("/health").json()
        scene.said.append(f"GET /health: {health['errors']}")
        scene.expect("the health names the damage", "damaged" in health["errors"].get(NAME, ""))
        scene.expect_service(http, 1)
        scene.expect_problem(http.put(f"/models/{NAME}/live", json={"version": 2}), (503,), "damaged")
        file.write_bytes(whole)
        _follows(scene, http, 2)
        scene.expect("the health is good", not http.get("/health").json()["errors"])
        scene.store.promote(NAME, 1)
        _follows(scene, http, 1)
        file.write_bytes(b"")  # damage while the server runs, then a promotion by another process
        scene.store.promote(NAME, 2)
        wait_for(lambda: http.get("/health").json()["errors"], FOLLOWS_S, server.log)
        scene.expect_service(http, 1)
        file.write_bytes(whole)
        _follows(scene, http, 2)
    scene.expect_intact()


def clock_jumps(scene: Scene) -> None:
    if not FAKETIME.exists():
        raise Skipped("libfaketime is not installed")
    clock = scene.folder / "clock"
    faked = ("/usr/bin/env", f"LD_PRELOAD={FAKETIME}", "FAKETIME_NO_CACHE=1", "FAKETIME_DONT_FAKE_MONOTONIC=1")
    clock.write_text("+0")

    def begun(job: str) -> bool:
        return http.get(f"/train/{job}").json()["started"] is not None

    with (
        scene.server((*faked, f"FAKETIME_TIMESTAMP_FILE={clock}"), operator_rate_limit="20/minute") as server,
        server.client() as http,
    ):
        for jump in ("+40d", "-40d", "+0"):
            job = http.post("/train", json=JOB).raise_for_status().json()["id"]
            wait_for(partial(begun, job), JOB_S, server.log)
            clock.write_text(jump)
            scene.expect_service(http, 2)
            ended = _ended(http, job)
            scene.expect(f"the job succeeds over a jump to {jump}, not {ended['error']}", ended["state"] == "succeeded")
            scene.expect("the service stays ready", http.get("/health/ready").status_code == 200)
        while (refused := http.put(f"/models/{NAME}/live", json={"version": 2})).status_code == 200:
            continue
        scene.expect("the rate limit holds", refused.status_code == 429)
        clock.write_text("-1d")
        refused = http.put(f"/models/{NAME}/live", json={"version": 2})
        wait_s = int(refused.headers.get("Retry-After", 0))
        scene.said.append(f"{refused.status_code} with Retry-After {wait_s} over the rate limit after a jump back")
        scene.expect(f"over the rate limit one waits no longer than before a jump back, not {wait_s} s", wait_s <= 120)
    scene.expect_intact()


def two_servers_on_one_store(scene: Scene) -> None:
    with scene.server() as one, one.client() as first:
        other = Server(scene.store.root, scene.folder / "runs", scene.folder / "log2")
        with other, other.client() as second:
            first.put(f"/models/{NAME}/live", json={"version": 1}).raise_for_status()
            _follows(scene, second, 1)
            second.put(f"/models/{NAME}/live", json={"version": 2}).raise_for_status()
            _follows(scene, first, 2)
            jobs = [http.post("/train", json=JOB).raise_for_status().json()["id"] for http in (first, second)]
            ended = [_ended(http, job) for http, job in zip((second, first), jobs, strict=True)]
            scene.expect("both jobs succeed", [job["state"] for job in ended] == ["succeeded"] * 2)
            scene.expect("each has one version", {job["published"]["version"] for job in ended} == {3, 4})
            one.kill()
            scene.expect_success(second)
            scene.expect_service(second, 2)
    versions = scene.store.versions(NAME)
    scene.said.append(f"three jobs, versions {versions}")
    scene.expect("each job has one version", versions == [1, 2, 3, 4, 5])
    scene.expect_intact()


SCENES: tuple[Callable[[Scene], None], ...] = (
    disk_full_while_training,
    disk_full_while_publishing,
    disk_full_for_the_database,
    disk_full_when_the_server_starts,
    read_only_store,
    data_set_missing,
    live_model_damaged,
    clock_jumps,
    two_servers_on_one_store,
)


def main(wanted: list[str]) -> int:
    checks = []
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        original = tiny_models.make_store(Path(name, "original"), versions=2)
        for play in SCENES:
            if wanted and play.__name__ not in wanted:
                continue
            scene = Scene(Path(name, play.__name__))
            shutil.copytree(original.root, scene.store.root)
            try:
                play(scene)
            except Skipped as reason:
                checks.append(Check(play.__name__.replace("_", " "), f"skipped: {reason}"))
                continue
            except (TimeoutError, httpx.HTTPError) as error:
                scene.missed.append(f"{type(error).__name__}: {error}")
            for missed in scene.missed:
                print(f"{play.__name__}: expected that {missed}", file=sys.stderr)
            said = "; ".join(scene.said).replace(name, "…").replace("|", "\\|").replace("\n", " ")
            checks.append(Check(play.__name__.replace("_", " "), said, "clear, intact, recovers", not scene.missed))
    return conclude(__file__, f"{len(checks)} scenes.", checks, whole=not wanted)


def _trained(http: httpx.Client) -> dict[str, Any]:
    """Start a training job and return it after its end."""
    return _ended(http, http.post("/train", json=JOB).raise_for_status().json()["id"])


def _ended(http: httpx.Client, job_id: str) -> dict[str, Any]:
    """Return a job after its end, or its current state if it does not end within JOB_S seconds."""

    def job() -> dict[str, Any]:
        seen: dict[str, Any] = http.get(f"/train/{job_id}").raise_for_status().json()
        return seen

    with suppress(TimeoutError):
        wait_for(lambda: job()["finished"], JOB_S)
    return job()


def _follows(scene: Scene, http: httpx.Client, version: int) -> None:
    """Wait until the service serves a version that another process has promoted."""
    wait_for(lambda: http.get(f"/models/{NAME}").json()["live"] == version, FOLLOWS_S, scene.folder / "log")
    scene.expect_service(http, version)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["/usr/bin/mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Skipped(f"mounting is not allowed here: {done.stderr.strip()}")


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """Put a folder with its content on a small tmpfs mount while the context lasts."""
    content = folder.with_name(f"{folder.name}-content")
    folder.mkdir(exist_ok=True)
    folder.rename(content)
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder))
    try:
        shutil.copytree(content, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["/usr/bin/umount", "--lazy", str(folder)], check=True)


@contextmanager
def _filled(disk: Path, leaving: int) -> Iterator[None]:
    """Fill a disk until only `leaving` bytes are free, while the context lasts."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leaving)))
    try:
        yield
    finally:
        ballast.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
