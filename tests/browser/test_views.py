"""Test the page as a visitor uses it, in a real browser and with real models.

Each state of the page is audited with axe-core in light and dark colors.
"""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pytest
from api import make_zip
from PIL import ExifTags, Image

from app.inference.images.encoded import decode
from app.routes.page import STATIC

pytest.importorskip("axe_playwright_python")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, ViewportSize, expect

pytestmark = pytest.mark.slow

SAMPLES = STATIC / "samples"
ROCKET = Path(__file__).parents[2] / "docs" / "pictures" / "rocket.jpg"
MAX_FIRST_VIEW = 60_000  # bytes
MAX_LEVELS = 3.0  # mean difference of the pixels that the page shows from those of the service, of 255
MAX_PROBABILITY = 0.03  # difference of the answer to a picture that the browser has scaled
TRAINING_MS = 200_000
MIN_TARGET = 44  # pixels of a control that is touched
NARROWEST: ViewportSize = {"width": 320, "height": 640}  # a screen of 1,280 pixels at a zoom of 400 %
COLOR_SCHEMES: dict[Literal["dark", "light"], Any] = {"dark": {"runOnly": ["color-contrast"]}, "light": {}}
"""Color schemes, with the rules of axe-core that depend on them, or all rules."""
CLOCKWISE = 6  # orientation of a photo that has to be turned by 90 degrees
TINY = {"width": 8, "epochs": 2, "validation_images": 0}

# Creates the event of a drop or a paste with files, or with the address of a picture.
_TRANSFER = """([kind, files]) => {
    const data = new DataTransfer();
    for (const [name, type, bytes] of files) data.items.add(new File([new Uint8Array(bytes)], name, { type }));
    if (files.length === 0) data.setData("text/uri-list", "https://example.org/cat.jpg");
    const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
        : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
    document.body.dispatchEvent(event);
}"""


_BACKGROUND = "element => getComputedStyle(element).backgroundColor"


def audit(page: Page) -> None:
    """Assert that axe-core finds no violation in light and dark colors, and that nothing is wider than the screen."""
    for scheme, options in COLOR_SCHEMES.items():
        page.emulate_media(color_scheme=scheme)
        results = Axe().run(page, options=options)
        assert results.violations_count == 0, results.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def transfer(page: Page, kind: str, *files: tuple[str, str, bytes]) -> None:
    page.evaluate(_TRANSFER, [kind, [(name, media_type, list(content)) for name, media_type, content in files]])


def choose(page: Page, *names: str) -> None:
    """Choose sample pictures as files, and wait for their answers."""
    page.goto("/")
    page.set_input_files("#file", [SAMPLES / f"{name}.jpg" for name in names])
    wait_for_answer(page)


def wait_for_answer(page: Page) -> None:
    expect(page.locator("#answer[aria-busy='false'] .bars").first).to_be_visible()


def best(page: Page) -> tuple[str, float]:
    """Return the most probable class and its probability."""
    name = page.locator(".bars li:first-child .name").first.evaluate("element => element.firstChild.data")
    share = page.locator(".bars li:first-child .share").first.inner_text()
    return name.replace(" ", "_"), float(share.removesuffix("\u00a0%")) / 100


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def answer_with(status: int, body: str, media_type: str = "application/problem+json") -> Callable[[Route], None]:
    return lambda route: route.fulfill(status=status, body=body, content_type=media_type)


def problem(detail: str) -> str:
    return json.dumps({"type": "about:blank", "title": "x", "status": 0, "detail": detail})


def test_first_view_is_small_and_explains_itself(page: Page) -> None:
    page.goto("/")
    expect(page.get_by_role("heading", name="What is in the picture?")).to_be_visible()
    expect(page.locator("#model")).to_have_count(1)
    sizes = page.evaluate("performance.getEntries().map(({ transferSize }) => transferSize ?? 0)")
    assert sum(sizes) < MAX_FIRST_VIEW
    audit(page)
    page.get_by_role("button", name="100 classes").click()
    expect(page.get_by_role("dialog")).to_contain_text("lawn mower")
    audit(page)


