"""eq. 8: where the OOD prototype comes from. p_ood is the mean penultimate feature of some outliers.

The paper's synthetic outlier of a training sample x mixes its early activation with the early prototype of the class y'
that the classifier finds second most likely, and runs the rest of the network on the mix:

    λ · e(x) + (1 - λ) · p_{y'}^early

The other sources are the training samples that the classifier knows least of, uniform noise, real outliers (which makes
OOD data part of the method: everything that reports such a detector says so) and the mean of the class prototypes.
Sources are immutable configuration; `fit` gives them what they ask for. Each brings the settings of the score that it
was studied with: the paper's, or those of docs/research/ood-prototype.md.
"""

from __future__ import annotations

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from torch_grood._batches import split_batch
from torch_grood._progress import Progress, track
from torch_grood.errors import GroodError
from torch_grood.features import FeatureExtractor

__all__ = [
    "PAPER",
    "HighEnergy",
    "HighestEnergy",
    "Mixup",
    "OutlierContext",
    "OutlierSamples",
    "OutlierSource",
    "PrototypeMean",
    "SampleReservoir",
    "ScoreSettings",
    "TrainingSamples",
    "UniformNoise",
    "content_keys",
    "named_source",
    "outlier_source",
]

_FEWEST, _MOST = 100, 1000
# Larger images are folded to this many numbers before they are hashed, which is the slow part.
_FOLD = 2048
_WORD = 2**64 - 1


@dataclass(frozen=True)
class TrainingSamples:
    """Training samples drawn by seed over the whole training set.

    Attributes:
        images: (n, ...), as the loader gave them.
        runner_up: row, among the classes with a prototype, of the second-highest logit, int64 (n,).
    """

    images: Tensor
    runner_up: Tensor


@dataclass(frozen=True)
class OutlierContext:
    """What a source may draw on after the pass over the training set.

    Attributes:
        class_prototypes: float64 (C, d).
        extractor: the model, None in features-only use.
        early_prototypes: float64 (C, ...), if the source asked for them.
        samples: if the source asked for them.
        image_shape: shape of one training image.
        channel_range: least and greatest value of each channel over the training images, each (channels,).
        batch_size: samples that the model may be given at a time.
        seed: of the detector.
        progress: see `torch_grood._progress`.
        uncertain: features of the training samples of highest energy, (m, d), if the source asked for them.
    """

    class_prototypes: Tensor
    extractor: FeatureExtractor | None = None
    early_prototypes: Tensor | None = None
    samples: TrainingSamples | None = None
    image_shape: tuple[int, ...] = ()
    channel_range: tuple[Tensor, Tensor] | None = None
    batch_size: int = 64
    seed: int = 0
    progress: Progress = None
    uncertain: Tensor | None = None


@dataclass(frozen=True)
class ScoreSettings:
    """How a score comes from the distances.

    Attributes:
        geometry: see `torch_grood.geometry`.
        temperature: T; None: the root mean square distance of the training features from the prototype of their class.
        k: the score is the mean distance to so many nearest stored gradients.
    """

    geometry: str = "raw"
    temperature: float | None = 1.0
    k: int = 1


PAPER = ScoreSettings()
"""Features as they are, T = 1, the one nearest gradient."""


class OutlierSource(ABC):
    """Where the OOD prototype comes from.

    Attributes:
        uses_ood_data: real OOD data are part of the detector.
        uses_early_layer: needs early prototypes, hence an early layer.
        settings: of the score, where the detector is given none.
    """

    uses_ood_data: ClassVar[bool] = False
    uses_early_layer: ClassVar[bool] = False
    settings: ClassVar[ScoreSettings] = PAPER

    def n_training_samples(self, n_all: int | None) -> int:
        """Training samples that `fit` keeps for this source, of `n_all` (None: not known before the end)."""
        return 0

    def n_uncertain(self, n_all: int | None) -> int:
        """Features of the highest energy that `fit` keeps for this source, as `n_training_samples`."""
        return 0

    def prototype(self, outliers: Tensor, place: Callable[[Tensor], Tensor]) -> Tensor:
        """p_ood, float64 (d,), of outliers (m, d), which `place` takes to where distances are taken."""
        return place(outliers).double().mean(0)

    @abstractmethod
    def features(self, context: OutlierContext) -> Tensor:
        """Penultimate features of the outliers, (m, d), m ≥ 1.

        Raises:
            GroodError: if the context lacks what the source needs.
        """

    def config(self) -> dict[str, Any]:
        """Name and arguments, JSON-able; `outlier_source` makes the source again."""
        arguments = {item.name: getattr(self, item.name) for item in fields(self) if item.init}  # type: ignore[arg-type]
        return {"name": type(self).__name__, **arguments}


