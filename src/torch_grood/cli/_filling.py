"""`grood fit --engine`: features by many processes, before the fit itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch_grood.cli._common import Device, Reporter, to_device
from torch_grood.cli._scaled import Engine, teller, whole_spec
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.data import ImageSource, ImageTransform
    from torch_grood.scale.filling import Filler

__all__ = ["Filling", "MakeFiller", "check_filling", "fill"]


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
    classes: Sequence[int | str] | None

    def __call__(self) -> Filler:
        import torch

        from torch_grood.data import FeatureCache, image_loader
        from torch_grood.features import FeatureExtractor
        from torch_grood.models import load_model
        from torch_grood.scale.filling import Filler

        torch.set_num_threads(1)
        network = to_device(load_model(self.model, self.weights, self.num_classes).model, self.device)
        loader = image_loader(self.source, self.transform, batch_size=self.batch_size, workers=0, on_bad=self.on_bad)
        return Filler(FeatureExtractor(network, self.head), loader, FeatureCache(self.cache), self.classes)

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
    """

    engine: Engine
    workers: int | None
    address: str | None
    gpus: float


def fill(sets: Sequence[MakeFiller], how: Filling, reporter: Reporter) -> bool:
    """Compute the features of all sets.

    Returns:
        whether this process goes on to fit.
    """
    from torch_grood.scale.filling import fill_as_rank, fill_on_ray
    from torch_grood.scale.ranks import rank_of_process

    rank, world = rank_of_process() if how.engine is Engine.torchrun else (0, 1)
    for one in sets:
        tell = teller(len(one.source), world, reporter)
        if how.engine is Engine.torchrun:
            fill_as_rank(one(), rank, world, tell=tell)
        else:
            fill_on_ray(one.whole(), workers=how.workers, address=how.address, gpus=how.gpus, tell=tell)
    return rank == 0


def check_filling(cache: Path | None, outliers: str) -> Path:
    """Fail for what many processes cannot do.

    Returns:
        the folder of features.

    Raises:
        GroodError: then.
    """
    if cache is None:
        raise GroodError("--engine needs a folder for features that all workers see: --cache DIR")
    if outliers == "mixup":
        raise GroodError(
            "--outliers mixup sums up activations image by image, which one process must do; leave --engine out, or "
            "take another source"
        )
    return cache