@pytest.mark.parametrize("name", ["rocket", "castle", "chair"])
def test_scaling_in_the_browser_keeps_the_answer(name: str, page: Page, client: httpx.Client) -> None:
    """A photo of 12 megapixels, stored on its side, is turned and scaled down before it is sent.

    The service gets the original for comparison.
    """
    sample = Image.open(SAMPLES / f"{name}.jpg")
    photo = sample.resize((4000, 3000), Image.Resampling.BICUBIC).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = CLOCKWISE
    original = encode(photo, "JPEG", exif=exif)
    page.goto("/")
    page.set_input_files("#file", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": original})
    wait_for_answer(page)
    model = page.locator("#model").input_value()
    direct = client.post(f"/predict?model={model}", files={"file": original}).json()["predictions"][0]["classes"][0]
    label, probability = best(page)
    assert label == direct["label"]
    assert probability == pytest.approx(direct["probability"], abs=MAX_PROBABILITY)


def test_preview_shows_the_pixels_that_the_service_computes(page: Page) -> None:
    choose(page, "castle")
    shown = page.locator(".seen canvas").evaluate(
        "canvas => [...canvas.getContext('2d').getImageData(0, 0, 32, 32).data]"
    )
    pixels = np.array(shown).reshape(32, 32, 4)[..., :3].transpose(2, 0, 1)
    computed = decode((SAMPLES / "castle.jpg").read_bytes(), 10**8, 10**8)
    assert np.abs(pixels - computed.astype(int)).mean() < MAX_LEVELS


def test_answer_names_classes_model_and_time(page: Page) -> None:
    choose(page, "castle")
    assert best(page)[0] == "castle"
    assert page.locator(".bars li").count() == 5
    expect(page.locator("#answer")).to_contain_text(re.compile(r"cascade, version 1\. [\d.]+ ms on the server"))
    expect(page.locator("#said")).to_contain_text("castle")
    audit(page)
    page.get_by_role("button", name="From a program").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"{page.url.partition('#')[0]}predict?model=cascade")
    audit(page)
    page.get_by_role("button", name="Close").click()
    page.emulate_media(forced_colors="active")
    assert len({page.locator(part).first.evaluate(_BACKGROUND) for part in (".bar", ".bar span")}) == 2


def test_photos_are_taken_from_drop_and_paste(page: Page) -> None:
    page.goto("/")
    castle = ("castle.jpg", "image/jpeg", (SAMPLES / "castle.jpg").read_bytes())
    transfer(page, "drop", castle)
    wait_for_answer(page)
    assert best(page)[0] == "castle"
    page.goto("/#/models")
    expect(page.locator("table")).to_be_visible()
    transfer(page, "paste", ("chair.jpg", "image/jpeg", (SAMPLES / "chair.jpg").read_bytes()))
    expect(page.locator("#said")).to_contain_text("chair.jpg: chair")
    transfer(page, "drop")
    expect(page.locator("#notice")).to_contain_text("only the address of a picture")
    audit(page)


def test_several_photos_are_a_gallery(page: Page) -> None:
    choose(page, "castle", "chair", "cat")
    photos = page.locator("#gallery button")
    expect(photos).to_have_count(3)
    expect(photos.nth(1)).to_contain_text("chair")
    photos.nth(1).click()
    assert best(page)[0] == "chair"
    expect(photos.nth(2)).to_contain_text("?")  # none of the classes
    audit(page)


def test_photos_beyond_the_limit_of_the_service_are_left_out(page: Page, client: httpx.Client) -> None:
    health = client.get("/health").json()
    assert health["max_images"] == 32
    page.route("**/health", lambda route: route.fulfill(json=health | {"max_images": 2}))
    choose(page, "castle", "chair", "cat")
    expect(page.locator("#gallery button")).to_have_count(2)
    expect(page.locator("#refused")).to_contain_text("2 photos at a time are the limit. The other 1 are left out.")


def test_what_the_browser_shows_is_converted_and_the_rest_refused(page: Page) -> None:
    page.goto("/")
    page.set_input_files("#file", {"name": "a.heic", "mimeType": "image/heic", "buffer": b"\0\0\0\x18ftypheic\0\0"})
    expect(page.locator("#refused")).to_contain_text("This browser cannot show a.heic. Save it as a JPEG or PNG")
    expect(page.locator("#hint")).to_be_visible()
    audit(page)
    drawing = (
        b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><circle cx="4" cy="4" r="4" fill="red"/></svg>'
    )
    huge = encode(Image.new("L", (10_000, 6_000), 99), "PNG")
    for name, media_type, content in (("a.svg", "image/svg+xml", drawing), ("huge.png", "image/png", huge)):
        page.set_input_files("#file", {"name": name, "mimeType": media_type, "buffer": content})
        expect(page.locator("#said")).to_contain_text(f"{name}: ")
        expect(page.locator("#refused")).to_be_empty()