@dataclass(frozen=True)
class Mixup(OutlierSource):
    """The paper's synthetic outliers: training samples mixed with the early prototype of their runner-up class.

    Args:
        n: training samples to mix, drawn by seed over the whole training set; all of them if it has fewer. None: a
            fiftieth of the training set, at least 100 and at most 1,000: the error of the mean falls as 1/√n, and so
            mixing takes about a fiftieth of the time of `fit`.
        lam: λ, the weight of the sample itself, in [0, 1]. With 1 the "outliers" are the samples.
    """

    n: int | None = None
    lam: float = 0.9
    uses_early_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.n is not None:
            object.__setattr__(self, "n", _checked_count(self.n))
        if not isinstance(self.lam, Real) or not 0 <= self.lam <= 1:
            raise GroodError(f"lam is the weight of the sample in the mix, between 0 and 1; got {self.lam!r}")
        object.__setattr__(self, "lam", float(self.lam))

    def n_training_samples(self, n_all: int | None) -> int:
        """See `OutlierSource`."""
        return _fiftieth(n_all) if self.n is None else self.n

    def features(self, context: OutlierContext) -> Tensor:
        """See `OutlierSource.features`."""
        extractor = _extractor(self, context)
        samples, prototypes = context.samples, context.early_prototypes
        if samples is None or prototypes is None:
            raise GroodError("Mixup needs training samples and early prototypes; use it through GROOD.fit")
        if len(prototypes) < 2:
            raise GroodError(
                "Mixup mixes with the second most likely class and there is one class only; use PrototypeMean()"
            )
        found = []
        starts = range(0, len(samples.images), context.batch_size)
        for start in track(starts, context.progress, "mix"):
            batch = slice(start, start + context.batch_size)
            partner = prototypes[samples.runner_up[batch].to(prototypes.device)]

            def mix(early: Tensor, partner: Tensor = partner) -> Tensor:
                return self.lam * early + (1 - self.lam) * partner.to(early.device, early.dtype)

            found.append(extractor(samples.images[batch], mix).features)
        return torch.cat(found)


@dataclass(frozen=True)
class HighEnergy(OutlierSource):
    """The training samples that the classifier knows least of, by their free energy -log Σ exp z: no synthetic image.

    p_ood is the mean of their features, drawn toward the origin. Chosen among many sources with classifiers that had
    never seen some of their classes: docs/research/ood-prototype.md. It needs the logits, and no early layer.

    Args:
        n: training samples of the highest energy; all of them if there are fewer. None: a fiftieth of the training set,
            at least 100 and at most 1,000.
        shrink: p_ood is the mean times this, in [0, 1]: at 1 the near outliers are told best, toward 0 the far ones.
    """

    n: int | None = None
    shrink: float = 0.5
    settings: ClassVar[ScoreSettings] = ScoreSettings("unit", None, 10)

    def __post_init__(self) -> None:
        if self.n is not None:
            object.__setattr__(self, "n", _checked_count(self.n))
        if not isinstance(self.shrink, Real) or isinstance(self.shrink, bool) or not 0 <= self.shrink <= 1:
            raise GroodError(f"shrink is what the mean is multiplied by, between 0 and 1; got {self.shrink!r}")
        object.__setattr__(self, "shrink", float(self.shrink))

    def n_uncertain(self, n_all: int | None) -> int:
        """See `OutlierSource`."""
        return _fiftieth(n_all) if self.n is None else self.n

    def prototype(self, outliers: Tensor, place: Callable[[Tensor], Tensor]) -> Tensor:
        """See `OutlierSource.prototype`."""
        return self.shrink * super().prototype(outliers, place)

    def features(self, context: OutlierContext) -> Tensor:
        """See `OutlierSource.features`."""
        if context.uncertain is None or len(context.uncertain) == 0:
            raise GroodError(
                "HighEnergy needs the logits of the training samples; use it through GROOD.fit, pass "
                "fit_features(…, logits=…), or take PrototypeMean()"
            )
        return context.uncertain


