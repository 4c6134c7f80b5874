"""Features by many processes, into the folder that a fit takes them from.

A fit with a `FeatureCache` computes only what is not kept there, and ends with the same file, byte for byte. So workers
keep the features of batches, in whatever order, and the fit finds all of them: sums, prototypes and gradients are made
by one process, in the order of the batches, whatever the number of workers. The folder is one that all of them see.

Early activations, which `Mixup` needs the sums of, are too large to be kept. Each worker sums up those of a segment of
the batches; the segments are the same for any number of workers, and are added up in their order. So the detector does
not depend on this number either; from that of one process, which sums up image by image, it differs by rounding.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch_grood.errors import GroodError
from torch_grood.outliers import OutlierSource, PrototypeMean
from torch_grood.scale.pool import LIVES, Pool, cluster
from torch_grood.stored_pass import FeaturePass, run_stored
from torch_grood.training_pass import TrainingPass

if TYPE_CHECKING:
    from torch_grood.data import FeatureCache, ImageLoader
    from torch_grood.features import FeatureExtractor

__all__ = ["Filler", "fill_as_rank", "fill_on_ray"]

# Batches of a task: a worker that dies loses so much.
_PIECE = 16
# Parts of the training set whose early activations are summed up by one process each, however many there are.
_SEGMENTS = 16
_LOOK_EVERY = 0.5


class Filler:
    """Computes and keeps features of a loader's batches, and what else a fit asks the network for.

    Args:
        extractor: of the model.
        loader: of all images.
        cache: a folder that all workers see.
        classes: see `GROOD.fit`; images of others are passed over.
        source: of outliers, of the fit; None for images that are not fitted on.
        seed: of the fit.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        loader: ImageLoader,
        cache: FeatureCache,
        classes: Sequence[int | str] | None = None,
        source: OutlierSource | None = None,
        seed: int = 0,
    ) -> None:
        self.extractor, self.loader = extractor, loader
        self._cache, self._classes, self._seed = cache, classes, seed
        self._source = source or PrototypeMean()
        left_out: list[int] = []
        if classes is not None or self._source.uses_early_layer:
            left_out = self._started().left_out()
        self._pass = FeaturePass(extractor, loader, cache, left_out)

    def missing(self) -> list[range]:
        """What is not kept, in pieces."""
        batches = self._pass.missing()
        if self._sums_up():
            lacking = set(batches)
            return [one for one in self._segments() if self._pass.lacks_sums(one) or lacking & set(one)]
        found: list[range] = []
        for batch in batches:
            if found and found[-1].stop == batch and len(found[-1]) < _PIECE:
                found[-1] = range(found[-1].start, batch + 1)
            else:
                found.append(range(batch, batch + 1))
        return found

    def fill(self, piece: range) -> int:
        """Compute and keep what is missing of some batches; the number of images."""
        if self._sums_up():
            passed = TrainingPass(self.extractor, self._source, self._seed, self.loader, self._classes)
            self.collect(passed, piece)
            return passed.n_samples
        with self.extractor.evaluation():
            return sum(len(part.hashes) for part in self._pass.extractions(piece, progress=False))

    def finish(self) -> None:
        """Once nothing is missing, and in one process: make of it what a fit looks for."""
        if self._sums_up():
            self._pass.join_sums(self._started(), self._segments())

    def _sums_up(self) -> bool:
        """Whether early activations are to be summed up, so that pieces are segments."""
        return self._source.uses_early_layer and self._pass.lacks_sums()

    def _segments(self) -> list[range]:
        n = len(self.loader)
        count = min(_SEGMENTS, n)
        return [range(n * number // count, n * (number + 1) // count) for number in range(count)]

    def _started(self) -> TrainingPass:
        passed = TrainingPass(self.extractor, self._source, self._seed, self.loader, self._classes)
        with self.extractor.evaluation():
            passed.start(self._cache.first_image(self.loader))
        return passed

    def collect(self, passed: TrainingPass, batches: range) -> None:
        """Let a pass of a fit take some batches, with their features from the cache."""
        with self.extractor.evaluation():
            run_stored(passed, self.loader, self._cache, False, batches)

    def number(self, piece: range) -> int:
        """Of a piece, by where it lies and not by its place among what is missing: others may have begun."""
        return self._segments().index(piece) if self._sums_up() else piece.start // _PIECE

    def names(self, piece: range) -> tuple[str, str]:
        """The first and the last file of some batches."""
        paths = self.loader.source.paths
        return paths[self.loader.positions(piece.start).start], paths[self.loader.positions(piece.stop - 1).stop - 1]


class _Worker:
    """The actor."""

    def __init__(self, make_filler: Callable[[], Filler]) -> None:
        self._make_filler = make_filler

    def ready(self) -> None:
        self._filler = self._make_filler()

    def fill(self, piece: range) -> int:
        return self._filler.fill(piece)


def fill_on_ray(
    make_filler: Callable[[], Filler],
    *,
    workers: int | None = None,
    address: str | None = None,
    gpus: float = 0,
    tell: Callable[[int], None] = lambda images: None,
) -> None:
    """Compute and keep the features of all batches that are not kept.

    Args:
        make_filler: called here and by each worker, where it is sent; its model runs on one thread.
        workers: see `Pool`.
        address: see `cluster`.
        gpus: of each worker.
        tell: is told how many images each piece adds.

    Raises:
        GroodError: for images that end one worker after the other; as `GROOD.fit`, or `Pool.run`.
    """
    filler = make_filler()
    left = deque(filler.missing())
    if not left:
        filler.finish()
        return
    deaths: Counter[range] = Counter()
    with cluster(address):
        pool: Pool[range] = Pool(_Worker, (make_filler,), workers, gpus)
        for piece, images in pool.run(left, lambda worker, piece: worker.fill.remote(piece)):
            if images is not None:
                tell(images)
                continue
            deaths[piece] += 1
            if deaths[piece] == LIVES:
                first, last = filler.names(piece)
                raise GroodError(
                    f"{LIVES} worker processes died over the images from {first} to {last}: one of them may be broken "
                    "in a way that no error tells, or a worker needs more memory. What was computed is kept"
                )
            left.appendleft(piece)
    filler.finish()


def fill_as_rank(filler: Filler, rank: int, world: int, *, tell: Callable[[int], None] = lambda images: None) -> None:
    """Compute and keep this process' share of the features; the first process waits for all of them.

    Args:
        filler: of the same images in all processes.
        rank: number of this process.
        world: how many there are.
        tell: is told how many images each piece adds.

    Raises:
        GroodError: as `GROOD.fit`.
    """
    for piece in filler.missing():
        if filler.number(piece) % world == rank:
            tell(filler.fill(piece))
    if rank == 0:
        while filler.missing():
            time.sleep(_LOOK_EVERY)
        filler.finish()
