"""The preprocessing that belongs to a model: resize, centre crop, to [0, 1], normalise.

A network sees (x / 255 − mean) / std of an image that was resized and cropped in one particular way, and its features
mean something for such inputs only. `ImageTransform` is that way as plain data, so that it can travel with a detector
in its file. On PIL images the result equals torchvision's Resize, CenterCrop, ToTensor and Normalize bit for bit;
torchvision itself is not needed, nor is torch, unless a tensor is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from torch_grood._optional import require
from torch_grood.data.images import MAX_PIXELS
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["INTERPOLATIONS", "PRESETS", "ImageTransform"]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")

MAX_SIDE = 4096
"""Transforms are read from files of unknown origin; 4096 × 4096 float32 RGB already takes 200 MB an image."""

_RGB = 3
_MAX_CHANNEL = 10
_MIN_STD = 1e-6


@dataclass(frozen=True)
class ImageTransform:
    """A PIL RGB image → a float32 tensor (3, H, W).

    Attributes:
        resize: an int resizes the shorter side to it and keeps the aspect ratio; (height, width) does not keep it;
            None leaves the size.
        crop: centre crop, (height, width) or an int for a square; a smaller image is padded with black; None leaves it.
        interpolation: one of `INTERPOLATIONS`.
        mean: per channel, in units of [0, 1].
        std: per channel, in units of [0, 1].

    Raises:
        GroodError: if a field has a wrong type or a value out of range.
    """

    resize: int | tuple[int, int] | None
    crop: int | tuple[int, int] | None
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _channels(name, getattr(self, name)))
        if min(self.std) < _MIN_STD:
            raise GroodError(f"std must be at least {_MIN_STD:g} in each channel, not {self.std}")
        if self.interpolation not in INTERPOLATIONS:
            raise GroodError(
                f"unknown interpolation {self.interpolation!r}; expected one of {', '.join(INTERPOLATIONS)}"
            )

    def __call__(self, image: Image) -> Tensor:
        """Transform one image.

        Raises:
            GroodError: if the image is not RGB, or so elongated that resizing would blow it up beyond `MAX_PIXELS`.
        """
        import torch

        pixels = torch.from_numpy(self.pixels(image))
        return self.normalise(pixels.permute(2, 0, 1).contiguous())

    def pixels(self, image: Image) -> NDArray[np.uint8]:
        """The image resized and cropped, not yet normalised, (H, W, 3).

        Raises:
            GroodError: as when it is called.
        """
        if getattr(image, "mode", None) != "RGB":
            raise GroodError(
                f"expected a PIL image of mode RGB, got {getattr(image, 'mode', type(image).__name__)}; "
                "read files with load_image, or call image.convert('RGB')"
            )
        return np.array(self._crop(self._resize(image)))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(x / 255 − mean) / std of pixels (..., 3, H, W) uint8, as float32 on their device."""
        import torch

        mean, std = (_on(pixels.device, channels) for channels in (self.mean, self.std))
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every result, or None if it depends on the image."""
        if isinstance(self.crop, int):
            return self.crop, self.crop
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, tuple) else None

    def _resize(self, image: Image) -> Image:
        if self.resize is None:
            return image
        if isinstance(self.resize, tuple):
            height, width = self.resize
        else:
            # torchvision rounds the longer side down.
            longer = int(self.resize * max(image.size) / min(image.size))
            width, height = (self.resize, longer) if image.width <= image.height else (longer, self.resize)
        if width * height > MAX_PIXELS:
            raise GroodError(
                f"the image is {image.width} × {image.height}; its shorter side resized to {self.resize} "
                f"would make it {width} × {height}, beyond the limit of {MAX_PIXELS:,} pixels"
            )
        if (width, height) == image.size:
            return image
        resampling = require("PIL.Image", extra="vision").Resampling
        return image.resize((width, height), resampling[self.interpolation.upper()])

    def _crop(self, image: Image) -> Image:
        if self.crop is None:
            return image
        height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        left, top = _centre(image.width, width), _centre(image.height, height)
        # PIL fills with zeros what lies outside the image.
        return image.crop((left, top, left + width, top + height))

    def to_dict(self) -> dict[str, Any]:
        """The transform as JSON-able data, for `from_dict`."""
        return {
            "resize": list(self.resize) if isinstance(self.resize, tuple) else self.resize,
            "crop": list(self.crop) if isinstance(self.crop, tuple) else self.crop,
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """The transform that `to_dict` described.

        Raises:
            GroodError: if a key is unknown or missing, or a value is of a wrong type or out of range.
        """
        if not isinstance(data, Mapping):
            raise GroodError(f"a transform must be an object with named fields, not {type(data).__name__}")
        fields = tuple(cls.__dataclass_fields__)
        missing = [name for name in fields if name not in data]
        unknown = [str(name) for name in data if name not in fields]
        if missing or unknown:
            found = [
                f"{kind} {', '.join(names[:5])}" for kind, names in (("lacks", missing), ("has", unknown)) if names
            ]
            raise GroodError(f"a transform has the fields {', '.join(fields)}; this one {' and '.join(found)}")
        return cls(**{name: data[name] for name in fields})

    @classmethod
    def from_torchvision(cls, preset: Any) -> Self:
        """The transform of ``weights.transforms()`` of a torchvision classification model.

        Raises:
            GroodError: if it is not torchvision's ImageClassification preset.
        """
        if type(preset).__name__ != "ImageClassification":
            raise GroodError(
                "expected torchvision's ImageClassification preset (weights.transforms()), "
                f"got {type(preset).__name__}; "
                "build an ImageTransform with the same resize, crop, interpolation, mean and std instead"
            )
        resize, crop = (value[0] if len(value) == 1 else value for value in (preset.resize_size, preset.crop_size))
        # antialias is left aside: it acts on tensors only, PIL always smooths.
        return cls(resize, crop, str(preset.interpolation.value), preset.mean, preset.std)

    @classmethod
    def from_timm(cls, config: Mapping[str, Any]) -> Self:
        """The evaluation transform of ``timm.data.resolve_model_data_config(model)``.

        Raises:
            GroodError: if it needs padding ("border"), a non-square resize that keeps the aspect ratio, or another
                number of channels than 3.
        """
        channels, height, width = config["input_size"]
        if channels != _RGB:
            raise GroodError(f"expected a model of RGB images, got one with {channels} channels")
        mode = config["crop_mode"] or "center"
        scaled = (math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"]))
        if mode == "squash":
            resize: int | tuple[int, int] = scaled
        elif mode == "center" and scaled[0] == scaled[1]:
            resize = scaled[0]
        else:
            raise GroodError(
                f"timm's crop mode {mode!r} for {height} × {width} cannot be written as resize and centre crop; "
                "build an ImageTransform that comes near enough for your model, and check its accuracy"
            )
        return cls(resize, (height, width), config["interpolation"], config["mean"], config["std"])

    def __str__(self) -> str:
        steps = []
        if self.resize is not None:
            how = "shorter side" if isinstance(self.resize, int) else "both sides"
            steps.append(f"resize {how} to {_by(self.resize)} ({self.interpolation})")
        if self.crop is not None:
            steps.append(f"centre crop {_by(self.crop)}")
        steps.append(f"mean {_list(self.mean)}, std {_list(self.std)}")
        return ", ".join(steps)


def _size(name: str, value: object) -> int | tuple[int, int] | None:
    # type(…), not isinstance: True is an int to isinstance, but `true` in a JSON file is no size.
    if value is None or (type(value) is int and 1 <= value <= MAX_SIDE):
        return value
    if isinstance(value, (list, tuple)) and len(value) == len(("height", "width")):
        height, width = (_size(name, side) if type(side) is int else None for side in value)
        if type(height) is int and type(width) is int:
            return height, width
    raise GroodError(
        f"{name} must be an int or (height, width), each between 1 and {MAX_SIDE}, or None; not {value!r:.100}"
    )


def _channels(name: str, value: object) -> tuple[float, float, float]:
    # Beyond 10 lie values in units of [0, 255], and numbers that overflow float32.
    if (
        not isinstance(value, (list, tuple))
        or len(value) != _RGB
        or any(type(v) not in (int, float) or not abs(v) <= _MAX_CHANNEL for v in value)
    ):
        raise GroodError(
            f"{name} must be three numbers, one a channel, in units of [0, 1] (divide those of [0, 255] by 255); "
            f"not {value!r:.100}"
        )
    red, green, blue = (float(v) for v in value)
    return red, green, blue


@lru_cache(maxsize=32)
def _on(device: torch.device, channels: tuple[float, float, float]) -> Tensor:
    """Kept, since copying three numbers to an accelerator waits for all that it has to do before."""
    import torch

    return torch.tensor(channels, device=device).reshape(3, 1, 1)


def _centre(available: int, wanted: int) -> int:
    """Offset of a centred window. torchvision rounds half to even when it crops, and down when it pads."""
    return -((wanted - available) // 2) if wanted > available else round((available - wanted) / 2)


def _by(size: int | tuple[int, int]) -> str:
    return str(size) if isinstance(size, int) else f"{size[0]} × {size[1]}"


def _list(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# OpenOOD v1.5's evaluation transforms.
PRESETS: Mapping[str, ImageTransform] = {
    "cifar10": ImageTransform(32, 32, "bilinear", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ImageTransform(32, 32, "bilinear", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ImageTransform(256, 224, "bilinear", *_IMAGENET),
}
