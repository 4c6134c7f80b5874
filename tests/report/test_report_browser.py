"""The page in a browser: it complains of nothing, shows what is pointed at, and fits on a phone and on paper."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from report_world import AS_PATTERNS, HOSTILE, QUICK, World

from browser import browser_page, needs_browser
from torch_grood.report import benchmark_report, detector_report, write_page

pytestmark = [needs_browser, pytest.mark.filterwarnings("ignore::ResourceWarning")]
expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=60_000)

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "cifar10" / "resnet20.json"


@pytest.fixture(scope="module")
def pages(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page on a detector, one with hostile names, and one on a benchmark."""
    folder = tmp_path_factory.mktemp("pages")
    sets = [*world.sets(), world.one("near", "unlabelled", HOSTILE[0])]
    write_page(folder / "detector.html", detector_report(world.detector, AS_PATTERNS, sets, QUICK))
    hostile = [world.one("test", "known", "k<i>"), *(world.one("far", "near", name) for name in HOSTILE)]
    write_page(folder / "hostile.html", detector_report(world.detector, AS_PATTERNS, hostile, QUICK))
    alone = replace(QUICK, points=1)
    write_page(folder / "one.html", detector_report(world.detector, AS_PATTERNS, world.sets(), alone))
    write_page(folder / "benchmark.html", benchmark_report(RESULTS))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[tuple[Any, list[str]]]:
    with browser_page(viewport={"width": 1200, "height": 900}) as found:
        yield found


@pytest.fixture
def page(browser: tuple[Any, list[str]], pages: Path) -> Iterator[Any]:
    """The page on a detector; nothing may be complained of, whatever a test does with it."""
    found, complaints = browser
    complaints.clear()
    found.set_viewport_size({"width": 1200, "height": 900})
    found.emulate_media(color_scheme="light", media="screen", reduced_motion="reduce")
    found.goto((pages / "detector.html").as_uri())
    yield found
    assert complaints == []


def points(page: Any) -> dict[str, Any]:
    found: dict[str, Any] = page.evaluate("JSON.parse(document.getElementById('points').textContent)")
    return found


def on_screen(page: Any, view: str, i: int) -> tuple[float, float]:
    """Where a marker is really drawn: the middle of its <use>, found by set and order."""
    data = points(page)
    set_, order = data["set"][i], [k for k, one in enumerate(data["set"]) if one == data["set"][i]].index(i)
    box = page.evaluate(
        "([id, order]) => { const b = document.getElementById(id).querySelectorAll('use')[order]"
        ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }",
        [f"{view}-set-{set_}", order],
    )
    return box[0], box[1]


def apart(page: Any, view: str) -> int:
    """A point that no other one is near to."""
    xy = np.array(points(page)[view])
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2) + 1e9 * np.eye(len(xy))
    return int(distance.min(1).argmax())


