"""The benchmark: for each checkpoint one extraction, then every method on it, then figures, intervals and tests.

    spec ──▶ image sets ──▶ outputs of the classifier ──▶ scores of each method ──▶ figures ──▶ results.json, .md, .csv

What is slow is kept as it comes, features in the store and scores in files: a run that was interrupted goes on.
"""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from torch_grood.data import ImageLoader, ImageTransform, image_loader
from torch_grood.data.dataset import OnBad
from torch_grood.errors import GroodError
from torch_grood.evaluation import results as r
from torch_grood.evaluation.choice import ChooseBy
from torch_grood.evaluation.extraction import ClassifierOutputs, NamedProgress, Sets, extract_sets
from torch_grood.evaluation.image_sets import ImageSet, ResolvedSets
from torch_grood.evaluation.measurement import compare, method_result, score_sets
from torch_grood.evaluation.methods import Method
from torch_grood.evaluation.metrics import classifier_accuracy, prototype_accuracy
from torch_grood.evaluation.scoring import ScoredMethod, run_method, scores_path
from torch_grood.evaluation.tables import write_tables
from torch_grood.feature_store import FeatureStore
from torch_grood.features import model_fingerprint

__all__ = ["Checkpoint", "Classifier", "Settings", "run_benchmark"]

_log = logging.getLogger("torch_grood")

_FEWEST_DRAWS = 40
_FEWEST_CLASSES = 3
_PACKAGES = ("torch-grood", "torch", "numpy", "faiss-cpu", "scikit-learn", "scipy", "pytorch-ood", "pillow")

Report = Callable[[str], None]


class Checkpoint(NamedTuple):
    """One run.

    Attributes:
        weights: file of the network's weights; None: as the model is made.
        seed: of what is random in methods.
    """

    weights: Path | None
    seed: int


