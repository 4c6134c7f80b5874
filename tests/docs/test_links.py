"""Links of all pages lead somewhere: to files that are there, headings that are there, names that are defined."""

from __future__ import annotations

import re

import pytest
from doc_pages import ROOT, anchors, blocks, links, pages, read

MORE = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"]


def wrong_links(page: str, text: str) -> list[str]:
    """What does not lead anywhere, with the reason."""
    wrong = []
    for shown, target, anchor in links(text):
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        if not path.exists():
            wrong.append(f"{target}: no such file")
        elif anchor and path.suffix == ".md" and anchor not in anchors(text if not target else path.read_text("utf-8")):
            wrong.append(f"{target}#{anchor}: no such heading")
        elif path.suffix == ".py" and (name := re.fullmatch(r"`(\w+)(?:\(\))?`", shown)):
            pattern = rf"^\s*(?:async def|def|class) {name[1]}\b|^{name[1]}\b[^=(]*="
            if not re.search(pattern, path.read_text("utf-8"), re.MULTILINE):
                wrong.append(f"{target} does not define {name[1]}")
    return wrong


@pytest.mark.parametrize("page", [*pages(), *MORE])
def test_links_lead_somewhere(page: str) -> None:
    assert wrong_links(page, read(page)) == []


@pytest.mark.parametrize(
    "broken",
    [
        "[x](nothing.md)",
        "[x](decide.md#nothing)",
        "[x](#nothing)",
        "[`nothing`](../src/torch_grood/gradients.py)",
        "[`test_nothing`](../tests/test_gradients.py)",
        "![x](images/nothing.png)",
    ],
)
def test_a_link_that_leads_nowhere_is_seen(broken: str) -> None:
    assert len(wrong_links("docs/index.md", f"# Heading\n\nWords {broken}.\n")) == 1


def test_links_that_are_right_are_not_complained_about() -> None:
    text = "# A heading, of `code`\n\n[x](decide.md#class-by-class), [y](#a-heading-of-code), "
    text += "[`GROOD`](../src/torch_grood/detector.py)\n"
    assert wrong_links("docs/index.md", text) == []


def test_the_method_links_each_equation_to_code_and_a_test() -> None:
    sections = re.split(r"^## ", read("docs/method.md"), flags=re.MULTILINE)[1:-1]
    assert len(sections) >= 10
    for section in sections:
        targets = [target for _, target, _ in links(section)]
        title = section.partition("\n")[0]
        assert any(target.startswith("../tests/") for target in targets), title
        assert any(target.startswith("../src/") for target in targets) or title == "‖H‖ = π", title


def test_no_page_names_a_machine() -> None:
    """Pages are for every reader: no folder of somebody's machine is on them."""
    paths = re.compile(r"(?<![\w.~])/(?:work|home|root|tmp|Users)/\w")
    assert [(page, found[0]) for page in [*pages(), *MORE] if (found := paths.search(read(page)))] == []


def test_there_is_something_to_check() -> None:
    assert sum(len(list(links(read(page)))) for page in pages()) > 200
    assert sum(len(blocks(page)) for page in pages()) > 80
