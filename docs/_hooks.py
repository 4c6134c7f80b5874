"""What the site adds to the pages: the repository's files that they link to, and formulas that need no script.

Pages link to code, tests and other files by their places in the repository, as GitHub shows them. Here each such file
becomes a page below source/, a notebook as its cells, and a link whose text is the name of a function or class leads to
the line that defines it.
"""

from __future__ import annotations

import json
import posixpath
import re
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# [text](target) and [text](target#anchor), of images too; not across lines.
LINK = re.compile(r"(?<=\]\()([^()\s#]+)(?=[#)])")
FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r'<(div|span) class="arithmatex">(.*?)</\1>', re.DOTALL)
PROMPT = re.compile(r"^( *)>>> .*(?:\n\1(?!>>> )\S.*|\n\1>>> .*|\n\1\.\.\. .*)*", re.MULTILINE)
NAMED = re.compile(r'<a href="([^"#]*source/([^"#]+\.py)\.html)"><code>(\w+)(?:\(\))?</code></a>')
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".yml": "yaml"}


class Examples(griffe.Extension):
    """Puts the examples of docstrings into code blocks, and leaves out what is meant for doctest alone."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r" +# doctest: .*", "", obj.docstring.value)
            obj.docstring.value = PROMPT.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each file of the repository that a page links to, and for those that these link to."""
    todo = [(_place(file.src_uri), file.content_string) for file in files.documentation_pages()]
    todo += [("mkdocs.yml", "[](CONTRIBUTING.md)[](CHANGELOG.md)")]
    while todo:
        place, text = todo.pop()
        for _, target in _targets(place, text):
            uri = _uri(target)
            if uri is None or not uri.startswith("source/") or files.get_file_from_path(uri):
                continue
            content = _page(ROOT / target)
            files.append(File.generated(config, uri, content=content))
            if target.endswith(".md"):
                todo.append((target, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Turn links between places in the repository into links between pages."""
    place, here = _place(page.file.src_uri), posixpath.dirname(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        uri = _uri(posixpath.normpath(posixpath.join(posixpath.dirname(place), found[1])))
        return posixpath.relpath(uri, here) if uri and files.get_file_from_path(uri) else found[1]

    # What lies between fences; the last piece has none behind it.
    fences = [found.group() for found in FENCE.finditer(markdown)]
    prose = [LINK.sub(moved, text) for text in FENCE.sub("\0", markdown).split("\0")]
    return "".join(text + fence for text, fence in zip(prose, [*fences, ""], strict=True))


def on_page_content(html: str, page: Page, config: Any, files: Files) -> str:
    """Formulas become MathML; links to functions and classes get the line of the definition."""

    def formula(found: re.Match[str]) -> str:
        text = unescape(re.sub(r"<[^>]+>", "", found[2])).strip()
        display = found[1] == "div"
        return convert(text.removeprefix(r"\[").removesuffix(r"\]"), display="block" if display else "inline")

    def line(found: re.Match[str]) -> str:
        number = definition(ROOT / found[2], found[3])
        return found[0] if number is None else found[0].replace(found[1], f"{found[1]}#__codelineno-0-{number}", 1)

    return NAMED.sub(line, FORMULA.sub(formula, html))


@event_priority(-100)
def on_post_build(config: Any) -> None:
    """The index of the search as a script, too: a page from disk may read no other file."""
    index = Path(config.site_dir, "search", "search_index.json")
    index.with_suffix(".js").write_text(f"var __index = {index.read_text(encoding='utf-8')}", encoding="utf-8")


def definition(path: Path, name: str) -> int | None:
    """The line of a Python file that defines a name."""
    pattern = re.compile(rf"\s*(?:async def|def|class) {name}\b|{name}\b[^=(]*=")
    lines = path.read_text(encoding="utf-8").split("\n")
    return next((number for number, text in enumerate(lines, 1) if pattern.match(text)), None)


def _place(uri: str) -> str:
    """Where a page's text lies in the repository."""
    if not uri.startswith("source/"):
        return f"docs/{uri}"
    place = uri.removeprefix("source/")
    return place if (ROOT / place).is_file() else place.removesuffix(".md")


def _uri(target: str) -> str | None:
    """The page that shows a file of the repository."""
    if target == "README.md":
        return "index.md"
    if target.startswith("docs/") and target != "docs/_hooks.py":
        return target.removeprefix("docs/")
    if target.startswith("..") or not (ROOT / target).is_file():
        return None
    return f"source/{target}" if target.endswith(".md") else f"source/{target}.md"


def _targets(place: str, text: str) -> list[tuple[str, str]]:
    """What a text links to: as it is written, and its place in the repository."""
    found = LINK.findall(FENCE.sub("", text))
    return [(link, posixpath.normpath(posixpath.join(posixpath.dirname(place), link))) for link in found]


def _page(path: Path) -> str:
    """The page of a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".ipynb":
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
        return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells)
    kind = LANGUAGES.get(path.suffix, "text")
    hidden = "---\nsearch: { exclude: true }\nhide: [toc]\n---\n"
    return f"{hidden}# {path.name}\n\n`{name}`\n\n``````{{ .{kind} linenums=1 }}\n{text.rstrip()}\n``````\n"
