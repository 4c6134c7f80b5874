"""The pages as tests see them: their blocks of Python and of commands, links and anchors."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("grood", "python", "pip", "make", "curl", "accelerate", "torchrun", "camera", "mkdir", "ray")
BASH = shutil.which("bash")

_FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1 *$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?: {4}.*\n|\n(?= {4}))+)")
_COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}|for) ")
_RECORD, _WORD = "\x1e", "\x1f"
# A call is one write, so that those of a pipe do not mix. A here-document is the program's last argument.
# What only makes arguments of others is run, or stands for itself.
_RECORD_CALL = rf"""exec 3>&1
base64() {{ {shutil.which("base64") or ":"} "$@" 2>/dev/null; }}
openssl() {{ builtin printf secret; }}
__record() {{
  local words line
  builtin printf -v words '%s\x1f' "$@"
  [ "$1 $2" = "python -" ] && while IFS= read -r line; do words+="$line"$'\n'; done
  builtin printf '\x1e%s' "$words" >&3
}}
"""


@dataclass(frozen=True)
class Command:
    """A program and its arguments, as bash would pass them."""

    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((self.program, *self.arguments))


@dataclass(frozen=True)
class Block:
    """A block of a page: Python, or commands.

    Attributes:
        page: its path in the repository.
        number: of its kind on the page, from 0.
        line: where it begins.
        language: "python" or "commands".
        text: of it.
    """

    page: str
    number: int
    line: int
    language: str
    text: str = field(repr=False)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """README.md and all pages below docs."""
    return ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page that can be run, in their order."""
    text = read(page) if text is None else text
    found: list[tuple[int, str, str]] = []
    for match in _FENCE.finditer(text):
        if match[2] in ("python", "bash", "sh", "console"):
            found.append((match.start(), "python" if match[2] == "python" else "commands", match[3]))
    for match in _INDENTED.finditer(_without_fences(text)):
        block = re.sub(r"^ {4}", "", match[1], flags=re.MULTILINE)
        if _COMMAND.match(block):
            found.append((match.start(), "commands", block))
    numbers = {"python": 0, "commands": 0}
    made = []
    for start, language, block in sorted(found):
        made.append(Block(page, numbers[language], text.count("\n", 0, start) + 1, language, block))
        numbers[language] += 1
    return made


def commands(block: Block, folder: Path | None = None) -> list[Command]:
    """What bash would start, with quotes, braces, ~ and loops as bash has them; nothing is started."""
    return _commands(block.text, str(folder or ROOT))


@cache
def _commands(text: str, folder: str) -> list[Command]:
    assert BASH is not None
    stubs = "".join(f'{program}() {{ __record {program} "$@"; }}\n' for program in PROGRAMS)
    run = subprocess.run(
        [BASH, "--noprofile", "--norc", "-c", _RECORD_CALL + stubs + text],
        cwd=folder,
        env={"HOME": folder, "PATH": "/nowhere", "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert not run.stderr, f"bash does not understand this: {run.stderr}\n{text}"
    return [
        Command(words[0], tuple(words[1:-1]) if words[-1] == "" else tuple(words[1:]))
        for words in (record.split(_WORD) for record in run.stdout.split(_RECORD)[1:])
    ]


def grood_arguments(command: Command) -> tuple[str, ...] | None:
    """The arguments that reach `grood`, also through a launcher of processes; None: it is another program."""
    if command.program == "grood":
        return command.arguments
    if "torch_grood" in command.arguments and "-m" in command.arguments:
        return command.arguments[command.arguments.index("torch_grood") + 1 :]
    return None


def spans(text: str) -> list[str]:
    """Code within prose."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", _without_fences(text))


def links(text: str) -> Iterator[tuple[str, str, str]]:
    """Text, target and anchor of each link and image that leads to a place in the repository."""
    for shown, target in re.findall(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)", _without_fences(text)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield shown, path, anchor


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub and the site make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *#*$", _without_fences(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", lambda match: match[1] or "", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).strip().replace(" ", "-")
        again = 1
        unique = slug
        while unique in found:
            unique, again = f"{slug}-{again}", again + 1
        found.add(unique)
    return found


def _without_fences(text: str) -> str:
    """The text with fences blanked out, so that places stay as they are."""
    return _FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
