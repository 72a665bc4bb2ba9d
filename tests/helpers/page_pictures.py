"""Take the pictures of the page in docs/pictures, with the shipped models and Debian's chromium.

    python tests/helpers/page_pictures.py [--runs FOLDER]

One picture shows a finished training. The program takes the newest one in the runs folder, or else trains a small
network on CIFAR-100, which takes some minutes. A runs folder that is given stays for the next time.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[2]))

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from server import Server, wait_for
from service import find_finished_job

from training.dataset import DEFAULT_FOLDER

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs/pictures"
TRAINING = {
    "recipe": "resnet",
    "overrides": {"width": 8, "epochs": 6, "batch_size": 256, "validation_images": 1000},
    "promote": "never",
}
TRAINING_S = 3600.0
WIDTH = 1280
COLORS = 256  # enough for a picture without photos


def find_training(client: httpx.Client) -> str:
    """Return the id of the newest finished training. Train if there is none."""
    finished = [job["id"] for job in client.get("/train").json() if job["state"] == "succeeded"]
    if not finished:
        job_id = client.post("/train", json=TRAINING).raise_for_status().json()["id"]
        finished = [wait_for(lambda: find_finished_job(client, job_id), TRAINING_S)["id"]]
    newest: str = finished[0]
    return newest


def take(
    browser: Browser,
    address: str,
    name: str,
    height: int,
    show: Callable[[Page], None],
    color_scheme: Literal["dark", "light"] = "light",
) -> None:
    """Take the picture of a state of the page.

    Args:
        browser: The browser.
        address: URL of the service.
        name: Name of the file without its ending.
        height: Height of the picture in pixels.
        show: Function that brings the page into the state.
        color_scheme: Colors of the page.
    """
    page = browser.new_page(
        base_url=address,
        viewport={"width": WIDTH, "height": height},
        color_scheme=color_scheme,
        reduced_motion="reduce",
    )
    show(page)
    path = PICTURES / f"{name}.png"
    page.screenshot(path=path)
    page.close()
    picture = Image.open(path).convert("RGB")
    has_photo = name == "page"
    (picture if has_photo else picture.quantize(COLORS, dither=Image.Dither.NONE)).save(path, optimize=True)


def explain_castle(page: Page) -> None:
    page.goto("/#/?sample=castle")
    page.get_by_role("button", name="Why castle?").click()
    page.locator(".cover").wait_for()
    page.mouse.move(WIDTH - 1, 0)
    page.evaluate("document.activeElement.blur()")


def open_training(page: Page, job_id: str) -> None:
    page.goto(f"/#/train/{job_id}")
    page.locator(".chart").first.wait_for()


def open_card(page: Page) -> None:
    page.goto("/#/models/resnet18/5")
    page.locator(".chart").first.wait_for()


def main(runs: Path | None) -> None:
    data = os.environ.get("CIFAR100_DATA", DEFAULT_FOLDER)
    with tempfile.TemporaryDirectory() as folder:
        models = shutil.copytree(ROOT / "models", Path(folder, "models"))
        with (
            Server(models, runs or Path(folder, "runs"), Path(folder, "log"), data=data) as server,
            server.client() as client,
            sync_playwright() as playwright,
            playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"]) as browser,
        ):
            job_id = find_training(client)
            address = str(client.base_url)
            take(browser, address, "page", 700, explain_castle)
            take(browser, address, "page-training", 730, lambda page: open_training(page, job_id), "dark")
            take(browser, address, "page-model", 760, open_card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path)
    main(parser.parse_args().runs)
