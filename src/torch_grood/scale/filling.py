"""Features by many processes, into the folder that a fit takes them from.

A fit with a `FeatureCache` computes only what is not kept there, and ends with the same file, byte for byte. So workers
keep the features of batches, in whatever order, and the fit finds all of them: sums, prototypes and gradients are made
by one process, in the order of the batches, whatever the number of workers. The folder is one that all of them see.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch_grood.errors import GroodError
from torch_grood.outliers import PrototypeMean
from torch_grood.scale.pool import LIVES, Pool, cluster
from torch_grood.stored_pass import FeaturePass, run_stored
from torch_grood.training_pass import TrainingPass

if TYPE_CHECKING:
    from torch_grood.data import FeatureCache, ImageLoader
    from torch_grood.features import FeatureExtractor

__all__ = ["Filler", "fill_as_rank", "fill_on_ray"]

# Batches of a task: a worker that dies loses so much.
_PIECE = 16
_LOOK_EVERY = 0.5


class Filler:
    """Computes and keeps features of a loader's batches.

    Args:
        extractor: of the model.
        loader: of all images.
        cache: a folder that all workers see.
        classes: see `GROOD.fit`; images of others are passed over.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        loader: ImageLoader,
        cache: FeatureCache,
        classes: Sequence[int | str] | None = None,
    ) -> None:
        self.extractor, self.loader = extractor, loader
        self._cache = cache
        left_out: list[int] = []
        if classes is not None:
            passed = TrainingPass(extractor, PrototypeMean(), 0, loader, classes)
            passed.start(cache.first_image(loader))
            left_out = passed.left_out()
        self._pass = FeaturePass(extractor, loader, cache, left_out)

    def missing(self) -> list[range]:
        """What is not kept, in pieces."""
        batches = self._pass.missing()
        found: list[range] = []
        for batch in batches:
            if found and found[-1].stop == batch and len(found[-1]) < _PIECE:
                found[-1] = range(found[-1].start, batch + 1)
            else:
                found.append(range(batch, batch + 1))
        return found

    def fill(self, piece: range) -> int:
        """Compute and keep the features of some batches; the number of images."""
        with self.extractor.evaluation():
            return sum(len(part.hashes) for part in self._pass.extractions(piece, progress=False))

    def collect(self, passed: TrainingPass, batches: range) -> None:
        """Let a pass of a fit take some batches, with their features from the cache."""
        with self.extractor.evaluation():
            run_stored(passed, self.loader, self._cache, False, batches)

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
        # By where it lies, not by its place among what is missing: others may have begun.
        if piece.start // _PIECE % world == rank:
            tell(filler.fill(piece))
    while rank == 0 and filler.missing():
        time.sleep(_LOOK_EVERY)
