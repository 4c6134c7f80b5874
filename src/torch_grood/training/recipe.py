"""What a training is: network, data, augmentation, optimiser and schedule as plain values.

A recipe is a flat TOML file; those of the literature are built in (`recipe_names`). It holds all that the result is
defined by. How it is computed (device, precision, processes) is not part of it: see `Computation`.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Self

from torch_grood._files import read_at_most
from torch_grood.errors import GroodError
from torch_grood.models import is_builtin_spec

__all__ = ["OWN_IMAGES", "Recipe", "read_recipe", "recipe_names"]

OWN_IMAGES = "own-images"
"""The recipe for class folders of the user's own, whatever the network."""

CROPS = ("none", "padded", "resized")
OPTIMIZERS = ("sgd", "adamw")

_LARGEST_FILE = 2**20
_MAX_TEXT = 2000
# A whole number of a TOML file may have a million digits, which is no float and which Python does not print.
_MAX_INT = 2**63 - 1
_TYPES = {"str": str, "str | None": str, "bool": bool, "int": int, "float": float}
_EXPECTED = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        name: of the recipe.
        model: the network's spec, as for `torch_grood.models.load_model`.
        title: one line for people.
        reference: where it comes from, and what to expect.
        benchmark: the benchmark whose training and validation images it uses (`torch_grood.evaluation.spec`), if any.
        pretrained: start from the model's published weights.
        transform: the evaluation's preprocessing, a preset's name; None takes the model's own.
        crop: "padded": the image as in evaluation, padded with black, then a random window of the same size.
            "resized": a random part of the image, resized. "none": as in evaluation.
        padding: of "padded", pixels on each side.
        min_area: of "resized", the least share of the image's area.
        flip: mirror half of the images.
        epochs: passes over the training images.
        batch_size: images a step, over all processes together.
        optimizer: "sgd" or "adamw".
        lr: the learning rate's peak.
        final_lr: where its cosine ends.
        warmup_epochs: over which it first rises linearly from 0.
        momentum: of SGD.
        nesterov: Nesterov's form of it.
        weight_decay: of all parameters.
        label_smoothing: of the cross entropy.
        seed: of the initial weights, the order, the augmentation and dropout.

    Raises:
        GroodError: if a value is out of range.
    """

    name: str
    model: str
    title: str = ""
    reference: str = ""
    benchmark: str | None = None
    pretrained: bool = False
    transform: str | None = None
    crop: str = "resized"
    padding: int = 4
    min_area: float = 0.08
    flip: bool = True
    epochs: int = 100
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    final_lr: float = 0.0
    warmup_epochs: int = 0
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, str(field.type), getattr(self, field.name)))
        _one_of("crop", self.crop, CROPS)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _in_range("epochs", self.epochs, 1, 1_000_000)
        _in_range("batch_size", self.batch_size, 1, 1_000_000)
        _in_range("padding", self.padding, 0, 1000)
        _in_range("min_area", self.min_area, 1e-3, 1)
        _in_range("warmup_epochs", self.warmup_epochs, 0, self.epochs)
        _in_range("lr", self.lr, 0, 1e6)
        _in_range("final_lr", self.final_lr, 0, self.lr)
        _in_range("momentum", self.momentum, 0, 1)
        _in_range("weight_decay", self.weight_decay, 0, 1e3)
        _in_range("label_smoothing", self.label_smoothing, 0, 1)
        _in_range("seed", self.seed, 0, _MAX_INT)
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise GroodError("nesterov needs a momentum above 0; set nesterov=false as well")

    def overridden(self, settings: Iterable[str]) -> Self:
        """The recipe with other values, which its title then tells.

        Args:
            settings: texts such as "lr=0.05", values written as in TOML; the quotes of a text may be left out.

        Raises:
            GroodError: if a name is unknown or a value cannot be.
        """
        changed = replace(self, **dict(self._setting(text) for text in settings))
        before, after = self.to_dict(), changed.to_dict()
        names = sorted(name for name in after if after[name] != before[name])
        if not self.title or not names or "title" in names:
            return changed
        told = ", ".join(f"{name}={after[name]}" for name in names)
        return replace(changed, title=f"{self.title}, but {told}"[:_MAX_TEXT])

    def _setting(self, text: str) -> tuple[str, Any]:
        name, equals, value = (part.strip() for part in text.partition("="))
        known = {field.name: str(field.type) for field in fields(self)}
        if not equals or not name:
            raise GroodError(f"expected NAME=VALUE, such as lr=0.05; got {text!r:.100}")
        _check_names([name], known, "a recipe")
        if _TYPES[known[name]] is str:
            return name, None if value == "none" and known[name].endswith("None") else value.strip("\"'")
        # TOML wants a digit before the point.
        written = f"0{value}" if value.startswith(".") else value
        try:
            return name, tomllib.loads(f"value = {written}")["value"]
        except (ValueError, RecursionError):
            raise _wrong(name, value, _TYPES[known[name]]) from None

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-able data, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], origin: str = "a recipe") -> Self:
        """The recipe that `to_dict` described.

        Raises:
            GroodError: if a key is unknown or missing, or a value of a wrong type or out of range.
        """
        _check_names(data, [field.name for field in fields(cls)], origin)
        for needed in ("name", "model"):
            if needed not in data:
                raise GroodError(f"{origin}: the key {needed} is missing")
        try:
            return cls(**data)
        except GroodError as error:
            raise GroodError(f"{origin}: {error}") from None


def recipe_names() -> tuple[str, ...]:
    """Names of the built-in recipes."""
    return tuple(
        sorted(file.name.removesuffix(".toml") for file in _built_in().iterdir() if file.name.endswith(".toml"))
    )


def read_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by name, from a TOML file, or `OWN_IMAGES` with a network.

    Args:
        name_or_path: one of `recipe_names`, a file that ends in .toml, or a model's spec; a bare name such as
            "resnet18" is torchvision's.

    Raises:
        GroodError: if it is none of them, or the file is no recipe.
    """
    name = str(name_or_path)
    if name in recipe_names():
        return _parsed((_built_in() / f"{name}.toml").read_bytes(), name)
    if name.endswith(".toml"):
        recipe = _parsed(read_at_most(name, _LARGEST_FILE, "a recipe"), name)
        if not is_builtin_spec(recipe.model):
            raise GroodError(
                f"{name}: the model {recipe.model!r:.100} is code that a file must not start by itself, only you; give "
                f"it in place of the file, grood train {recipe.model!r:.100}, and the other values with --set"
            )
        return recipe
    own = read_recipe(OWN_IMAGES)
    if ":" in name:
        return replace(own, model=name)
    near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.7)
    near = near or [known for known in recipe_names() if known.startswith(f"{name}-")]
    if near or not name.partition(".")[0].isidentifier():
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise GroodError(
            f"unknown recipe {name!r:.100}{hint} Recipes: {', '.join(recipe_names())}; or a .toml file, or a network "
            "such as resnet18, torchvision:vit_b_16, timm:NAME or file.py:factory"
        )
    return replace(own, model=f"torchvision:{name}")


