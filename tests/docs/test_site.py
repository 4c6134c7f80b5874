"""The site builds without a warning, and no page of it loads anything from elsewhere."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from browser import browser_page, needs_browser

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
pytest.importorskip("latex2mathml")

ROOT = Path(__file__).parents[2]

# Attributes of elements that a browser loads by itself; what one clicks on is not among them.
LOADED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}
LOADING_LINKS = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest"}
ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)


class _Page(HTMLParser):
    """What a page loads, what it links to, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.styles: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.loads += [values[name] for name in LOADED.get(tag, ()) if name in values]
        if tag == "link" and LOADING_LINKS & set(values.get("rel", "").split()):
            self.loads.append(values.get("href", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and "name" in values:
            self.ids.add(values["name"])
        self.styles.append(values.get("style", ""))
        self.classes |= set(values.get("class", "").split())

    def handle_data(self, data: str) -> None:
        if self.get_starttag_text() and str(self.get_starttag_text()).startswith("<style"):
            self.styles.append(data)


def parsed(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    return page


def from_elsewhere(page: _Page) -> list[str]:
    """What a page loads from other hosts."""
    return [load for load in page.loads if ELSEWHERE.match(load)] + _styles_from_elsewhere("\n".join(page.styles))


def _styles_from_elsewhere(css: str) -> list[str]:
    return re.findall(r"""(?:url\(\s*["']?|@import\s+["'])((?:https?:)?//[^"')]*)""", css)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--config-file",
            ROOT / "mkdocs.yml",
            "--site-dir",
            folder,
        ],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert "WARNING" not in said
    assert "ERROR" not in said
    return folder


@pytest.fixture(scope="module")
def built_pages(site: Path) -> dict[str, _Page]:
    return {
        path.relative_to(site).as_posix(): parsed(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")
    }


@pytest.mark.slow
def test_every_page_is_built(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), page
    assert (site / "source/src/torch_grood/gradients.py.html").is_file()
    assert (site / "source/notebooks/ten-minutes.ipynb.html").is_file()
    assert not list(site.rglob("_hooks*"))


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: Path, built_pages: dict[str, _Page]) -> None:
    assert {name: found for name, page in built_pages.items() if (found := from_elsewhere(page))} == {}
    for style in site.rglob("*.css"):
        assert _styles_from_elsewhere(style.read_text(encoding="utf-8")) == [], style
    # The theme would fetch a script for these alone.
    assert not any("mermaid" in page.classes for page in built_pages.values())


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site: Path, built_pages: dict[str, _Page]) -> None:
    wrong = []
    for name, page in built_pages.items():
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or target.netloc or name == "404.html":
                continue
            path = (site / name).parent / unquote(target.path) if target.path else site / name
            path = path / "index.html" if path.is_dir() else path
            if not path.exists():
                wrong.append((name, link))
            elif target.fragment and path.suffix == ".html":
                there = built_pages[path.resolve().relative_to(site.resolve()).as_posix()]
                if unquote(target.fragment) not in there.ids and target.fragment != "__skip":
                    wrong.append((name, link))
    assert wrong == []


@pytest.mark.slow
def test_every_stable_name_is_in_the_reference(built_pages: dict[str, _Page]) -> None:
    import torch_grood

    ids = set().union(*(page.ids for name, page in built_pages.items() if name.startswith("reference/")))
    classes = {name for name in torch_grood.__all__ if not name.startswith("__")}
    missing = {name for name in classes if not any(one.endswith(f".{name}") for one in ids)}
    assert missing == set()


@pytest.mark.slow
def test_formulas_need_no_script(site: Path) -> None:
    html = (site / "method.html").read_text(encoding="utf-8")
    assert html.count("<math") >= 14
    assert "arithmatex" not in html
    assert "\\frac" not in re.sub(r"<annotation.*?</annotation>", "", html)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(address: str, scheme: str) -> None:
    with browser_page(color_scheme=scheme) as (page, complaints):
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index", "method", "reference/detector", "results/cifar10", "source/src/torch_grood/gradients.py"):
            page.goto(f"{address}/{name}.html", wait_until="networkidle")
            shown = page.evaluate("document.body.dataset.mdColorScheme")
            assert shown == {"light": "default", "dark": "slate"}[scheme]
            # No page is wider than the window: tables scroll by themselves.
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert asked
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        assert complaints == []


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("from_disk", [False, True])
def test_the_search_finds_a_page(address: str, site: Path, from_disk: bool) -> None:
    with browser_page() as (page, complaints):
        # The index is read before anything is asked of it.
        page.goto(f"{site.as_uri() if from_disk else address}/index.html", wait_until="networkidle")
        page.locator("input.md-search__input").click()
        page.wait_for_load_state("networkidle")
        page.locator("input.md-search__input").press_sequentially("threshold for each class", delay=20)
        page.locator(".md-search-result__item").first.wait_for(timeout=120_000)
        assert "decide.html" in str(page.locator(".md-search-result__list").inner_html())
        assert complaints == []


@pytest.mark.parametrize(
    "html",
    [
        '<script src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<link rel="preconnect" href="https://fonts.example">',
        '<img src="http://example.org/x.png">',
        '<p style="background: url(https://example.org/x.png)">x</p>',
        "<style>@import 'https://example.org/x.css';</style>",
    ],
)
def test_what_is_loaded_from_elsewhere_is_seen(html: str) -> None:
    assert len(from_elsewhere(parsed(html))) == 1


def test_what_one_may_click_on_is_not_loaded() -> None:
    html = '<a href="https://example.org">x</a><link rel="canonical" href="https://example.org"><img src="a.png">'
    assert from_elsewhere(parsed(html)) == []
