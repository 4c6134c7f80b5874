"""Promised against observed: what the decisions of a calibrated detector do on real images.

    python benchmarks/cifar10_sources.py …      # extracts the features of a CIFAR-10 classifier, kept in its --cache
    python benchmarks/coverage.py CACHE/resnet20_cifar10-…-50000-0 --output docs/results/coverage.md \
        --figure docs/images/coverage.png

The detector is GROOD with its default outliers (Mixup, λ = 0.9, first block). OpenOOD's 1,000 validation images
calibrate, its 9,000 test images are the ID images to come. Nothing is chosen here.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cifar10_sources import FAR, NEAR
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor
from tqdm import tqdm

from torch_grood import GROOD, ConformalThreshold, GroodError
from torch_grood._files import replacing
from torch_grood._optional import require
from torch_grood.threshold import benjamini_hochberg, least_rejections

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TITLES = {"cifar100": "CIFAR-100", "tin": "TinyImageNet", "mnist": "MNIST", "texture": "Textures"}
FPR, FDR, N_OOD = 0.05, 0.1, 90


class Part(NamedTuple):
    """Images of one list: log scores (n,) and nearest class prototypes (n,)."""

    scores: Tensor
    nearest: Tensor


class Data(NamedTuple):
    """All that the page is made from."""

    threshold: ConformalThreshold
    held_out: Part
    test: Part
    ood: dict[str, Tensor]


def main() -> None:
    """Print the page, and write it and its figure; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path, help="folder of features that cifar10_sources.py has left")
    parser.add_argument("--layer", default="layer1", help="early layer of the Mixup outliers")
    parser.add_argument("--splits", type=int, default=1000, help="random splits into calibration and test")
    parser.add_argument("--output", type=Path, help="the page; without it, it is only printed")
    parser.add_argument("--figure", type=Path, help="the figure, PNG")
    arguments = parser.parse_args()
    data = read(arguments.features, arguments.layer)
    by_class = _class_rates(data, arguments.splits)
    page = PAGE.format(
        n_splits=f"{arguments.splits:,}",
        official=official(data),
        splits=random_splits(data, arguments.splits),
        classes=each_class(data, by_class),
        worst=worst_class(by_class),
        few=discoveries(data, FEW, arguments.splits),
        half=discoveries(data, HALF, arguments.splits),
        fpr=_percent(FPR, 0),
        fdr=FDR,
        n_ood=N_OOD,
        versions=f"torch {torch.__version__.split('+')[0]}",
    )
    print(page)
    if arguments.output:
        with replacing(arguments.output) as temporary:
            temporary.write_text(page, encoding="utf-8")
    if arguments.figure:
        with replacing(arguments.figure) as temporary:
            temporary.write_bytes(figure(data, by_class))


def read(folder: Path, layer: str) -> Data:
    """Fit on the cached training features, calibrate on the validation images and score all the others.

    Raises:
        GroodError: if a file is missing.
    """
    train = _load(folder / f"pass-{layer}.pt")
    detector = GROOD(None).fit_features(
        train["features"], train["labels"], train["predictions"], ood_features=train["mixed"]["0.9"]
    )
    held_out = _load(folder / "val_cifar10.pt")
    threshold = detector.calibrate_features(held_out["features"], fpr=FPR).threshold_
    assert threshold is not None  # calibrate_features has set it

    def part(extracted: dict[str, Any]) -> Part:
        features = extracted["features"]
        return Part(detector.log_score_features(features), detector.predict_features(features).prototype_label)

    ood = {name: detector.log_score_features(_load(folder / f"test_{name}.pt")["features"]) for name in (*NEAR, *FAR)}
    found = Data(threshold, part(held_out), part(_load(folder / "test_cifar10.pt")), ood)
    assert torch.equal(found.held_out.scores.sort().values, threshold.log_scores)
    return found


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise GroodError(
            f"there is no {path}; run benchmarks/cifar10_sources.py first, and give the folder in its cache"
        )
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def official(data: Data) -> str:
    """The official split: one calibration, one test."""
    rows = []
    for fpr in RATES:
        threshold = data.threshold.at(fpr)
        n_flagged, n = int(threshold.is_ood(data.test.scores).sum()), len(data.test.scores)
        interval = stats.binomtest(n_flagged, n).proportion_ci(0.95, "exact")
        rows.append(
            [
                _percent(fpr),
                f"{threshold.tau:.4f}",
                _range(*threshold.band()),
                f"**{_percent(n_flagged / n)}**",
                _range(interval.low, interval.high),
                f"{_chance(n_flagged, n, threshold):.2f}",
                *(_percent(_rate(threshold.is_ood(scores)), 1) for scores in data.ood.values()),
            ]
        )
    titles = [f"{TITLES[name]} flagged" for name in data.ood]
    return _table(
        ["promised", "τ", "band of this draw", "observed", "95 % interval of it", "as unusual by chance", *titles], rows
    )


