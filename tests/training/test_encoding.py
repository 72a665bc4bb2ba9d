"""Test file names with any characters: the restart in UTF-8 mode, and text that quotes undecodable bytes."""

import os
import subprocess
import sys

import pytest

from training.encoding import replace_surrogates

SHOW = r"""
import os, sys
from training.encoding import restart_in_utf8_mode
print(os.getpid(), flush=True)
restart_in_utf8_mode()
print(os.getpid(), sys.getfilesystemencoding(), sys.argv[1] == "gr\xf6\xdfe")
"""


@pytest.mark.parametrize(
    ("text", "replaced"),
    [
        ("plain", "plain"),
        ("größe 日本 😀", "größe 日本 😀"),
        (os.fsdecode("gr") + "\udcc3\udcb6\udcc3\udc9fe", "größe"),
        ("gr\udcf6\udcdfe", "gr\\xf6\\xdfe"),
        ("a\ud800b", "a\\ud800b"),
    ],
)
def test_replaced_surrogates_can_be_encoded(text: str, replaced: str) -> None:
    assert replace_surrogates(text) == replaced
    replaced.encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment", "starts", "encoding"),
    [
        ([], {"LC_ALL": "C", "PYTHONUTF8": "0"}, 2, "utf-8 True"),
        ([], {"LC_ALL": "C", "PYTHONUTF8": ""}, 1, "utf-8 True"),
        (["-X", "utf8=0"], {"LC_ALL": "C", "PYTHONUTF8": "0"}, 2, "ascii False"),
    ],
    ids=["C locale", "default", "option that precedes the variable"],
)
def test_program_restarts_once_if_its_locale_is_not_utf8(
    options: list[str], environment: dict[str, str], starts: int, encoding: str
) -> None:
    command = [sys.executable, *options, "-c", SHOW, "größe"]
    ran = subprocess.run(command, env=os.environ | environment, capture_output=True, timeout=60, check=True)
    *begun, last = ran.stdout.decode().splitlines()
    process, _, rest = last.partition(" ")
    assert begun == [process] * starts
    assert rest == encoding