@dataclass(frozen=True)
class UniformNoise(OutlierSource):
    """Images of uniform noise, blurred; of each 100 the 10 that the classifier is least sure of (least log-sum-exp).

    The noise spans the range of the training images, channel by channel, after the transform: black to white.

    Args:
        n: noise images to keep.
    """

    n: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _checked_count(self.n))

    def features(self, context: OutlierContext) -> Tensor:
        """See `OutlierSource.features`."""
        extractor = _extractor(self, context)
        if context.channel_range is None:
            raise GroodError("UniformNoise needs the range of the training images; use it through GROOD.fit")
        generator = torch.Generator().manual_seed(context.seed)
        low, high = (bound.view(-1, *[1] * (len(context.image_shape) - 1)) for bound in context.channel_range)
        kept: list[Tensor] = []
        for _ in track(range(-(-self.n // 10)), context.progress, "noise"):
            noise = torch.rand(100, *context.image_shape, generator=generator, dtype=torch.float32)
            if noise.ndim == 4:
                sigma = float(torch.empty(1, dtype=torch.float32).uniform_(0.2, 5.0, generator=generator))
                noise = _gaussian_blur(noise, sigma)
            noise = low + (high - low) * noise
            parts = [extractor(part) for part in torch.split(noise, context.batch_size)]
            energy = torch.cat([part.logits.double().logsumexp(1) for part in parts])
            least = energy.argsort(stable=True)[:10].sort().values
            kept.append(torch.cat([part.features for part in parts])[least])
        return torch.cat(kept)[: self.n]


@dataclass(frozen=True)
class OutlierSamples(OutlierSource):
    """Real outliers: the method then uses OOD data, and everything that reports it says so.

    Args:
        loader: batches of images, or of (images, anything).
        n: images to use at most; None: all.
    """

    loader: Iterable[Any] = field(repr=False)
    n: int | None = None
    uses_ood_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.n is not None:
            object.__setattr__(self, "n", _checked_count(self.n))

    def features(self, context: OutlierContext) -> Tensor:
        """See `OutlierSource.features`."""
        extractor = _extractor(self, context)
        found: list[Tensor] = []
        count = 0
        for batch in track(self.loader, context.progress, "outliers"):
            images, _ = split_batch(batch)
            if self.n is not None:
                images = images[: self.n - count]
            if len(images):
                found.append(extractor(images).features)
                count += len(images)
            if count == self.n:
                break
        if not found:
            raise GroodError("the loader of outliers gave no image")
        return torch.cat(found)

    def config(self) -> dict[str, Any]:
        """See `OutlierSource.config`; the images themselves are not kept."""
        return {"name": "OutlierSamples", "n": self.n}


@dataclass(frozen=True)
class PrototypeMean(OutlierSource):
    """The mean of the class prototypes: no outlier at all, and nothing to choose."""

    def prototype(self, outliers: Tensor, place: Callable[[Tensor], Tensor]) -> Tensor:
        """See `OutlierSource.prototype`; the prototypes are where distances are taken already."""
        return outliers.double().mean(0)

    def features(self, context: OutlierContext) -> Tensor:
        """See `OutlierSource.features`."""
        return context.class_prototypes.mean(0, keepdim=True)


def _fiftieth(n_all: int | None) -> int:
    """A fiftieth of the training set, within bounds: the error of a mean falls as 1/√n."""
    return _MOST if n_all is None else min(max(n_all // 50, _FEWEST), _MOST)


def named_source(name: str, n: int | None = None, lam: float = Mixup.lam) -> OutlierSource:
    """The source "energy", "mixup", "noise" or "mean", as command lines and other libraries name them.

    Args:
        name: of the source.
        n: number of outliers; None: the source's own default.
        lam: λ of "mixup". Both are ignored where a source has no use for them.

    Raises:
        GroodError: for another name, or arguments out of range.
    """
    if name == "energy":
        return HighEnergy(n)
    if name == "mixup":
        return Mixup(n, lam)
    if name == "noise":
        return UniformNoise() if n is None else UniformNoise(n)
    if name == "mean":
        return PrototypeMean()
    raise GroodError(f"there is no source of outliers {name!r}; there are energy, mixup, noise and mean")


@dataclass(frozen=True)
class ForeignSource(OutlierSource):
    """A source of the user's own that a stored detector was fitted with: its name, without its code."""

    name: str
    arguments: dict[str, Any]

    def features(self, context: OutlierContext) -> Tensor:
        """Not possible."""
        raise GroodError(f"the outlier source {self.name!r} is not part of torch-grood; pass outliers=… to fit again")

    def config(self) -> dict[str, Any]:
        """See `OutlierSource.config`."""
        return {"name": self.name, **self.arguments}


def outlier_source(config: dict[str, Any]) -> OutlierSource:
    """Make the source that `config` describes (see `OutlierSource.config`).

    Raises:
        GroodError: for a missing name or wrong arguments.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    known: dict[Any, Callable[..., OutlierSource]] = {
        source.__name__: source for source in (HighEnergy, Mixup, UniformNoise, PrototypeMean)
    }
    # The images are not kept; to fit again takes a new source.
    known["OutlierSamples"] = partial(OutlierSamples, ())
    if not isinstance(name, str):
        raise GroodError(f"an outlier source has a name, known are {', '.join(known)}; got {config!r}")
    if name not in known:
        return ForeignSource(name, arguments)
    try:
        return known[name](**arguments)
    except TypeError as error:
        raise GroodError(f"bad arguments of outlier source {name}: {error}") from None


class HighestEnergy:
    """The features of the samples of a stream with the highest free energy -log Σ exp z, in order of the energy.

    Args:
        n: samples to keep.
    """

    def __init__(self, n: int) -> None:
        self._n = n
        self._energy = torch.empty(0, dtype=torch.float64)
        self._features: Tensor | None = None

    def offer(self, features: Tensor, logits: Tensor) -> None:
        """Offer a batch of features (n, d) with their logits (n, C)."""
        if not self._n:
            return
        energy = -logits.detach().cpu().double().logsumexp(1)
        if len(self._energy) == self._n and not bool((energy > self._energy[-1]).any()):
            return  # Most batches of a long stream: nothing is copied.
        self._take(energy, features.detach().cpu())

    def merge(self, later: HighestEnergy) -> None:
        """Take what another sample of the same size has kept of a stream that follows this one's."""
        if later._features is not None:
            self._take(later._energy, later._features)

    def _take(self, energy: Tensor, candidates: Tensor) -> None:
        if self._features is not None:
            energy, candidates = torch.cat([self._energy, energy]), torch.cat([self._features, candidates])
        kept = energy.argsort(descending=True, stable=True)[: self._n]
        self._energy, self._features = energy[kept], candidates[kept]

    def features(self, most: int) -> Tensor | None:
        """At most so many of them, (m, d); None if none was asked for or offered."""
        return None if self._features is None else self._features[:most]


class SampleReservoir:
    """A uniform sample of a stream, the same in whatever order and batches the stream comes.

    Each image gets a pseudo-random priority from its content and the seed; the n least are kept.

    Args:
        n: samples to keep.
        seed: another seed draws another sample.

    Attributes:
        size: samples to keep.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.size = n
        self._key = seed.to_bytes(8, "little", signed=True)
        # Of an image that can be read again, its position stands for it.
        self._heap: list[tuple[int, int, Tensor | int, int]] = []
        self._count = 0

    def offer(self, images: Tensor, runner_up: Tensor) -> None:
        """Offer a batch of images (n, ...) with their runner-up classes (n,)."""
        if self.size:
            self._offer(_priorities(images, self._key), lambda i: images[i].detach().cpu().clone(), runner_up)

    def offer_positions(self, priorities: Tensor, positions: Tensor, runner_up: Tensor) -> None:
        """Offer images that are not at hand, by `priorities` (n,) and positions (n,); `samples` reads what it needs."""
        if self.size:
            where = positions.tolist()
            self._offer((number & _WORD for number in priorities.tolist()), where.__getitem__, runner_up)

    def priorities(self, images: Tensor) -> Tensor:
        """Of images (n, ...), int64 (n,): a number below 2^64 as its 64 bits."""
        numbers = [number - 2**64 * (number >> 63) for number in _priorities(images, self._key)]
        return torch.tensor(numbers, dtype=torch.int64)

    def _offer(self, priorities: Iterable[int], image: Callable[[int], Tensor | int], runner_up: Tensor) -> None:
        for i, (priority, partner) in enumerate(zip(priorities, runner_up.tolist(), strict=True)):
            # A heap of the negated priorities has the sample to be replaced next on top.
            entry = -priority
            self._count += 1
            if len(self._heap) < self.size:
                heapq.heappush(self._heap, (entry, self._count, image(i), partner))
            elif entry > self._heap[0][0]:
                heapq.heapreplace(self._heap, (entry, self._count, image(i), partner))

    def samples(
        self, most: int | None = None, read: Callable[[list[int]], list[Tensor]] | None = None
    ) -> TrainingSamples | None:
        """The sample, or a sample of at most `most`, in an order that depends on content and seed alone.

        None if none was asked for or offered.

        Args:
            most: samples to give at most.
            read: gives the images at some positions, if they were offered so.

        Raises:
            GroodError: if the images have several sizes, or one is another than when it was offered.
        """
        if not self._heap:
            return None
        entries = sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))[:most]
        images = self._images(entries, read)
        shapes = sorted({tuple(image.shape) for image in images})
        if len(shapes) > 1:
            raise GroodError(
                f"the training images have several sizes, {shapes[0]} and {shapes[1]} for example, and are to be "
                "mixed; give the transform a crop"
            )
        return TrainingSamples(torch.stack(images), torch.tensor([e[3] for e in entries]))

    def _images(
        self, entries: list[tuple[int, int, Tensor | int, int]], read: Callable[[list[int]], list[Tensor]] | None
    ) -> list[Tensor]:
        positions = [image for _, _, image, _ in entries if isinstance(image, int)]
        if not positions:
            return [image for _, _, image, _ in entries if isinstance(image, Tensor)]
        assert read is not None
        assert len(positions) == len(entries)
        images = read(positions)
        for (entry, _, position, _), image in zip(entries, images, strict=True):
            if next(_priorities(image[None], self._key)) != -entry:
                raise GroodError(
                    f"training image {position} is another one than when its features were kept, though its file has "
                    "the same size and time; use another cache folder"
                )
        return images


def content_keys(samples: Tensor, seed: int) -> Tensor:
    """A pseudo-random number for each of n samples, from its content and the seed alone, int64 (n,)."""
    # Another key than the reservoir's, which draws from the same images.
    numbers = _priorities(samples, seed.to_bytes(8, "little", signed=True) + b"subset")
    return torch.tensor([number >> 1 for number in numbers], dtype=torch.int64)


def _priorities(samples: Tensor, key: bytes) -> Iterator[int]:
    rows = _folded(samples.detach().flatten(1).cpu().contiguous().view(torch.uint8)).numpy()
    return (int.from_bytes(hashlib.blake2b(row.data, digest_size=8, key=key).digest(), "little") for row in rows)


def _folded(content: Tensor) -> Tensor:
    """Each row of bytes, or for long rows the sums of its 32-bit words at equal positions: every byte counts."""
    if content.shape[1] <= 16 * _FOLD:
        return content
    words = content.view(torch.int32) if content.shape[1] % 4 == 0 else content
    whole = words.shape[1] // _FOLD * _FOLD
    sums = words[:, :whole].view(len(words), -1, _FOLD).sum(1)
    return torch.cat([sums, words[:, whole:]], dim=1).view(torch.uint8)


def _extractor(source: OutlierSource, context: OutlierContext) -> FeatureExtractor:
    if context.extractor is None:
        raise GroodError(
            f"{type(source).__name__} runs the model, and there is none; pass ood_features=… (their mean becomes the "
            "OOD prototype), or use GROOD(None, outliers=PrototypeMean())"
        )
    return context.extractor


def _checked_count(n: Any) -> int:
    if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
        raise GroodError(f"n is a number of outliers, at least 1; got {n!r}")
    return int(n)


def _gaussian_blur(images: Tensor, sigma: float, size: tuple[int, int] = (7, 5)) -> Tensor:
    """Blur (n, c, h, w) by a separable Gaussian kernel of the given height and width, which the authors' code uses."""
    for axis, length in zip((2, 3), size, strict=True):
        if images.shape[axis] < length:
            continue
        position = torch.arange(length, dtype=images.dtype) - (length - 1) / 2
        kernel = torch.softmax(-0.5 * (position / sigma).square(), 0)
        shape, padding = [1, 1, 1, 1], [0, 0, 0, 0]
        shape[axis] = length
        padding[2 * (3 - axis)] = padding[2 * (3 - axis) + 1] = length // 2
        channels = images.shape[1]
        weight = kernel.view(shape).expand(channels, 1, *shape[2:])
        images = functional.conv2d(functional.pad(images, padding, mode="reflect"), weight, groups=channels)
    return images
