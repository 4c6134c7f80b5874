"""A fit whose gradients no process holds all of, and the search through them: an actor, and a file, for each part.

1. The features are in the cache: see `filling`.
2. Each part takes those of its batches, all parts at once.
3. The sums of the prototypes go from part to part, and each adds its samples in their order. That is one addition a
   feature, and the parts are as fast as one process here; so the sums are those of one process, bit for bit.
4. The OOD prototype is made here. Each part makes its gradients of it, and writes them to its file, all at once.
5. Other actors read the files, and whoever scores asks all of them: see `torch_grood.neighbors.sharded`.

What an actor that is lost knew is made anew by the next one from the cache, or from its file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torch_grood._optional import require
from torch_grood._progress import Progress
from torch_grood.errors import GroodError
from torch_grood.features import FeatureExtractor
from torch_grood.geometry import SquareSum
from torch_grood.gradients import GradientField, PolarGradients
from torch_grood.neighbors import ExactIndex, GradientSearcher, GradientStore, Neighbors, StoreOptions
from torch_grood.neighbors.sharded import MergedSearcher, ShardFile, ShardFiles
from torch_grood.outliers import OutlierSource, PrototypeMean
from torch_grood.prototypes import ClassPrototypes
from torch_grood.scale.pool import cluster, got
from torch_grood.state import FittedState, StoredPart, fit_info, gradient_field_of, store_gradients
from torch_grood.storage import open_shard, save_shard, shard_names
from torch_grood.training_pass import Collected, TrainingPass

if TYPE_CHECKING:
    from torch_grood.data import FeatureCache, ImageLoader
    from torch_grood.detector import GROOD
    from torch_grood.scale.filling import Filler

__all__ = ["RemoteSearcher", "fit_in_shards", "searching"]


class _Settings(NamedTuple):
    """What the passes of all parts have in common."""

    source: OutlierSource
    seed: int
    store: StoreOptions
    geometry: str
    classes: Sequence[int | str] | None


class _Seen(NamedTuple):
    """What a part has read."""

    collected: Collected
    kept: list[int]
    bad: list[tuple[str, str]]


class _Built(NamedTuple):
    """A part that is written, its gradients left out."""

    file: ShardFile
    part: StoredPart
    log_rounding: float


class _Part:
    """The actor that makes a part; each task can be asked for again, of another actor, too, and so brings all it needs.

    Ray does not keep what a constructor was sent, if it is large: the names of the images are.
    """

    def __init__(self, settings: _Settings, batches: range) -> None:
        self._settings, self._batches = settings, batches
        self._passed: TrainingPass | None = None
        self._loader: ImageLoader | None = None

    def collect(self, make_filler: Callable[[], Filler]) -> _Seen:
        passed = self._collected(make_filler)
        assert self._loader is not None
        return _Seen(passed.collected(), self._loader.kept, self._loader.bad)

    def add_up(
        self, make_filler: Callable[[], Filler], sums: tuple[ClassPrototypes, SquareSum]
    ) -> tuple[ClassPrototypes, SquareSum]:
        prototypes, squares = sums
        passed = self._collected(make_filler)
        if passed.rows:
            passed.go_on(prototypes, squares)
        return prototypes, squares

    def build(self, make_filler: Callable[[], Filler], field: GradientField, first: int, path: Path) -> _Built:
        passed = self._collected(make_filler)
        if not passed.rows:
            raise GroodError(f"no image of {path.name} takes part; use fewer shards")
        # The features are let go on the way.
        self._passed = None
        try:
            part = store_gradients(
                field,
                features=passed.features.drain(),
                labels=torch.cat(passed.rows),
                predictions=torch.cat(passed.predictions),
                sample_ids=torch.cat(passed.sample_ids) + first,
                class_ids=passed.class_ids,
                store=self._settings.store,
            )
        except GroodError as error:
            raise GroodError(f"{path.name}: {error} (of one shard; fewer are larger)") from None
        file = save_shard(path, ExactIndex().build(part.gradients))
        none = GradientStore.of(PolarGradients(torch.empty(0), torch.empty(0, 1)))
        return _Built(file, part._replace(gradients=none), part.gradients.log_rounding)

    def _collected(self, make_filler: Callable[[], Filler]) -> TrainingPass:
        if self._passed is None:
            filler = make_filler()
            how = self._settings
            passed = TrainingPass(
                filler.extractor, how.source, how.seed, filler.loader, how.classes, how.store, geometry=how.geometry
            )
            filler.collect(passed, self._batches)
            self._passed, self._loader = passed, filler.loader
        return self._passed


class _Searcher:
    """The actor that searches a part."""

    def __init__(self, shards: ShardFiles, file: ShardFile) -> None:
        self._where = shards, file
        self._opened: GradientSearcher | None = None

    def ready(self) -> None:
        if self._opened is None:
            self._opened = open_shard(*self._where)

    def search(self, queries: PolarGradients, k: int) -> Neighbors:
        self.ready()
        assert self._opened is not None
        return self._opened.search(queries, k)


class RemoteSearcher(MergedSearcher):
    """Asks an actor for each part; it can be sent to a worker.

    Args:
        shards: the parts.
        actors: of each.
    """

    def __init__(self, shards: ShardFiles, actors: Sequence[Any]) -> None:
        super().__init__(shards)
        self._actors = actors

    @property
    def gradients(self) -> GradientStore:  # type: ignore[override]
        """They are elsewhere.

        Raises:
            GroodError: always.
        """
        raise _elsewhere()

    def _ask(self, queries: PolarGradients, ks: Sequence[int]) -> Sequence[Neighbors]:
        sent = require("ray", extra="scale").put(queries)
        found: Sequence[Neighbors] = got(
            [actor.search.remote(sent, k) for actor, k in zip(self._actors, ks, strict=True)], "a search"
        )
        return found

    def with_added(self, gradients: PolarGradients, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        raise _elsewhere()

    def with_only(self, rows: Tensor, store: StoreOptions, *, seed: int = 0) -> GradientSearcher:
        raise _elsewhere()


def _elsewhere() -> GroodError:
    return GroodError("the gradients are with other processes; load the detector again to look at or change them")


@contextmanager
def searching(shards: ShardFiles, address: str | None = None) -> Iterator[RemoteSearcher]:
    """Actors that hold a part each, while it lasts; each opens its file where it runs.

    Args:
        shards: the parts, in a folder that all nodes see.
        address: see `cluster`.

    Raises:
        GroodError: if the cluster has too little memory for them, or a file cannot be read.
    """
    with cluster(address):
        size = max((shards.folder / file.name).stat().st_size for file in shards.files)
        actor = _lasting(_Searcher, size, len(shards.files))
        actors = [actor.remote(shards, file) for file in shards.files]
        try:
            got([one.ready.remote() for one in actors], "a shard")
            yield RemoteSearcher(shards, actors)
        finally:
            for one in actors:
                require("ray", extra="scale").kill(one)


def _lasting(actor: type, size: int, count: int) -> Any:
    """Actors that come again, on another node if need be, with what was asked of them; they wait for no core.

    Args:
        actor: their class.
        size: bytes of memory that each needs.
        count: how many there will be.

    Raises:
        GroodError: if the nodes of the cluster have too little memory.
    """
    ray = require("ray", extra="scale")
    # Without room on any node, they would be waited for in silence.
    nodes = [node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]]
    room = sum(int(memory // max(size, 1)) for memory in nodes)
    if room < count:
        raise GroodError(
            f"{count} parts take {size / 2**30:,.1f} GiB each, and the {len(nodes)} nodes of the cluster have room for "
            f"{room} of them ({sum(nodes) / 2**30:,.1f} GiB for tasks); add nodes or shards, or store int8"
        )
    return ray.remote(num_cpus=0, memory=size, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(
        actor
    )


def fit_in_shards(
    detector: GROOD,
    make_filler: Callable[[], Filler],
    loader: ImageLoader,
    cache: FeatureCache,
    output: Path,
    shards: int,
    *,
    classes: Sequence[int | str] | None = None,
    address: str | None = None,
    progress: Progress = None,
) -> ShardFiles:
    """Fit, with the gradients in files beside the one that the detector is to be saved to.

    The detector is fitted afterwards, and knows where its gradients are: `GROOD.save(output)` writes the rest.

    Args:
        detector: with its model; of exact search, without a subset.
        make_filler: sent to each part; see `fill_on_ray`, which has filled the cache.
        loader: of all training images.
        cache: a folder that all workers see.
        output: of the detector, in a folder that all workers see.
        shards: parts; no more than there are batches.
        classes: see `GROOD.fit`.
        address: see `cluster`.
        progress: see `GROOD.fit`; of the outliers.

    Returns:
        the parts.

    Raises:
        GroodError: as `GROOD.fit`; or if it cannot be done in so many parts.
    """
    check_shards(detector, shards, len(loader))
    assert detector.model is not None
    extractor = FeatureExtractor(detector.model, detector.head)
    settings, source = detector.settings, detector.outliers
    how = _Settings(
        # A source with images of its own need not be sent: its features are made here.
        source if source.n_uncertain(None) else PrototypeMean(),
        detector.seed,
        detector.store,
        settings.geometry,
        classes,
    )
    passed = TrainingPass(extractor, source, detector.seed, loader, classes, detector.store, geometry=settings.geometry)
    with cluster(address), extractor.evaluation():
        probe = passed.start(cache.first_image(loader))
        # Features, and gradients of them.
        size = 2 * len(loader.source) * probe.features.nbytes // shards
        actor = _lasting(_Part, size, shards)
        bounds = [len(loader) * number // shards for number in range(shards + 1)]
        parts = [actor.remote(how, range(*pair)) for pair in pairwise(bounds)]
        make = require("ray", extra="scale").put(make_filler)
        seen: list[_Seen] = got([part.collect.remote(make) for part in parts], "a part of the fit")
        firsts = [passed.n_read]
        loader.restart()
        for one in seen:
            passed.join(one.collected)
            firsts.append(passed.n_read)
            loader.kept += one.kept
            loader.bad += one.bad
        if passed.n_samples == 0:
            raise GroodError("the loader gave no training sample; check the path and the loader")
        sums = passed.prototypes, passed.squares
        for part in parts:
            sums = part.add_up.remote(make, sums)
        (passed.prototypes, passed.squares), *_ = got([sums], "a sum")
        outlier_features = source.features(passed.outlier_context(None, progress))
        field = gradient_field_of(passed.prototypes, passed.squares, outlier_features, source, settings)
        paths = [output.absolute().with_name(name) for name in shard_names(output, field, shards)]
        building = [
            part.build.remote(make, field, first, path)
            for part, first, path in zip(parts, firsts[:-1], paths, strict=True)
        ]
        built: list[_Built] = got(building, "a part of the fit")
    files = ShardFiles(paths[0].parent, probe.features.shape[1], detector.store.dtype, tuple(one.file for one in built))
    info = fit_info(
        field,
        source,
        settings,
        n_samples=passed.n_samples,
        n_indexed=sum(file.n for file in files.files),
        n_correct=sum(one.part.n_correct for one in built),
        n_prototype_correct=sum(one.part.n_prototype_correct for one in built),
        n_outliers=len(outlier_features),
        predicts=True,
        log_rounding=max(one.log_rounding for one in built),
    )
    state = FittedState(
        classes=passed.classes,
        class_ids=passed.class_ids,
        class_prototypes=field.class_prototypes,
        ood_prototype=field.ood_prototype,
        index=detector.index,
        searcher=RemoteSearcher(files, ()),
        sample_ids=torch.cat([one.part.sample_ids for one in built]),
        fingerprint=None,
        info=info,
    )
    detector.adopt(passed.completed(state, loader))
    return files


def check_shards(detector: GROOD, shards: int, batches: int) -> None:
    """Fail for what cannot be done in parts.

    Raises:
        GroodError: then.
    """
    if not isinstance(detector.index, ExactIndex):
        raise GroodError(f"shards are searched exactly, not by {detector.index.spec!r}; leave --index or --shards out")
    if detector.outliers.uses_early_layer:
        raise GroodError(
            f"{type(detector.outliers).__name__} mixes images of all training images, which no shard has; take another "
            "source, or leave --shards out"
        )
    if detector.subset is not None:
        raise GroodError("a subset is chosen from all gradients, which no shard has; leave it or --shards out")
    if not 1 <= shards <= batches:
        raise GroodError(f"{batches} batches of images make 1 to {batches} shards, not {shards}")
