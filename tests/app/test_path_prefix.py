"""Test the grammar of path prefixes."""

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Mount

from app.main import create_app
from app.path_prefix import OWN_PATHS, parse_path_prefix
from app.server.startup import StartupError, read_settings
from app.settings import Settings


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("", ""),
        ("/", ""),
        ("/ml", "/ml"),
        ("/ml/", "/ml"),
        ("/a/b-c_d.e~f/0", "/a/b-c_d.e~f/0"),
        ("/models/cifar100", "/models/cifar100"),
        ("/.well", "/.well"),
    ],
)
def test_plain_path_is_a_prefix_without_its_final_slash(text: str, prefix: str) -> None:
    assert parse_path_prefix(text) == prefix


@pytest.mark.parametrize(
    "text",
    [
        "ml",
        "//",
        "//example.org",
        "/ml//x",
        "/ml//",
        "http://example.org",
        "https:/example.org",
        "/ml?x",
        "/ml#x",
        "/ml\r\nSet-Cookie: a=b",
        "/ml\n",
        "/m l",
        "/ml\\x",
        "/ml%2F",
        "/ml/..",
        "/../ml",
        "/./ml",
        "/ml,/x",
        '/"><script>',
        "/mä",
        "/" + 200 * "m",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a path prefix; use one such as /ml"):
        parse_path_prefix(text)


def test_paths_of_the_service_are_refused_as_prefixes() -> None:
    app = create_app(Settings())
    paths = {each.path for each in app.routes if isinstance(each, APIRoute | Mount)} | set(app.openapi()["paths"])
    assert {path for path in paths if "{" not in path} - {"/"} == OWN_PATHS
    for path in OWN_PATHS:
        with pytest.raises(ValueError, match=f"^{path} is a path of the service itself; use a prefix such as /ml"):
            parse_path_prefix(path)


def test_invalid_root_path_prevents_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR100_ROOT_PATH", "ml")
    with pytest.raises(StartupError, match=r"^CIFAR100_ROOT_PATH: 'ml' is not a path prefix"):
        read_settings()
