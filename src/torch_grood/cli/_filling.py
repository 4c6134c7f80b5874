"""`grood fit --engine`: features by many processes, before the fit itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch_grood.cli._common import Device, Reporter, to_device
from torch_grood.cli._scaled import Engine, teller, whole_spec
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood._progress import Progress
    from torch_grood.data import FeatureCache, ImageLoader, ImageSource, ImageTransform
    from torch_grood.detector import GROOD
    from torch_grood.outliers import OutlierSource
    from torch_grood.scale.filling import Filler

__all__ = ["Filling", "MakeFiller", "check_filling"]

Classes = Sequence[int | str] | None
Fit = Callable[..., Any]


@dataclass(frozen=True)
class MakeFiller:
    """Makes the same filler wherever it is sent: paths are whole."""

    model: str
    weights: Path | None
    num_classes: int | None
    device: Device
    source: ImageSource
    transform: ImageTransform
    batch_size: int
    on_bad: Literal["raise", "skip"]
    cache: Path
    head: str | None
    early_layer: str | None
    classes: Sequence[int | str] | None
    outliers: OutlierSource | None
    seed: int

    def __call__(self) -> Filler:
        import torch

        from torch_grood.data import FeatureCache, image_loader
        from torch_grood.features import FeatureExtractor
        from torch_grood.models import load_model
        from torch_grood.scale.filling import Filler

        torch.set_num_threads(1)
        network = to_device(load_model(self.model, self.weights, self.num_classes).model, self.device)
        loader = image_loader(self.source, self.transform, batch_size=self.batch_size, workers=0, on_bad=self.on_bad)
        extractor = FeatureExtractor(network, self.head, self.early_layer)
        return Filler(extractor, loader, FeatureCache(self.cache), self.classes, self.outliers, self.seed)

    def whole(self) -> MakeFiller:
        """With all paths from the root: a worker may start in another folder."""
        return replace(
            self,
            model=whole_spec(self.model),
            weights=None if self.weights is None else self.weights.absolute(),
            source=self.source.absolute(),
            cache=self.cache.absolute(),
        )


@dataclass(frozen=True)
class Filling:
    """What the options say of the work.

    Attributes:
        engine: what runs the workers.
        workers: of Ray; None: one a core.
        address: of Ray's cluster.
        gpus: of each worker.
        shards: files of gradients; None: all in one process and file.
        sets: what there is to compute; the training images are the first.
    """

    engine: Engine
    workers: int | None
    address: str | None
    gpus: float
    shards: int | None
    sets: Sequence[MakeFiller]

    def fill(self, reporter: Reporter) -> bool:
        """Compute the features of all sets.

        Returns:
            whether this process goes on to fit.
        """
        from torch_grood.scale.filling import fill_as_rank, fill_on_ray
        from torch_grood.scale.ranks import rank_of_process

        rank, world = rank_of_process() if self.engine is Engine.torchrun else (0, 1)
        for one in self.sets:
            tell = teller(len(one.source), world, reporter)
            if self.engine is Engine.torchrun:
                fill_as_rank(one(), rank, world, tell=tell)
            else:
                fill_on_ray(one.whole(), workers=self.workers, address=self.address, gpus=self.gpus, tell=tell)
        return rank == 0

    @contextmanager
    def fitting(self, detector: GROOD, loader: ImageLoader, output: Path, reporter: Reporter) -> Iterator[Fit | None]:
        """Compute the features of all sets, and fit with them.

        Yields:
            as `GROOD.fit` of the detector; then it can be calibrated within. None if another process does that.
        """
        if self.shards is None:
            yield detector.fit if self.fill(reporter) else None
            return
        from torch_grood.scale.pool import cluster
        from torch_grood.scale.shards import check_shards, fit_in_shards, searching

        check_shards(detector, self.shards, len(loader))
        with ExitStack() as stack:
            stack.enter_context(cluster(self.address))
            self.fill(reporter)

            def fit(loader: ImageLoader, *, progress: Progress, classes: Classes, cache: FeatureCache) -> None:
                assert self.shards is not None
                how = (self.sets[0].whole(), loader, cache, output, self.shards)
                files = fit_in_shards(detector, *how, classes=classes, progress=progress)
                detector.search_with(stack.enter_context(searching(files)))

            yield fit


def check_filling(cache: Path | None, engine: Engine, shards: int | None) -> Path:
    """Fail for what many processes cannot do.

    Returns:
        the folder of features.

    Raises:
        GroodError: then.
    """
    if shards is not None and engine is not Engine.ray:
        raise GroodError(f"--shards needs --engine ray, not {engine}; its processes stay and search")
    if cache is None:
        raise GroodError("--engine needs a folder for features that all workers see: --cache DIR")
    return cache
