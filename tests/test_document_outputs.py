"""Test that outputs of another shape than a document shows are found."""

import pytest
from documented_commands import differs


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ('{"id": "20261124-112513-ea24acdd", "top1": 0.5}', '{"id":"20261129-184202-4f8114de","top1":1}'),
        ('{"cards": [1, "…"]}', '{"cards": [2, 3, 4]}'),
        ('{"a": 1, "…": "…"}', '{"a": 1, "b": 2}'),
        ('{"live":true}\n{"live":true}', '{"live": true}\n{"live": true}'),
        ("live_version 4.0 in openvino-int8", "live_version   5.0 in torchscript-cpu"),
        ("first\n…\nlast", "first\nsecond\nthird\nlast\n"),
    ],
)
def test_outputs_of_the_same_shape_are_equal(expected: str, actual: str) -> None:
    assert differs(expected, actual) is None


@pytest.mark.parametrize(
    ("expected", "actual", "difference"),
    [
        ('{"a": 1}', '{"a": 1, "b": 2}', r"has \['a', 'b'\], the document shows \['a'\]"),
        ('{"a": [{"b": 1}]}', '{"a": [{"b": null}]}', r"\.a\[0\]\.b is None, the document shows 1"),
        ('{"a": [1]}', '{"a": [1, 2]}', "has 2 items, the document shows 1"),
        ('{"label": "rocket"}', '{"label": "skyscraper"}', "skyscraper"),
        ("live", "ready", "the output is 'ready'"),
    ],
)
def test_other_outputs_are_named(expected: str, actual: str, difference: str) -> None:
    with pytest.raises(AssertionError, match=difference):
        raise AssertionError(differs(expected, actual))
