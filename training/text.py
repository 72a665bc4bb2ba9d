"""Text from outside, such as a name that a client sends, as messages may repeat it: short."""

MAX_QUOTED = 100


def shorten(text: str, limit: int) -> str:
    """A text of at most `limit` characters; a longer one ends with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quote(text: str) -> str:
    """A text in quotes, at most `MAX_QUOTED` characters of it, with escapes for what cannot be printed."""
    return repr(shorten(text, MAX_QUOTED))
