"""Test that the output of a Ray job becomes the metrics, the publication and the output of its run."""

from pathlib import Path

import pytest

from training.run import Publication, Run
from training.store import Store

pytest.importorskip("ray")

from app.jobs.ray_executor import _write_output


def test_output_of_several_attempts_is_one_run(tmp_path: Path, published_store: Path) -> None:
    publication = Publication(model="resnet", version=1, live=True, test=Store(published_store).card("resnet", 1).test)
    lines = [
        "loading PyTorch ...",
        '{"name": "resnet"}',
        '{"epoch": 1, "event": "epoch"}',
        '{"epoch": 2, "event": "epoch"}',
        '{"epoch": 2, "event": "epoch"}',  # the next attempt measures it again
        '{"event": "published", ' + publication.model_dump_json().removeprefix("{"),
        '{"epoch": 3, "ev',  # not complete yet
    ]
    run = Run(tmp_path)
    _write_output(run, "\n".join(lines))
    assert list(run.numbered_metrics()) == [(1, {"epoch": 1, "event": "epoch"}), (3, {"epoch": 2, "event": "epoch"})]
    assert run.publication() == publication
    assert run.output_file.read_text().splitlines() == [*lines[:2], lines[-1]]
