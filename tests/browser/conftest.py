"""Provide a server with shipped models, and a page in Debian's chromium that fails a test on any error it reports."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server import Server
from service import list_processes

pytest.importorskip("playwright")

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, ViewportSize, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
SHIPPED = Path(__file__).parents[2] / "models"
WIDE: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 844}
TIMEOUT_MS = 60_000  # for each condition; other processes may keep all cores busy

_REPORT_VIOLATIONS = """addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) =>
    console.error(`security policy: ${violatedDirective} ${blockedURI}`))"""
_FAILED_RESPONSE = "Failed to load resource"  # tests of failures want these


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the shipped models and the synthetic data set. It takes corrections; the cascade is the default."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copytree(SHIPPED, folder / "models")
    with Server(folder / "models", folder / "runs", folder / "log", evaluate_wait_s="0.2", feedback="true") as running:
        yield running
    for process in list_processes(folder):
        os.kill(process, signal.SIGKILL)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser. It ends with the module, because Playwright keeps an event loop running in the thread of the tests."""
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def page(request: pytest.FixtureRequest, server: Server, browser: Browser) -> Iterator[Page]:
    """A page on a wide screen, or on a phone in a test that is marked so. It must report no error."""
    is_phone = request.node.get_closest_marker("phone") is not None
    context = browser.new_context(
        base_url=server.address,
        viewport=PHONE if is_phone else WIDE,
        has_touch=is_phone,
        is_mobile=is_phone,
        reduced_motion="reduce",
        permissions=["clipboard-read", "clipboard-write"],
    )
    context.set_default_timeout(TIMEOUT_MS)
    expect.set_options(timeout=TIMEOUT_MS)
    context.add_init_script(_REPORT_VIOLATIONS)
    page, errors = context.new_page(), list[str]()
    own = (server.address or "", "blob:", "about:")

    def note_message(message: ConsoleMessage) -> None:
        if message.type == "error" and not message.text.startswith(_FAILED_RESPONSE):
            errors.append(message.text)

    def note_request(request: Request) -> None:
        if not request.url.startswith(own):
            errors.append(f"a request to {request.url}")

    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", note_message)
    page.on("request", note_request)
    yield page
    context.close()
    assert errors == []
