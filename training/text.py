"""This module prepares untrusted text, such as a name from a client, for messages: it shortens, quotes and corrects."""

from collections.abc import Collection
from difflib import get_close_matches

MAX_QUOTED = 100


def shorten(text: str, limit: int) -> str:
    """Shorten a text to at most `limit` characters. A shortened text ends with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quote(text: str) -> str:
    """Quote a text of at most `MAX_QUOTED` characters, and escape its unprintable characters."""
    return repr(shorten(text, MAX_QUOTED))


def suggest(name: str, known: Collection[str], kind: str = "fields") -> str:
    """Return a hint for an unknown name: the most similar known name, or all known names if none is similar.

    Args:
        name: The unknown name.
        known: The known names, in lower case with underscores.
        kind: Plural noun for the known names.
    """
    near = get_close_matches(name[:MAX_QUOTED].lower().replace("-", "_"), known, n=1)
    return f"did you mean {near[0]}?" if near else f"the {kind} are {', '.join(known)}"
