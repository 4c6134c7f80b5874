"""``grood train``: from folders of images to a classifier, which `grood fit` takes as its model."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torch_grood._text import plain
from torch_grood.cli._common import (
    MODEL,
    READING,
    Device,
    DeviceOption,
    Progress,
    QuietOption,
    Reporter,
    WorkersOption,
    least_rate,
    reporting,
)
from torch_grood.cli._search import bytes_of
from torch_grood.cli.fit import DEFAULT_RATE
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.training import Recipe, TrainingRun

__all__ = ["train"]

RECIPE, COMPUTATION = "Recipe", "Computation"
_INTERRUPTED = 130


class _Precision(StrEnum):
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


def _list(wanted: bool) -> None:
    if not wanted:
        return
    from torch_grood.training import read_recipe, recipe_names

    for name in recipe_names():
        recipe = read_recipe(name)
        typer.echo(f"{name:<20} {recipe.title}")
        if recipe.reference:
            typer.echo(f"{'':<20} {recipe.reference}")
    raise typer.Exit


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="One of --list; a .toml file; or a network to train on your own images: resnet18 and others of "
            "torchvision, timm:NAME, package.module:factory or file.py:factory.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="Class folders in DIR/train and DIR/val; or class folders alone, of which a tenth is held out; or a "
            "benchmark's images, for its recipe.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run: new, or one to go on with.")
    ],
    show_list: Annotated[
        bool, typer.Option("--list", help="Show the recipes and exit.", callback=_list, is_eager=True)
    ] = False,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over the training images.", rich_help_panel=RECIPE)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Images a step, of all processes together.", rich_help_panel=RECIPE),
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="The learning rate's peak.", rich_help_panel=RECIPE)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of everything random.", rich_help_panel=RECIPE)] = None,
    transform: Annotated[
        str | None,
        typer.Option(
            "--transform",
            metavar="NAME",
            help="Preprocessing: cifar10, cifar100 or imagenet. torchvision's and timm's models bring their own.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any value of the recipe: crop=padded, optimizer=adamw. May be given several times.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    pretrained: Annotated[
        bool,
        typer.Option(
            "--pretrained", help="Start from torchvision's or timm's published weights.", rich_help_panel=MODEL
        ),
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="Start from these: .safetensors, or a state dict. A head of other classes starts anew.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    device: DeviceOption = Device.auto,
    mixed_precision: Annotated[
        _Precision | None,
        typer.Option(
            "--mixed-precision", help="Default: no, or what accelerate launch says.", rich_help_panel=COMPUTATION
        ),
    ] = None,
    channels_last: Annotated[
        bool,
        typer.Option(
            "--channels-last/--no-channels-last",
            help="Memory format of the network, in which convolutions run faster.",
            rich_help_panel=COMPUTATION,
        ),
    ] = True,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile.", rich_help_panel=COMPUTATION)
    ] = False,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            "--micro-batch",
            min=1,
            help="Images at a time, where a batch needs too much memory.",
            rich_help_panel=COMPUTATION,
        ),
    ] = None,
    checkpoint_every: Annotated[
        float,
        typer.Option(
            "--checkpoint-every",
            metavar="SECONDS",
            help="Between checkpoints; there is one after each epoch in any case.",
            rich_help_panel=COMPUTATION,
        ),
    ] = 600,
    workers: WorkersOption = None,
    memory: Annotated[
        str,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Keep decoded images up to this size, where the augmentation allows it; else files are read again.",
            rich_help_panel=READING,
        ),
    ] = "2GiB",
    quiet: QuietOption = False,
) -> None:
    """Train a classifier, or fine-tune one; then fit a detector on it.

    Ctrl-C ends it with usable weights, and the same command goes on with it:
    also after a kill, to the same bits.

    Examples:
        grood train resnet18 --data flowers/ --pretrained --output flowers-run
        grood train cifar10-resnet18 --data openood/ --seed 1 --output runs/1
        grood train timm:vit_tiny_patch16_224 --data flowers/ --lr 0.003 -o vit
        grood train nets.py:net --data flowers/ --transform imagenet -o net
        accelerate launch --num_processes 4 -m torch_grood train resnet18 …
    """
    from torch_grood.training import Computation, read_recipe
    from torch_grood.training import train as train_classifier

    shorthands = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "transform": transform,
        "pretrained": "true" if pretrained else None,
    }
    given = [f"{name}={value}" for name, value in shorthands.items() if value is not None]
    wanted = read_recipe(recipe).overridden(_once([*given, *(settings or ())]))
    computation = Computation(
        device=device.value,
        mixed_precision=None if mixed_precision is None else mixed_precision.value,
        channels_last=channels_last,
        compile=compiled,
        micro_batch=micro_batch,
        workers=workers,
        memory=bytes_of(memory),
        checkpoint_seconds=checkpoint_every,
    )
    # accelerate launch and torchrun start this command several times; one of the processes speaks.
    is_main = os.environ.get("RANK", "0") == "0"
    quiet = quiet or not is_main
    was_complete = _is_complete(output)
    with reporting(quiet) as reporter:
        reporter.say(_described(wanted))
        run = train_classifier(wanted, data, output, weights=weights, computation=computation, progress=_bars(reporter))
        if was_complete:
            reporter.say(f"{output} is complete: the same recipe on the same images; nothing to do")
    if not quiet:
        for name, value in _rows(run):
            typer.echo(f"{name:<18} {plain(value)}")
    if not run.complete:
        if is_main:
            _say_how_to_go_on(run)
        raise typer.Exit(_INTERRUPTED)


def _once(settings: Iterable[str]) -> list[str]:
    found: dict[str, str] = {}
    for text in settings:
        name = text.partition("=")[0].strip()
        if name in found:
            raise GroodError(f"{name} is given twice, as {found[name]} and {text}; leave one out")
        found[name] = text
    return list(found.values())


def _is_complete(output: Path) -> bool:
    from torch_grood.models.from_run import is_run, read_record

    return is_run(str(output)) and read_record(output).get("status") == "complete"


def _described(recipe: Recipe) -> str:
    start = ", from published weights" if recipe.pretrained else ""
    return (
        f"recipe {recipe.name}: {recipe.model}{start}, {recipe.epochs} epochs in batches of {recipe.batch_size}, "
        f"{recipe.optimizer} with lr {recipe.lr:g}, crop {recipe.crop}, seed {recipe.seed}"
    )


def _bars(reporter: Reporter) -> Progress:
    """A bar for the decoding of images, of which there may be none, and one for the steps."""
    decoding, training = reporter.progress("decoding"), reporter.progress("training")
    if decoding is False or training is False:
        return False

    def wrap(batches: Iterable[Any]) -> Iterable[Any]:
        # Images are decoded by ranges of positions.
        return (decoding if isinstance(batches, range) else training)(batches)

    return wrap


def _rows(run: TrainingRun) -> list[tuple[str, str]]:
    """(what, value) for people."""
    lines = [("epochs", f"{len(run.figures)} of {run.recipe.epochs}, {run.steps:,} steps")]
    if run.figures:
        last = run.figures[-1]
        lines += [
            ("training", f"{100 * last.accuracy:.2f} % right as augmented, loss {last.loss:.4f}"),
            ("validation", f"{100 * last.val_accuracy:.2f} % right, loss {last.val_loss:.4f}"),
        ]
    lines.append(("weights", str(run.folder.weights)))
    curve = run.folder.path / "curve.png"
    if curve.is_file():
        lines.append(("learning curve", str(curve)))
    if run.complete:
        lines.append(("next", _next_command(run)))
    return lines


def _next_command(run: TrainingRun) -> str:
    """How a detector is fitted on it. A network of the user's own is named by the user each time, never by a file."""
    from torch_grood.models import is_builtin_spec
    from torch_grood.models.from_run import read_record

    folder, spec = run.folder.path, run.recipe.model
    if is_builtin_spec(spec):
        arguments = ["--model", str(folder)]
    else:
        arguments = ["--model", spec, "--weights", str(run.folder.weights)]
        arguments += ["--transform", str(folder / "transform.json")]
        arguments += ["--train", str(folder / "train.txt"), "--calibrate", str(folder / "val.txt")]
    rate = least_rate(read_record(folder)["images"]["val"])
    if rate > DEFAULT_RATE:
        arguments += ["--fpr", f"{rate:g}"]
    return shlex.join(["grood", "fit", *arguments, "--output", str(folder / "detector.grood")])


def _say_how_to_go_on(run: TrainingRun) -> None:
    launched = "WORLD_SIZE" in os.environ
    again = "launch the same command again" if launched else shlex.join(["grood", *sys.argv[1:]])
    typer.echo(
        f"interrupted after step {run.steps:,} of {run.n_steps:,}; {plain(run.folder.weights)} holds the weights as of "
        f"then\nto go on: {plain(again)}",
        err=True,
    )