def _chance(n_flagged: int, n: int, threshold: ConformalThreshold) -> float:
    """How often chance alone puts the observed rate as far out, if validation and test images are exchangeable."""
    law = _law(threshold, n)
    return min(1.0, 2 * min(float(law.cdf(n_flagged)), float(law.sf(n_flagged - 1))))


def _law(threshold: ConformalThreshold, n_new: int) -> Any:
    """Of the number of false alarms among n_new exchangeable images: binomial, with the rate's own law, Beta."""
    rank = int((threshold.log_scores >= threshold.log_tau).sum())  # no ties here
    return stats.betabinom(n_new, rank, threshold.n + 1 - rank)


def random_splits(data: Data, count: int) -> str:
    """The pool of all ID images, parted at random into calibration and test as often as `count`."""
    pool, n = torch.cat([data.held_out.scores, data.test.scores]), len(data.held_out.scores)
    observed: dict[float, list[int]] = {fpr: [] for fpr in RATES}
    for held_out, new in _splits(len(pool), n, count, seed=0):
        threshold = ConformalThreshold.fit(pool[held_out], FPR)
        for fpr in RATES:
            observed[fpr].append(int(threshold.at(fpr).is_ood(pool[new]).sum()))
    rows, n_new = [], len(pool) - n
    for fpr, counts in observed.items():
        low, high = data.threshold.at(fpr).band()
        law, rates = _law(data.threshold.at(fpr), n_new), np.array(counts) / n_new
        expected = float(law.cdf(np.floor(high * n_new)) - law.cdf(np.ceil(low * n_new) - 1))
        rows.append(
            [
                _percent(fpr),
                _percent(float(law.mean()) / n_new, 3),
                f"{_percent(rates.mean(), 3)} ± {_percent(rates.std() / np.sqrt(count), 3)}",
                _percent(float(law.std()) / n_new, 3),
                _percent(rates.std(), 3),
                _percent(expected, 1),
                _percent(((rates >= low) & (rates <= high)).mean(), 1),
            ]
        )
    return _table(
        ["promised", "mean: theory", "observed", "deviation: theory", "observed", "in the band: theory", "observed"],
        rows,
    )


class ClassRates(NamedTuple):
    """Observed rates (splits, classes) of one threshold for all and of one each, by fpr; NaN: cannot be promised."""

    single: dict[float, np.ndarray[Any, np.dtype[np.float64]]]
    each: dict[float, np.ndarray[Any, np.dtype[np.float64]]]


def _class_rates(data: Data, count: int) -> ClassRates:
    scores = torch.cat([data.held_out.scores, data.test.scores])
    nearest = torch.cat([data.held_out.nearest, data.test.nearest])
    found = ClassRates({fpr: np.full((count, 10), np.nan) for fpr in RATES}, {})
    found.each.update({fpr: np.full((count, 10), np.nan) for fpr in RATES})
    for i, (held_out, new) in enumerate(_splits(len(scores), len(data.held_out.scores), count, seed=1)):
        everyone = ConformalThreshold.fit(scores[held_out], FPR)
        each = ConformalThreshold.fit(scores[held_out], FPR, nearest[held_out])
        for fpr in RATES:
            found.single[fpr][i] = _by_class(everyone.at(fpr).is_ood(scores[new]), nearest[new])
            try:
                flagged = each.at(fpr).is_ood(scores[new], nearest[new])
            except GroodError:  # too few images for a class
                continue
            found.each[fpr][i] = _by_class(flagged, nearest[new])
    return found


def each_class(data: Data, rates: ClassRates) -> str:
    """The false alarms of each class, with one threshold for all and with one each."""
    each = ConformalThreshold.fit(data.held_out.scores, FPR, data.held_out.nearest)
    everyone = data.threshold.is_ood(data.test.scores)
    by_each = each.is_ood(data.test.scores, data.test.nearest)
    sizes, bands = data.held_out.nearest.bincount(minlength=10), each.bands()
    columns = (
        _by_class(everyone, data.test.nearest),
        rates.single[FPR].mean(0),
        _by_class(by_each, data.test.nearest),
        rates.each[FPR].mean(0),
    )
    rows = []
    for c, name in enumerate(CLASSES):
        one, one_mean, own, own_mean = (_percent(column[c], 1) for column in columns)
        low, high = bands[c].tolist()
        rows.append([name, str(int(sizes[c])), one, one_mean, own, _range(low, high, 1), own_mean])
    heads = ["one threshold: official split", "mean of random splits"]
    heads += ["one each: official split", "band of this draw", "mean of random splits"]
    return _table(["nearest prototype", "calibration images", *heads], rows)


