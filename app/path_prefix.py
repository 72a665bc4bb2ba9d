"""Parses the path prefix under which a proxy publishes the service, such as /ml. Input: text. Output: the prefix."""

import re

OWN_PATHS = {
    "/docs",
    "/errors",
    "/evaluate",
    "/evaluate/jobs",
    "/explain",
    "/feedback",
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/models",
    "/openapi.json",
    "/predict",
    "/static",
    "/train",
    "/train/recipes",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/stats",
}
"""Paths of the service. They are ambiguous as prefixes, because a proxy may remove the prefix or pass it on."""

_MAX_LENGTH = 200
_PREFIX = re.compile(r"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~-]+)*")  # unreserved characters of RFC 3986, section 2.3


def parse_path_prefix(text: str) -> str:
    """Return a path prefix without its final slash, empty for the root.

    Raises:
        ValueError: The text is not a plain absolute path, or it is a path of the service.
    """
    prefix = text.removesuffix("/")
    if len(prefix) > _MAX_LENGTH or not _PREFIX.fullmatch(prefix):
        raise ValueError(
            f"{text[:_MAX_LENGTH]!r} is not a path prefix; use one such as /ml, of letters, digits and . _ ~ -"
        )
    if prefix in OWN_PATHS:
        raise ValueError(f"{prefix} is a path of the service itself; use a prefix such as /ml{prefix}")
    return prefix
