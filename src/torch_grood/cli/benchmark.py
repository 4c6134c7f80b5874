"""``grood benchmark``: GROOD beside other detectors, by OpenOOD's protocol or one's own."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torch_grood._text import shorten
from torch_grood.cli._common import (
    MODEL,
    READING,
    BatchSizeOption,
    Device,
    DeviceOption,
    NumClassesOption,
    QuietOption,
    SkipBadOption,
    WorkersOption,
    reporting,
    to_device,
)
from torch_grood.cli._transform import (
    CropOption,
    MeanOption,
    ResizeOption,
    StdOption,
    TransformOption,
    transform_of,
)
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.data import ImageTransform
    from torch_grood.evaluation.benchmark import Checkpoint, Classifier
    from torch_grood.evaluation.choice import ChooseBy
    from torch_grood.evaluation.published import Published
    from torch_grood.evaluation.results import BenchmarkResults
    from torch_grood.models import LoadedModel

__all__ = ["benchmark"]

METHODS, RESULTS = "Methods", "Results"
_SEED_MARK = "{seed}"
_MOST_DRAWS = 100_000
_LARGEST_SEED = 2**63 - 1


class _Choose(StrEnum):
    none = "none"
    ood = "validation-ood"
    classes = "held-out-classes"


def benchmark(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC|FILE",
            help="cifar10, cifar100, imagenet200, imagenet, or your own benchmark.toml; "
            "or a results.json, to show or verify it again.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="SPEC",
            help="torchvision:NAME, timm:NAME, package.module:factory, file.py:factory, or the folder of a "
            "grood train.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            help="Its weights; several times for several checkpoints, or once with {seed} in the name.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="A,B,…",
            help="all, or names with parameters if need be: grood,grood:outliers=noise,knn:k=200,msp.",
            rich_help_panel=METHODS,
        ),
    ] = "all",
    choose: Annotated[
        _Choose,
        typer.Option(
            "--choose",
            help="How hyper-parameters are chosen: not at all (published defaults), on the validation OOD images, or "
            "from ID data alone.",
            rich_help_panel=METHODS,
        ),
    ] = _Choose.none,
    seeds: Annotated[
        str,
        typer.Option("--seeds", metavar="0,1,…", help="Of everything random; one run each.", rich_help_panel=METHODS),
    ] = "0",
    root: Annotated[
        Path | None,
        typer.Option(
            "--root",
            metavar="DIR",
            help="Folder of the images and lists; else GROOD_DATA, else ./data. See grood data.",
            rich_help_panel=READING,
        ),
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Go on without OOD sets that are absent or incomplete; averages are marked as not comparable.",
            rich_help_panel=READING,
        ),
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for results.json, .md, .csv and scores.",
            rich_help_panel=RESULTS,
        ),
    ] = Path("grood-benchmark"),
    verify: Annotated[
        str | None,
        typer.Option(
            "--verify",
            metavar="NAME|FILE",
            help="Compare with published figures, e.g. openood-v1.5-cifar10; exit status 1 if something is off.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            "--bootstrap",
            min=0,
            max=_MOST_DRAWS,
            help="Bootstrap draws for 95 % intervals; 0: none.",
            rich_help_panel=RESULTS,
        ),
    ] = 1000,
    num_classes: NumClassesOption = None,
    device: DeviceOption = Device.auto,
    channels_last: Annotated[
        bool,
        typer.Option(
            "--channels-last",
            help="Memory format of the network: often faster, rounds otherwise.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    transform: TransformOption = None,
    resize: ResizeOption = None,
    crop: CropOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    head: Annotated[
        str | None,
        typer.Option("--head", metavar="LAYER", help="The model's last layer, if not found.", rich_help_panel=MODEL),
    ] = None,
    early_layer: Annotated[
        str | None,
        typer.Option("--early-layer", metavar="LAYER", help="Where GROOD mixes, if not found.", rich_help_panel=MODEL),
    ] = None,
    batch_size: BatchSizeOption = 64,
    workers: WorkersOption = None,
    skip_bad: SkipBadOption = False,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Keeps features between runs; else ~/.cache/torch-grood/features.",
            rich_help_panel=READING,
        ),
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Compare GROOD with other detectors on the same features, by OpenOOD's protocol.

    Examples:
        grood benchmark cifar10 --model nets.py:net --weights net.pt --root openood
        grood benchmark cifar10 --model nets.py:net --weights 's{seed}.pt' --seeds 0,1
        grood benchmark imagenet --model torchvision:resnet50 --methods grood,msp
        grood benchmark my.toml --model timm:resnet18 --choose held-out-classes
        grood benchmark found/results.json --verify openood-v1.5-cifar10
    """
    from torch_grood.evaluation.published import read_published

    published = None if verify is None else read_published(verify)
    if spec.endswith(".json"):
        from torch_grood.evaluation.results import read_results

        results = read_results(Path(spec))
        _show(results, quiet)
        _verify(results, published)
        return
    if model is None:
        raise GroodError("--model is missing: the classifier, such as torchvision:resnet50 or networks.py:resnet18")
    from torch_grood.data import FeatureCache
    from torch_grood.evaluation.benchmark import Settings, run_benchmark
    from torch_grood.evaluation.image_sets import data_root, resolve
    from torch_grood.evaluation.methods import methods_of
    from torch_grood.evaluation.spec import read_spec
    from torch_grood.models.from_run import WEIGHTS, is_run

    settings = Settings(
        methods=tuple(methods_of(methods)),
        by=_by(choose),
        draws=draws,
        batch_size=batch_size,
        workers=workers,
        on_bad="skip" if skip_bad else "raise",
        head=head,
        early_layer=early_layer,
    )
    if not weights and is_run(model):
        weights = [str(Path(model) / WEIGHTS)]
    checkpoints = _checkpoints(weights or [], seeds)
    described = read_spec(spec)
    with reporting(quiet) as reporter:
        # All that can be wrong with the data is said before the network starts.
        sets = resolve(described, data_root(described, root), allow_missing)
        for line in sets.warnings:
            reporter.warn(line)
        load = _loading(
            model,
            num_classes,
            device,
            channels_last,
            lambda loaded: transform_of(loaded, transform, resize, crop, mean, std, described.transform),
        )
        folder = Path("~/.cache/torch-grood/features").expanduser() if cache is None else cache
        reporter.say(f"{described.title}: {sum(map(len, sets)):,} images; features are kept in {folder}")
        results = run_benchmark(
            sets,
            checkpoints,
            load,
            settings,
            store=FeatureCache(folder),
            folder=output,
            progress=reporter.progress,
            say=reporter.say,
            warn=reporter.warn,
        )
    _show(results, quiet)
    if not quiet:
        typer.echo(f"\nwritten: {output}/results.json, results.md, results.csv and scores/")
    if not any(method.status == "done" for run in results.runs for method in run.methods):
        raise GroodError("no method has figures; the warnings, and results.md, say why")
    _verify(results, published)


