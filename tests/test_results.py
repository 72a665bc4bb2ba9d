"""Test which runs of a script may replace its kept table."""

import argparse

import pytest
from results import is_whole


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ([], True),
        (["--minutes", "30", "--kills", "200"], True),
        (["--minutes", "60.5", "--workers", "2"], True),
        (["--minutes", "29.9"], False),
        (["--kills", "199", "--minutes", "60"], False),
        (["--only", "png"], False),
        (["scene"], False),
    ],
)
def test_run_with_default_or_larger_options_is_whole(options: list[str], whole: bool) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("scenes", nargs="*")
    assert is_whole(parser, parser.parse_args(options)) is whole
