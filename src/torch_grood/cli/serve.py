"""``grood serve``: decisions over HTTP."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torch_grood._files import read_at_most
from torch_grood._optional import require
from torch_grood.cli._common import (
    MODEL,
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
    reporting,
)
from torch_grood.cli._runtime import is_onnx, open_runtime, warn_uncalibrated
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.runtime import Runtime

__all__ = ["serve"]

WHO, LIMITS, DRIFT = "Who may ask", "Limits", "Drift"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_TOKEN = "GROOD_TOKEN"
_LEAST_TOKEN = 16
_MIB = 2**20


def serve(
    detector: Annotated[Path, typer.Argument(metavar="DETECTOR", help="A .grood file, or an .onnx of grood export.")],
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen at.", rich_help_panel=WHO)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="0: any that is free.", rich_help_panel=WHO)
    ] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            metavar="NAME",
            help="A name by which the service may be asked, as a proxy passes it on; may be repeated; *: any.",
            rich_help_panel=WHO,
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            metavar="FILE",
            help=f"Holds the token that requests must bring (Authorization: Bearer …). Or set {_TOKEN}.",
            rich_help_panel=WHO,
        ),
    ] = None,
    no_token: Annotated[
        bool,
        typer.Option(
            "--no-token", help="Let anyone ask who reaches the address, if it is not loopback.", rich_help_panel=WHO
        ),
    ] = False,
    fpr: FprOption = None,
    tau: TauOption = None,
    training_root: Annotated[
        Path | None,
        typer.Option(
            "--training-root",
            metavar="DIR",
            help="Show the nearest training images, small, from this folder. Without it none is shown, nor named.",
        ),
    ] = None,
    max_request: Annotated[
        int, typer.Option("--max-request", metavar="MIB", min=1, help="Of a request.", rich_help_panel=LIMITS)
    ] = 16,
    max_images: Annotated[int, typer.Option("--max-images", min=1, help="In a request.", rich_help_panel=LIMITS)] = 64,
    max_pixels: Annotated[
        int, typer.Option("--max-pixels", min=1, help="That an image declares.", rich_help_panel=LIMITS)
    ] = 50_000_000,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            min=0.1,
            help="Until a request is there, and until its answer is.",
            rich_help_panel=LIMITS,
        ),
    ] = 30.0,
    queue: Annotated[
        int,
        typer.Option("--queue", min=1, help="Images that wait; more are told to come again.", rich_help_panel=LIMITS),
    ] = 1024,
    drift_window: Annotated[
        int,
        typer.Option("--drift-window", metavar="IMAGES", min=1, help="In each test for drift.", rich_help_panel=DRIFT),
    ] = 1000,
    drift_level: Annotated[
        float,
        typer.Option(
            "--drift-level", metavar="RATE", help="Chance of a false alarm in each of them.", rich_help_panel=DRIFT
        ),
    ] = 0.001,
    model: ModelOption = None,
    weights: WeightsOption = None,
    num_classes: NumClassesOption = None,
    transform: StoredTransformOption = None,
    device: DeviceOption = Device.auto,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="That the model uses. Default: one a CPU.", rich_help_panel=MODEL),
    ] = None,
    parallel: Annotated[
        int,
        typer.Option(
            "--parallel",
            metavar="N",
            min=1,
            help="Batches at the same time, each on --threads (default: the cores divided by N). For small networks "
            "and many clients; of .onnx files.",
            rich_help_panel=MODEL,
        ),
    ] = 1,
    batch_size: BatchSizeOption = 64,
    quiet: QuietOption = False,
) -> None:
    """Decide about images over HTTP, with a page to drop images on.

    Logs are lines of JSON on stderr; --quiet leaves out those of requests. Ctrl-C or SIGTERM ends it when the requests
    under way have their answers.

    Examples:
        grood serve flowers.onnx
        grood serve flowers.grood --model nets.py:resnet20 --weights r20.pt --training-root flowers/train
        GROOD_TOKEN=$(openssl rand -hex 32) grood serve flowers.onnx --host 0.0.0.0
        curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:8000/v1/score
    """
    for module in ("fastapi", "fastapi_offline", "uvicorn", "httptools", "python_multipart", "prometheus_client"):
        require(module, extra="serve")
    token = _token(token_file)
    if host not in _LOOPBACK and token is None and not no_token:
        raise GroodError(
            f"--host {host} can be reached from other machines, which may then ask without end; set {_TOKEN} or "
            "--token-file, or give --no-token if something else keeps strangers out"
        )
    if not math.isfinite(timeout):
        raise GroodError(f"--timeout {timeout} has no end; give seconds")
    if training_root is not None and not training_root.is_dir():
        raise GroodError(f"--training-root {training_root}: no such folder")
    if training_root is not None and is_onnx(detector):
        raise GroodError(f"{detector} does not name its training images; give --training-root with a .grood file")
    from torch_grood import serving
    from torch_grood.data.pixels import default_threads, usable_cpus

    if threads is None and parallel > 1:
        threads = max(1, usable_cpus() // parallel)
    with reporting(quiet) as reporter:
        runtime = open_runtime(
            detector, model, weights, num_classes, transform, device, reporter, fpr=fpr, tau=tau, threads=threads
        )
        warn_uncalibrated(runtime, tau, reporter)
        settings = serving.Settings(
            host=host,
            port=port,
            allowed_hosts=tuple(allow_host or ()),
            token=token,
            limits=serving.Limits(
                request_bytes=max_request * _MIB,
                images=max_images,
                pixels=max_pixels,
                seconds=timeout,
                queue=queue,
                held_bytes=max(256, 4 * max_request) * _MIB,
            ),
            batch_size=batch_size,
            threads=default_threads(),
            deciders=parallel,
            drift_window=drift_window,
            drift_level=drift_level,
            training_root=training_root,
            facts=_facts(runtime),
            log_requests=not quiet,
        )

        def tell(url: str) -> None:
            # Among lines of JSON that somebody collects, this one would be none.
            if sys.stderr.isatty():
                reporter.say(f"open {url} in a browser; Ctrl-C ends it")

        serving.run(runtime, settings, ready=tell)


def _token(file: Path | None) -> str | None:
    """The token, from a file or the environment: on a command line, other users of the machine would see it."""
    given = os.environ.get(_TOKEN)
    if file is not None:
        given = read_at_most(file, _MIB, "a token").decode("utf-8", "replace").strip()
    if given is None:
        return None
    if len(given) < _LEAST_TOKEN or not given.isascii() or not given.isprintable() or " " in given:
        raise GroodError(
            f"a token has at least {_LEAST_TOKEN} characters of ASCII and no blank; make one: openssl rand -hex 32"
        )
    return given


def _facts(runtime: Runtime) -> dict[str, Any]:
    """What `grood info` says, of the detector itself."""
    from torch_grood.runtime.onnx import OnnxRuntime

    if isinstance(runtime, OnnxRuntime):
        return dict(runtime.manifest.facts)
    from torch_grood.runtime import DetectorRuntime
    from torch_grood.summary import facts

    assert isinstance(runtime, DetectorRuntime)
    return facts(runtime.detector)
