"""One safe file for a fitted detector: safetensors for the numbers, JSON for the rest. Nothing in it can be executed.

A reader needs no more than the safetensors format: the JSON lies in its header under the key "torch-grood". Tensors:

    class_prototypes  float64 (C, d)     ood_prototype   float64 (d,)      class_ids  int64 (C,)
    log_magnitude     float64 (N,)       direction       float32 (N, d)    sample_ids int64 (N,)
    calibration       float64 (n,)       log scores of held-out ID samples, ascending; absent before `calibrate`

    index.*           what an index of faiss learned, see `neighbors.faiss_state`

A gradient is exp(log_magnitude) · direction. Format 2 adds directions as float16 or int8 codes, which times the row's
direction_scale, float32 (N,), are the direction. faiss never reads a file: its index is put together from tensors that
were checked, and its codes are made anew from the gradients; a kind of index that has no such tensors, and one of
format 1, is built again from the seed. A file is written whole under another name and then renamed.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from torch_grood._files import replacing
from torch_grood.errors import FormatError, GroodError
from torch_grood.features import ModelFingerprint
from torch_grood.neighbors import (
    ExactIndex,
    FaissIndex,
    GradientIndex,
    GradientSearcher,
    GradientStore,
    IndexQuality,
    Subset,
)
from torch_grood.neighbors.subset import make_subset
from torch_grood.outliers import OutlierSource, outlier_source
from torch_grood.state import FitInfo, FittedState
from torch_grood.threshold import ConformalThreshold

if TYPE_CHECKING:
    from torch_grood.detector import GROOD

__all__ = ["FORMAT_VERSION", "StoredDetector", "load", "save"]

FORMAT_VERSION = 2
_KEY = "torch-grood"
# Rounding of the components to float32 is less, and exact search allows for more.
_UNIT = 4e-7
_DIRECTIONS = (torch.float32, torch.float16, torch.int8)
_TENSORS: dict[str, tuple[torch.dtype, int]] = {
    "class_prototypes": (torch.float64, 2),
    "ood_prototype": (torch.float64, 1),
    "class_ids": (torch.int64, 1),
    "log_magnitude": (torch.float64, 1),
    "sample_ids": (torch.int64, 1),
}


@dataclass(frozen=True)
class StoredDetector:
    """What a file holds."""

    state: FittedState
    threshold: ConformalThreshold | None
    outliers: OutlierSource
    index: GradientIndex
    subset: Subset | None
    seed: int
    metadata: dict[str, Any]


def save(path: Path, detector: GROOD, state: FittedState) -> None:
    """Write `detector`, whose fitted state is `state`, to `path`; the old file stays until the new one is whole.

    Raises:
        GroodError: if the folder cannot be written to, the metadata are not JSON, or the index is of a kind that no
            file may ask for.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    import torch_grood

    index, store, quality = state.index, state.searcher.gradients, state.searcher.quality
    index_tensors = state.searcher.tensors()
    if isinstance(index, FaissIndex):
        index.check_storable(store, index_tensors)
    header: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "library_version": torch_grood.__version__,
        "classes": state.classes,
        "outliers": detector.outliers.config(),
        "index": {"spec": index.spec, **(index.config() if isinstance(index, FaissIndex) else {})},
        "quality": None if quality is None else asdict(quality),
        "seed": detector.seed,
        "fingerprint": None if state.fingerprint is None else asdict(state.fingerprint),
        "fit": asdict(state.info),
        "fpr": None if detector.threshold_ is None else detector.threshold_.fpr,
        "metadata": detector.metadata,
    }
    tensors: dict[str, Tensor] = {
        "class_prototypes": state.class_prototypes,
        "ood_prototype": state.ood_prototype,
        "class_ids": state.class_ids,
        "log_magnitude": store.log_magnitude,
        "direction": store.codes,
        "sample_ids": state.sample_ids,
        **index_tensors,
    }
    if store.scale is not None:
        tensors["direction_scale"] = store.scale
    if detector.threshold_ is not None:
        tensors["calibration"] = detector.threshold_.log_scores
    try:
        # ASCII: a file name that is no Unicode has a lone surrogate in Python, which UTF-8 cannot hold.
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GroodError(f"the detector's metadata cannot be written as JSON: {error}") from None
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={_KEY: text})
        except SafetensorError as error:
            raise GroodError(f"cannot write {path}: {error}") from error


