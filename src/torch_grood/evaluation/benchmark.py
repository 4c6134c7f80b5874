"""The benchmark: for each checkpoint one extraction, then every method on it, then figures, intervals and tests.

    spec ──▶ image sets ──▶ outputs of the classifier ──▶ scores of each method ──▶ figures ──▶ results.json, .md, .csv

What is slow is kept as it comes, features in the store and scores in files: a run that was interrupted goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from torch_grood.data import ImageLoader, ImageTransform, image_loader
from torch_grood.errors import GroodError
from torch_grood.evaluation import results as r
from torch_grood.evaluation.extraction import ClassifierOutputs, NamedProgress, Sets, extract_sets
from torch_grood.evaluation.image_sets import ImageSet, ResolvedSets
from torch_grood.evaluation.measurement import compare, method_result, score_sets
from torch_grood.evaluation.metrics import classifier_accuracy, prototype_accuracy
from torch_grood.evaluation.record import (
    peak_memory,
    recorded_model,
    recorded_settings,
    set_infos,
    version_of,
    versions,
)
from torch_grood.evaluation.scoring import ScoredMethod, run_method, scores_path
from torch_grood.evaluation.settings import Checkpoint, Classifier, Settings, check_settings
from torch_grood.evaluation.tables import write_tables
from torch_grood.feature_store import FeatureStore
from torch_grood.features import model_fingerprint

__all__ = ["Checkpoint", "Classifier", "Settings", "run_benchmark"]

_log = logging.getLogger("torch_grood")

Report = Callable[[str], None]


class _Ready(NamedTuple):
    """One run, its images read.

    Attributes:
        number: of the run, from 0.
        checkpoint, classifier: what is run.
        fingerprint: SHA-256 of the weights.
        outputs: what the classifier says of all sets.
    """

    number: int
    checkpoint: Checkpoint
    classifier: Classifier
    fingerprint: str
    outputs: ClassifierOutputs


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
    check_settings(sets, checkpoints, settings)
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
        ready = _Ready(number, checkpoint, classifier, model_fingerprint(classifier.model).weights, outputs)
        scored = _score(ready, settings, folder, progress, say, warn)
        infos = set_infos(sets, outputs)
        say("figures and intervals")
        run, tests = _measure(ready, scored, infos, settings)
        for method in run.methods:
            for text in method.warnings:
                warn(f"{method.label}: {text}")
        runs.append(run)
        comparisons += tests
        models.append(recorded_model(classifier, outputs))
    found = r.BenchmarkResults(
        spec=r.SpecInfo(sets.spec.name, sets.spec.title, sets.spec.digest),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        settings=recorded_settings(sets, settings, models),
        sets=infos,
        comparable=r.comparability(infos),
        runs=tuple(runs),
        comparisons=tuple(comparisons),
    )
    r.write_results(folder / "results.json", found)
    write_tables(folder, found)
    return found


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
    ready: _Ready, settings: Settings, folder: Path, progress: NamedProgress, say: Report, warn: Report
) -> list[ScoredMethod]:
    """All methods, one after the other."""
    outputs, classifier = ready.outputs, ready.classifier
    # All that scores depend on beside the method; what a file of scores is found again by.
    key = {
        "sets": dict(outputs.fingerprints),
        "weights": ready.fingerprint,
        "head": outputs.head_name,
        "early_layer": outputs.early_layer,
        "transform": classifier.transform.to_dict(),
        "device": str(next(classifier.model.parameters()).device.type),
        "seed": ready.checkpoint.seed,
        "versions": {name: version_of(name) for name in ("torch-grood", "pytorch-ood")},
    }
    scored = []
    for i, method in enumerate(settings.methods):
        say(f"method {i + 1} of {len(settings.methods)}: {method.label}")
        found = run_method(
            method,
            outputs,
            by=settings.by,
            path=scores_path(folder / "scores", f"run{ready.number}", method),
            key=key,
            progress=progress(f"choose {method.name}") if callable(progress) else progress,
        )
        if found.status != "done":
            what = "failed" if found.status == "failed" else f"is {found.status}"
            warn(f"{method.label} {what}: {found.reason}")
        scored.append(found)
    return scored


def _measure(
    ready: _Ready, scored: Sequence[ScoredMethod], infos: Sequence[r.SetInfo], settings: Settings
) -> tuple[r.Run, list[r.Comparison]]:
    """Figures of all methods, and tests of GROOD against the others."""
    checkpoint, outputs = ready.checkpoint, ready.outputs
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
        weights_sha256=ready.fingerprint,
        seed=checkpoint.seed,
        accuracy=r.Accuracy(
            classifier_accuracy(outputs.test.logits, labels),
            prototype_accuracy(outputs.test.features, outputs.prototypes, labels),
        ),
        extraction=r.Extraction(cost.seconds, cost.images, max(0, cost.images - cost.network_images)),
        methods=methods,
        peak_memory_bytes=peak_memory(),
    )
    return run, compare(ready.number, methods, scores, groups)
