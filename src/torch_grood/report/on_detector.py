"""A report on a fitted detector and what it says of sets of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torch_grood._optional import require
from torch_grood._progress import Progress
from torch_grood.errors import GroodError
from torch_grood.evaluation.metrics import auroc
from torch_grood.report.closer import Closer, Picked, look_closer, pick_points, place
from torch_grood.report.figures import Histogram, promise_curve, roc_curves, scatter, score_histograms
from torch_grood.report.page import page
from torch_grood.report.pictures import data_uri, sheet_of, training_picture
from torch_grood.report.sets import ROLES, ReportSet, ScoredSet, score_set
from torch_grood.report.svg import SERIES
from torch_grood.report.tables import class_grid, detection_grid, exceedance, flagged_share, promise_grid, share
from torch_grood.summary import facts, rows, stored_rows

if TYPE_CHECKING:
    from torch_grood import GROOD, ConformalThreshold, Explanation
    from torch_grood.data.dataset import OnBad
    from torch_grood.data.transforms import ImageTransform
    from torch_grood.evaluation.tables import Grid

__all__ = ["POINTS", "Options", "detector_report"]

POINTS = 1500
"""Images drawn one by one; each takes about a kilobyte of the page."""
_CARDS, _GALLERY_SETS, _NEIGHBORS = 8, 8, 4
_PIXELATED = 64
# Of which one lies outside a 95 % interval on either side.
_LEAST_DRAWS = 40
# One tested at a time, a true promise is doubted so often.
_DOUBT = 0.025

NamedProgress = Callable[[str], Progress]


@dataclass(frozen=True)
class Options:
    """How a report is made.

    Attributes:
        title: of the page; None: of the detector's file.
        fpr: another false-alarm rate than the detector's.
        tau: the user's own threshold.
        points: images drawn one by one, of all sets together; 0: none, and no image is shown.
        draws: of the bootstrap for the intervals of FPR@95, at least 40; 0: none.
        seed: of which images are drawn, and of the bootstrap.
        training_root: folder of the training images; None: their names as they were stored.
        batch_size: images at a time.
        workers: processes that read files; None: as `image_loader`.
        on_bad: what becomes of unreadable files.
    """

    title: str | None = None
    fpr: float | None = None
    tau: float | None = None
    points: int = POINTS
    draws: int = 1000
    seed: int = 0
    training_root: Path | None = None
    batch_size: int = 64
    workers: int | None = None
    on_bad: OnBad = "raise"


def detector_report(
    detector: GROOD,
    transform: ImageTransform,
    sets: Sequence[ReportSet],
    options: Options | None = None,
    *,
    file: Path | None = None,
    progress: NamedProgress = lambda name: None,
) -> str:
    """An HTML page on a detector, and on what it says of images.

    Args:
        detector: fitted, with its model.
        transform: of its images.
        sets: at most one of them "known"; none: a page on the fit and the calibration alone.
        options: how it is made.
        file: of the detector, for its name and size.
        progress: gives a bar of a name.

    Raises:
        GroodError: for two sets of one name or two known ones, a rate that cannot be promised, too few draws, or as
            `score_set`.
        MissingDependencyError: without the extra ``report``.
    """
    options = options or Options()
    for module in ("jinja2", "matplotlib", "sklearn.metrics", "scipy.stats"):
        require(module, extra="report")
    _check(sets)
    if 0 < options.draws < _LEAST_DRAWS:
        raise GroodError(
            f"{options.draws} draws are too few for a 95 % interval; expected 0, or {_LEAST_DRAWS} or more"
        )
    threshold = detector.threshold_
    if threshold is not None and options.fpr is not None:
        threshold = threshold.at(options.fpr)
    # For its errors, before a long pass.
    if threshold is not None or options.tau is not None or options.fpr is not None:
        nothing = torch.empty(0, detector.fit_info_.n_features)
        detector.predict_features(nothing, fpr=options.fpr, tau=options.tau)
    scored = [
        score_set(
            detector,
            transform,
            one,
            fpr=options.fpr,
            tau=options.tau,
            batch_size=options.batch_size,
            workers=options.workers,
            on_bad=options.on_bad,
            progress=progress(f"scoring {one.name}"),
        )
        for one in sets
    ]
    found = _Report(detector, transform, scored, threshold, options, progress)
    return found.page(file)


def _check(sets: Sequence[ReportSet]) -> None:
    names = [one.name for one in sets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise GroodError(f"two sets are called {twice!r}; give them names: NAME=PATH")
    if sum(one.role == "known" for one in sets) > 1:
        raise GroodError("there are two sets of known images; give one, or a list of the images of both")


class _Report:
    """What the sections of the page share."""

    def __init__(
        self,
        detector: GROOD,
        transform: ImageTransform,
        sets: Sequence[ScoredSet],
        threshold: ConformalThreshold | None,
        options: Options,
        progress: NamedProgress,
    ) -> None:
        self.detector, self.transform, self.sets, self.options = detector, transform, sets, options
        self.threshold = None if options.tau is not None else threshold
        self.classes = [str(name) for name in detector.classes_]
        self.known = next((one for one in sets if one.role == "known"), None)
        self.unknown = [one for one in sets if one.is_unknown]
        self.colours = _colours(sets)
        self._progress = progress
        self._lacks_training = False

    def page(self, file: Path | None) -> str:
        """The whole page."""
        name = "a detector" if file is None else file.name
        found = facts(self.detector, file)
        context: dict[str, Any] = {
            "rule": self.rule(),
            "tiles": list(self.tiles()),
            "warnings": list(self.warnings()),
            "detector_rows": [*rows(found | _named(file)), *stored_rows(found["metadata"])],
            "set_rows": [(one.name, _set_text(one)) for one in self.sets],
            **self.scores(),
            **self.telling(),
            **self.promise(),
            **self.by_class(),
            **self.closer(),
        }
        contents = {
            "scores": ("Scores", "histograms"),
            "telling": ("Unknown told from known", "detection"),
            "promise": ("False alarms", "promise"),
            "gradients": ("Where the images lie", "polar"),
            "images": ("The hardest images", "galleries"),
            "classes": ("Class by class", "by_class"),
        }
        shown = {id: title for id, (title, part) in contents.items() if context[part]}
        shown["detector"] = "What was fitted"
        title = self.options.title or f"What {name} knows, and what it does not"
        return page("detector", title, shown, context)

    def rule(self) -> str:
        """The decision in one sentence."""
        if self.options.tau is not None:
            return (
                f"An image is flagged as unknown if its score is above τ = {self.options.tau:.4g}, a threshold that "
                "was set by hand and promises nothing."
            )
        threshold = self.threshold
        if threshold is None:
            return "It is not calibrated: it gives scores, and decides nothing."
        rate = f"{100 * threshold.fpr:g} %"
        if threshold.groups is not None:
            return (
                "An image is flagged as unknown if its score is above the threshold of its nearest class, which is the "
                f"case if its p-value is at most {threshold.fpr:g}: of known images of each class, at most {rate} are "
                f"flagged on average, if they are like the {threshold.n:,} that set the thresholds."
            )
        low, high = (share(end) for end in threshold.band())
        return (
            f"An image is flagged as unknown if its score is above τ = {threshold.tau:.4g}, which is the case if its "
            f"p-value is at most {threshold.fpr:g}: of known images like the {threshold.n:,} that set this threshold, "
            f"at most {rate} are flagged on average (with this very calibration {low} to {high} %, at 95 % confidence)."
        )

    def tiles(self) -> Iterator[dict[str, str]]:
        """The figures that one looks for first."""
        known = self.known
        if known is not None and known.is_ood is not None:
            promised = "nothing was promised"
            if self.threshold is not None:
                promised = f"promised: at most {100 * self.threshold.fpr:g} %, on average"
            yield _tile("Known images flagged", f"{share(float(known.is_ood.mean()))} %", promised)
        for role in ("near", "far", "unknown"):
            sets = [one for one in self.unknown if one.role == role]
            if not sets:
                continue
            names = ", ".join(one.name for one in sets)
            kind = "Unknown" if role == "unknown" else f"{role.capitalize()} unknown"
            flagged = [float(one.is_ood.mean()) for one in sets if one.is_ood is not None]
            if flagged:
                yield _tile(f"{kind} images flagged", f"{share(sum(flagged) / len(flagged))} %", names)
            if known is not None:
                mean = sum(auroc(known.score, one.score) for one in sets) / len(sets)
                yield _tile(f"AUROC, {kind.lower()} images", f"{share(mean)} %", names)
        if known is not None and known.accuracy is not None:
            yield _tile("Accuracy of the classifier", f"{share(known.accuracy)} %", f"on {known.name}")
        for one in self.sets:
            if one.role == "unlabelled" and one.is_ood is not None:
                yield _tile(f"{one.name}: flagged", f"{share(float(one.is_ood.mean()))} %", f"of {len(one):,} images")

    def warnings(self) -> Iterator[str]:
        """What a reader must know before the figures."""
        info = self.detector.fit_info_
        if info.uses_ood_data:
            yield (
                "real unknown images took part in the fit of this detector, so that its figures on unknown images are "
                "not those of a method that has seen none."
            )
        quality = self.detector.index_quality_
        if quality is not None:
            yield "the search for the nearest gradients is approximate; its measured recall is among the facts below."
        for one in self.sets:
            if one.bad:
                yield f"{one.name}: {len(one.bad):,} unreadable files were left out."

    def scores(self) -> dict[str, Any]:
        """Histograms, and τ."""
        if not self.sets:
            return {"histograms": "", "has_tau": False, "tau_text": ""}
        taus: tuple[float, float] | None = None
        text = ""
        if self.options.tau is not None:
            taus = self.options.tau, self.options.tau
        elif self.threshold is not None:
            found = self.threshold.log_taus.exp()
            taus = float(found.min()), float(found.max())
        if taus is not None:
            text = "What lies right of τ, in the grey area, is flagged."
            if taus[0] != taus[1]:
                text = (
                    f"Each class has its own threshold; the least and the greatest are drawn, {taus[0]:.4g} and "
                    f"{taus[1]:.4g}."
                )
        histograms = [
            Histogram(
                one.name,
                ROLES[one.role],
                one.score,
                None if one.is_ood is None else float(one.is_ood.mean()),
                colour,
            )
            for one, colour in zip(self.sets, self.colours, strict=True)
        ]
        return {"histograms": score_histograms(histograms, taus), "has_tau": taus is not None, "tau_text": text}

    def telling(self) -> dict[str, Any]:
        """ROC and the table of figures."""
        if self.known is None or not self.unknown:
            return {"detection": None, "roc": ""}
        colours = [colour for one, colour in zip(self.sets, self.colours, strict=True) if one.is_unknown]
        curves = {one.name: one.score for one in self.unknown}
        return {
            "detection": detection_grid(self.known, self.unknown, self.options.draws, self.options.seed),
            "roc": roc_curves(self.known.score, curves, colours),
        }

    def promise(self) -> dict[str, Any]:
        """Promised against observed false alarms."""
        known, threshold = self.known, self.threshold
        if known is None or threshold is None or known.p_value is None or known.is_ood is None:
            nothing = dict.fromkeys(("promise_curve", "promise_verdict", "n_calibration"), "")
            return {"promise": None, "promise_has_band": False, **nothing}
        count, rate = int(known.is_ood.sum()), 100 * threshold.fpr
        chance = exceedance(known, threshold)
        share_of = f"{count:,} of {len(known):,} known images are flagged: {flagged_share(known)} %."
        verdict = f"At the promised {rate:g} %, {share_of} "
        if chance > _DOUBT:
            verdict += "That does not speak against the promise."
        else:
            verdict += (
                f"So many happen with a chance of {chance:.2g} at most if these images are like those of the "
                "calibration: they may not be."
            )
        one_group = threshold.groups is None
        return {
            "promise": promise_grid(known, threshold),
            "promise_curve": promise_curve(known.p_value, threshold.fpr, threshold.n if one_group else None),
            "promise_has_band": one_group,
            "promise_verdict": verdict,
            "n_calibration": f"{threshold.n:,}",
        }

    def by_class(self) -> dict[str, Any]:
        """Each class by itself."""
        if self.known is None:
            return {"by_class": None, "class_text": ""}
        grid: Grid = class_grid(self.known, self.unknown, self.classes)
        text = "Where false alarms gather, and which classes unknown images are taken for."
        if self.threshold is not None and self.threshold.groups is None:
            text += " The promise is about all known images together: some classes have more false alarms, some fewer."
        return {"by_class": grid, "class_text": text}

    def closer(self) -> dict[str, Any]:
        """All that shows images."""
        nothing: dict[str, Any] = {"polar": "", "points": None, "galleries": []}
        if not self.sets or self.options.points == 0:
            return nothing
        points = pick_points(self.sets, self.options.points, self.options.seed)
        hardest = [(i, positions, least) for i, positions, least in self._hardest() if len(positions)]
        picked = [*points, *(Picked(i, position) for i, positions, _ in hardest for position in positions)]
        looked = look_closer(
            self.detector,
            self.transform,
            self.sets,
            picked,
            batch_size=self.options.batch_size,
            progress=self._progress("drawing"),
        )
        n = len(points)
        explanation = self.detector.explain_features(looked.features[n:], _NEIGHBORS, 1) if len(picked) > n else None
        galleries = list(self._galleries(hardest, looked.pictures[n:], explanation))
        return self._views(points, Closer(looked.pictures[:n], looked.features[:n])) | {
            "galleries": galleries,
            "galleries_note": self._galleries_note(),
        }

    def _galleries_note(self) -> str:
        notes = []
        if len(self.sets) > _GALLERY_SETS:
            notes.append(f"Of the first {_GALLERY_SETS} sets.")
        if self._lacks_training:
            notes.append(
                "Training images that are marked ? are not where they were; --training-root says where they are."
            )
        return " ".join(notes)

    def _hardest(self) -> Iterator[tuple[int, list[int], bool]]:
        """Of each set the images that are most unlike what the set is, and whether these have the lowest scores."""
        for i, one in enumerate(self.sets[:_GALLERY_SETS]):
            order = np.argsort(one.score if one.is_unknown else -one.score, kind="stable")
            yield i, order[:_CARDS].tolist(), one.is_unknown

    def _views(self, points: Sequence[Picked], looked: Closer) -> dict[str, Any]:
        places = place(self.detector.state_, looked.features, self.options.seed)
        sets = np.array([one.set for one in points], dtype=np.int64)
        polar, plane = (scatter(places, sets, self.colours, view) for view in ("polar", "plane"))
        chosen = [(self.sets[one.set], one.position) for one in points]
        classes = sorted({int(of.label[at]) for of, at in chosen})
        place_of = {label: at for at, label in enumerate(classes)}
        total = sum(map(len, self.sets))
        shown = (
            f"All {total:,} images are drawn."
            if len(points) == total
            else (f"{len(points):,} of the {total:,} images are drawn, as evenly among the sets as can be.")
        )
        return {
            "polar": polar.svg,
            "plane": plane.svg,
            "names_classes": bool(places.class_names),
            "legend": [{"name": one.name, "colour": c} for one, c in zip(self.sets, self.colours, strict=True)],
            "shown_points": f"{shown} Point at one, or press the arrow keys, to see it.",
            "points": {
                "polar": polar.xy,
                "plane": plane.xy,
                "set": sets.tolist(),
                "sets": [one.name for one in self.sets],
                "label": [place_of[int(of.label[at])] for of, at in chosen],
                "classes": [self.classes[label] for label in classes],
                "score": [f"{of.score[at]:.4g}" for of, at in chosen],
                "p_value": [None if of.p_value is None else f"{of.p_value[at]:.4g}" for of, at in chosen],
                "is_ood": [None if of.is_ood is None else bool(of.is_ood[at]) for of, at in chosen],
                "file": [_short(of.path(at)) for of, at in chosen],
                "sheet": sheet_of(looked.pictures)._asdict(),
            },
        }

    def _galleries(
        self, hardest: Sequence[tuple[int, list[int], bool]], pictures: Sequence[Any], explanation: Explanation | None
    ) -> Iterator[dict[str, Any]]:
        at = 0
        for i, positions, least in hardest:
            one, cards = self.sets[i], []
            for position in positions:
                assert explanation is not None
                cards.append(self._card(one, position, pictures[at], explanation, at))
                at += 1
            kind = f"{'most like' if least else 'least like'} the training images"
            lead = {
                "known": "Known images with the highest scores: false alarms, odd pictures, or wrong labels.",
                "unlabelled": "The images with the highest scores.",
            }.get(one.role, "Unknown images with the lowest scores: these pass most easily for known ones.")
            lead += " Below each, the training images with the nearest gradients."
            yield {"title": f"{one.name}: {kind}", "lead": lead, "cards": cards}

    def _card(self, one: ScoredSet, position: int, picture: Any, found: Explanation, at: int) -> dict[str, Any]:
        label, flagged = self.classes[one.label[position]], None if one.is_ood is None else bool(one.is_ood[position])
        truth = None if one.truth is None else self.classes[one.truth[position]]
        p_value = "" if one.p_value is None else f", p-value {one.p_value[position]:.3g}"
        said = f"Classifier: {label}" if truth in (None, label) else f"Classifier: {label}; label: {truth}"
        samples = found.neighbor[at].tolist()
        near = zip(
            samples,
            self.detector.sample_names(samples),
            found.neighbor_log_distance[at].tolist(),
            strict=True,
        )
        return {
            "picture": data_uri(picture),
            "is_small": max(picture.size) < _PIXELATED,
            "alt": f"Image {_short(one.path(position))}",
            "verdict": {True: "Flagged", False: "Not flagged", None: "No decision"}[flagged],
            "text": f"{said}. Score {one.score[position]:.4g}{p_value}.",
            "file": _short(one.path(position)),
            "neighbors": [self._neighbor(*of, is_small=max(picture.size) < _PIXELATED) for of in near],
        }

    def _neighbor(self, sample: int, name: str | None, log_distance: float, *, is_small: bool) -> dict[str, Any]:
        picture = training_picture(name, self.options.training_root)
        self._lacks_training = self._lacks_training or (picture is None and name is not None)
        shown = f"number {sample}" if name is None else _short(name)
        return {
            "picture": picture,
            "alt": f"Training image {shown}" + ("" if picture else ", which is not there"),
            # In a class folder, the name of the class.
            "text": shown.partition("/")[0],
            "distance": f"{math.exp(log_distance):.2g}",
            "is_small": is_small,
        }


def _colours(sets: Sequence[ScoredSet]) -> list[int]:
    """Place of each set's colour; the first is the known images'."""
    others = iter(range(1, len(sets) + 1))
    return [0 if one.role == "known" else 1 + (next(others) - 1) % (SERIES - 1) for one in sets]


def _tile(what: str, value: str, note: str) -> dict[str, str]:
    return {"what": what, "value": value, "note": note}


def _named(file: Path | None) -> dict[str, Any]:
    """A page that is sent elsewhere tells no folder of this machine."""
    return {"file": "in memory", "bytes": 0} if file is None else {"file": file.name}


def _set_text(one: ScoredSet) -> str:
    bad = f", {len(one.bad):,} unreadable ones left out" if one.bad else ""
    return f"{ROLES[one.role]}, {len(one):,}{bad}; from {_short(one.source.origin)}"


def _short(path: str) -> str:
    """The end of a path."""
    return "/".join(Path(path).parts[-2:])