def load(path: Path) -> StoredDetector:
    """Read and check a file that `save` wrote; tensors are memory-mapped, nothing is executed.

    Raises:
        FormatError: if the file is truncated, altered, of a newer format, or no detector file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FormatError(f"{path} is no regular file" if path.exists() else f"there is no detector file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise FormatError(f"{path} is a safetensors file, but no detector of torch-grood")
            header = json.loads(metadata[_KEY])
            version = header.get("format_version") if isinstance(header, dict) else None
            if type(version) is not int or version < 1:
                raise FormatError(f"{path} does not tell the version of its format; it was altered")
            if version > FORMAT_VERSION:
                raise FormatError(
                    f"{path} has format {version}, written by torch-grood {header.get('library_version')}; this "
                    f"version reads up to {FORMAT_VERSION}. Install a newer torch-grood."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FormatError(f"{path} is no detector file, or is truncated or altered: {error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read as a detector: {error}") from None
    try:
        return _restore(header, _checked(tensors))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (GroodError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise FormatError(f"{path} was altered: {error!r}") from None


def _checked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors beside the directions, if they have the right types and fit together."""
    for name, (dtype, ndim) in _TENSORS.items():
        if name not in tensors:
            raise FormatError(f"the tensor {name!r} is missing; the file was altered")
        if tensors[name].dtype != dtype or tensors[name].ndim != ndim:
            raise FormatError(f"the tensor {name!r} is {tensors[name].dtype} {tuple(tensors[name].shape)}; altered")
        if tensors[name].is_floating_point() and not bool(tensors[name].isfinite().all()):
            raise FormatError(f"the tensor {name!r} holds NaN or infinity; the file was altered")
    n_classes, d = tensors["class_prototypes"].shape
    n = len(tensors["log_magnitude"])
    shapes = [tuple(tensors[name].shape) for name in _TENSORS]
    if shapes != [(n_classes, d), (d,), (n_classes,), (n,), (n,)] or n == 0:
        raise FormatError(f"the shapes of the tensors do not fit together: {dict(zip(_TENSORS, shapes, strict=True))}")
    calibration = tensors.get("calibration")
    if calibration is not None and (
        calibration.dtype != torch.float64 or calibration.ndim != 1 or bool((calibration.diff() < 0).any())
    ):
        raise FormatError("the calibration scores are not in ascending order; the file was altered")
    return tensors


def _store(tensors: dict[str, Tensor], rounding_radius: float) -> GradientStore:
    """The stored gradients, if they are ones that a fit gives."""
    direction, scale = tensors.get("direction"), tensors.get("direction_scale")
    n, d = len(tensors["log_magnitude"]), tensors["class_prototypes"].shape[1]
    if direction is None or direction.dtype not in _DIRECTIONS:
        raise FormatError("the tensor 'direction' is missing or of a wrong type; the file was altered")
    if direction.shape != (n, d):
        raise FormatError(f"the shapes of the tensors do not fit together: direction is {tuple(direction.shape)}")
    if (scale is None) != (direction.dtype == torch.float32) or (
        scale is not None and (scale.dtype != torch.float32 or scale.shape != (n,))
    ):
        raise FormatError("the tensor 'direction_scale' does not fit the directions; the file was altered")
    if bool((tensors["log_magnitude"] > 0).any()) or not 0 <= rounding_radius < math.inf:
        raise FormatError("the gradients are not ones that a fit gives; the file was altered")
    log_rounding = math.log(rounding_radius) if rounding_radius else -math.inf
    store = GradientStore(tensors["log_magnitude"], direction, scale, log_rounding)
    if scale is not None and not bool((scale >= 0).all()):
        raise FormatError("the tensor 'direction_scale' is negative or NaN; the file was altered")
    for rows in store.chunks():
        length = torch.linalg.vector_norm(store.directions(rows), dim=1, dtype=torch.float64)
        if not bool(length.isfinite().all()):
            raise FormatError("the tensor 'direction' holds NaN or infinity; the file was altered")
        if not bool((((length - 1).abs() < _UNIT) | (length == 0)).all()):
            raise FormatError("the gradients are not ones that a fit gives; the file was altered")
    return store


