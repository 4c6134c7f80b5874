"""`grood score --engine`: the same decisions by many processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torch_grood.cli._common import Device, Reporter, reporting
from torch_grood.cli._runtime import open_runtime, warn_uncalibrated
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.runtime import Runtime
    from torch_grood.scale.job import Counts

__all__ = [
    "AddressOption",
    "Engine",
    "EngineOption",
    "GpusOption",
    "MakeRuntime",
    "ParallelOption",
    "Scaled",
    "ShardsOption",
    "check_local",
    "check_scaled",
    "score_scaled",
    "teller",
    "whole_spec",
]

_SAY_EVERY = 10.0


class Engine(StrEnum):
    """What runs the workers."""

    local = "local"
    ray = "ray"
    torchrun = "torchrun"


_SCALING = "Many processes"
EngineOption = Annotated[
    Engine,
    typer.Option(
        "--engine",
        help="ray: on this machine's cores, or a cluster; torchrun: the processes of that launcher. What was "
        "interrupted goes on where it was.",
        rich_help_panel=_SCALING,
    ),
]
ParallelOption = Annotated[
    int | None,
    typer.Option("--parallel", metavar="N", min=1, help="Workers of Ray. Default: all.", rich_help_panel=_SCALING),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address", metavar="ADDRESS", help="Of a cluster; auto: this machine's.", rich_help_panel=_SCALING
    ),
]
GpusOption = Annotated[
    float, typer.Option("--gpus-per-worker", min=0, help="That Ray keeps for each.", rich_help_panel=_SCALING)
]

ShardsOption = Annotated[
    int | None,
    typer.Option(
        "--shards",
        metavar="N",
        min=1,
        help="Gradients in N files beside --output, each made and searched by a process of its own: for more than one "
        "machine's memory. Needs --engine ray.",
        rich_help_panel=_SCALING,
    ),
]


@dataclass(frozen=True)
class MakeRuntime:
    """Opens the same runtime wherever it is sent: paths are whole, and nothing is said."""

    detector: Path
    model: str | None
    weights: Path | None
    num_classes: int | None
    transform: str | None
    device: Device
    fpr: float | None
    tau: float | None

    def __call__(self) -> Runtime:
        with reporting(quiet=True) as reporter:
            return self.open(reporter, threads=1)

    def open(self, reporter: Reporter, threads: int | None = None) -> Runtime:
        """See `open_runtime`."""
        how = (self.model, self.weights, self.num_classes, self.transform, self.device)
        return open_runtime(self.detector, *how, reporter, fpr=self.fpr, tau=self.tau, threads=threads)

    @classmethod
    def of(
        cls,
        detector: Path,
        model: str | None,
        weights: Path | None,
        num_classes: int | None,
        transform: str | None,
        device: Device,
        fpr: float | None,
        tau: float | None,
    ) -> MakeRuntime:
        """With all paths from the root: a worker may start in another folder."""
        model = None if model is None else whole_spec(model)
        if transform is not None and Path(transform).is_file():
            transform = str(Path(transform).absolute())
        weights = None if weights is None else weights.absolute()
        return cls(detector.absolute(), model, weights, num_classes, transform, device, fpr, tau)


def whole_spec(model: str) -> str:
    """A model's spec with the path from the root, if it has one."""
    file, found, factory = model.rpartition(":")
    if found and Path(file).is_file():
        return f"{Path(file).absolute()}:{factory}"
    return str(Path(model).absolute()) if Path(model).is_dir() else model


@dataclass(frozen=True)
class Scaled:
    """What the options say of the work.

    Attributes:
        engine: "ray" or "torchrun".
        output: folder, or a URL.
        workers: of Ray; None: one a core.
        address: of Ray's cluster.
        gpus: of each worker.
        image_column: of Parquet files.
        batch_size: images at a time.
    """

    engine: Engine
    output: str
    workers: int | None
    address: str | None
    gpus: float
    image_column: str | None
    batch_size: int


def score_scaled(make_runtime: MakeRuntime, images: Sequence[str], root: str | None, how: Scaled, quiet: bool) -> None:
    """Score images into a folder of Parquet parts."""
    from torch_grood.scale import Job, inputs_of, score_as_rank, score_on_ray
    from torch_grood.scale.parts import Folder
    from torch_grood.scale.ranks import rank_of_process
    from torch_grood.watching import made_by

    rank, world = rank_of_process() if how.engine is Engine.torchrun else (0, 1)
    with reporting(quiet or rank > 0) as reporter:
        # Here, too: what is wrong is said before a cluster starts.
        runtime = make_runtime.open(reporter, threads=1)
        warn_uncalibrated(runtime, make_runtime.tau, reporter)
        inputs = inputs_of(images, root, image_column=how.image_column)
        by = made_by(make_runtime.detector, runtime, make_runtime.tau)
        job = Job(inputs, Folder(how.output), by, how.batch_size)
        say = teller(len(inputs), world, reporter)

        def tell(counts: Counts) -> None:
            say(counts.images + counts.bad)

        if how.engine is Engine.torchrun:
            summary = score_as_rank(job, runtime, rank, world, tell=tell)
        else:
            # An ONNX file has all in it.
            shards = getattr(runtime, "shards", None)
            del runtime
            options = {"workers": how.workers, "address": how.address, "gpus": how.gpus, "shards": shards}
            summary = score_on_ray(job, make_runtime, **options, tell=tell)  # type: ignore[arg-type]
        if summary is None:
            return
        reporter.say(
            f"done: {summary.images:,} images scored, {summary.ood:,} of them OOD; {summary.bad:,} inputs left out "
            f"({how.output}/scores and bad)"
        )


def check_local(workers: int | None, address: str | None, gpus: float, *more: object) -> None:
    """Fail for options of engines where there is none.

    Raises:
        GroodError: if one is given.
    """
    if gpus or any(value is not None for value in (workers, address, *more)):
        raise GroodError(
            "--parallel, --ray-address, --gpus-per-worker, --shards and --image-column are for --engine ray"
        )


def check_scaled(output: str | None, forbidden: Mapping[str, object]) -> str:
    """Fail for options that do not go with an engine.

    Returns:
        the folder.

    Raises:
        GroodError: if one is given, or there is no folder to write to.
    """
    given = [name for name, value in forbidden.items() if value not in (None, False)]
    if given:
        raise GroodError(f"{', '.join(given)} is for --engine local; leave it out, or score fewer images")
    if output is None:
        raise GroodError("--engine writes a folder of Parquet files; name it: --output DIR, or a URL such as s3://…")
    if "://" not in output and Path(output).is_file():
        raise GroodError(f"--output {output} is a file; --engine writes a folder")
    return output


def teller(n: int, world: int, reporter: Reporter) -> Callable[[int], None]:
    """Says from time to time how far this process is, one of `world` that share n images; it is told how many more."""
    began = time.monotonic()
    done, next_time = 0, began + _SAY_EVERY
    of = f"{n:,}" if world == 1 else f"about {n // world:,}"

    def tell(images: int) -> None:
        nonlocal done, next_time
        done += images
        now = time.monotonic()
        if now >= next_time:
            next_time = now + _SAY_EVERY
            reporter.say(f"{done:,} of {of} images, {done / (now - began):,.0f} a second")

    return tell