@pytest.mark.parametrize("name", ["detector", "hostile", "one", "benchmark"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_complaints(page: Any, pages: Path, name: str, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.goto((pages / f"{name}.html").as_uri())
    assert page.title()
    broken = "[...document.images].filter(one => !one.complete || one.naturalWidth === 0).length"
    assert page.evaluate(broken) == 0


def test_light_and_dark(page: Any) -> None:
    colours = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours.append(
            page.evaluate(
                "['body', '#polar-set-0 use', '#polar text', '.tiles li'].map(one => { const style = "
                "getComputedStyle(document.querySelector(one.replace('#polar text', '[data-view=polar] text'))); "
                "return [style.color, style.backgroundColor, style.fill].join(); })"
            )
        )
    light, dark = colours
    assert all(one != other for one, other in zip(light, dark, strict=True))


def contrast(first: list[float], second: list[float]) -> float:
    """By WCAG 2."""

    def luminance(colour: list[float]) -> float:
        parts = [one / 255 for one in colour[:3]]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    names = ["ink", "faint", "link", *(f"series-{i}" for i in range(8)), "back", "card"]
    found = page.evaluate(
        "names => names.map(name => { const one = document.createElement('i'); one.style.color = `var(--${name})`; "
        "document.body.append(one); const found = getComputedStyle(one).color.match(/[\\d.]+/g).map(Number); "
        "one.remove(); return found; })",
        names,
    )
    colours = dict(zip(names, found, strict=True))
    for ground in ("back", "card"):
        for name in names[:3]:
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    # Names of sets are written in their colours, in large letters; markers are no text.
    for name in names[3:11]:
        assert contrast(colours[name], colours["back"]) >= 4, name
    assert len({tuple(colours[name]) for name in names[3:11]}) == 8


@pytest.mark.parametrize("view", ["polar", "plane"])
@pytest.mark.parametrize("width", [1200, 375])
def test_what_is_pointed_at_is_shown(page: Any, view: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.locator(f"[data-view={view}]").scroll_into_view_if_needed()
    i, data = apart(page, view), points(page)
    x, y = on_screen(page, view, i)
    page.mouse.move(x + 1, y - 1)
    tip = page.locator("#tip")
    expect(tip).to_be_visible()
    lines = tip.locator(".text").inner_text().split("\n")
    assert lines[0] == data["sets"][data["set"][i]]
    assert lines[1] == f"classifier: {data['classes'][data['label'][i]]}"
    assert lines[2].startswith(f"score {data['score'][i]}, p-value {data['p_value'][i]}, ")
    assert lines[3] == data["file"][i]
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    # The ring is around the marker, in both views.
    for one in ("polar", "plane"):
        ring = page.locator(f"[data-view={one}] .ring").bounding_box()
        left, up = on_screen(page, one, i)
        assert (ring["x"] + ring["width"] / 2, ring["y"] + ring["height"] / 2) == pytest.approx((left, up), abs=1)
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()


def test_the_tile_is_that_image(page: Any, world: World) -> None:
    """The grey values of the picture in the tip are nearer to those of its file than to any other's that is drawn."""
    page.locator("[data-view=polar]").scroll_into_view_if_needed()
    data, folders = points(page), (world.folder / "test", world.folder, world.folder, world.folder)
    files = [folders[set_] / file for set_, file in zip(data["set"], data["file"], strict=True)]
    images = np.stack([grey(Image.open(file)) for file in files])
    found = 0
    for i in range(0, len(files), 3):
        page.mouse.move(*on_screen(page, "polar", i))
        # Another point may lie there too.
        tile = page.locator("#tip .tile").bounding_box()
        if page.locator("#tip .text").text_content().endswith(data["file"][i]):
            # Not a picture of the element, for which the page may be scrolled, and the tip be gone.
            shot = Image.open(io.BytesIO(page.screenshot(clip=tile)))
            nearest = int(np.abs(images - grey(shot)).mean(1).argmin())
            # A file may be in two sets.
            assert files[nearest] == files[i]
            found += 1
    assert found > 5


def grey(image: Image.Image) -> NDArray[np.float64]:
    """Of 8 · 8 parts, without the corners, which are round."""
    found = np.asarray(image.convert("L").resize((8, 8), Image.Resampling.BOX), dtype=np.float64)
    found[::7, ::7] = 0
    return (found - found.mean()).ravel()


def test_the_keyboard_goes_from_image_to_image(page: Any) -> None:
    view, spoken, tip = page.locator("[data-view=polar]"), page.locator("#pointed"), page.locator("#tip")
    view.focus()
    data = points(page)
    order = sorted(range(len(data["set"])), key=lambda i: data["polar"][i][0])
    for key, place in (
        ("ArrowRight", 0),
        ("ArrowRight", 1),
        ("ArrowDown", 11),
        ("ArrowLeft", 10),
        ("ArrowUp", 0),
        ("ArrowLeft", 0),
    ):
        page.keyboard.press(key)
        expect(tip).to_be_visible()
        expect(tip).to_contain_text(data["file"][order[place]])
        expect(spoken).to_contain_text(data["file"][order[place]])
    page.keyboard.press("End")
    expect(tip).to_contain_text(data["file"][order[-1]])
    page.keyboard.press("Home")
    expect(tip).to_contain_text(data["file"][order[0]])
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    expect(page.locator(".ring").first).to_be_hidden()
    page.keyboard.press("ArrowRight")
    expect(tip).to_be_visible()
    page.keyboard.press("Tab")
    expect(tip).to_be_hidden()


def test_the_tip_goes_with_its_point_when_the_page_scrolls(page: Any) -> None:
    """Focus scrolls the page, and the event may come after a key; out of sight, the tip is gone."""
    view, tip = page.locator("[data-view=polar]"), page.locator("#tip")
    view.focus()
    page.keyboard.press("ArrowRight")
    expect(tip).to_be_visible()
    before, top = tip.bounding_box(), view.bounding_box()["y"]
    page.evaluate("scrollBy({top: 40, behavior: 'instant'})")
    moved = top - view.bounding_box()["y"]
    assert moved > 0
    page.wait_for_function("top => document.getElementById('tip').getBoundingClientRect().y < top", arg=before["y"])
    after = tip.bounding_box()
    assert (after["x"], after["y"]) == pytest.approx((before["x"], before["y"] - moved), abs=1)
    page.evaluate("scrollTo({top: document.body.scrollHeight, behavior: 'instant'})")
    expect(tip).to_be_hidden()


def test_sets_can_be_hidden(page: Any) -> None:
    boxes = page.locator(".toggles input")
    assert boxes.count() == 4
    i = apart(page, "polar")
    set_ = points(page)["set"][i]
    page.locator("[data-view=polar]").scroll_into_view_if_needed()
    x, y = on_screen(page, "polar", i)
    boxes.nth(set_).uncheck()
    for view in ("polar", "plane"):
        assert not page.locator(f"[id='{view}-set-{set_}']").is_visible()
        assert page.locator(f"[id='{view}-set-{(set_ + 1) % 3}']").is_visible()
    page.mouse.move(x, y)
    shown = page.locator("#tip .text").text_content() if page.locator("#tip").is_visible() else ""
    assert not shown.startswith(points(page)["sets"][set_])
    view = page.locator("[data-view=polar]")
    view.focus()
    for _ in range(sum(one != set_ for one in points(page)["set"])):
        page.keyboard.press("ArrowRight")
        expect(page.locator("#tip")).to_be_visible()
        assert not page.locator("#tip .text").text_content().startswith(points(page)["sets"][set_])
    boxes.nth(set_).check()
    assert page.locator(f"[id='polar-set-{set_}']").is_visible()
    for place in range(4):
        boxes.nth(place).uncheck()
    view.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_be_hidden()


@pytest.mark.parametrize("name", ["detector", "hostile", "one", "benchmark"])
@pytest.mark.parametrize("width", [320, 375, 800])
def test_a_narrow_page_does_not_scroll_sideways(page: Any, pages: Path, name: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto((pages / f"{name}.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What is wider scrolls by itself, also by keys.
    wide = "[...document.querySelectorAll('main *')].filter(one => one.scrollWidth > one.clientWidth + 1 && "
    wide += "['auto', 'scroll'].includes(getComputedStyle(one).overflowX) && one.tabIndex !== 0).length"
    assert page.evaluate(wide) == 0


def test_histograms_stay_readable_on_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 375, "height": 800})
    height = page.evaluate(
        "Math.min(...[...document.querySelectorAll('figure.wide text')].map(one => one.getBoundingClientRect().height))"
    )
    assert height >= 9


def test_the_order_of_tabs_reaches_everything(page: Any) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.dataset.view || document.activeElement.tagName"))
    for one in ("A", "polar", "plane", "INPUT"):
        assert one in seen


def test_paper_is_light_and_shows_everything(page: Any, pages: Path, tmp_path: Path) -> None:
    page.emulate_media(color_scheme="dark", media="print")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert not page.locator(".toggles").is_visible()
    page.pdf(path=str(tmp_path / "page.pdf"), format="A4")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 12


def test_no_column_is_cut_off_on_paper(page: Any) -> None:
    # A4 with margins of a centimetre.
    page.set_viewport_size({"width": 718, "height": 1000})
    page.emulate_media(media="print")
    cut = page.evaluate(
        "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth + 1)"
        ".map(one => one.getAttribute('aria-label'))"
    )
    assert cut == []


def test_folded_rows_are_unfolded_on_paper(page: Any, pages: Path, tmp_path: Path) -> None:
    """The table of many classes: 40 at once, the others when asked for, all on paper."""
    from torch_grood.evaluation.tables import Cell, Grid
    from torch_grood.report.page import page as render

    rows = tuple((Cell(f"class {i}"), Cell("1")) for i in range(60))
    names = ("rule", "histograms", "roc", "promise", "promise_curve", "polar", "detection", "points", "class_text")
    nothing: dict[str, Any] = dict.fromkeys(names, "")
    nothing |= {key: [] for key in ("tiles", "warnings", "galleries", "set_rows", "detector_rows")}
    write_page(
        tmp_path / "many.html",
        render("detector", "t", {}, nothing | {"by_class": Grid("Classes", ("class", "number"), rows)}),
    )
    page.goto((tmp_path / "many.html").as_uri())
    last, first = page.get_by_text("class 59", exact=True), page.get_by_text("class 39", exact=True)
    assert first.is_visible()
    assert not last.is_visible()
    page.get_by_text("20 more", exact=True).click()
    expect(last).to_be_visible()
    page.reload()
    page.emulate_media(media="print")
    assert last.evaluate("one => one.checkVisibility({contentVisibilityAuto: true})")
    assert last.bounding_box()["height"] > 5
