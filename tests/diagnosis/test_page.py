"""The page in a real browser, Chromium, which must be installed: without a network, narrow and wide."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drawn import diagnosed, model_of, write_images

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason='There is no Playwright: pip install -e ".[test]".')
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="There is no Chromium: apt-get install chromium.")

ROWS = [
    *(("good", score, product) for product in (0, 1) for score in (0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.9)),
    ("good", 1.4, 0),
    *(("scratch", score, product) for product in (0, 1) for score in (0.8, 1.5, 1.7, 1.9, 2.2, 2.5)),
    *(("stain & dust", score, 1) for score in (0.7, 1.2)),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    images = write_images(folder, ROWS)
    return diagnosed(folder / "out", model_of([1.0, 1.0], ["disc", "plate"]), images)


@pytest.fixture
def rows(written: Path) -> list[dict]:
    return json.loads((written.parent / "numbers.json").read_text())["images"]


@pytest.fixture(params=[1400, 400])
def page(browser: Any, written: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The open page; whatever it logs, or asks of a network, fails the test."""
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    context.set_offline(True)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda asked: asked.url.startswith(("data:", "file:")) or wrong.append(asked.url))
    page.goto(written.as_uri())
    yield page
    context.close()
    assert not wrong


def test_pictures_load_and_fit(page: Any, rows: list[dict]) -> None:
    images = "[...document.images]"
    page.wait_for_function(f"{images}.every(image => image.complete)")
    # Two figures and an example in front, two of each product's figures, four inside, and two pictures an image.
    assert page.evaluate(f"{images}.length") == 2 + 2 + 2 * 2 + 4 + 2 * len(rows)
    assert page.evaluate(f"{images}.every(image => image.naturalWidth > 0)")
    assert page.evaluate(f"{images}.every(image => image.alt)")
    width = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(width) == 0
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    assert page.evaluate(width) == 0
    assert page.evaluate("Math.min(...[...document.querySelectorAll('.entry img')].map(i => i.clientWidth))") >= 256
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.title() == "Can this model be trusted on these parts?"


def test_the_first_screen_answers(page: Any) -> None:
    answer = page.locator("main > .answer")
    assert answer.inner_text() == "With care: it misses some of the defective parts."
    assert "It misses 3 of 14 defective images" in page.locator("main > dl").inner_text()
    assert page.locator("main > .pictures > figure").count() == 3
    assert page.locator(".example .badge").inner_text() == "missed"


def shown(page: Any) -> list[str]:
    return [name.inner_text() for name in page.locator(".entry:visible code").all()]


def files(rows: list[dict], **wanted: str) -> list[str]:
    return [row["file"] for row in rows if all(row[key] == value for key, value in wanted.items())]


def test_filters(page: Any, rows: list[dict]) -> None:
    """Each shows just the images that the JSON says, in the JSON's order; they combine."""
    assert shown(page) == files(rows)
    for verdict in ("missed", "false alarm", "found", "passed"):
        wanted = files(rows, verdict=verdict)
        assert wanted
        page.get_by_role("button", name=f"{verdict.capitalize()} ({len(wanted)})", exact=True).click()
        assert shown(page) == wanted
        assert page.get_by_role("status").inner_text() == f"{len(wanted)} of {len(rows)} images"
        assert page.locator("[aria-pressed=true]").inner_text() == f"{verdict.capitalize()} ({len(wanted)})"
    page.get_by_role("button", name=f"All ({len(rows)})").click()
    for kind in ("good", "scratch", "stain & dust"):
        page.locator("#kind").select_option(kind)
        assert shown(page) == files(rows, kind=kind)
    page.locator("#kind").select_option("scratch")
    page.locator("#product").select_option("plate")
    assert shown(page) == files(rows, kind="scratch", product="plate")
    page.get_by_role("button", name="Missed (3)").click()
    assert shown(page) == files(rows, kind="scratch", product="plate", verdict="missed")
    page.locator("#kind").select_option("good")
    assert shown(page) == []


def test_a_picture_is_enlarged_by_keyboard(page: Any, rows: list[dict]) -> None:
    first = page.locator(".entry button").first
    first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.locator("img").count() == 2
    assert dialog.locator("code").inner_text() == rows[0]["file"]
    assert dialog.evaluate("box => box.scrollWidth - box.clientWidth") == 0
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert first.evaluate("button => button === document.activeElement")
