"""One safe file for a fitted detector: safetensors for the numbers, JSON for the rest. Nothing in it can be executed.

`docs/format.md` specifies the file, and `torch_grood.container` how its bytes are checked. Tensors:

    class_prototypes  float64 (C, d)     ood_prototype   float64 (d,)      class_ids  int64 (C,)
    log_magnitude     float64 (N,)       sample_ids      int64 (N,)        zero_rows  int64 (z,)
    direction         float32 (N, d), or float16 or int8 with direction_scale float32 (N,)
    training_hashes   int64 (n,)         training_names  uint8 (m,)        training_name_ends  int64 (n,)
    calibration       float64 (n,)       calibration_groups  int64 (n,)
    index.*           what an index learned: `neighbors.faiss_state`, `neighbors.filter`

A detector of more gradients than one process holds is in several files: the head, which has all else, and beside it its
shards, which have the gradients (from `log_magnitude` to `zero_rows`, and `index.*`) and are listed in the head.

faiss never reads a file: its index is put together from tensors that were checked, and its codes are made anew from the
gradients; a kind of index that has no such tensors, and one of format 1, is built again from the seed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from torch_grood import container
from torch_grood.container import BLOCK, Guard
from torch_grood.errors import AlteredFileError, FormatError, GroodError
from torch_grood.features import ModelFingerprint
from torch_grood.geometry import checked_geometry
from torch_grood.gradients import GradientField
from torch_grood.neighbors import (
    ExactIndex,
    FaissIndex,
    GradientIndex,
    GradientSearcher,
    GradientStore,
    IndexQuality,
    StoreOptions,
    Subset,
)
from torch_grood.neighbors.sharded import MergedSearcher, ShardedSearcher, ShardFile, ShardFiles
from torch_grood.neighbors.subset import make_subset
from torch_grood.outliers import PAPER, OutlierSource, ScoreSettings, outlier_source
from torch_grood.provenance import CalibrationRecord, Names, TrainingRecord
from torch_grood.state import FitInfo, FittedState
from torch_grood.threshold import ConformalThreshold

if TYPE_CHECKING:
    from torch_grood.detector import GROOD

__all__ = ["FORMAT_VERSION", "StoredDetector", "load", "open_shard", "save", "save_shard", "shard_names"]

FORMAT_VERSION = 5
# Of a detector in one file, which older readers know, too.
_OF_ONE_FILE = 4
_MOST_SHARDS = 10_000
# The first version that tells how the score comes from distances; before, it was as in the paper.
_TELLS_SETTINGS = 4
# The first version that lists its zero rows.
_LISTS_ZERO_ROWS = 3
# The first version that keeps what an index learned.
_KEEPS_STATES = 2
# Rounding of the components to float32 is less, and exact search allows for more.
_UNIT = 4e-7
# Characters of the arguments of a source or a subset.
_LONGEST_CONFIG = 100_000
_DIRECTIONS = (torch.float32, torch.float16, torch.int8)
# Of a large file, these are checked when they are used.
_LAZY = ("direction", "training_hashes", "training_names", "training_name_ends")
_TENSORS: dict[str, tuple[torch.dtype, int]] = {
    "class_prototypes": (torch.float64, 2),
    "ood_prototype": (torch.float64, 1),
    "class_ids": (torch.int64, 1),
    "log_magnitude": (torch.float64, 1),
    "sample_ids": (torch.int64, 1),
}
_OF_SHARDS = ("log_magnitude", "direction", "direction_scale", "zero_rows")


@dataclass(frozen=True)
class StoredDetector:
    """What a file holds."""

    state: FittedState
    threshold: ConformalThreshold | None
    calibration: CalibrationRecord | None
    outliers: OutlierSource
    index: GradientIndex
    subset: Subset | None
    seed: int
    metadata: dict[str, Any]
    settings: ScoreSettings
    store_dtype: str


def save(path: Path, detector: GROOD, state: FittedState, shards: int | None = None) -> None:
    """Write `detector`, whose fitted state is `state`, to `path`; the old file stays until the new one is whole.

    Args:
        path: of the file, or of the head.
        detector: to write.
        state: of it.
        shards: files for the gradients; None: one file with all, and of a detector whose shards lie beside `path`
            already, the head alone.

    Raises:
        GroodError: if the folder cannot be written to, the metadata are not JSON, the index is of a kind that no
            file may ask for, or it cannot be in shards.
    """
    found = _beside(path, state.searcher) if shards is None else _in_shards(path, state, shards)
    _write(path, detector, state, found)


def _beside(path: Path, searcher: GradientSearcher) -> ShardFiles | None:
    shards = searcher.shards if isinstance(searcher, MergedSearcher) else None
    return shards if shards is not None and shards.folder == path.absolute().parent else None


def _in_shards(path: Path, state: FittedState, count: int) -> ShardFiles:
    """Write the gradients in so many files."""
    store, index = state.searcher.gradients, state.index
    if not isinstance(index, ExactIndex):
        raise GroodError(f"shards are searched exactly, not by {index.spec!r}; save one file, or fit with 'exact'")
    most = min(len(store), _MOST_SHARDS)
    if type(count) is not int or not 1 <= count <= most:
        raise GroodError(f"{len(store):,} gradients can be in 1 to {most:,} shards, not {count!r}")
    bounds = [len(store) * number // count for number in range(count + 1)]
    files = []
    for name, (start, stop) in zip(shard_names(path, state.gradient_field, count), pairwise(bounds), strict=True):
        part = index.build(store.select(torch.arange(start, stop), StoreOptions()))
        files.append(save_shard(path.with_name(name), part))
    return ShardFiles(path.absolute().parent, store.dim, store.dtype, tuple(files))


def _write(path: Path, detector: GROOD, state: FittedState, shards: ShardFiles | None) -> None:
    import torch_grood

    index, searcher, quality = state.index, state.searcher, state.searcher.quality
    threshold, calibration, training = detector.threshold_, detector.calibration_, state.training
    header: dict[str, Any] = {
        "format_version": _OF_ONE_FILE if shards is None else FORMAT_VERSION,
        "library_version": torch_grood.__version__,
        "classes": state.classes,
        "outliers": detector.outliers.config(),
        "index": {"spec": index.spec, **(index.config() if isinstance(index, FaissIndex) else {})},
        "quality": None if quality is None else asdict(quality),
        "seed": detector.seed,
        "settings": asdict(detector.settings),
        "fingerprint": None if state.fingerprint is None else asdict(state.fingerprint),
        "fit": asdict(state.info),
        "training": None if training is None else {"n": len(training.hashes), "digest": training.digest()},
        "calibration": None if calibration is None else asdict(calibration),
        "fpr": None if threshold is None else threshold.fpr,
        "metadata": detector.metadata,
    }
    tensors: dict[str, Tensor] = {
        "class_prototypes": state.class_prototypes,
        "ood_prototype": state.ood_prototype,
        "class_ids": state.class_ids,
        "sample_ids": state.sample_ids,
    }
    if shards is None:
        index_tensors = searcher.tensors()
        if isinstance(index, FaissIndex):
            index.check_storable(searcher.gradients, index_tensors)
        tensors |= _gradient_tensors(searcher.gradients) | index_tensors
    else:
        header["shards"] = {"dim": shards.dim, "dtype": shards.dtype, "files": [list(file) for file in shards.files]}
    if threshold is not None:
        tensors["calibration"] = threshold.log_scores
        if threshold.groups is not None:
            tensors["calibration_groups"] = threshold.groups
    if training is not None:
        training.check()
        tensors["training_hashes"] = training.hashes
        if training.names is not None:
            training.names.check()
            tensors |= {"training_names": training.names.text, "training_name_ends": training.names.ends}
    container.write(path, header, tensors)


def _gradient_tensors(store: GradientStore) -> dict[str, Tensor]:
    tensors = {"log_magnitude": store.log_magnitude, "direction": store.codes, "zero_rows": store.zero_rows()}
    return tensors if store.scale is None else tensors | {"direction_scale": store.scale}


def shard_names(head: Path, field: GradientField, count: int) -> list[str]:
    """Names of the shards' files, which lie beside their head; those of another fit have others and are left alone."""
    content = [tensor.numpy().tobytes() for tensor in (field.class_prototypes, field.ood_prototype)]
    fit = hashlib.sha256(b"".join(content)).hexdigest()[:8]
    return [f"{head.stem}-{fit}-{number + 1:05}-of-{count:05}.grood" for number in range(count)]


