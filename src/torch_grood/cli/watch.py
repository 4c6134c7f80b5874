"""``grood watch``: decisions about images as they come."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from torch_grood._interrupts import interrupts
from torch_grood.cli._common import (
    READING,
    BatchSizeOption,
    Device,
    DeviceOption,
    FprOption,
    ModelOption,
    NumClassesOption,
    QuietOption,
    StoredTransformOption,
    TauOption,
    WeightsOption,
    check_output,
    reporting,
)
from torch_grood.cli._runtime import open_runtime, warn_uncalibrated
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.cli._common import Reporter
    from torch_grood.watching import Counts, Journal, Source
    from torch_grood.watching.journal import Done, Kind

__all__ = ["watch"]

# Seconds between two lines that say how far it is.
_SAY_EVERY = 10.0
_STDIN = "-"
COMING = "Waiting for images"


def watch(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file, or an .onnx of grood export.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of any depth; a file of JSON lines that grows, "
            '{"path": …} or {"id": …, "data": base64}; or -: such lines from stdin.',
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.jsonl",
            help="Takes a line for each image, and is what a restart goes on from.",
        ),
    ],
    once: Annotated[
        bool, typer.Option("--once", help="Decide about what is there now and is not decided, then end.")
    ] = False,
    fpr: FprOption = None,
    tau: TauOption = None,
    done: Annotated[
        list[Path] | None,
        typer.Option("--done", metavar="FILE", help="An earlier --output: what has a line there is left out, too."),
    ] = None,
    settle: Annotated[
        float,
        typer.Option(
            "--settle",
            metavar="SECONDS",
            min=0,
            help="A file of the folder is complete when size and time have stood still for so long.",
            rich_help_panel=COMING,
        ),
    ] = 1.0,
    interval: Annotated[
        float,
        typer.Option(
            "--interval",
            metavar="SECONDS",
            min=0,
            help="Between two looks at the folder or file.",
            rich_help_panel=COMING,
        ),
    ] = 1.0,
    max_wait: Annotated[
        float,
        typer.Option(
            "--max-wait",
            metavar="SECONDS",
            min=0,
            help="What an image waits for others to share a batch with.",
            rich_help_panel=COMING,
        ),
    ] = 0.2,
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Of the paths in JSON lines, which may not lead out of it. Default: the file's folder, or for - the "
            "current one.",
            rich_help_panel=READING,
        ),
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    num_classes: NumClassesOption = None,
    transform: StoredTransformOption = None,
    device: DeviceOption = Device.auto,
    batch_size: BatchSizeOption = 64,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Threads that read files. Default: one a CPU, at most 8.",
            rich_help_panel=READING,
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Decide about images as they come, into a file of JSON lines; a restart goes on where it was.

    Each image has one line, whatever happens: Ctrl-C, a kill, a crash, a full disk. What cannot be read has one that
    says why. Ctrl-C or SIGTERM ends it after the batch under way.

    Examples:
        grood watch flowers.grood inbox/ -o decisions.jsonl
        grood watch flowers.onnx inbox/ -o decisions.jsonl --once
        grood watch flowers.grood requests.jsonl -o decisions.jsonl --root photos/
        camera | grood watch flowers.onnx - -o decisions.jsonl --max-wait 0.05
    """
    _check(source, root, settle, output)
    check_output(output, detector, weights, source, *(done or ()))
    from torch_grood import watching
    from torch_grood.data.pixels import default_threads

    with reporting(quiet) as reporter, interrupts() as interrupted, ExitStack() as stack:
        runtime = open_runtime(detector, model, weights, num_classes, transform, device, reporter, fpr=fpr, tau=tau)
        warn_uncalibrated(runtime, tau, reporter)
        by = watching.made_by(detector, runtime, tau)
        kind: Kind = "pipe" if source == _STDIN else "folder" if Path(source).is_dir() else "stream"
        journal = stack.enter_context(watching.opened_journal(output, by, kind, done or ()))
        _say_start(journal, output, reporter)
        how = _How(settle, interval, root, once, interrupted.is_set)
        coming = _opened(source, kind, journal.done, how, reporter, stack)
        counts = watching.watch(
            coming,
            runtime,
            journal,
            by,
            batch_size=batch_size,
            max_wait=max_wait,
            threads=workers or default_threads(),
            stop=interrupted.is_set,
            tell=_teller(reporter),
        )
        _say_end(counts, coming, reporter, interrupted.is_set())


def _check(source: str, root: Path | None, settle: float, output: Path) -> None:
    if source != _STDIN and not Path(source).exists():
        raise GroodError(f"{source}: no such folder or file; - is the standard input")
    if root is not None and (source != _STDIN and Path(source).is_dir()):
        raise GroodError("--root is for the paths in JSON lines; leave it out for a folder")
    if root is not None and not root.is_dir():
        raise GroodError(f"--root {root}: no such folder")
    if output.exists() and output.stat().st_size and output.suffix.lower() in (".csv", ".json", ".parquet"):
        raise GroodError(f"{output} exists and is no file of JSON lines by its name; give another name")


class _How(NamedTuple):
    """In which way something is waited for."""

    settle: float
    interval: float
    root: Path | None
    once: bool
    stop: Callable[[], bool]


def _opened(source: str, kind: Kind, done: Done, how: _How, reporter: Reporter, stack: ExitStack) -> Source:
    from torch_grood.watching import Folder, Pipe, Stream

    if kind == "pipe":
        return Pipe(sys.stdin.fileno(), done.seen, root=how.root, stop=how.stop)
    path, interval, once = Path(source), how.interval, how.once
    if kind == "folder":
        return Folder(
            path, done.seen, settle=how.settle, interval=interval, once=once, stop=how.stop, warn=reporter.warn
        )
    stream = Stream(path, done.spans, done.last, root=how.root, interval=interval, once=once, stop=how.stop)
    return stack.enter_context(stream)


def _say_start(journal: Journal, output: Path, reporter: Reporter) -> None:
    if journal.cut:
        reporter.say(f"{output}: cut off {journal.cut:,} bytes of lines that a kill left unfinished")
    if journal.done.rows:
        reporter.say(f"{journal.done.rows:,} inputs are done; going on with the others")


def _teller(reporter: Reporter) -> Callable[[Counts], None]:
    next_time = time.monotonic() + _SAY_EVERY

    def tell(counts: Counts) -> None:
        nonlocal next_time
        if time.monotonic() >= next_time:
            next_time = time.monotonic() + _SAY_EVERY
            reporter.say(_counted(counts))

    return tell


def _counted(counts: Counts) -> str:
    parts = [f"{counts.images:,} images, {counts.ood:,} of them OOD"]
    if counts.errors:
        parts.append(f"{counts.errors:,} that could not be scored")
    if counts.gone:
        parts.append(f"{counts.gone:,} that were gone before they were read")
    return ", ".join(parts)


def _say_end(counts: Counts, source: Source, reporter: Reporter, interrupted: bool) -> None:
    from torch_grood.watching import Folder, Pipe, Stream

    reporter.say(f"{'stopped' if interrupted else 'done'}: {_counted(counts)}")
    if isinstance(source, Pipe) and source.repeated:
        reporter.say(f"{source.repeated:,} lines were left out, whose ids were there before")
    if interrupted:
        return
    if isinstance(source, Folder) and source.left:
        reporter.warn(f"{source.left:,} files came or changed meanwhile; run the same again for them")
    if isinstance(source, Stream) and source.left:
        reporter.warn("the last line has no end yet; run the same again for it")