def _loading(
    spec: str,
    num_classes: int | None,
    device: Device,
    channels_last: bool,
    prepared: Callable[[LoadedModel], ImageTransform],
) -> Callable[[Checkpoint], Classifier]:
    """What makes the network of a checkpoint."""
    import torch

    from torch_grood.evaluation.benchmark import Classifier
    from torch_grood.models import load_model

    def load(checkpoint: Checkpoint) -> Classifier:
        loaded = load_model(spec, checkpoint.weights, num_classes)
        network = to_device(loaded.model, device)
        if channels_last:
            network = network.to(memory_format=torch.channels_last)
        return Classifier(network, prepared(loaded), loaded.spec)

    return load


def _by(choose: _Choose) -> ChooseBy | None:
    from torch_grood.evaluation.choice import ChooseBy

    return {
        _Choose.none: None,
        _Choose.ood: ChooseBy.validation_ood,
        _Choose.classes: ChooseBy.held_out_classes,
    }[choose]


def _checkpoints(weights: list[str], seeds: str) -> list[Checkpoint]:
    """One run for each seed, or for each file of weights.

    Raises:
        GroodError: if seeds and weights do not go together, or a file is missing.
    """
    from torch_grood.evaluation.benchmark import Checkpoint

    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise GroodError(f"--seeds must be whole numbers such as 0,1,2; got {seeds!r}") from None
    if not 0 <= min(numbers) <= max(numbers) <= _LARGEST_SEED or len(set(numbers)) < len(numbers):
        raise GroodError(f"--seeds must be different numbers from 0 to {_LARGEST_SEED}; got {seeds:.200}")
    if len(weights) == 1:
        weights = [weights[0].replace(_SEED_MARK, str(seed)) for seed in numbers]
    elif len(weights) > 1 and len(numbers) == 1:
        numbers *= len(weights)
    elif len(weights) > 1 and len(weights) != len(numbers):
        raise GroodError(f"{len(weights)} --weights and {len(numbers)} --seeds; give one seed, or one for each file")
    files: list[Path | None] = [Path(file) for file in weights] if weights else [None] * len(numbers)
    missing = [str(file) for file in files if file is not None and not file.is_file()]
    if missing:
        raise GroodError(f"no such weights file: {shorten(missing)}")
    pairs = list(zip(files, numbers, strict=True))
    if len(set(pairs)) < len(pairs):
        raise GroodError("the same --weights twice with one seed would count one run twice")
    return [Checkpoint(file, seed) for file, seed in pairs]


def _show(results: BenchmarkResults, quiet: bool) -> None:
    if quiet:
        return
    from rich.console import Console

    from torch_grood.evaluation.tables import footnotes, to_rich

    console = Console()
    console.print(to_rich(results))
    for line in footnotes(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _verify(results: BenchmarkResults, published: Published | None) -> None:
    """Compare with published figures; exit status 1 if one that can be compared is off."""
    if published is None:
        return
    from rich.console import Console

    from torch_grood.evaluation.published import deviations_grid, verdict, verify

    found = verify(results, published)
    decided = verdict(found)
    console = Console()
    console.print(deviations_grid(found).to_rich())
    console.print(decided.text, markup=False, highlight=False, soft_wrap=True)
    if not decided.is_confirmed:
        raise typer.Exit(1)
