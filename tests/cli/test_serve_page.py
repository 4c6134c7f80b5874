"""The page of `grood serve` in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from browser import browser_page, needs_browser
from served import Served, served

pytestmark = [pytest.mark.slow, needs_browser]
MODEL = ("--model", "nets.py:net", "--weights", "net.safetensors")
TOKEN = "0123456789abcdef"
DROP = """(place, bytes) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
  for (const kind of ["dragover", "drop"]) {
    place.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
  }
}"""


def results(page: Any, count: int) -> list[Any]:
    found = page.locator("#results > li")
    found.nth(count - 1).wait_for()
    assert found.count() == count
    return list(found.all())


def test_verdicts_and_neighbors(digits: Path) -> None:
    known, odd = sorted((digits / "test/zero").iterdir())[0], sorted((digits / "ood").iterdir())[0]
    with (
        served("net.grood", *MODEL, "--training-root", "train", "--fpr", "0.2") as service,
        browser_page() as (page, complaints),
    ):
        page.goto(service.url)
        page.get_by_text("The classifier knows 4 classes").wait_for()
        page.set_input_files("#files", [str(known), str(odd)])
        second, first = results(page, 2)
        for item, path in ((first, known), (second, odd)):
            assert item.locator("figcaption").inner_text() == path.name
            assert item.locator("strong").inner_text() in ("Known", "Unknown")
            assert item.locator(".neighbors img").count() == 5
            # Each is there: it was fetched, and can be shown.
            for image in item.locator(".neighbors img").all():
                image.scroll_into_view_if_needed()
                page.wait_for_timeout(200)
                assert image.evaluate("image => image.complete && image.naturalWidth === 160")
        assert "zero" in first.locator("dl").inner_text()
        page.locator("#drift").get_by_text("2 of the first 1,000 images seen").wait_for()
        page.locator("#drop").evaluate(DROP, list(odd.read_bytes()))
        assert results(page, 3)[0].locator("figcaption").inner_text() == "dropped.png"
        assert complaints == []


def test_what_is_no_image_says_so(digits: Path) -> None:
    (digits / "<b>bad.png").write_bytes(b"no image")
    with served("net.grood", *MODEL) as service, browser_page(viewport={"width": 360, "height": 640}) as (page, _):
        page.goto(service.url)
        page.set_input_files("#files", [str(digits / "<b>bad.png")])
        item = results(page, 1)[0]
        assert item.locator("strong").inner_text() == "No score"
        assert "not an image" in item.inner_text()
        assert item.locator("figcaption").inner_text() == "<b>bad.png"
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_token_is_asked_for(digits: Path) -> None:
    with served("net.grood", *MODEL, environment={"GROOD_TOKEN": TOKEN}) as service, browser_page() as (page, _):
        page.goto(service.url)
        page.locator("#token").wait_for()
        page.fill("#token-text", "wrong")
        page.keyboard.press("Enter")
        page.get_by_text("This service needs a token").wait_for()
        page.fill("#token-text", TOKEN)
        page.keyboard.press("Enter")
        page.locator("#token").wait_for(state="hidden")
        page.set_input_files("#files", [str(next((digits / "ood").iterdir()))])
        assert "number " in results(page, 1)[0].inner_text()


def background(service: Served, scheme: str) -> str:
    with browser_page(color_scheme=scheme) as (page, complaints):
        page.goto(service.url)
        page.get_by_text("The classifier knows").wait_for()
        assert complaints == []
        return str(page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))


def test_dark_and_light_and_the_documentation(digits: Path) -> None:
    with served("net.grood", *MODEL) as service:
        assert background(service, "light") == "rgb(255, 255, 255)"
        assert background(service, "dark") == "rgb(22, 22, 24)"
        with browser_page() as (page, complaints):
            page.goto(f"{service.url}/docs")
            page.get_by_text("Decide about images").wait_for()
            assert complaints == []
