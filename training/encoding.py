"""This module makes file names with any characters usable: the encoding of paths, and text that quotes them."""

import os
import sys


def restart_in_utf8_mode() -> None:
    """Restart the program in Python's UTF-8 mode if its locale has another encoding, such as LC_ALL=C.

    Libraries such as PyTorch and TensorBoard open paths as UTF-8. The process keeps its id and its open files. Call
    this first, before the program has started threads.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.execve(sys.executable, sys.orig_argv, os.environ | {"PYTHONUTF8": "1"})  # noqa: S606


def replace_surrogates(text: str) -> str:
    """Make a text encodable as UTF-8. Surrogates stand for the bytes of a file name that Python could not decode.

    Bytes that are valid UTF-8 are decoded. Other bytes become escapes such as \\xf6.
    """
    if text.isascii():
        return text
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode(errors="backslashreplace").decode()
