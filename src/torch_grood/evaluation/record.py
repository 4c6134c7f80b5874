"""What results tell of how a benchmark was run: its sets, settings, versions and memory; no path of this machine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from torch_grood.evaluation import results as r
from torch_grood.evaluation.extraction import ClassifierOutputs
from torch_grood.evaluation.image_sets import ResolvedSets
from torch_grood.evaluation.settings import Classifier, Settings

__all__ = ["peak_memory", "recorded_model", "recorded_settings", "set_infos", "version_of", "versions"]

_PACKAGES = ("torch-grood", "torch", "numpy", "faiss-cpu", "scikit-learn", "scipy", "pytorch-ood", "pillow")


def set_infos(sets: ResolvedSets, outputs: ClassifierOutputs) -> tuple[r.SetInfo, ...]:
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


def recorded_settings(sets: ResolvedSets, settings: Settings, models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How it was run; no path, which says nothing elsewhere."""
    return {
        "methods": [method.config() for method in settings.methods],
        "chosen_by": None if settings.by is None else str(settings.by),
        "bootstrap_draws": settings.draws,
        "batch_size": settings.batch_size,
        "unreadable_images": settings.on_bad,
        "threads": torch.get_num_threads(),
        "sets_left_out": [one.spec.key for one in sets.left_out],
        "warnings": [text.replace(f"{sets.root}{os.sep}", "") for text in sets.warnings],
        "models": [dict(model) for model in models],
    }


def recorded_model(classifier: Classifier, outputs: ClassifierOutputs) -> dict[str, Any]:
    """The network of a run, and what was found in it."""
    spec = classifier.spec
    if ".py:" in spec:
        # path/to/networks.py:resnet20 → networks.py:resnet20
        spec = spec.replace("\\", "/").rpartition("/")[2]
    return {
        "spec": spec,
        "head": outputs.head_name,
        "early_layer": outputs.early_layer,
        "transform": classifier.transform.to_dict(),
        "device": str(next(classifier.model.parameters()).device),
        "test_images_in_train": outputs.n_test_in_train,
    }


def versions() -> dict[str, str]:
    """Of what figures depend on, by name."""
    found = {name: text for name in _PACKAGES if (text := version_of(name))}
    return found | {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def version_of(name: str) -> str:
    """Of a distribution; empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def peak_memory() -> int | None:
    """Of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
