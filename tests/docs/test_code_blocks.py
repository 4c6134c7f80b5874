"""Every block of Python on a page runs, and every command is one that exists; those that small data suffice for run.

What cannot run here, and what is made smaller, is listed in `doc_exceptions`, with reasons. What the pages presuppose
(a folder of flowers, a detector, OpenOOD's layout) is made by `doc_worlds`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import typer.main
from doc_exceptions import ADDED, AFRESH, BEYOND_TESTS, NOT_RUN, SHOWN_FIRST, SMALLER, TOML_FILES, NotRun
from doc_pages import BASH, ROOT, Block, Command, blocks, commands, grood_arguments, pages, spans
from doc_worlds import namespace, small_benchmark, write_world
from typer.testing import CliRunner

from models import taught_cnn

pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash to take commands apart")

PAGES = pages()
PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]
COMMANDS = [block for page in PAGES for block in blocks(page) if block.language == "commands"]


def grood(*arguments: object) -> tuple[int, str]:
    """Exit status and all that a command wrote, in this process."""
    from torch_grood.cli._app import app

    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", found.stdout + found.stderr)


# --- Every command exists, and takes what it is given


def parse(arguments: tuple[str, ...]) -> None:
    """Let the real command line take the arguments apart, and run nothing.

    Raises:
        AssertionError: if it does not accept them.
    """
    from torch_grood.cli._app import app

    group: Any = typer.main.get_command(app)
    try:
        context = group.make_context("grood", list(arguments))
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        command.make_context(name, rest, parent=context)
    except Exception as error:  # click's own, which typer may bring along
        said = error.format_message() if hasattr(error, "format_message") else repr(error)
        raise AssertionError(f"grood {' '.join(arguments)}: {said}") from None


def check_command(command: Command) -> None:
    """A command can be what it says: its program, options and files exist."""
    arguments = grood_arguments(command)
    if arguments is not None:
        try:
            parse(arguments)
        except AssertionError:
            # Dots may stand for what a page leaves out.
            if "…" not in arguments:
                raise
            parse(tuple(word for word in arguments if word != "…"))
    elif command.program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        named = {extra for word in command.arguments for extra in re.findall(r"^torch-grood\[(.*)\]$", word)}
        assert {extra for names in named for extra in names.split(",")} <= set(extras), command
    elif command.program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(command.arguments) <= set(targets), command
    elif command.program == "python" and command.arguments[0] in ("-", "-c"):
        compile(command.arguments[1], str(command), "exec")
    elif command.program == "python":
        assert (ROOT / command.arguments[0]).is_file(), command


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_commands_are_accepted(block: Block) -> None:
    found = commands(block)
    assert found
    for command in found:
        check_command(command)


def test_commands_in_prose_exist() -> None:
    """`grood fit --cache DIR` in a sentence: the command and each of its options."""
    group: Any = typer.main.get_command(__import__("torch_grood.cli._app", fromlist=["app"]).app)
    options = {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for name, command in group.commands.items()
    }
    everywhere = set().union(*options.values()) | {"--help", "--version", "--checkpoints"}
    wrong = []
    for page in PAGES:
        for span in spans((ROOT / page).read_text(encoding="utf-8")):
            name = re.match(r"grood ([a-z]+)\b", span)
            used = re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", span) if name or span.startswith("--") else []
            known = options.get(name[1], set()) | {"--help"} if name else everywhere
            if name and name[1] not in options:
                wrong.append((page, span))
            # `python script.py --option` and other programs' options are not ours.
            if name:
                wrong += [(page, span, option) for option in used if option not in known]
    assert not wrong


SCRIPTS = sorted(
    {name for block in COMMANDS for name in re.findall(r"^python (\S+\.py)\b", block.text, flags=re.MULTILINE)}
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_options_of_scripts_exist(script: str) -> None:
    for command in (command for block in COMMANDS for command in commands(block)):
        if command.program != "python" or command.arguments[0] != script:
            continue
        sub = [word for word in command.arguments[1:2] if re.fullmatch(r"[a-z]+", word)]
        shown = _help(script, *sub) or _help(script)
        for option in (word for word in command.arguments if word.startswith("--")):
            assert re.search(rf"{option}\b", shown), f"{script} has no {option}"


@cache
def _help(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout if done.returncode == 0 else ""


# --- What can run does


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")

    def run(*arguments: object) -> None:
        code, text = grood(*arguments)
        assert code == 0, text

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return write_world(folder, run)


@pytest.fixture
def world(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that pages presuppose, as the current folder; it is also the user's own, and the network is out of reach."""
    folder = tmp_path / "world"
    shutil.copytree(prepared, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    for name in ("HOME", "XDG_CACHE_HOME", "GROOD_DATA"):
        monkeypatch.setenv(name, str(folder / ("cache" if name == "XDG_CACHE_HOME" else "")))
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setattr("urllib.request.urlopen", _no_network)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def _no_network(*arguments: Any, **named: Any) -> Any:
    raise urllib.request.URLError("tests do not use the network")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def run_python(block: Block, names: dict[str, Any]) -> None:
    code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec", dont_inherit=True)
    with quietly():
        exec(code, names)


def smaller(block: Block) -> Block:
    """With the words of `doc_exceptions.SMALLER` exchanged."""
    for page, there, instead in SMALLER:
        if page == block.page:
            block = replace(block, text=block.text.replace(there, instead))
    return block


def toml_blocks(page: str) -> list[str]:
    return re.findall(r"^```toml\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def excepted(block: Block, command: Command | None = None, home: str = "") -> NotRun | None:
    return next((e for e in NOT_RUN if replace(e, start=e.start.replace("{home}", home)).fits(block, command)), None)


def added(command: Command, home: str) -> tuple[str, ...]:
    return next((more for start, more in ADDED if str(command).startswith(start.replace("~", home))), ())


class Page:
    """Runs the blocks of a page in their order, in one namespace and one folder."""

    def __init__(self, page: str, world: Path) -> None:
        self.page, self.world = page, world
        self.names = namespace(page, world) | {"__name__": "page"}
        if page in AFRESH:
            shutil.rmtree(world / AFRESH[page])
        if page in TOML_FILES:
            (world / TOML_FILES[page]).write_text(toml_blocks(page)[0], encoding="utf-8")
        self.server: subprocess.Popen[str] | None = None
        self.address = ""
        self.ran = 0

    def run(self) -> None:
        try:
            shown_first = [b for b in blocks(self.page) if (b.page, b.language, b.number) in SHOWN_FIRST]
            for block in [*(b for b in blocks(self.page) if b not in shown_first), *shown_first]:
                if block.language == "python":
                    self._python(smaller(block))
                else:
                    for command in commands(smaller(block), self.world):
                        self._command(block, command)
        finally:
            if self.server is not None:
                stop(self.server)

    def _python(self, block: Block) -> None:
        exception = excepted(block)
        if exception is None:
            run_python(block, self.names)
            self.ran += 1
            return
        assert exception.fails is not None
        with pytest.raises(Exception, match=exception.fails):
            run_python(block, dict(self.names))

    def _command(self, block: Block, command: Command) -> None:
        exception = excepted(block, command, str(self.world))
        if exception is not None:
            self._refused(exception, command)
        elif command.program == "curl":
            assert self.server is not None, "a page asks a service that it has not started"
            self._asked(command)
        elif command.program == "python":
            arguments = [str(ROOT / word) if word.endswith(".py") else word for word in command.arguments]
            done = subprocess.run(
                [sys.executable, *arguments], cwd=self.world, capture_output=True, text=True, timeout=200, check=False
            )
            assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
            self.ran += 1
        else:
            arguments = grood_arguments(command)
            assert arguments is not None, command
            self._grood(command, (*arguments, *added(command, str(self.world))))
            self.ran += 1

    def _refused(self, exception: NotRun, command: Command) -> None:
        arguments = grood_arguments(command)
        if exception.fails is None or arguments is None:
            assert exception.needs in BEYOND_TESTS or not (self.world / str(exception.needs)).exists()
            return
        code, text = grood(*arguments)
        assert code in (1, 2), f"{command} ran, and need not be on the list: {text}"
        assert re.search(exception.fails, text), f"{command} was expected to say {exception.fails!r}: {text}"

    def _grood(self, command: Command, arguments: tuple[str, ...]) -> None:
        if arguments[0] == "serve" or (arguments[0] == "watch" and "--once" not in arguments):
            self._until_stopped(arguments)
            return
        if arguments[0] == "watch":
            # Each line of a page begins a journal of its own.
            Path(arguments[1 + [word in ("-o", "--output") for word in arguments].index(True)]).unlink(missing_ok=True)
        expected = {0, 1} if "--verify" in arguments or arguments[0] == "data" else {0}
        code, text = grood(*arguments)
        assert code in expected, f"{command}: {text}"

    def _until_stopped(self, arguments: tuple[str, ...]) -> None:
        """Start what goes on until Ctrl-C, wait for a sign of life, and stop it; a service stays for its questions."""
        if self.server is not None:
            stop(self.server)
        lines = '{"id": "1", "path": "inbox/none.png"}\n' if "-" in arguments else None
        output = next((word for word in arguments if word.endswith(".jsonl") and word != arguments[2]), None)
        if output is not None:
            Path(output).unlink(missing_ok=True)
        started = subprocess.Popen(
            [sys.executable, "-m", "torch_grood", *arguments],
            cwd=self.world,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert started.stdin is not None
        assert started.stdout is not None
        if lines:
            started.stdin.write(lines)
            started.stdin.flush()
        if arguments[0] == "serve":
            self.server, heard = started, ""
            while "http://" not in heard:
                line = started.stdout.readline()
                assert line, f"the service ended: {heard}"
                heard += line
            found = re.search(r"http://[\d.]+:\d+", heard)
            assert found
            self.address = found[0]
            return
        assert output is not None
        for _ in range(600):
            if Path(output).exists() and "\n" in Path(output).read_text(encoding="utf-8"):
                break
            assert started.poll() is None, started.stdout.read()
            time.sleep(0.1)
        else:
            started.kill()
            raise AssertionError(f"no decision in {output}")
        stop(started)

    def _asked(self, command: Command) -> None:
        asked = [re.sub(r"http://127.0.0.1:8000", self.address, word) for word in command.arguments]
        program = shutil.which("curl")
        if program is None:
            pytest.skip("there is no curl")
        done = subprocess.run(
            [program, "--silent", "--fail", *asked], cwd=self.world, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert isinstance(json.loads(done.stdout), dict)
        self.ran += 1


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode in (0, 130), process.returncode


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_a_page_runs_from_top_to_bottom(page: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_ood")
    if page == "docs/scale.md":
        pytest.importorskip("ray")
    monkeypatch.setattr("pytorch_ood.benchmark.CIFAR10_OpenOOD", small_benchmark)
    Page(page, world).run()


@pytest.mark.parametrize("page", [page for page in PAGES if toml_blocks(page)])
def test_benchmarks_in_toml_are_understood(page: str, tmp_path: Path) -> None:
    from torch_grood.evaluation.spec import read_spec

    for text in toml_blocks(page):
        (tmp_path / "page.toml").write_text(text, encoding="utf-8")
        assert read_spec(str(tmp_path / "page.toml")).name == "flowers"


@pytest.mark.parametrize("page", ["docs/method.md", "docs/benchmark.md", "docs/choose.md"])
def test_python_on_made_up_features(page: str) -> None:
    names: dict[str, Any] = {"model": taught_cnn()}
    found = [block for block in blocks(page) if block.language == "python"]
    assert found
    for block in found:
        run_python(block, names)


# --- These tests can fail


@pytest.mark.parametrize(
    "broken",
    [
        "detector.fit(loader)",
        "from torch_grood import GROOD\n\nGROOD(model, indx='exact')",
        "import torch\n\nassert torch.zeros(1) == 1",
        "import warnings\n\nwarnings.warn('old', DeprecationWarning)",
    ],
)
def test_a_broken_block_of_python_fails(broken: str) -> None:
    (block,) = blocks("docs/made-up.md", f"# A page\n\nWords.\n\n```python\n{broken}\n```\n")
    with pytest.raises((NameError, TypeError, AssertionError, DeprecationWarning)):
        run_python(block, {"model": None})


@pytest.mark.parametrize(
    "broken",
    [
        "grood fitt --model x --output y",
        "grood fit --modle x --output y",
        "grood score flowers.grood",
        "grood score flowers.grood inbox/ --fpr much",
        "grood train resnet18 --data flowers/ \\\n        --otput run",
        "accelerate launch --num_processes 8 -m torch_grood train x --dat y",
        "python benchmarks/nothing.py",
        "python -c 'import torch; print('",
        "pip install 'torch-grood[everything]'",
        "make demos",
    ],
)
def test_a_broken_command_fails(broken: str) -> None:
    (block,) = blocks("docs/made-up.md", f"Words.\n\n    {broken}\n\nMore words.\n")
    (command,) = commands(block)
    with pytest.raises((AssertionError, SyntaxError)):
        check_command(command)


def test_blocks_are_found_as_markdown_has_them() -> None:
    text = "    grood info a.grood    # words\n    grood info 'b c.grood'\n\nText:\n\n    no command\n\n"
    text += "```python\nx = 1\n```\n"
    found = blocks("docs/made-up.md", text)
    assert [(block.language, block.line) for block in found] == [("commands", 1), ("python", 8)]
    assert [command.arguments for command in commands(found[0])] == [("info", "a.grood"), ("info", "b c.grood")]


def test_bash_takes_commands_apart() -> None:
    text = "    for seed in 0 1; do\n      grood info ~/$seed.grood\n    done\n"
    text += "    camera | grood watch {a,b}.onnx - -o 'o p'\n"
    (block,) = blocks("docs/made-up.md", text)
    found = [command for command in commands(block, Path("/home")) if command.program == "grood"]
    assert [command.arguments for command in found] == [
        ("info", "/home/0.grood"),
        ("info", "/home/1.grood"),
        ("watch", "a.onnx", "b.onnx", "-", "-o", "o p"),
    ]


def test_nothing_is_excepted_that_is_not_there() -> None:
    here = [(block, command) for block in COMMANDS for command in commands(smaller(block), Path("/home"))]
    unused = [
        exception
        for exception in NOT_RUN
        if exception.page in ("*", *PAGES)
        if not any(excepted(block) is exception for block in PYTHON)
        and not any(replace(exception, start=exception.start.replace("{home}", "/home")).fits(b, c) for b, c in here)
    ]
    assert not unused
    assert [
        start for start, _ in ADDED if not any(str(c).startswith(start.replace("~", "/home")) for _, c in here)
    ] == []
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    assert [entry for entry in SMALLER if entry[1] not in texts.get(entry[0], entry[1])] == []


def test_every_exception_is_shown_to_be_needed() -> None:
    """By what it says when it is run, or by what it needs and a test has not."""
    assert [exception for exception in NOT_RUN if (exception.fails is None) == (exception.needs is None)] == []