def worst_class(rates: ClassRates) -> str:
    """The class with the most false alarms: over many splits, and in each of them."""
    rows = []
    for fpr in RATES:
        possible = ~np.isnan(rates.each[fpr]).any(1)
        cells = [_percent(fpr), _percent(rates.single[fpr].mean(0).max(), 1)]
        cells.append(_percent(np.median(rates.single[fpr].max(1)), 1))
        if possible.mean() < 0.5:  # those that remain are a selection
            cells += [f"cannot be promised in {_percent(1 - possible.mean(), 1)} of the splits", ""]
        else:
            each = rates.each[fpr][possible]
            cells += [_percent(each.mean(0).max(), 1), _percent(np.median(each.max(1)), 1)]
        rows.append(cells)
    return _table(
        [
            "promised", "one threshold: worst class of the mean", "worst class of a split (median)",
            "one each: worst class of the mean", "worst class of a split (median)",
        ],
        rows,
    )  # fmt: skip


def discoveries(data: Data, batches: Iterable[Batch], count: int) -> str:
    """Benjamini-Hochberg over batches of ID and OOD images, each over random splits and draws."""
    pool = torch.cat([data.held_out.scores, data.test.scores])
    rows = [_discoveries(pool, data.ood, batch, count) for batch in batches]
    return _table(
        [
            "tested", "calibration", "fdr", "shortest list", "discovered", "of these ID", "OOD found",
            "best cut: of these ID", f"p ≤ {FPR} instead: flagged", "of these ID",
        ],
        rows,
    )  # fmt: skip


class Batch(NamedTuple):
    """ID images and as many from each of some OOD sets, after a calibration with n_held_out images."""

    n_held_out: int
    n_id: int
    n_each: int
    sets: tuple[str, ...]
    fdr: float

    def __str__(self) -> str:
        names = TITLES[self.sets[0]] if len(self.sets) == 1 else "of all four"
        return f"{self.n_id:,} + {self.n_each * len(self.sets):,} {names}"


