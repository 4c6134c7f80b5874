"""What there is to say about a fitted detector: once as data, once as lines to read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_grood._text import plain, shorten

if TYPE_CHECKING:
    from torch_grood import GROOD, ConformalThreshold

_RATES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2)
_SHOWN_CLASSES = 20
# Characters of a line; what a file says may be anything.
_LONGEST = 2000
__all__ = ["UNCALIBRATED", "facts", "operating_points", "rows", "stored_rows", "threshold_facts"]

UNCALIBRATED = "none: it scores, but cannot decide. Run: grood calibrate FILE HELD_OUT_IMAGES"


def facts(detector: GROOD, path: Path | None = None) -> dict[str, Any]:
    """JSON-able; of the file, too, if it has one."""
    from dataclasses import asdict

    quality, training, calibration = detector.index_quality_, detector.training_, detector.calibration_
    file: dict[str, Any] = {} if path is None else {"file": str(path), "bytes": path.stat().st_size}
    if detector.shards_ is not None:
        file["shards"] = [shard.name for shard in detector.shards_.files]
    return file | {
        "classes": list(detector.classes_),
        "prototypes": [detector.classes_[i] for i in detector.class_ids_.tolist()],
        "fit": asdict(detector.fit_info_),
        "store": {"dtype": detector.store.dtype, "bytes": detector.stored_bytes_},
        "index": {"spec": detector.index.spec, "quality": None if quality is None else asdict(quality)},
        "seed": detector.seed,
        "training": None
        if training is None
        else {"n": len(training.hashes), "digest": training.digest(), "has_names": training.names is not None},
        "calibration": None if calibration is None else asdict(calibration),
        "threshold": None if detector.threshold_ is None else threshold_facts(detector, detector.threshold_),
        "metadata": detector.metadata,
    }


def threshold_facts(detector: GROOD, threshold: ConformalThreshold) -> dict[str, Any]:
    """What a threshold promises, and what else the same calibration could; JSON-able."""
    from torch_grood.errors import GroodError

    def points(one: ConformalThreshold) -> list[dict[str, Any]]:
        taus = zip(one.log_taus.tolist(), one.bands().tolist(), strict=True)
        # JSON has no -∞.
        return [
            {"log_tau": log_tau if math.isfinite(log_tau) else None, "tau": math.exp(log_tau), "band": band}
            for log_tau, band in taus
        ]

    if threshold.groups is not None:
        names = [detector.classes_[group] for group in threshold.group_ids.tolist()]
        by_class = [{"class": name} | point for name, point in zip(names, points(threshold), strict=True)]
        return {"fpr": threshold.fpr, "n": threshold.n, "classes": by_class}
    others = []
    for rate in _RATES:
        try:
            others.append({"fpr": rate} | points(threshold.at(rate))[0])
        except GroodError:
            # More images are needed to promise so little.
            continue
    return {"fpr": threshold.fpr, "n": threshold.n} | points(threshold)[0] | {"operating_points": others}


def operating_points(found: dict[str, Any]) -> list[str]:
    """A line for each rate, or each class, that the calibration makes a promise for."""
    threshold = found["threshold"]
    if threshold is None:
        return []
    name, points = ("class", threshold["classes"]) if "classes" in threshold else ("fpr", threshold["operating_points"])
    shown = points[:_SHOWN_CLASSES]
    lines = [f"{name:>18} {'τ':>12}   false alarms of this calibration (95 %)"]
    for point in shown:
        low, high = (_percent(limit) for limit in point["band"])
        label = plain(point["class"])[:18] if name == "class" else _percent(point["fpr"])
        lines.append(f"{label:>18} {point['tau']:>12.6g}   {low} to {high}")
    return lines + ([f"{'…':>18} {len(points) - len(shown):,} more classes"] if len(points) > len(shown) else [])


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(what, value), safe to print."""
    fit, threshold = found["fit"], found["threshold"]
    names = [] if found["classes"] == list(range(len(found["classes"]))) else found["prototypes"]
    accuracies = f"{_percent(fit['prototype_accuracy'])} nearest prototype"
    if fit["classifier_accuracy"] is not None:
        accuracies = f"{_percent(fit['classifier_accuracy'])} classifier, {accuracies}"
    lines = [
        ("training images", _training(fit)),
        ("classes", f"{fit['n_classes']:,}" + (f": {shorten(names)}" if names else "")),
        ("accuracy on them", accuracies),
        ("features", f"{fit['n_features']:,}" + (f", the input of {fit['head']}" if fit["head"] else "")),
        ("OOD prototype", _outliers(fit)),
        ("score", _score(fit)),
        ("store", _store(found["store"], fit)),
        ("search", _index(found["index"])),
        ("calibration images", _calibration(found["calibration"])),
        ("threshold", UNCALIBRATED if threshold is None else _threshold(threshold)),
        ("file", f"{found['file']}, {_size(found['bytes'])}{_shards(found.get('shards'))}"),
    ]
    return [(name, plain(value[:_LONGEST])) for name, value in lines]