def _fit_info(stored: dict[str, Any]) -> FitInfo:
    """What the header says of the fit, each entry of its type; entries that a later version added are passed over."""
    types = get_type_hints(FitInfo)
    found: dict[str, Any] = {}
    for name, value in stored.items():
        if name not in types:
            continue
        if name == "image_shape":
            value = tuple(value)
        hint = types[name]
        # `tuple[int, ...]` is checked as a tuple, `float | None` as either.
        allowed = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else [hint])]
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            raise FormatError(f"{name} of the fit is {value!r}; the file was altered")
        found[name] = value
    return FitInfo(**found)


def _index(stored: dict[str, Any]) -> GradientIndex:
    arguments = dict(stored)
    spec = arguments.pop("spec")
    index = ExactIndex() if spec == "exact" else FaissIndex(spec, **arguments)
    if isinstance(index, ExactIndex) and arguments:
        raise FormatError(f"exact search has no arguments {', '.join(arguments)}; the file was altered")
    if isinstance(index, FaissIndex) and index.gpu is not None:
        raise FormatError("where an index is searched is not for a file to say; the file was altered")
    return index


def _searcher(
    index: GradientIndex, store: GradientStore, tensors: dict[str, Tensor], seed: int, quality: Any
) -> GradientSearcher:
    """The index over the stored gradients, put together from its tensors and never by faiss from bytes."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("index.")}
    if isinstance(index, FaissIndex):
        return index.restore(store, own, seed=seed, quality=_quality(quality))
    if own or quality is not None:
        raise FormatError("exact search has neither tensors nor a quality; the file was altered")
    return index.build(store, seed=seed)


def _quality(stored: Any) -> IndexQuality | None:
    """What was measured at `fit`; None if nothing was, or by a file of format 1."""
    if stored is None:
        return None
    recall, inflation, n = stored["recall_at_1"], stored["score_inflation"], stored["n_queries"]
    numbers_fit = all(type(number) in (int, float) for number in (recall, inflation)) and type(n) is int
    if not numbers_fit or not (0 <= recall <= 1 and 1 <= inflation < math.inf and n >= 1):
        raise FormatError(f"the quality of the index is {stored!r}; the file was altered")
    return IndexQuality(float(recall), float(inflation), n)


def _restore(header: dict[str, Any], tensors: dict[str, Tensor]) -> StoredDetector:
    info = _fit_info(header["fit"])
    store = _store(tensors, info.rounding_radius)
    names = header["classes"]
    if not isinstance(names, list) or any(type(name) not in (int, str) for name in names):
        raise FormatError("the classes are not a list of names; the file was altered")
    if len(set(names)) != len(names):
        raise FormatError("a class is named twice; the file was altered")
    classes = tuple(names)
    class_ids = tensors["class_ids"]
    if len(class_ids) == 0 or int(class_ids.min()) < 0 or int(class_ids.max()) >= len(classes):
        raise FormatError(f"the prototypes' classes are not among the {len(classes)} names; the file was altered")
    seed = header["seed"]
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise FormatError(f"the seed is {seed!r}; the file was altered")
    index = _index(header["index"])
    fingerprint = header["fingerprint"]
    state = FittedState(
        classes=classes,
        class_ids=class_ids,
        class_prototypes=tensors["class_prototypes"],
        ood_prototype=tensors["ood_prototype"],
        index=index,
        searcher=_searcher(index, store, tensors, seed, header.get("quality")),
        sample_ids=tensors["sample_ids"],
        fingerprint=None if fingerprint is None else ModelFingerprint(**fingerprint),
        info=info,
    )
    threshold = None
    if header["fpr"] is not None:
        threshold = ConformalThreshold.fit(tensors["calibration"], header["fpr"])
    source = outlier_source(header["outliers"])
    if not isinstance(header["metadata"], dict):
        raise FormatError("the metadata are not a JSON object; the file was altered")
    return StoredDetector(state, threshold, source, index, make_subset(info.subset), seed, header["metadata"])