def test_square_is_moved_by_pointer_and_keys_and_kept_in_the_link(page: Page) -> None:
    page.goto("/")
    page.get_by_role("button", name="A rocket at dusk").click()
    wait_for_answer(page)
    square = page.get_by_role("slider", name="Square that the network sees")
    before = square.get_attribute("aria-valuetext")
    box = square.bounding_box()
    assert box
    with page.expect_response("**/predict*"):
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"], box["y"])
        page.mouse.up()
    assert square.get_attribute("aria-valuetext") != before
    with page.expect_response("**/predict*"):
        page.mouse.move(box["x"] + 2, box["y"] + box["height"] - 4)  # no corner is here any more: the square has moved
        page.get_by_role("button", name="Smaller square").click()
    square.focus()
    with page.expect_response("**/predict*"):
        for key in ("ArrowRight", "ArrowDown", "-"):
            page.keyboard.press(key)
    wait_for_answer(page)
    audit(page)
    text = square.get_attribute("aria-valuetext")
    assert text
    page.get_by_role("button", name="Copy link").click()
    link = page.evaluate("navigator.clipboard.readText()")
    answer = best(page)
    page.goto("about:blank")
    page.goto(link)
    wait_for_answer(page)
    expect(square).to_have_attribute("aria-valuetext", text)
    assert best(page) == answer


def test_models_answer_side_by_side(page: Page) -> None:
    choose(page, "castle")
    page.select_option("#model", "all")
    expect(page.locator(".one")).to_have_count(4)
    assert page.locator(".one h2").all_inner_texts() == ["cascade", "resnet18", "resnet", "resnet-seed"]
    # The first member of the cascade is confident, so both give the same answer.
    assert page.locator(".one").nth(0).locator(".share").all_inner_texts() == (
        page.locator(".one").nth(2).locator(".share").all_inner_texts()
    )
    audit(page)


def test_explanation_is_laid_over_the_square(page: Page) -> None:
    choose(page, "castle")
    why = page.get_by_role("button", name="Why castle?")
    why.click()
    expect(why).to_have_attribute("aria-pressed", "true")
    expect(page.locator(".square .cover")).to_be_visible()
    expect(page.locator("#legend")).to_contain_text("speaks for castle")
    expect(page.locator("#said")).to_contain_text("The photo shows which regions speak for castle, most of all the ")
    audit(page)
    why.click()
    expect(page.locator(".square .cover")).to_have_count(0)


def test_right_class_is_sent(page: Page, client: httpx.Client) -> None:
    choose(page, "cup")
    page.get_by_role("button", name="Send the right class").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Right class").select_option("bowl")
    audit(page)
    page.route("**/feedback*", answer_with(507, problem("the service keeps 10,000 corrections already")))
    dialog.get_by_role("button", name="Send").click()
    expect(dialog.get_by_role("alert")).to_contain_text("The service keeps 10,000 corrections already.")
    page.unroute("**/feedback*")
    dialog.get_by_role("button", name="Send").click()
    expect(page.locator("#notice")).to_contain_text("keeps this picture as bowl")
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("button", name="Send the right class")).to_be_focused()
    [correction] = client.get("/feedback").json()
    assert (correction["label"], correction["answer"]["predicted"]) == ("bowl", best(page)[0])


def test_page_offers_no_correction_if_the_service_takes_none(page: Page, client: httpx.Client) -> None:
    health = client.get("/health").json() | {"feedback": False}
    page.route("**/health", answer_with(200, json.dumps(health), "application/json"))
    choose(page, "cup")
    expect(page.get_by_role("button", name="From a program")).to_be_visible()
    expect(page.get_by_role("button", name="Send the right class")).to_have_count(0)


def test_strange_picture_is_called_none_of_the_classes(page: Page) -> None:
    choose(page, "cat")
    expect(page.locator("#answer")).to_contain_text("Probably none of the 100 classes.")
    audit(page)