def save_shard(path: Path, searcher: GradientSearcher) -> ShardFile:
    """Write a part of a detector's gradients, whole or not at all.

    Raises:
        GroodError: if the folder cannot be written to.
    """
    import torch_grood

    store = searcher.gradients
    rounding_radius = math.exp(store.log_rounding)
    header = {
        "format_version": FORMAT_VERSION,
        "library_version": torch_grood.__version__,
        "shard": {"n": len(store), "d": store.dim, "rounding_radius": rounding_radius},
    }
    digest = container.write(path, header, _gradient_tensors(store) | searcher.tensors())
    return ShardFile(path.name, len(store), digest)


def open_shard(shards: ShardFiles, file: ShardFile, *, verify: bool = False) -> GradientSearcher:
    """Read and check a file that `save_shard` wrote.

    Args:
        shards: as the head lists them.
        file: one of them.
        verify: see `load`.

    Raises:
        FormatError: as `load`; or if it is another file than the head lists.
    """
    path = shards.folder / file.name
    found = container.read(path, FORMAT_VERSION, lazy=() if verify else _LAZY)
    if found.digest != file.digest:
        raise AlteredFileError(f"{path} is not the shard that the detector was saved with; copy all of its files again")
    try:
        magnitude = found.tensors["log_magnitude"]
        if magnitude.dtype != torch.float64 or magnitude.ndim != 1 or len(magnitude) != file.n:
            raise FormatError(f"it has not the {file.n:,} gradients that the detector lists")
        if not all(bool(end.isfinite()) for end in magnitude.aminmax()):
            raise FormatError("the tensor 'log_magnitude' holds NaN or infinity")
        store = _store(
            found.tensors,
            shards.dim,
            found.header["shard"]["rounding_radius"],
            FORMAT_VERSION,
            found.guards.get("direction"),
        )
        own = {name: tensor for name, tensor in found.tensors.items() if name.startswith("index.")}
        return ExactIndex().restore(store, own)
    except (GroodError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise AlteredFileError(f"{path} was altered: {error}") from None


def load(path: Path, *, verify: bool = False) -> StoredDetector:
    """Read and check a file that `save` wrote; tensors are memory-mapped, nothing is executed.

    Args:
        path: the file.
        verify: check all of a large file now; else its gradients are checked when they are first used.

    Raises:
        FormatError: NewerFormatError, TruncatedFileError or AlteredFileError, or if it is no detector file.
    """
    found = container.read(path, FORMAT_VERSION, lazy=() if verify else _LAZY)
    if "shard" in found.header:
        raise FormatError(f"{path} is a part of a detector; name the file that its parts lie beside")
    try:
        shards = None
        if "shards" in found.header:
            shards = _shards(found.header, path.absolute().parent)
        stored = _restore(found.header, _checked(found.tensors, shards), found.guards, shards)
    except FormatError as error:
        raise AlteredFileError(f"{path}: {error}") from None
    except (GroodError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise AlteredFileError(f"{path} was altered: {error!r}") from None
    if shards is None:
        return stored
    for file in shards.files:
        if not (shards.folder / file.name).is_file():
            raise FormatError(
                f"{path} has its gradients in {len(shards.files)} files beside it, and {file.name} is missing; copy "
                "all of them"
            )
        if verify:
            open_shard(shards, file, verify=True)
    return stored


def _shards(header: dict[str, Any], folder: Path) -> ShardFiles:
    """The files that a head lists, if they can be ones."""
    if header["format_version"] < FORMAT_VERSION:
        raise FormatError("it lists shards, which its format does not know; the file was altered")
    listed, dim, dtype = (header["shards"][key] for key in ("files", "dim", "dtype"))
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_SHARDS:
        raise FormatError("the list of its shards was altered")
    files = tuple(ShardFile(*one) for one in listed)
    for name, n, digest in files:
        # Nothing beyond the folder of the head is read, whatever it says.
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".grood") or "\\" in name:
            raise FormatError(f"{name!r:.100} is no name of a shard; the file was altered")
        if type(n) is not int or n < 1 or not isinstance(digest, str):
            raise FormatError(f"what it says of the shard {name!r:.100} was altered")
    if dtype not in [str(one).removeprefix("torch.") for one in _DIRECTIONS]:
        raise FormatError(f"its gradients are {dtype!r:.100}; the file was altered")
    return ShardFiles(folder, dim, dtype, files)


def _checked(tensors: dict[str, Tensor], shards: ShardFiles | None) -> dict[str, Tensor]:
    """The tensors beside the directions, if they have the right types and fit together."""
    expected = _TENSORS if shards is None else {name: kind for name, kind in _TENSORS.items() if name not in _OF_SHARDS}
    for name, (dtype, ndim) in expected.items():
        if name not in tensors:
            raise FormatError(f"the tensor {name!r} is missing; the file was altered")
        if tensors[name].dtype != dtype or tensors[name].ndim != ndim:
            raise FormatError(f"the tensor {name!r} is {tensors[name].dtype} {tuple(tensors[name].shape)}; altered")
        # NaN is the least and the greatest of all; `isfinite` would take as much memory as the tensor.
        values = tensors[name]
        if values.is_floating_point() and values.numel() and not all(bool(end.isfinite()) for end in values.aminmax()):
            raise FormatError(f"the tensor {name!r} holds NaN or infinity; the file was altered")
    n_classes, d = tensors["class_prototypes"].shape
    n = len(tensors["sample_ids"]) if shards is None else sum(file.n for file in shards.files)
    fitting = {"class_prototypes": (n_classes, d), "ood_prototype": (d,), "class_ids": (n_classes,)}
    shapes = {name: tuple(tensors[name].shape) for name in expected}
    if shapes != {name: fitting.get(name, (n,)) for name in expected} or n == 0 or d == 0:
        raise FormatError(f"the shapes of the tensors do not fit together: {shapes}")
    superfluous = () if shards is None else [name for name in _OF_SHARDS if name in tensors]
    if superfluous:
        raise FormatError(f"the tensor {superfluous[0]!r} belongs into its shards; the file was altered")
    return tensors


def _integers(tensors: Mapping[str, Tensor], name: str, length: int | None = None) -> Tensor | None:
    """A tensor of whole numbers (n,), if it is there."""
    found = tensors.get(name)
    if found is None:
        return None
    if found.dtype != torch.int64 or found.ndim != 1 or (length is not None and len(found) != length):
        raise FormatError(f"the tensor {name!r} is {found.dtype} {tuple(found.shape)}; the file was altered")
    return found


class _RowGuard:
    """Checks the gradients of a file row by row, when they are first used: their bytes, and that they are unit vectors.

    Args:
        store: the gradients, without a guard.
        guard: of their codes; None: the bytes were checked.
    """

    def __init__(self, store: GradientStore, guard: Guard | None) -> None:
        self._store, self._guard = store, guard
        self._checked = torch.zeros(len(store), dtype=torch.bool)
        self._zero = torch.zeros(len(store), dtype=torch.bool)
        self._zero[store.zero_rows()] = True
        self._row_bytes = store.dim * store.codes.element_size()

    def check(self, rows: Tensor | slice) -> None:
        """See `RowGuard.check`."""
        if bool(self._checked[rows].all()):
            return
        for part in self._store.chunks() if isinstance(rows, slice) else [rows]:
            self._check(part)

    def _check(self, rows: Tensor | slice) -> None:
        if isinstance(rows, Tensor):
            rows = torch.unique(rows[~self._checked[rows]])
        if self._guard is not None:
            self._guard.check_blocks(self._blocks(rows))
        length = torch.linalg.vector_norm(self._store.directions(rows), dim=1, dtype=torch.float64)
        if not bool(length.isfinite().all()):
            raise AlteredFileError("the tensor 'direction' holds NaN or infinity; the file was altered")
        fits = torch.where(self._zero[rows], length == 0, (length - 1).abs() < _UNIT)
        if not bool(fits.all()):
            raise AlteredFileError("the stored gradients are not ones that a fit gives; the file was altered")
        self._checked[rows] = True

    def _blocks(self, rows: Tensor | slice) -> Iterable[int]:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self._store))
            return range(start * self._row_bytes // BLOCK, -(-stop * self._row_bytes // BLOCK))
        first, last = rows * self._row_bytes // BLOCK, ((rows + 1) * self._row_bytes - 1) // BLOCK
        widest = int((last - first).max()) + 1 if len(rows) else 0
        return {block for i in range(widest) for block in (first + i).clamp(max=last).tolist()}


def _store(
    tensors: dict[str, Tensor], d: int, rounding_radius: float, version: int, guard: Guard | None
) -> GradientStore:
    """The stored gradients, if they are ones that a fit gives."""
    direction, scale = tensors.get("direction"), tensors.get("direction_scale")
    n = len(tensors["log_magnitude"])
    if direction is None or direction.dtype not in _DIRECTIONS:
        raise FormatError("the tensor 'direction' is missing or of a wrong type; the file was altered")
    if direction.shape != (n, d):
        raise FormatError(f"the shapes of the tensors do not fit together: direction is {tuple(direction.shape)}")
    if (scale is None) != (direction.dtype == torch.float32) or (
        scale is not None and (scale.dtype != torch.float32 or scale.shape != (n,))
    ):
        raise FormatError("the tensor 'direction_scale' does not fit the directions; the file was altered")
    if scale is not None and not bool((scale >= 0).all()):
        raise FormatError("the tensor 'direction_scale' is negative or NaN; the file was altered")
    if bool((tensors["log_magnitude"] > 0).any()) or not 0 <= rounding_radius < math.inf:
        raise FormatError("the gradients are not ones that a fit gives; the file was altered")
    zero_rows = _integers(tensors, "zero_rows")
    if zero_rows is not None and len(zero_rows) and not 0 <= int(zero_rows.min()) <= int(zero_rows.max()) < n:
        raise FormatError(f"a zero row is none of the {n:,} rows; the file was altered")
    if (zero_rows is None) != (version < _LISTS_ZERO_ROWS):
        raise FormatError("the tensor 'zero_rows' does not fit the format; the file was altered")
    log_rounding = math.log(rounding_radius) if rounding_radius else -math.inf
    store = GradientStore(tensors["log_magnitude"], direction, scale, log_rounding, zero_rows)
    rows = _RowGuard(store, guard)
    if guard is None:
        rows.check(slice(None))
        return store
    return GradientStore(tensors["log_magnitude"], direction, scale, log_rounding, zero_rows, rows)


def _training(stored: Any, tensors: dict[str, Tensor], n_read: int, guards: dict[str, Guard]) -> TrainingRecord | None:
    """What the file tells of the training set."""
    hashes, text = _integers(tensors, "training_hashes", n_read), tensors.get("training_names")
    ends = _integers(tensors, "training_name_ends", n_read)
    unfitting = (stored is None) != (hashes is None) or (text is None) != (ends is None)
    if unfitting or (hashes is None and ends is not None):
        raise FormatError("what it says of the training set does not fit its tensors; the file was altered")
    if hashes is None:
        return None
    guard = guards.get("training_hashes")
    if text is None or ends is None:
        return TrainingRecord(hashes, guard=guard)
    if text.dtype != torch.uint8 or text.ndim != 1:
        raise FormatError("the names of the training samples are of a wrong type; the file was altered")
    names = [guards[name] for name in ("training_names", "training_name_ends") if name in guards]
    return TrainingRecord(hashes, Names(text, ends, (names[0], names[1]) if names else None), guard)


def _threshold(header: dict[str, Any], tensors: dict[str, Tensor], n_classes: int) -> ConformalThreshold | None:
    scores, groups = tensors.get("calibration"), tensors.get("calibration_groups")
    if (header["fpr"] is None) != (scores is None):
        raise FormatError("the calibration scores are missing, or there is no fpr; the file was altered")
    if scores is None:
        return None
    # No distance of two gradients is greater than 2.
    if scores.dtype != torch.float64 or scores.ndim != 1 or len(scores) == 0 or bool((scores > 1).any()):
        raise FormatError("the calibration scores are of a wrong type; the file was altered")
    groups = _integers(tensors, "calibration_groups", len(scores))
    if groups is not None and not 0 <= int(groups.min()) <= int(groups.max()) < n_classes:
        raise FormatError("a calibration score has no class; the file was altered")
    threshold = ConformalThreshold.fit(scores, header["fpr"], groups)
    if not torch.equal(threshold.log_scores, scores):
        raise FormatError("the calibration scores are not in ascending order; the file was altered")
    return threshold


def _calibration(stored: Any, threshold: ConformalThreshold | None) -> CalibrationRecord | None:
    if stored is None:
        return None
    record = CalibrationRecord(**stored)
    numbers_fit = all(type(number) is int and number >= 0 for number in (record.n, record.n_left_out))
    if threshold is None or not numbers_fit or record.n != threshold.n or not isinstance(record.digest, str):
        raise FormatError(f"the calibration is {stored!r}; the file was altered")
    return record


def _fit_info(stored: dict[str, Any]) -> FitInfo:
    """What the header says of the fit, each entry of its type; entries that a later version added are passed over."""
    types = get_type_hints(FitInfo)
    found: dict[str, Any] = {}
    for name, value in stored.items():
        if name not in types:
            continue
        if name == "image_shape":
            value = tuple(value) if isinstance(value, list) else value
            if not isinstance(value, tuple) or any(type(size) is not int or size < 0 for size in value):
                raise FormatError(f"the shape of the training images is {value!r:.100}; the file was altered")
        hint = types[name]
        # `tuple[int, ...]` is checked as a tuple, `float | None` as either.
        allowed = [get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else [hint])]
        if type(value) not in allowed and not (type(value) is int and float in allowed):
            raise FormatError(f"{name} of the fit is {value!r}; the file was altered")
        # Read and shown, a long one would take many times the memory of the file.
        if isinstance(value, dict) and len(str(value)) > _LONGEST_CONFIG:
            raise FormatError(f"{name} of the fit is too long; the file was altered")
        if type(value) in (int, float):
            most = 1 if name.endswith("_accuracy") else math.inf if type(value) is float else 2**62
            if not 0 <= value <= most or value == math.inf:
                raise FormatError(f"{name} of the fit is {value!r}; the file was altered")
            value = float(value) if hint is not int else value
        found[name] = value
    return FitInfo(**found)


