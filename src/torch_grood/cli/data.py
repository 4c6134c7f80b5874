"""``grood data``: what a benchmark needs, what of it is there, and fetching the rest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torch_grood._text import plain
from torch_grood.cli._common import QuietOption

if TYPE_CHECKING:
    from rich.table import Table

    from torch_grood.evaluation.image_sets import SetReport
    from torch_grood.evaluation.spec import Archive, BenchmarkSpec

__all__ = ["data"]


def data(
    spec: Annotated[
        str,
        typer.Argument(metavar="SPEC", help="cifar10, cifar100, imagenet200, imagenet, or a TOML file of your own."),
    ],
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Where the images lie. Default: GROOD_DATA, else ./data; for a TOML file its own folder.",
        ),
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download what is missing and may be downloaded.")] = False,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME", help="Only this set; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Show which image sets a benchmark needs and which are there; fetch them.

    Exits with 0 if all are complete, else with 1. What is there is never
    written over, and what is complete is not fetched again.

    Examples:
        grood data cifar10
        grood data cifar10 --root ~/data --fetch
        grood data imagenet --set ninco --set ssb_hard --fetch
        grood data flowers.toml --json
    """
    from torch_grood.evaluation.download import archives_of
    from torch_grood.evaluation.image_sets import data_root, survey
    from torch_grood.evaluation.spec import read_spec

    benchmark = read_spec(spec)
    folder = data_root(benchmark, root)
    reports = survey(benchmark, folder, sets)
    if fetch and _fetch_all(archives_of(benchmark, reports), folder, quiet):
        reports = survey(benchmark, folder, sets)
    complete = all(report.status == "complete" for report in reports)
    if as_json:
        typer.echo(json.dumps(_facts(benchmark, folder, reports), indent=2))
    elif quiet:
        for report in reports:
            if report.status != "complete":
                _warn(f"{report.spec.key}: {report}")
    else:
        _show(benchmark, folder, reports)
        for line in _remedies(spec, benchmark, folder, reports, sets or ()):
            typer.echo(plain(line))
    if not complete:
        raise typer.Exit(1)


def _fetch_all(archives: Sequence[Archive], root: Path, quiet: bool) -> bool:
    """Fetch what can be fetched; one archive that cannot does not keep the others away."""
    from torch_grood.errors import GroodError, MissingDependencyError
    from torch_grood.evaluation.download import fetch, is_there

    fetched = False
    for archive in archives:
        if archive.url is None or is_there(archive, root):
            continue
        size = f", about {_bytes(archive.size)}" if archive.size else ""
        if not quiet:
            # Not through rich, whose bars and those of gdown would spoil each other.
            typer.echo(plain(f"fetching {archive.title}{size}"), err=True)
        try:
            fetched |= fetch(archive, root, progress=False if quiet else None)
        except MissingDependencyError:
            raise
        except GroodError as error:
            _warn(error)
    return fetched


def _warn(message: object) -> None:
    typer.secho(f"warning: {plain(message)}", fg="yellow", err=True)


def _facts(benchmark: BenchmarkSpec, root: Path, reports: Sequence[SetReport]) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "reference": benchmark.reference,
        "digest": benchmark.digest,
        "root": str(root),
        "complete": all(report.status == "complete" for report in reports),
        "sets": [
            {
                "name": report.spec.key,
                "group": report.group,
                "title": report.spec.title,
                "needed": report.spec.count,
                "there": None if report.source is None else len(report.source),
                "status": report.status,
                "reason": report.reason or None,
                "archives": list(report.spec.archives),
            }
            for report in reports
        ],
    }


def _show(benchmark: BenchmarkSpec, root: Path, reports: Sequence[SetReport]) -> None:
    from rich.console import Console

    out = Console(highlight=False)
    reference = f", {benchmark.reference}" if benchmark.reference else ""
    out.print(plain(f"{benchmark.title}{reference}, under {root}"), markup=False, soft_wrap=True)
    out.print(_table(benchmark, reports))


def _table(benchmark: BenchmarkSpec, reports: Sequence[SetReport]) -> Table:
    from rich.table import Table
    from rich.text import Text

    colours = {"complete": "green", "incomplete": "yellow", "absent": "red", "broken": "red"}
    table = Table()
    for name in ("set", "group", "images"):
        table.add_column(name)
    table.add_column("needed", justify="right")
    table.add_column("there", justify="right")
    for name in ("status", "from"):
        table.add_column(name)
    for report in reports:
        needed = "any" if report.spec.count is None else f"{report.spec.count:,}"
        there = "–" if report.source is None else f"{len(report.source):,}"
        cells = (report.spec.key, report.group, report.spec.title, needed, there)
        table.add_row(
            *(Text(plain(cell)) for cell in cells),
            Text(report.status, style=colours[report.status]),
            Text(", ".join(_image_archives(benchmark, report)) or "your own"),
        )
    return table


def _image_archives(benchmark: BenchmarkSpec, report: SetReport) -> list[str]:
    """Without the archive of the list, which most sets share."""
    listing = report.spec.list or ""
    return [key for key in report.spec.archives if not listing.startswith(f"{benchmark.archive(key).folder}/")]


def _remedies(
    name: str, benchmark: BenchmarkSpec, root: Path, reports: Sequence[SetReport], sets: Sequence[str]
) -> list[str]:
    """What is wrong, and what to do about it."""
    from torch_grood.evaluation.download import archives_of, is_there

    lines = [f"{report.spec.key}: {report}" for report in reports if report.status != "complete"]
    needed = [archive for archive in archives_of(benchmark, reports) if not is_there(archive, root)]
    remote = [archive for archive in needed if archive.url is not None]
    if remote:
        size = sum(archive.size or 0 for archive in remote)
        about = f" (about {_bytes(size)})" if all(archive.size for archive in remote) else ""
        titles = ", ".join(archive.title for archive in remote)
        command = ["grood", "data", name, "--root", str(root), *(part for key in sets for part in ("--set", key))]
        lines.append(f"To download {titles}{about}: {shlex.join([*command, '--fetch'])}")
    lines += [
        f"By hand, into {root / archive.folder}: {archive.title}. {archive.manual}"
        for archive in needed
        if archive.url is None
    ]
    return lines + _in_the_way(benchmark, root, reports)


def _in_the_way(benchmark: BenchmarkSpec, root: Path, reports: Sequence[SetReport]) -> list[str]:
    """Folders that are there, so that they are not fetched, and yet do not make their sets complete."""
    from torch_grood.evaluation.download import is_there

    keys: dict[str, list[str]] = {}
    for report in reports:
        archives = [benchmark.archive(key) for key in report.spec.archives]
        listing = report.spec.list or ""
        if report.status != "complete" and listing and not (root / listing).exists():
            # The archive of the list, whatever becomes of that of the images.
            archives = [archive for archive in archives if listing.startswith(f"{archive.folder}/")]
        if report.status != "complete" and archives and all(is_there(archive, root) for archive in archives):
            folders = " or ".join(str(root / archive.folder) for archive in archives)
            keys.setdefault(folders, []).append(report.spec.key)
    return [
        f"For {', '.join(names)}, what is in {folders} is not what the benchmark means; nothing is written over, so "
        "move away what is wrong, then add --fetch"
        for folders, names in keys.items()
    ]


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{max(1, round(size / 1e6))} MB"