@pytest.mark.parametrize(
    ("respond", "words"),
    [
        (lambda route: route.abort(), "The service does not answer."),
        (answer_with(502, "<h1>Bad gateway</h1>", "text/html"), "Something between this page and the service"),
        (answer_with(429, problem("more than 1 per minute; try again in 9 s")), "More than 1 per minute; try again"),
    ],
    ids=["down", "proxy", "limit"],
)
def test_failure_reads_like_a_sentence_and_can_be_tried_again(
    respond: Callable[[Route], None], words: str, page: Page
) -> None:
    page.goto("/")
    page.route("**/predict*", respond)
    page.set_input_files("#file", SAMPLES / "castle.jpg")
    expect(page.locator("#problem")).to_contain_text(words)
    audit(page)
    page.unroute("**/predict*")
    page.get_by_role("button", name="Try again").click()
    wait_for_answer(page)
    expect(page.locator("#problem")).to_be_empty()


def test_offline_device_is_told(page: Page) -> None:
    choose(page, "castle")
    page.context.set_offline(True)
    expect(page.locator("#notice")).to_contain_text("offline")
    audit(page)
    page.context.set_offline(False)
    expect(page.locator("#notice")).to_be_empty()


def test_key_is_asked_for_once(page: Page) -> None:
    refused = problem("this call needs an API key: send it as 'Authorization: Bearer KEY'")

    def require_key(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer a-key-of-sixteen":
            route.continue_()
        else:
            route.fulfill(status=401, body=refused, content_type="application/problem+json")

    page.route("**/predict*", require_key)
    page.goto("/")
    page.set_input_files("#file", SAMPLES / "castle.jpg")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("training, canceling, promoting and evaluating")
    audit(page)
    page.keyboard.press("Escape")
    expect(page.locator("#problem")).to_contain_text("needs an API key")
    page.get_by_role("button", name="Try again").click()
    dialog.get_by_label("API key").fill("a-key-of-sixteen")
    dialog.get_by_role("button", name="Use the key").click()
    wait_for_answer(page)
    page.reload()
    page.set_input_files("#file", SAMPLES / "chair.jpg")
    wait_for_answer(page)  # without a dialog
    assert page.evaluate("localStorage.length") == 0


def test_empty_store_says_what_to_do(page: Page, client: httpx.Client) -> None:
    health = client.get("/health").json() | {"models": {}, "store": "/srv/models"}
    page.route("**/health", lambda route: route.fulfill(json=health))
    page.goto("/")
    expect(page.locator("#problem")).to_contain_text("the folder /srv/models")
    expect(page.get_by_role("link", name="start a training")).to_be_visible()
    audit(page)


def test_training_is_watched_to_its_end(page: Page, client: httpx.Client) -> None:
    page.goto("/#/train")
    expect(page.get_by_role("heading", name="Train a network")).to_be_visible()
    page.get_by_label("Recipe").select_option("resnet")
    page.get_by_text("more settings").click()
    for field, value in TINY.items():
        page.locator(f"#field-{field}").fill(str(value))
    page.locator("#field-int8").uncheck()
    page.get_by_label("Make it live").select_option("never")
    audit(page)
    page.get_by_role("button", name="Start training").click()
    page.get_by_role("button", name="Cancel the training").focus()
    audit(page)
    expect(page.locator(".chart").first).to_be_visible(timeout=TRAINING_MS)
    expect(page.get_by_role("button", name="Cancel the training")).to_be_focused()
    expect(page.locator(".state.succeeded")).to_be_visible(timeout=TRAINING_MS)
    expect(page.get_by_role("heading", name="Training of resnet")).to_be_focused()
    expect(page.locator(".job")).to_contain_text("is published, but not live")
    assert page.locator(".chart polyline").count() == 4
    audit(page)
    (job, *_) = client.get("/train").json()
    assert job["request"]["overrides"] == TINY | {"int8": False}
    page.get_by_role("link", name="All trainings").click()
    expect(page.locator(".jobs li").first).to_contain_text("resnet")
    audit(page)
    page.get_by_role("link", name="resnet", exact=True).first.click()
    page.locator(".job .card a").click()
    expect(page.get_by_role("heading", name="Accuracy by class")).to_be_visible()


def test_training_is_refused_with_its_reason_and_canceled(page: Page, client: httpx.Client) -> None:
    page.goto("/#/train")
    page.locator("#field-epochs").fill("9999")
    page.get_by_role("button", name="Start training").click()
    expect(page.locator("#fault")).to_contain_text("above the limit of this service")
    expect(page.get_by_label("Epochs", exact=True)).to_have_attribute("aria-invalid", "true")
    audit(page)
    page.locator("#field-epochs").fill("400")
    page.get_by_role("button", name="Start training").click()
    page.get_by_role("button", name="Cancel the training").click()
    expect(page.locator(".state.cancelled")).to_be_visible()
    assert client.get("/train").json()[0]["state"] == "cancelled"


def test_version_is_promoted_and_rolled_back(page: Page, client: httpx.Client) -> None:
    page.goto("/#/models")
    audit(page)
    page.get_by_role("button", name="Make resnet/3 live").click()
    expect(page.locator("#notice")).to_contain_text("resnet/3 is live now. Before it was resnet/4.")
    assert client.get("/health").json()["models"]["resnet"]["version"] == 3
    page.get_by_role("button", name="Make resnet/4 live").click()
    expect(page.locator("#notice")).to_contain_text("resnet/4 is live now")
    assert client.get("/health").json()["models"]["resnet"]["version"] == 4


def test_versions_are_read_and_compared(page: Page) -> None:
    page.goto("/#/models")
    page.get_by_role("link", name="resnet/4").click()
    expect(page.locator(".facts")).to_contain_text("77.8")
    expect(page.get_by_role("link", name="Evaluate resnet/4")).to_be_visible()
    audit(page)
    page.get_by_label("Compare with").select_option("resnet/3")
    expect(page.get_by_role("heading", name="resnet/4 and resnet/3")).to_be_visible()
    audit(page)
    page.goto("/#/models/cascade/1")
    expect(page.locator(".facts")).to_contain_text("resnet/4 and resnet18/5; 34.7\u00a0% of the images need both")
    expect(page.get_by_role("heading", name="Training")).to_have_count(0)  # a cascade has no curve


def test_zip_of_labeled_photos_is_evaluated(page: Page) -> None:
    names = {"castle": "castle", "chair": "chair", "bricks": "road"}
    files = {f"{label}/{name}.jpg": (SAMPLES / f"{name}.jpg").read_bytes() for name, label in names.items()}
    page.goto("/")
    transfer(page, "drop", ("photos.zip", "application/zip", make_zip(files)))
    expect(page.get_by_role("heading", name="Evaluate a model")).to_be_visible()
    audit(page)
    page.get_by_role("button", name="Evaluate the photos").click()
    expect(page.get_by_role("heading", name="By class")).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("2 of 3")
    expect(page.get_by_role("img", name=re.compile("^Reliability"))).to_be_visible()
    mistake = page.get_by_role("region", name="The most confident mistakes").get_by_role("row").nth(1)
    expect(mistake).to_contain_text("road/bricks.jpg")
    expect(page.locator(".confusion")).to_contain_text("road answered as")
    audit(page)
    page.goto("/#/evaluate")
    page.set_input_files("#zip", {"name": "x.zip", "mimeType": "application/zip", "buffer": b"x"})
    page.get_by_role("button", name="Evaluate the photos").click()
    expect(page.locator(".problem")).to_contain_text("The zip cannot be read")
    audit(page)


@pytest.mark.phone
def test_answer_is_on_the_first_screen_of_a_phone(page: Page) -> None:
    choose(page, "rocket")
    expect(page.locator(".bars li").first).to_be_in_viewport(ratio=1)
    audit(page)
    for button in page.locator("button:visible:not(.link), .button:visible").all():
        box = button.bounding_box()
        assert box
        assert min(box["width"], box["height"]) >= MIN_TARGET
    page.set_viewport_size(NARROWEST)
    for view in ("train", "models", "evaluate", "models/resnet/4"):
        page.goto(f"/#/{view}")
        expect(page.locator("#view[aria-busy='false'] h1")).to_be_visible()
        audit(page)


def test_everything_is_reached_by_keyboard(page: Page) -> None:
    page.goto("/")
    expect(page.locator("#model")).to_have_count(1)

    def focus(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"{selector} is not reached")

    focus(".skip")
    focus("#file")
    focus("[data-name='castle']")
    page.keyboard.press("Enter")
    wait_for_answer(page)
    page.evaluate("document.activeElement.blur()")
    focus(".square")
    with page.expect_response("**/predict*"):
        page.keyboard.press("-")
    focus("#model")
    with page.expect_response("**/predict*model=resnet18*"):
        page.keyboard.press("ArrowDown")
    wait_for_answer(page)
    page.evaluate("document.activeElement.blur()")
    focus("[href='#/models']")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Models")).to_be_focused()
