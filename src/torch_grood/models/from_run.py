"""The folder of a training as a model: its record names the network, and says how images are prepared for it.

A folder can come from anywhere, as a detector file can. So its record is followed only where that runs no code of the
record's choice, and every value is checked.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torch_grood._files import read_at_most
from torch_grood.errors import GroodError
from torch_grood.models.spec import is_builtin_spec

if TYPE_CHECKING:
    from torch_grood.data.transforms import ImageTransform

__all__ = ["RECORD", "RECORD_FORMAT", "TRANSFORM", "WEIGHTS", "TrainedRun", "is_run", "read_record", "read_run"]

RECORD, WEIGHTS, TRANSFORM = "run.json", "model.safetensors", "transform.json"
"""The names of a run's files, which the training writes."""

RECORD_FORMAT = 1

_LARGEST_RECORD = 64 * 2**20
_LONGEST_TEXT = 2000


@dataclass(frozen=True)
class TrainedRun:
    """What the folder of a training says of its network.

    Attributes:
        folder: of the run.
        spec: of the network; one that a file may name.
        num_classes: outputs.
        transform: how images were prepared.
        classes: names of the outputs, or None if the images had none.
    """

    folder: Path
    spec: str
    num_classes: int
    transform: ImageTransform
    classes: tuple[str, ...] | None

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.folder / WEIGHTS

    def check_weights(self, state: Mapping[str, Tensor], origin: str) -> None:
        """Before the network is made: a record must not choose how much memory that takes.

        Raises:
            GroodError: if no tensor can be of a head for the record's number of classes.
        """
        if not any(tensor.ndim and len(tensor) == self.num_classes and tensor.numel() for tensor in state.values()):
            raise GroodError(
                f"{self.folder / RECORD} says {self.num_classes:,} classes, and {origin} has no tensor with as many "
                "rows, as the head would be; record and weights are not of one training"
            )


def is_run(spec: str) -> bool:
    """Whether a text names the folder of a training."""
    if is_builtin_spec(spec):
        return False
    try:
        return (Path(spec) / RECORD).is_file()
    except OSError:  # longer than any path
        return False


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a training, whose values are not yet checked.

    Raises:
        GroodError: if it cannot be read, or is none.
    """
    path = folder / RECORD
    content = read_at_most(path, _LARGEST_RECORD, "the record of a training")
    try:
        # A class may be named by a folder whose name is no UTF-8.
        record = json.loads(content.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise GroodError(f"{path} is no record of a training: {error}") from None
    if not isinstance(record, dict) or type(record.get("format")) is not int or record["format"] != RECORD_FORMAT:
        raise GroodError(f"{path} is no record of a training that this version reads")
    return record


def read_run(folder: Path) -> TrainedRun:
    """What a run's network is, as far as a file may say it.

    Raises:
        GroodError: if the record cannot be read, is not what it should be, or names code of its own.
    """
    path = folder / RECORD
    record = read_record(folder)
    model = record.get("model")
    if not isinstance(model, dict):
        raise GroodError(f"{path}: model must be an object with spec and num_classes, not {model!r:.100}")
    spec, num_classes, classes = model.get("spec"), model.get("num_classes"), record.get("classes")
    if not isinstance(spec, str) or not spec.isprintable() or len(spec) > _LONGEST_TEXT:
        raise GroodError(f"{path}: model.spec must be a text of one line, not {spec!r:.100}")
    # type(…), not isinstance: true is an int to isinstance.
    if type(num_classes) is not int or num_classes < 1:
        raise GroodError(f"{path}: model.num_classes must be a whole number, at least 1, not {num_classes!r:.100}")
    if classes is not None and not (
        isinstance(classes, list) and len(classes) == num_classes and all(isinstance(name, str) for name in classes)
    ):
        raise GroodError(f"{path}: classes must be the names of the {num_classes} classes, or null")
    transform = _transform(path, record.get("transform"))
    if not is_builtin_spec(spec):
        raise GroodError(
            f"{folder} was trained from {spec}, code that a record must not start by itself, only you; pass "
            f"--model {shlex.quote(spec)} --weights {shlex.quote(str(folder / WEIGHTS))} "
            f"--transform {shlex.quote(str(folder / TRANSFORM))}"
        )
    return TrainedRun(folder, spec, num_classes, transform, None if classes is None else tuple(classes))


def _transform(path: Path, data: object) -> ImageTransform:
    from torch_grood.data.transforms import ImageTransform

    try:
        return ImageTransform.from_dict(data)
    except GroodError as error:
        raise GroodError(f"{path}: its transform cannot be used: {error}") from None
