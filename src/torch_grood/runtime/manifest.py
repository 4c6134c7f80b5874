"""What an exported detector says of itself, as one JSON text in its file: all that a graph of operations cannot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch_grood._conformal import promised
from torch_grood.data.transforms import ImageTransform
from torch_grood.errors import FormatError, GroodError, NewerFormatError

__all__ = ["MANIFEST_KEY", "NEWEST", "Calibration", "Manifest"]

MANIFEST_KEY = "torch_grood"
"""Of the metadata property that holds the manifest."""

NEWEST = 1
_MAX_CLASSES = 1_000_000
_SIDES = 3


@dataclass(frozen=True)
class Calibration:
    """What the decisions of an exported detector rest on.

    Attributes:
        fpr: the false-alarm rate that `is_ood` promises.
        log_taus: log τ of each group.
        sizes: held-out images of each group.
        groups: class of each group, a position in the classes; None: one group for all.
    """

    fpr: float
    log_taus: tuple[float, ...]
    sizes: tuple[int, ...]
    groups: tuple[int, ...] | None

    @property
    def n(self) -> int:
        """Held-out images of all groups."""
        return sum(self.sizes)

    def promise(self, fpr: float, classes: tuple[str, ...]) -> float:
        """Another rate, if these held-out images can promise it.

        Raises:
            GroodError: if they cannot.
        """
        groups = (0,) if self.groups is None else self.groups
        return promised(
            fpr,
            dict(zip(groups, self.sizes, strict=True)),
            grouped=self.groups is not None,
            describe=lambda group: f"class {classes[group]!r}",
        )


@dataclass(frozen=True)
class Manifest:
    """See the module's docstring.

    Attributes:
        classes: names of the classifier's classes; labels are positions in it.
        transform: what turns an image file into an input of the graph.
        shape: of one input, (3, height, width); 0: any size.
        n_stored: gradients that each image is compared with.
        calibration: None: scores and classes only.
        facts: about the detector, for people to read; JSON-able.
        version: of the package that wrote it.
    """

    classes: tuple[str, ...]
    transform: ImageTransform
    shape: tuple[int, int, int]
    n_stored: int
    calibration: Calibration | None
    facts: Mapping[str, Any]
    version: str

    def to_json(self) -> str:
        """One line."""
        calibration = self.calibration
        return json.dumps(
            {
                "format": NEWEST,
                "classes": self.classes,
                "transform": self.transform.to_dict(),
                "shape": self.shape,
                "n_stored": self.n_stored,
                "calibration": None
                if calibration is None
                else {
                    "fpr": calibration.fpr,
                    # JSON has no -∞, the τ of images that are all equal to training images.
                    "log_taus": [tau if math.isfinite(tau) else None for tau in calibration.log_taus],
                    "sizes": calibration.sizes,
                    "groups": calibration.groups,
                },
                "facts": dict(self.facts),
                "version": self.version,
            },
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` gave.

        Raises:
            NewerFormatError: if a newer version wrote it.
            FormatError: if it is anything else.
        """
        try:
            data = json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"its manifest is no JSON: {error}"[:300]) from None
        if not isinstance(data, dict) or type(data.get("format")) is not int:
            raise FormatError("its manifest does not name its format")
        if data["format"] > NEWEST:
            raise NewerFormatError(
                f"it was written by a newer version of torch-grood, in format {data['format']}; this one reads up to "
                f"{NEWEST}. Update torch-grood"
            )
        try:
            return cls(
                classes=_names(data["classes"]),
                transform=ImageTransform.from_dict(data["transform"]),
                shape=_shape(data["shape"]),
                n_stored=_integers([data["n_stored"]], 1)[0],
                calibration=_calibration(data["calibration"], len(data["classes"])),
                facts=_mapping(data["facts"]),
                version=_text(data["version"]),
            )
        except KeyError as error:
            raise FormatError(f"its manifest lacks {error}") from None
        except FormatError:
            raise
        except GroodError as error:
            raise FormatError(f"its manifest cannot be used: {error}"[:500]) from None


def _calibration(data: Any, n_classes: int) -> Calibration | None:
    if data is None:
        return None
    data = _mapping(data)
    groups = None if data["groups"] is None else _integers(data["groups"], 0)
    sizes, taus = _integers(data["sizes"], 1), data["log_taus"]
    count = 1 if groups is None else len(groups)
    if groups is not None and (len(set(groups)) != count or max(groups, default=n_classes) >= n_classes):
        raise FormatError("the groups of its calibration are not among its classes")
    if not isinstance(taus, list) or len(taus) != count or len(sizes) != count:
        raise FormatError("its calibration has not one threshold and size for each group")
    if any(tau is not None and type(tau) is not float for tau in taus):
        raise FormatError("a threshold of its calibration is no number")
    fpr = data["fpr"]
    if type(fpr) is not float or not 0 < fpr < 1:
        raise FormatError("the false-alarm rate of its calibration is not between 0 and 1")
    return Calibration(fpr, tuple(-math.inf if tau is None else tau for tau in taus), sizes, groups)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"its manifest has a {type(value).__name__} where named fields are expected")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise FormatError(f"its manifest has a {type(value).__name__} where a text is expected")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= _MAX_CLASSES:
        raise FormatError("its manifest has no list of classes")
    return tuple(map(_text, value))


def _integers(value: Any, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(item) is not int or not least <= item < 2**53 for item in value):
        raise FormatError(f"its manifest has no whole numbers from {least} on where they are expected")
    return tuple(value)


def _shape(value: Any) -> tuple[int, int, int]:
    shape = _integers(value, 0)
    if len(shape) != _SIDES or shape[0] != _SIDES:
        raise FormatError(f"its manifest has the shape {shape} of an image; expected 3, height, width")
    return shape[0], shape[1], shape[2]


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")
