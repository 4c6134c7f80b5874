"""eq. 7: a class prototype is the mean of an activation over the training samples of the class.

    p_y = (1 / n_y) Σ h(x) over the training samples x of class y, right or wrong, without normalisation

The mean streams: float64 sums and integer counts, so that parts of a data set, seen one after the other or on several
machines, merge into the prototypes of the whole. The same class serves penultimate features (n, d) and early
activations of any shape (n, ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torch_grood.errors import GroodError

__all__ = ["ClassPrototypes", "Labels", "as_labels"]

Labels = Tensor | npt.NDArray[Any] | Sequence[int] | Sequence[str] | Sequence[int | str]

# Above this many numbers a sample, adding sample by sample beats converting the whole batch to float64 first.
_LARGE_ACTIVATION = 4096


class ClassPrototypes:
    """Streaming, mergeable class means.

    >>> prototypes = ClassPrototypes(["cat", "dog"])
    >>> prototypes.update(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), [0, "cat", "dog"])
    >>> prototypes.means
    tensor([[2., 0.],
            [0., 5.]], dtype=torch.float64)

    Args:
        classes: the number of classes, or their names (integers or strings) in the order of the prototypes.

    Attributes:
        classes: names, in row order.
        counts: samples seen of each class, int64 (C,).
    """

    def __init__(self, classes: int | Sequence[int | str]) -> None:
        if isinstance(classes, str) or not isinstance(classes, (int, Iterable)):
            raise GroodError(f"classes must be a number of classes or their names, got {classes!r}")
        names = range(classes) if isinstance(classes, int) else classes
        # numpy's integers as Python's, which JSON can hold.
        self.classes: tuple[int | str, ...] = tuple(name if isinstance(name, str) else int(name) for name in names)
        if not self.classes:
            raise GroodError("there is no class; GROOD needs at least one")
        if len(set(self.classes)) != len(self.classes):
            repeated = next(name for name in self.classes if self.classes.count(name) > 1)
            raise GroodError(f"class {repeated!r} is named twice")
        self.counts = torch.zeros(len(self.classes), dtype=torch.int64)
        self._sums: Tensor | None = None
        self._row_of = {name: row for row, name in enumerate(self.classes)}

    def update(self, activations: Tensor, labels: Labels) -> None:
        """Add samples.

        Args:
            activations: (n, ...), any float dtype and device; the trailing shape is the same in every call.
            labels: one a sample: rows of `classes` as integers, or names.

        Raises:
            GroodError: for a label out of range, of an unknown class or not an integer; for another shape than before;
                for a sample with a NaN or an infinity (it is named). Nothing is added then.
        """
        rows = self.rows(labels, len(activations))
        shape = activations.shape[1:]
        if self._sums is not None and self._sums.shape[1:] != shape:
            raise GroodError(
                f"activations of shape {tuple(shape)} a sample cannot be averaged with earlier ones of shape "
                f"{tuple(self._sums.shape[1:])}; bring all inputs to one size"
            )
        if len(activations) == 0:
            return
        activations = activations.detach()
        if not bool(activations.sum().isfinite()):
            _raise_if_not_finite(activations)
        if self._sums is None:
            device = "cpu" if activations.device.type == "mps" else activations.device
            self._sums = torch.zeros(len(self.classes), *shape, dtype=torch.float64, device=device)
        sums = self._sums
        activations = activations.to(sums.device)
        if shape.numel() > _LARGE_ACTIVATION:
            for activation, row in zip(activations, rows.tolist(), strict=True):
                sums[row].add_(activation)
        else:
            sums.index_add_(0, rows.to(sums.device), activations.double())
        self.counts += torch.bincount(rows, minlength=len(self.classes))

    def merge(self, other: ClassPrototypes) -> None:
        """Add what another instance, over the same classes, has seen."""
        if other.classes != self.classes:
            raise GroodError(f"cannot merge prototypes of classes {other.classes} into those of {self.classes}")
        if other._sums is None:
            return
        if self._sums is None:
            self._sums = other._sums.clone()
        elif self._sums.shape != other._sums.shape:
            raise GroodError(
                f"cannot merge sums of shape {tuple(other._sums.shape)} into sums of shape {tuple(self._sums.shape)}"
            )
        else:
            self._sums += other._sums.to(self._sums.device)
        self.counts += other.counts

    def sums_of(self, rows: Tensor) -> Tensor:
        """A copy of the sums of some classes on the CPU, float64 (k, ...), for `restore`."""
        if self._sums is None:
            raise GroodError("no sample was added yet, so there are no sums")
        return self._sums[rows.to(self._sums.device)].cpu()

    def restore(self, rows: Tensor, sums: Tensor, device: torch.device) -> None:
        """Set the sums of some classes to what `sums_of` gave, on the device of the activations; not the counts."""
        if self._sums is None:
            on = torch.device("cpu") if device.type == "mps" else device
            self._sums = torch.zeros(len(self.classes), *sums.shape[1:], dtype=torch.float64, device=on)
        self._sums[rows.to(self._sums.device)] = sums.to(self._sums.device)

    @property
    def sample_size(self) -> int:
        """Numbers in one activation; 0 before the first."""
        return 0 if self._sums is None else self._sums.shape[1:].numel()

    @property
    def means(self) -> Tensor:
        """The prototypes, float64 (C, ...).

        Raises:
            GroodError: if a class has no sample (it is named).
        """
        if self._sums is None or bool((self.counts == 0).any()):
            row = int((self.counts == 0).nonzero()[0])
            name = self.classes[row]
            label = f"{row} ({name!r})" if isinstance(name, str) else f"{name}"
            raise GroodError(
                f"no training sample has label {label}; GROOD needs at least one per class. "
                "Pass classes=[…] to leave it out."
            )
        counts = self.counts.to(self._sums.device, torch.float64)
        return self._sums / counts.view(-1, *[1] * (self._sums.ndim - 1))

    def rows(self, labels: Labels, n: int) -> Tensor:
        """Rows of `classes` for n labels, int64 (n,) on the CPU.

        Raises:
            GroodError: see `update`.
        """
        if isinstance(labels, np.ndarray):
            labels = labels.tolist()
        if isinstance(labels, Sequence) and any(isinstance(label, str) for label in labels):
            unknown = next(
                (i for i, label in enumerate(labels) if isinstance(label, str) and label not in self._row_of), -1
            )
            if unknown >= 0:
                raise GroodError(
                    f"label {labels[unknown]!r} of sample {unknown} is not one of the classes {self.classes}"
                )
            labels = [self._row_of[label] if isinstance(label, str) else label for label in labels]
        rows = as_labels(labels, n)
        outside = ((rows < 0) | (rows >= len(self.classes))).nonzero().flatten()
        if len(outside):
            sample = int(outside[0])
            raise GroodError(
                f"label {int(rows[sample])} of sample {sample} is out of range: there are {len(self.classes)} classes, "
                f"labels 0 to {len(self.classes) - 1} ({len(outside)} of {n} samples affected)"
            )
        return rows


def as_labels(labels: Any, n: int) -> Tensor:
    """Class labels as int64 (n,) on the CPU.

    Raises:
        GroodError: for labels that are missing, not integers, or not one a sample.
    """
    if labels is None:
        raise GroodError("labels are missing; pass batches of (images, labels)")
    try:
        tensor = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise GroodError(f"labels must be integers, one a sample, got {type(labels).__name__}: {error}") from None
    if n == 0 and tensor.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor.flatten()
    if tensor.ndim != 1 or len(tensor) != n:
        hint = "; for one-hot labels pass labels.argmax(1)" if tensor.ndim == 2 else ""
        raise GroodError(f"expected {n} labels, one a sample, got shape {tuple(tensor.shape)}{hint}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise GroodError(
            f"labels must be integers (the class of each sample), got {tensor.dtype}; convert with .long()"
        )
    return tensor.to(torch.int64)


def _raise_if_not_finite(activations: Tensor) -> None:
    """The sum of finite numbers may overflow; only a number that is not finite itself is an error."""
    finite = activations.reshape(len(activations), -1).isfinite().all(1)
    if not bool(finite.all()):
        sample = int((~finite).nonzero()[0])
        raise GroodError(
            f"sample {sample} of the batch has a NaN or infinite activation ({int((~finite).sum())} of "
            f"{len(activations)} samples affected). Check the input and the model (half precision may overflow)."
        )
