"""The folder of a run: what was run, how far it came, and the network.

    run.json                 recipe, data, network, preprocessing, machine, and the figures of every epoch
    log.csv                  the figures alone
    curve.png                drawn, where matplotlib is installed
    train.txt, val.txt       image lists of what was trained on and held out
    transform.json           the preprocessing, for --transform
    model.safetensors        the weights, as of the last epoch or of Ctrl-C
    checkpoint.safetensors   what a run that is not complete goes on from

`run.json` makes the folder a model's spec: ``load_model("RUN")``.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch_grood._files import alone, replacing
from torch_grood.data.sources import ImageSource
from torch_grood.errors import GroodError, MissingDependencyError
from torch_grood.models.from_run import RECORD, RECORD_FORMAT, TRANSFORM, WEIGHTS, read_record

__all__ = ["CHECKPOINT", "EpochFigures", "RunFolder", "figures_of"]

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class EpochFigures:
    """What came of one epoch.

    Attributes:
        epoch: 1, 2, …
        steps: done since the beginning.
        lr: of its last step.
        loss: mean cross entropy over its training images, each as it was met.
        accuracy: of them.
        val_loss: mean cross entropy over the validation images, after it.
        val_accuracy: of them.
        seconds: it took, with validation, without the writing of files.
        images_per_second: of training.
    """

    epoch: int
    steps: int
    lr: float
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float
    images_per_second: float


def figures_of(data: Sequence[Mapping[str, Any]]) -> tuple[EpochFigures, ...]:
    """Figures that were stored as JSON.

    Raises:
        TypeError, ValueError: if they are not what they should be.
    """
    figures = tuple(EpochFigures(**one) for one in data)
    for one in figures:
        if not all(type(value) in (int, float) and math.isfinite(value) for value in asdict(one).values()):
            raise ValueError(f"{one} has something else than numbers")
    return figures


class RunFolder:
    """Reads and writes the files of a run.

    Args:
        path: of the folder; made by `alone`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.path / WEIGHTS

    @property
    def checkpoint(self) -> Path:
        """The file of the checkpoint."""
        return self.path / CHECKPOINT

    def earlier(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of an earlier run of the same, which this one goes on from; None if there is none.

        Args:
            identity: what must be the same in the record, by key.

        Raises:
            GroodError: if the folder holds something else, or a run of something else.
        """
        if not self.path.exists():
            return None
        if not self.path.is_dir():
            raise GroodError(f"{self.path} is a file; give a new folder")
        if not (self.path / RECORD).is_file():
            # Hidden files: a temporary one that a kill left, or a file manager's.
            if any(not entry.name.startswith(".") for entry in self.path.iterdir()):
                raise GroodError(f"{self.path} is not empty and holds no training run; give a new folder")
            return None
        record = self.read()
        differences = [line for key, value in identity.items() for line in _differences(key, record.get(key), value)]
        if differences:
            listed = "".join(f"\n  {line}" for line in differences[:10])
            raise GroodError(f"{self.path} holds another training run; give a new folder. What differs:{listed}")
        return record

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Make the folder, and keep other processes from training in it.

        Raises:
            GroodError: if it cannot be made, or another process is training in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise GroodError(f"cannot make the folder {self.path}: {error.strerror or error}") from None
        with alone(self.path / ".lock", f"training in {self.path}"):
            yield

    def begin(self, record: Mapping[str, Any], train: ImageSource, val: ImageSource) -> None:
        """Write what is known before the first step.

        Raises:
            GroodError: if it cannot be written.
        """
        # First, since by it the folder is known as a run's if the rest does not come to be written.
        self.write(record, ())
        _write_text(self.path / TRANSFORM, json.dumps(record["transform"]) + "\n")
        self.write_lists(train, val)

    def write_lists(self, train: ImageSource, val: ImageSource) -> None:
        """Write where the images lie; they may have been moved since an earlier call.

        Raises:
            GroodError: if it cannot be written.
        """
        for name, source in (("train.txt", train), ("val.txt", val)):
            assert source.labels is not None
            lines = [f"{path} {label}\n" for path, label in zip(source.paths, source.labels, strict=True)]
            _write_text(self.path / name, "".join(lines))

    def write(self, record: Mapping[str, Any], figures: Sequence[EpochFigures]) -> None:
        """Write the record, and the figures as a table and a curve.

        Raises:
            GroodError: if it cannot be written.
        """
        content = {"format": RECORD_FORMAT, **record, "history": [asdict(one) for one in figures]}
        _write_text(self.path / RECORD, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        table = io.StringIO()
        writer = csv.DictWriter(table, [field.name for field in fields(EpochFigures)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(one) for one in figures)
        _write_text(self.path / "log.csv", table.getvalue())
        if figures:
            self._draw(str(record.get("title", "")), figures)

    def read(self) -> dict[str, Any]:
        """The record.

        Raises:
            GroodError: if it cannot be read.
        """
        return read_record(self.path)

    def figures(self, record: Mapping[str, Any]) -> tuple[EpochFigures, ...]:
        """The figures in the record of a complete run.

        Raises:
            GroodError: if there are none, or they are not what they should be.
        """
        try:
            figures = figures_of(record["history"])
        except (KeyError, TypeError, ValueError):
            figures = ()
        if not figures:
            raise GroodError(f"{self.path / RECORD} was altered: a complete run has figures of its epochs")
        return figures

    def _draw(self, title: str, figures: Sequence[EpochFigures]) -> None:
        try:
            from torch_grood.training.curve import draw_curve

            with replacing(self.path / "curve.png") as temporary:
                draw_curve(temporary, title, figures)
        except MissingDependencyError:
            # The table has all of it.
            return
        except Exception as error:
            log.warning(f"the learning curve could not be drawn: {type(error).__name__}: {error}")


def _differences(key: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*new, *(name for name in old if name not in new)]
        return [line for name in names for line in _differences(f"{key}.{name}", old.get(name), new.get(name))]
    return [] if old == new else [f"{key}: {old!r:.100} there, {new!r:.100} now"]


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