class Classifier(NamedTuple):
    """A network that is ready to run.

    Attributes:
        model: on its device.
        transform: its preprocessing.
        spec: how it was made, for the record.
    """

    model: nn.Module
    transform: ImageTransform
    spec: str


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Attributes:
        methods: to compare; the first GROOD among them is tested against all others.
        by: how hyper-parameters are chosen; None: they are as given.
        draws: of the bootstrap; 0: intervals of the AUROC only, by DeLong.
        batch_size, workers, on_bad: see `image_loader`.
        head, early_layer: of the model; found if None.
    """

    methods: tuple[Method, ...]
    by: ChooseBy | None = None
    draws: int = 1000
    batch_size: int = 64
    workers: int | None = None
    on_bad: OnBad = "raise"
    head: str | None = None
    early_layer: str | None = None


def run_benchmark(
    sets: ResolvedSets,
    checkpoints: Sequence[Checkpoint],
    load: Callable[[Checkpoint], Classifier],
    settings: Settings,
    *,
    store: FeatureStore,
    folder: Path,
    progress: NamedProgress = None,
    say: Report = _log.info,
    warn: Report = _log.warning,
) -> r.BenchmarkResults:
    """Run all methods on all checkpoints, and write ``results.json``, ``.md`` and ``.csv`` and the scores to a folder.

    Args:
        sets: the images of a benchmark.
        checkpoints: one run each.
        load: makes the network of a checkpoint.
        settings: see `Settings`.
        store: keeps features.
        folder: for what is written; made if it is absent.
        progress: gives a progress (see `GROOD.fit`) for the loops of what has the given name.
        say: takes lines for the user.
        warn: takes warnings.

    Raises:
        GroodError: for images or a model that cannot be used, no validation images where hyper-parameters are to be
            chosen, or a folder that cannot be written to. A method that cannot run is part of the results instead.
    """
    _check(sets, checkpoints, settings)
    _make_folder(folder)
    runs: list[r.Run] = []
    comparisons: list[r.Comparison] = []
    infos: tuple[r.SetInfo, ...] = ()
    digests: Mapping[str, str] = {}
    models: list[dict[str, Any]] = []
    for number, checkpoint in enumerate(checkpoints):
        classifier = load(checkpoint)
        weights = "" if checkpoint.weights is None else f", {checkpoint.weights.name}"
        say(f"run {number + 1} of {len(checkpoints)}: {classifier.spec}{weights}, seed {checkpoint.seed}")
        loaders = _loaders(sets, classifier.transform, settings)
        outputs = extract_sets(
            classifier.model,
            loaders,
            store,
            std=classifier.transform.std,
            seed=checkpoint.seed,
            head=settings.head,
            early_layer=settings.early_layer,
            progress=progress,
        )
        for key, loader in loaders.all().items():
            if loader.bad:
                warn(f"{key}: left out {len(loader.bad)} unreadable images, the first {loader.bad[0][0]}")
        if outputs.n_test_in_train:
            warn(f"{outputs.n_test_in_train} test images are training images, too: they have the same pixels")
        if digests and digests != outputs.digests:
            warn("the transform, or the images, differ between the runs")
        digests = outputs.digests
        fingerprint = model_fingerprint(classifier.model).weights
        scored = _score(outputs, checkpoint, classifier, fingerprint, settings, folder, number, progress, say, warn)
        infos = _set_infos(sets, outputs)
        say("figures and intervals")
        run, tests = _measure(number, checkpoint, fingerprint, outputs, scored, infos, settings)
        for method in run.methods:
            for text in method.warnings:
                warn(f"{method.label}: {text}")
        runs.append(run)
        comparisons += tests
        models.append(
            {
                "spec": _without_folder(classifier.spec),
                "head": outputs.head_name,
                "early_layer": outputs.early_layer,
                "transform": classifier.transform.to_dict(),
                "device": str(next(classifier.model.parameters()).device),
                "test_images_in_train": outputs.n_test_in_train,
            }
        )
    found = r.BenchmarkResults(
        spec=r.SpecInfo(sets.spec.name, sets.spec.title, sets.spec.digest),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        settings=_recorded(sets, settings, models),
        sets=infos,
        comparable=r.comparability(infos),
        runs=tuple(runs),
        comparisons=tuple(comparisons),
    )
    r.write_results(folder / "results.json", found)
    write_tables(folder, found)
    return found


def _check(sets: ResolvedSets, checkpoints: Sequence[Checkpoint], settings: Settings) -> None:
    if not settings.methods or not checkpoints:
        raise GroodError("a benchmark needs a method and a checkpoint at least")
    if 0 < settings.draws < _FEWEST_DRAWS:
        raise GroodError(
            f"an interval of 95 % needs {_FEWEST_DRAWS} bootstrap draws at least, got {settings.draws}; 1000 are "
            "usual, 0 leaves the bootstrap out"
        )
    if settings.by is not None and sets.val is None:
        raise GroodError(
            f"hyper-parameters are to be chosen by {settings.by}, which needs ID validation images, and "
            f"{sets.spec.name} has none; name them in id.val, or take the methods as they are"
        )
    if settings.by is ChooseBy.validation_ood and sets.val_ood is None:
        raise GroodError(
            f"hyper-parameters are to be chosen on validation outliers, and {sets.spec.name} has none here; name them "
            "in val_ood, or choose by held-out classes"
        )

    if settings.by is ChooseBy.held_out_classes and len(set(sets.train.source.labels or ())) < _FEWEST_CLASSES:
        raise GroodError(
            f"held-out classes need {_FEWEST_CLASSES} classes at least, and the training images of {sets.spec.name} "
            "have fewer; choose on validation OOD images, or take the methods as they are"
        )
    if settings.by is ChooseBy.held_out_classes and sets.val and len(set(sets.val.source.labels or ())) < 2:
        raise GroodError(
            f"held-out classes need validation images of two classes at least, and those of {sets.spec.name} have "
            "fewer; name more in id.val, choose on validation OOD images, or take the methods as they are"
        )


def _make_folder(folder: Path) -> None:
    try:
        (folder / "scores").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GroodError(f"the folder {folder} cannot be made: {error.strerror or error}; choose another") from None


def _loaders(sets: ResolvedSets, transform: ImageTransform, settings: Settings) -> Sets:
    def loader(found: ImageSet) -> ImageLoader:
        return image_loader(
            found.source,
            transform,
            batch_size=settings.batch_size,
            workers=settings.workers,
            on_bad=settings.on_bad,
        )

    return Sets(
        train=loader(sets.train),
        val=None if sets.val is None else loader(sets.val),
        test=loader(sets.test),
        val_ood=None if sets.val_ood is None else loader(sets.val_ood),
        ood={found.key: loader(found) for found in (*sets.near, *sets.far)},
    )


def _score(
    outputs: ClassifierOutputs,
    checkpoint: Checkpoint,
    classifier: Classifier,
    fingerprint: str,
    settings: Settings,
    folder: Path,
    number: int,
    progress: NamedProgress,
    say: Report,
    warn: Report,
) -> list[ScoredMethod]:
    """All methods, one after the other."""
    # All that scores depend on beside the method; what a file of scores is found again by.
    key = {
        "sets": dict(outputs.fingerprints),
        "weights": fingerprint,
        "head": outputs.head_name,
        "early_layer": outputs.early_layer,
        "transform": classifier.transform.to_dict(),
        "device": str(next(classifier.model.parameters()).device.type),
        "seed": checkpoint.seed,
        "versions": {name: _version(name) for name in ("torch-grood", "pytorch-ood")},
    }
    scored = []
    for i, method in enumerate(settings.methods):
        say(f"method {i + 1} of {len(settings.methods)}: {method.label}")
        found = run_method(
            method,
            outputs,
            by=settings.by,
            path=scores_path(folder / "scores", f"run{number}", method),
            key=key,
            progress=progress(f"choose {method.name}") if callable(progress) else progress,
        )
        if found.status != "done":
            what = "failed" if found.status == "failed" else f"is {found.status}"
            warn(f"{method.label} {what}: {found.reason}")
        scored.append(found)
    return scored


def _measure(
    number: int,
    checkpoint: Checkpoint,
    fingerprint: str,
    outputs: ClassifierOutputs,
    scored: Sequence[ScoredMethod],
    infos: Sequence[r.SetInfo],
    settings: Settings,
) -> tuple[r.Run, list[r.Comparison]]:
    """Figures of all methods, and tests of GROOD against the others."""
    groups = {group: [one.key for one in infos if one.role == group and one.status != "absent"] for group in r.GROUPS}
    comparable = r.comparability(infos)
    scores = {found.asked.label: sets for found in scored if (sets := score_sets(found)) is not None}
    methods = tuple(
        method_result(
            found,
            scores.get(found.asked.label),
            groups,
            comparable,
            draws=settings.draws,
            seed=checkpoint.seed,
        )
        for found in scored
    )
    cost, labels = outputs.cost, outputs.test.labels
    run = r.Run(
        weights=None if checkpoint.weights is None else checkpoint.weights.name,
        weights_sha256=fingerprint,
        seed=checkpoint.seed,
        accuracy=r.Accuracy(
            classifier_accuracy(outputs.test.logits, labels),
            prototype_accuracy(outputs.test.features, outputs.prototypes, labels),
        ),
        extraction=r.Extraction(cost.seconds, cost.images, max(0, cost.images - cost.network_images)),
        methods=methods,
        peak_memory_bytes=_peak_memory(),
    )
    return run, compare(number, methods, scores, groups)


def _set_infos(sets: ResolvedSets, outputs: ClassifierOutputs) -> tuple[r.SetInfo, ...]:
    """All sets of the benchmark, with what was read of each."""
    read = {"train": outputs.world.train, "val": outputs.world.val, "test": outputs.test}
    read |= {"val_ood": outputs.world.val_ood, **outputs.ood}
    sizes = {key: len(found) for key, found in read.items() if found is not None}
    infos = []
    for one in sets:
        role, n, expected = one.key if one.group in ("id", "val_ood") else one.group, sizes[one.key], one.spec.count
        n_bad = len(one) - n
        infos.append(
            r.SetInfo(
                key=one.key,
                title=one.spec.title,
                role=role,  # type: ignore[arg-type]
                n=n,
                expected=expected,
                status="complete" if expected in (None, n) and not n_bad else "incomplete",
                reason=f"{n_bad} unreadable" if n_bad else None,
                list_sha256=outputs.digests[one.key],
            )
        )
    for gone in sets.left_out:
        infos.append(
            r.SetInfo(gone.spec.key, gone.spec.title, gone.group, 0, gone.spec.count, "absent")  # type: ignore[arg-type]
        )
    return tuple(infos)


def _recorded(sets: ResolvedSets, settings: Settings, models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How it was run; no path, which says nothing elsewhere."""
    return {
        "methods": [method.config() for method in settings.methods],
        "chosen_by": None if settings.by is None else str(settings.by),
        "bootstrap_draws": settings.draws,
        "batch_size": settings.batch_size,
        "unreadable_images": settings.on_bad,
        "threads": torch.get_num_threads(),
        "sets_left_out": [one.spec.key for one in sets.left_out],
        "warnings": list(sets.warnings),
        "models": [dict(model) for model in models],
    }


def _without_folder(spec: str) -> str:
    """path/to/networks.py:resnet20 → networks.py:resnet20: a folder of this machine says nothing elsewhere."""
    return spec.replace("\\", "/").rpartition("/")[2] if ".py:" in spec else spec


def _versions() -> dict[str, str]:
    found = {name: text for name in _PACKAGES if (text := _version(name))}
    return found | {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _peak_memory() -> int | None:
    """Of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
