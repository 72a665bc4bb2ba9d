"""This module shortens untrusted text, such as a name from a client, so that messages can quote it."""

MAX_QUOTED = 100


def shorten(text: str, limit: int) -> str:
    """Shorten a text to at most `limit` characters. A shortened text ends with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quote(text: str) -> str:
    """Quote a text of at most `MAX_QUOTED` characters, and escape its unprintable characters."""
    return repr(shorten(text, MAX_QUOTED))