def _settings(header: dict[str, Any], info: FitInfo) -> ScoreSettings:
    """The settings that the detector was made with, if they are ones that the fit can have had."""
    if header["format_version"] < _TELLS_SETTINGS:
        if (info.geometry, info.temperature, info.k) != (PAPER.geometry, 1.0, PAPER.k):
            raise FormatError("the fit has settings that its format does not know; the file was altered")
        return PAPER
    settings = ScoreSettings(**header["settings"])
    temperature = info.temperature if settings.temperature is None else settings.temperature
    numbers_fit = type(settings.k) is int and 1 <= info.k <= min(settings.k, info.n_indexed)
    if not numbers_fit or type(temperature) is not float or temperature != info.temperature or not temperature > 0:
        raise FormatError(f"the settings of the score are {header['settings']!r:.200}; the file was altered")
    if checked_geometry(settings.geometry) != info.geometry:
        raise FormatError(f"the fit's geometry is {info.geometry!r:.100}, not the detector's; the file was altered")
    return settings


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
    index: GradientIndex, store: GradientStore, tensors: dict[str, Tensor], seed: int, header: dict[str, Any]
) -> GradientSearcher:
    """The index over the stored gradients, put together from its tensors and never by faiss from bytes."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("index.")}
    quality = header.get("quality")
    if isinstance(index, FaissIndex):
        if not own and header["format_version"] >= _KEEPS_STATES:
            index.check_rebuilt(store)
        return index.restore(store, own, seed=seed, quality=_quality(quality))
    if not isinstance(index, ExactIndex) or quality is not None:
        raise FormatError("exact search has no quality; the file was altered")
    return index.restore(store, own)


def _quality(stored: Any) -> IndexQuality | None:
    """What was measured at `fit`; None if nothing was, or by a file of format 1."""
    if stored is None:
        return None
    recall, inflation, n = stored["recall_at_1"], stored["score_inflation"], stored["n_queries"]
    if type(n) is int and n > 2**62:
        raise FormatError(f"the quality of the index is {stored!r}; the file was altered")
    numbers_fit = all(type(number) in (int, float) for number in (recall, inflation)) and type(n) is int
    if not numbers_fit or not (0 <= recall <= 1 and 1 <= inflation < math.inf and n >= 1):
        raise FormatError(f"the quality of the index is {stored!r}; the file was altered")
    return IndexQuality(float(recall), float(inflation), n)


def _restore(
    header: dict[str, Any], tensors: dict[str, Tensor], guards: dict[str, Guard], shards: ShardFiles | None
) -> StoredDetector:
    info = _fit_info(header["fit"])
    n_classes, d = tensors["class_prototypes"].shape
    if (info.n_indexed, info.n_classes, info.n_features) != (len(tensors["sample_ids"]), n_classes, d):
        raise FormatError("the sizes of the fit are not those of the tensors; the file was altered")
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
    sample_ids = tensors["sample_ids"]
    if not 0 <= int(sample_ids.min()) <= int(sample_ids.max()) < info.n_read:
        raise FormatError(f"a sample is none of the {info.n_read:,} that were read; the file was altered")
    index = _index(header["index"])
    if shards is None:
        version = header["format_version"]
        store = _store(tensors, d, info.rounding_radius, version, guards.get("direction"))
        searcher, dtype = _searcher(index, store, tensors, seed, header), store.dtype
    else:
        if not isinstance(index, ExactIndex) or header.get("quality") is not None or shards.dim != d:
            raise FormatError("shards of this dimension are searched exactly; the file was altered")
        searcher, dtype = ShardedSearcher(shards, index, partial(open_shard, shards)), shards.dtype
    settings = _settings(header, info)
    fingerprint = header["fingerprint"]
    state = FittedState(
        classes=classes,
        class_ids=class_ids,
        class_prototypes=tensors["class_prototypes"],
        ood_prototype=tensors["ood_prototype"],
        index=index,
        searcher=searcher,
        sample_ids=sample_ids,
        fingerprint=None if fingerprint is None else ModelFingerprint(**fingerprint),
        info=info,
        training=_training(header.get("training"), tensors, info.n_read, guards),
    )
    threshold = _threshold(header, tensors, len(classes))
    source = outlier_source(header["outliers"])
    if not isinstance(header["metadata"], dict):
        raise FormatError("the metadata are not a JSON object; the file was altered")
    return StoredDetector(
        state=state,
        threshold=threshold,
        calibration=_calibration(header.get("calibration"), threshold),
        outliers=source,
        index=index,
        subset=make_subset(info.subset),
        seed=seed,
        metadata=header["metadata"],
        settings=settings,
        store_dtype=dtype,
    )
