"""From what a report knows to one HTML file that needs no other."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch_grood._files import replacing
from torch_grood._optional import require
from torch_grood._text import encodable, plain

__all__ = ["page", "write_page"]

_FOLDER = Path(__file__).parent / "page"


def page(template: str, title: str, contents: Mapping[str, str], context: Mapping[str, Any]) -> str:
    """A page as HTML.

    Args:
        template: name of a file beside the style sheet.
        title: of the page.
        contents: names of its sections, by their ids.
        context: what the template shows. Strings are shown as they are, never as HTML, but for figures of `svg`, which
            are `Markup`.

    Raises:
        MissingDependencyError: without jinja2.
    """
    jinja = require("jinja2", extra="report")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        finalize=_shown,
    )
    markup = require("markupsafe", extra="report").Markup
    text: str = environment.get_template(f"{template}.html.jinja").render(
        **context,
        title=title,
        contents=list(contents.items()),
        version=version("torch-grood"),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        style=markup((_FOLDER / "report.css").read_text(encoding="utf-8").strip()),
        script=markup((_FOLDER / "report.js").read_text(encoding="utf-8").strip()),
    )
    return text


def _shown(value: Any) -> Any:
    """Names of files and classes may come from anywhere; and no line ends before a "%"."""
    return encodable(plain(value)).replace(" %", "\u00a0%") if type(value) is str else value


def write_page(path: Path, text: str) -> None:
    """Write a page whole or not at all.

    Raises:
        GroodError: if it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