def stored_rows(metadata: dict[str, Any]) -> list[tuple[str, str]]:
    """The model and preprocessing that a file names, which may be anything."""
    from torch_grood.data import ImageTransform
    from torch_grood.errors import GroodError

    model = metadata.get("model")
    lines = [("model", "not stored")]
    if isinstance(model, dict):
        weights = f", weights {model['weights']}" if model.get("weights") else ""
        lines = [("model", f"{model.get('spec', 'not stored')}{weights}")]
    try:
        lines.append(("transform", str(ImageTransform.from_dict(metadata["transform"]))))
    except KeyError:
        lines.append(("transform", "not stored"))
    except GroodError as error:
        lines.append(("transform", f"cannot be used: {error}"))
    return [(name, f"{plain(value):.300}") for name, value in lines]


def _training(fit: dict[str, Any]) -> str:
    text = f"{fit['n_samples']:,}, of which {fit['n_indexed']:,} are stored"
    if fit["subset"]:
        subset = dict(fit["subset"])
        arguments = ", ".join(f"{key}={value}" for key, value in subset.items() if key != "name")
        text += f": {subset['name']}({arguments})"
    if fit["covering_radius"] is not None:
        text += f", no score more than ε = {fit['covering_radius']:.4g} larger than with all"
    changes = [f"{fit[key]:,} {what}" for key, what in (("n_added", "added"), ("n_removed", "removed")) if fit[key]]
    return text + (f" ({', '.join(changes)} since the fit)" if changes else "")


def _store(store: dict[str, Any], fit: dict[str, Any]) -> str:
    text = f"{store['dtype']}, {_size(store['bytes'])}, {store['bytes'] / fit['n_indexed']:,.0f} bytes an image"
    return text + (f", scores within {fit['rounding_radius']:.4g} of float32's" if fit["rounding_radius"] else "")


def _shards(names: list[str] | None) -> str:
    return "" if names is None else f", and its gradients in {len(names)} beside it: {names[0]} …"


def _outliers(fit: dict[str, Any]) -> str:
    source = dict(fit["outlier_source"])
    name = source.pop("name", "?")
    arguments = ", ".join(f"{key}={value}" for key, value in source.items())
    text = f"{name}({arguments})"
    if fit["uses_ood_data"]:
        return f"{text}, REAL OOD DATA were used ({fit['n_outliers']:,} images)"
    return f"{text}, {fit['n_outliers']:,} of them" if fit["n_outliers"] > 1 else text


def _score(fit: dict[str, Any]) -> str:
    features = {"raw": "features as they are", "half": "features / √length", "unit": "features of unit length"}
    nearest = "nearest gradient" if fit["k"] == 1 else f"mean over the {fit['k']:,} nearest gradients"
    return f"{nearest}, {features[fit['geometry']]}, temperature {fit['temperature']:.4g}"


def _index(index: dict[str, Any]) -> str:
    quality = index["quality"]
    measured = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in (quality or {}).items())
    return str(index["spec"]) + (f" ({measured})" if measured else "")


def _calibration(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "not known"
    left_out = calibration["n_left_out"]
    return f"{calibration['n']:,}" + (f", and {left_out:,} left out that are training images" if left_out else "")


def _threshold(threshold: dict[str, Any]) -> str:
    promise = f"on average at most {_percent(threshold['fpr'])} false alarms"
    if "classes" in threshold:
        count = f"{len(threshold['classes']):,}"
        return f"one for each of {count} classes: {promise} in each, on images like the {threshold['n']:,} of them"
    low, high = (_percent(limit) for limit in threshold["band"])
    return (
        f"τ = {threshold['tau']:.6g}: {promise} on images like the {threshold['n']:,} it was calibrated on, "
        f"with this calibration {low} to {high} (95 %)"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