FEW = [Batch(1000, 9000, N_OOD, sets, FDR) for sets in (*((name,) for name in TITLES), tuple(TITLES))]
FEW.append(Batch(5000, 5000, N_OOD, tuple(TITLES), FDR))
HALF = [
    Batch(5000, 1000, 1000 // len(sets), sets, fdr)
    for fdr in (FDR, 2 * FDR)
    for sets in (*((name,) for name in TITLES), tuple(TITLES))
]


def _discoveries(pool: Tensor, ood: dict[str, Tensor], batch: Batch, count: int) -> list[str]:
    found: list[list[float]] = []
    n_ood = batch.n_each * len(batch.sets)
    generator = torch.Generator().manual_seed(2)
    for held_out, new in _splits(len(pool), batch.n_held_out, count, seed=3):
        outliers = [
            ood[name][torch.randperm(len(ood[name]), generator=generator)[: batch.n_each]] for name in batch.sets
        ]
        p = ConformalThreshold.fit(pool[held_out], FPR).p_values(torch.cat([pool[new[: batch.n_id]], *outliers]))
        flagged, plain = benjamini_hochberg(p, batch.fdr), p <= FPR
        found.append([float(x.sum()) for part in (flagged, plain) for x in (part, part[: batch.n_id])])
    discovered, false, n_plain, false_plain = np.array(found).T
    share = false / np.maximum(discovered, 1)
    return [
        str(batch),
        f"{batch.n_held_out:,}",
        f"{batch.fdr:g}",
        f"{least_rejections(batch.n_held_out, batch.n_id + n_ood, batch.fdr):,}",
        f"{discovered.mean():.1f}",
        f"{_percent(share.mean())} ± {_percent(share.std() / np.sqrt(count))}",
        _percent((discovered - false).mean() / n_ood, 1),
        _percent(_best_cut(pool, [ood[name] for name in batch.sets], n_ood / batch.n_id), 0),
        f"{n_plain.mean():.0f}",
        _percent((false_plain / np.maximum(n_plain, 1)).mean(), 0),
    ]


def _best_cut(pool: Tensor, ood: list[Tensor], ood_per_id: float) -> float:
    """The least share of ID above any ID score, for so many OOD images per ID image; known only to who knows all."""
    cuts = pool.sort(descending=True).values
    false_alarms = torch.arange(1, len(cuts) + 1) / len(cuts)
    above = [1 - torch.searchsorted(scores.sort().values, cuts).double() / len(scores) for scores in ood]
    return float((false_alarms / (false_alarms + ood_per_id * torch.stack(above).mean(0))).min())


def _splits(size: int, n: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows for calibration, n of them, and the other ones."""
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(count), desc=f"splits, {n} for calibration", leave=False):
        rows = torch.randperm(size, generator=generator)
        yield rows[:n], rows[n:]


def _by_class(flagged: Tensor, nearest: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([_rate(flagged[nearest == c]) for c in range(10)])


def _rate(flagged: Tensor) -> float:
    return float(flagged.double().mean())


def _percent(rate: float, digits: int = 2) -> str:
    return f"{100 * rate:.{digits}f} %"


def _range(low: float, high: float, digits: int = 2) -> str:
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f} %"


def _table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure(data: Data, rates: ClassRates) -> bytes:
    """PNG: observed over promised on the official split, with the band; and the false alarms of each class."""
    matplotlib = require("matplotlib", extra="bench")
    figure_module = require("matplotlib.figure", extra="bench")
    blue, red, ink = "#0072B2", "#D55E00", "#222222"  # Okabe and Ito's colours, which the colour-blind can tell apart
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        made = figure_module.Figure(figsize=(11, 4.4), dpi=140, facecolor="white", layout="constrained")
        left, right = made.subplots(1, 2, width_ratios=[1, 1.35])
        n = len(data.test.scores)
        grid = np.geomspace(0.008, 0.25, 60)
        bands = np.array([data.threshold.at(fpr).band() for fpr in grid])
        left.fill_between(100 * grid, *(100 * bands.T), color="#dddddd", linewidth=0, label="95 % band of one draw")
        left.plot(100 * grid, 100 * grid, color=ink, linewidth=1, label="promised")
        for fpr in RATES:
            k = int(data.threshold.at(fpr).is_ood(data.test.scores).sum())
            interval = stats.binomtest(k, n).proportion_ci(0.95, "exact")
            left.plot([100 * fpr] * 2, [100 * interval.low, 100 * interval.high], color=blue, linewidth=2)
            left.plot(100 * fpr, 100 * k / n, "o", color=blue, label="observed, 9,000 images" if fpr == 0.01 else None)
        ticks = [1, 2, 5, 10, 20]
        left.set(xscale="log", yscale="log", xlabel="promised, %", ylabel="known images flagged, %")
        left.set(xticks=ticks, xticklabels=ticks, yticks=ticks, yticklabels=ticks)
        left.minorticks_off()
        left.legend(frameon=False, fontsize=10)
        left.set_title("all classes together", fontsize=11)
        for values, colour, shift, title in (
            (rates.single[FPR], red, -0.14, "one threshold for all"),
            (rates.each[FPR], blue, 0.14, "one threshold each"),
        ):
            low, high = 100 * np.nanquantile(values, [0.025, 0.975], axis=0)
            right.vlines(np.arange(10) + shift, low, high, color=colour, linewidth=1.5)
            right.plot(np.arange(10) + shift, 100 * np.nanmean(values, axis=0), "o", color=colour, label=title)
        right.axhline(100 * FPR, color=ink, linewidth=1)
        right.set(ylim=(0, None), xticks=range(10), ylabel="known images flagged, %")
        right.set_xticklabels(CLASSES, rotation=35, ha="right")
        right.legend(frameon=False, fontsize=10)
        right.set_title("by class, 5 % promised: mean and 95 % of the splits", fontsize=11)
        file = io.BytesIO()
        made.savefig(file, format="png")
    return file.getvalue()


PAGE = """\
# Promised and observed false alarms on CIFAR-10

Made by `benchmarks/coverage.py`. The classifier is the published ResNet-20 of [the other page](cifar10-resnet20.md),
the detector GROOD with its default outliers (Mixup at the first block, λ = 0.9) on all 50,000 training images.
OpenOOD's 1,000 validation images calibrate; its 9,000 test images are the known images to come, and CIFAR-100,
TinyImageNet (near), MNIST and Textures (far; not OpenOOD's far sets) the unknown ones. Nothing was chosen on any of
these sets. [How to decide](../decide.md) says how to use the rule.

![Observed false alarms over promised ones, with the band; and by class, with one threshold and with one each](\
../images/coverage.png)

## The official split

{official}

"Promised" holds on average over calibration sets. "Band of this draw" is where the rate of this one set lies, with
a confidence of 95 %; it is computed from the 1,000 calibration images alone. "Observed" is the share of the 9,000
test images that are flagged, its interval Clopper and Pearson's. The observed rates lie in their bands. "As unusual
by chance": how often exchangeable images give a rate as far from the promise as this one (two-sided; the five rows
are about the same images, so that they are not five tests).

What the promise costs stands in the columns to the right: at 5 % false alarms, more than half of the near-OOD images
pass, and most of MNIST. Calibration cannot mend that. It makes the number of false alarms known, and the detector no
better.

## {n_splits} random splits

The same 10,000 images, parted at random into 1,000 for calibration and 9,000 to come. The band is for the rate over
infinitely many images, so that somewhat less than 95 % of the rates on 9,000 images lie in it; the theory
(beta-binomial) says how many.

{splits}

Within their errors, mean, deviation and share are those of the theory. That had to be so, whatever the images: a
random split is exchangeable by construction, and these rows check the code. That the images to come are exchangeable
with those of the calibration is an assumption. The official split is one observation in favour of it, for this data
set.

## By class

One threshold keeps its promise over all images together, not for each class. The class here is that of the nearest
prototype, as in `calibrate(…, per_class=True)`. At {fpr}:

{classes}

With one threshold, a cat is flagged some thirty times as often as an automobile. With one each, the mean over splits
is at or below the promise for every class; below it by up to 1/(n + 1), which is 1 % for 100 images. The price is the
noise of one draw: with 100 images a class the band reaches from 1 to 9 or 10 %, and of ten classes one or two may lie
outside theirs, as automobile (below) and frog (above) do in the official split.

The class with the most false alarms, at each rate:

{worst}

"Of the mean": the class whose mean over all splits is the greatest; it is what the promise is about. "Of a split":
the greatest of the ten rates in one split, median over the splits; it is what one user with 1,000 images should
expect of the unluckiest class. At 1 %, 99 images of every class are needed. The promise is for the class that the
detector takes an image for, not for its true class.

## Which of these images are outliers?

Benjamini and Hochberg's rule at fdr = {fdr} on known images with {n_ood} unknown ones of each set: means over
{n_splits} splits and draws. "Of these ID" is the false discovery proportion, 0 where nothing is discovered, with
its standard error. "Shortest list": the fewest images that can be flagged, if any, with p-values of at least 1/(n + 1).
"Best cut": the share of known images above the best of all thresholds, for one who knows which images are known.

{few}

**The rule discovers next to nothing, and that is the right answer.** A list with at most one known image in ten does
not exist: at this share of unknown images, more than half of the images are known ones above whatever threshold.
`p ≤ 0.05` gives such lists. More calibration images (last row) make p-values finer and allow shorter lists; they do
not change the ranking. It takes a detector that ranks these images better, or unknown images that are further away.

With as many unknown images as known ones, some lists do exist (5,000 images for calibration, 1,000 known and 1,000
unknown ones):

{half}

The theory bounds the mean of the false discovery proportion by fdr times the share of known images: 5 % and 10 %
here. Where lists are long the mean is at the bound, within its error; where few batches have any discovery it is
below. It is a mean over batches and calibrations; the proportion of one batch varies.

## What the promise does not say

- **It is about images like those of the calibration.** Another camera, season, compression or mix of classes breaks
  it, in either direction and without a warning. Calibrate again on recent known images.
- **It is a mean over calibration sets.** One set has one rate; the band says where.
- **It does not hold by class**, nor for any other part of the images, unless asked for (`per_class=True`), and then
  by the class of the nearest prototype.
- **It is not about the images that are flagged.** If unknown images are rare most of those may be known; that is what
  `fdr` is for.
- **It says nothing of how many unknown images are caught.** The tables do, for these sets.
- **This is one classifier and one data set.** The validation and test images are parts of the same CIFAR-10 test set,
  and as exchangeable as images can be.

## How to run it

    python benchmarks/cifar10_sources.py …    # as on the other page; leaves the features in its --cache
    python benchmarks/coverage.py CACHE/resnet20_cifar10-…-50000-0 \\
        --output docs/results/coverage.md --figure docs/images/coverage.png

Seeds are fixed. Measured with {versions}.
"""


if __name__ == "__main__":
    main()