def _built_in() -> Any:
    return resources.files("torch_grood.training") / "recipes"


def _parsed(content: bytes, origin: str) -> Recipe:
    try:
        data = tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise GroodError(f"{origin} is no UTF-8 text; expected a recipe in TOML") from None
    # Not only TOMLDecodeError: a number of more than 4300 digits is a ValueError.
    except (ValueError, RecursionError) as error:
        raise GroodError(f"{origin} is no TOML: {error}") from None
    return Recipe.from_dict(data, origin)


def _checked(name: str, type_name: str, value: Any) -> Any:
    kind = _TYPES[type_name]
    if value is None and type_name.endswith("None"):
        return None
    # type(…), not isinstance: true is an int to isinstance.
    is_small = type(value) is not int or abs(value) <= _MAX_INT
    if kind is float and type(value) in (int, float) and is_small and math.isfinite(value):
        return float(value)
    if kind is str and type(value) is str and value.isprintable() and len(value) <= _MAX_TEXT:
        return value
    if kind in (bool, int) and type(value) is kind and is_small:
        return value
    raise _wrong(name, value, kind)


def _wrong(name: str, value: object, kind: type) -> GroodError:
    try:
        shown = f"{value!r:.100}"
    except (ValueError, RecursionError):
        shown = "one too large to be shown"
    return GroodError(f"{name} must be {_EXPECTED[kind]}, not {shown}")


def _check_names(names: Iterable[str], known: Iterable[str], origin: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
            raise GroodError(f"{origin} has no {name!r:.80}; {hint}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise GroodError(f"{name} must be one of {', '.join(allowed)}, not {value!r:.100}")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise GroodError(f"{name} must be between {low:g} and {high:g}, not {value:g}")
