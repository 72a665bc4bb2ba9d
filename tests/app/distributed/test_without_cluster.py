"""Test that nothing of Ray is imported without CIFAR100_CLUSTER, and the checks of the settings of a cluster."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from app.settings import Settings

SERVE_ONCE = """
import sys
from pathlib import Path
from fastapi.testclient import TestClient
from app.main import create_app
from app.settings import Settings

models, runs = map(Path, sys.argv[1:])
with TestClient(create_app(Settings(models=models, runs=runs, data="synthetic:4"))) as client:
    assert client.get("/health/ready").status_code == 200
print([name for name in sys.modules if name.split(".")[0] == "ray" or name.startswith("app.distributed")])
"""


@pytest.mark.slow
def test_nothing_of_ray_is_imported_without_a_cluster(published_store: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SERVE_ONCE, str(published_store), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster_min_replicas": 3, "cluster_max_replicas": 2}, "CIFAR100_CLUSTER_MIN_REPLICAS=3 exceeds"),
        ({"cluster": "local", "workers": 2}, "needs CIFAR100_WORKERS=1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings.model_validate(settings)


def test_a_cluster_without_the_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.settings.find_spec", lambda _: None)
    with pytest.raises(ValidationError, match="extra ray"):
        Settings(cluster="auto")
    assert Settings(cluster="").cluster is None
