"""One method's scores on a benchmark, sorted once, and how the scores of an ID and an OOD set lie to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torch_grood.errors import GroodError
from torch_grood.evaluation.metrics import Scores, _as_scores, _count_for

__all__ = ["Counts", "Floats", "Group", "Ordering", "Placements", "ScoreSets", "names_of", "paired_names"]

Group = str | Sequence[str] | None
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


class ScoreSets:
    """One method's scores on a benchmark: its ID test set, and any number of OOD sets held against it.

    In every set the samples are in the same order for all methods that are to be compared.

    Args:
        id_scores: (n,) numbers, higher = more OOD; infinities are legal.
        ood_scores: of each OOD set by name, (m,) likewise.

    Attributes:
        id_scores: float64 (n,), read-only.
        ood_scores: float64 (m,) by name, read-only.

    Raises:
        GroodError: if there is no OOD set or one without a name, or a set is empty, not 1-D, not real numbers, or
            holds NaN.
    """

    def __init__(self, id_scores: Scores, ood_scores: Mapping[str, Scores]) -> None:
        if not ood_scores or "" in ood_scores:
            raise GroodError(f"expected scores of OOD sets by name, got the names {list(ood_scores)}")
        self.id_scores = _frozen(_as_scores(id_scores, "ID"))
        self.ood_scores = {name: _frozen(_as_scores(scores, f"OOD ({name})")) for name, scores in ood_scores.items()}
        self._placed: dict[str, Placements] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """Number of OOD scores by set."""
        return {name: scores.size for name, scores in self.ood_scores.items()}

    def placements(self, name: str) -> Placements:
        """Where the samples of an OOD set and of ID lie."""
        # Kept, as comparisons ask for them again and again; an `Ordering` would take four times the room.
        if name not in self._placed:
            self._placed[name] = Ordering(self.id_scores, self.ood_scores[name]).placements()
        return self._placed[name]


class Placements(NamedTuple):
    """AUROC, and where the samples lie among the other set's, in the samples' own order.

    Attributes:
        auroc: of the pair of sets.
        above: share of OOD above each ID sample, ties counting one half, (n,).
        below: share of ID below each OOD sample, likewise (m,).
    """

    auroc: float
    above: Floats
    below: Floats

    def __sub__(self, other: Placements) -> Placements:
        return Placements(self.auroc - other.auroc, self.above - other.above, self.below - other.below)


class Ordering:
    """How one ID set and one OOD set lie to each other: all that any figure of any resample needs."""

    def __init__(self, id_scores: Floats, ood_scores: Floats) -> None:
        self.id_order, self.ood_order = np.argsort(id_scores), np.argsort(ood_scores)
        ids, oods = id_scores[self.id_order], ood_scores[self.ood_order]
        self.n, self.m = ids.size, oods.size
        # Of the i-th lowest ID score: ID at or below it, OOD below it, OOD at or below it.
        self.id_upto = np.searchsorted(ids, ids, side="right")
        self.ood_below_id = np.searchsorted(oods, ids)
        self.ood_upto_id = np.searchsorted(oods, ids, side="right")
        # Of the j-th lowest OOD score: OOD below it, ID below it, ID at or below it.
        self.ood_below = np.searchsorted(oods, oods)
        self.id_below_ood = np.searchsorted(ids, oods)
        self.id_upto_ood = np.searchsorted(ids, oods, side="right")
        self.id_kept = _count_for(0.95, self.n)
        self.ood_spared = self.m - _count_for(0.95, self.m)

    def placements(self) -> Placements:
        """Where the samples lie, on the scores as they are."""
        twice_won = self.id_below_ood + self.id_upto_ood
        above, below = np.empty(self.n), np.empty(self.m)
        above[self.id_order] = (2 * self.m - self.ood_below_id - self.ood_upto_id) / (2 * self.m)
        below[self.ood_order] = twice_won / (2 * self.n)
        return Placements(int(twice_won.sum()) / (2 * self.n * self.m), above, below)

    def figures(self, id_counts: Counts, ood_counts: Counts) -> tuple[float, ...]:
        """`FIGURES` of a resample that holds each sample so many times, with n and m in all."""
        n, m = self.n, self.m
        drawn_id, drawn_ood = id_counts[self.id_order], ood_counts[self.ood_order]
        # Element k: how many of the k lowest samples' draws there are.
        id_total, ood_total = np.zeros(n + 1, np.int64), np.zeros(m + 1, np.int64)
        np.cumsum(drawn_id, out=id_total[1:])
        np.cumsum(drawn_ood, out=ood_total[1:])
        below_ood = id_total[self.id_below_ood]
        twice_won = int(drawn_ood @ (below_ood + id_total[self.id_upto_ood]))
        kept = np.searchsorted(id_total, self.id_kept) - 1  # the ID sample at whose score enough is kept
        caught = np.searchsorted(ood_total, self.ood_spared, side="right") - 1  # likewise of OOD
        ood_precision = _precision(m - ood_total[self.ood_below], n - below_ood)
        id_precision = _precision(id_total[self.id_upto], ood_total[self.ood_upto_id])
        return (
            twice_won / (2 * n * m),
            int(ood_total[self.ood_upto_id[kept]]) / m,
            (n - int(id_total[self.id_below_ood[caught]])) / n,
            float((drawn_ood * ood_precision).sum()) / m,
            float((drawn_id * id_precision).sum()) / n,
        )


def names_of(known: Mapping[str, int], group: Group) -> list[str]:
    """The sets that a group stands for, of those that are known."""
    names = list(known) if group is None else [group] if isinstance(group, str) else list(group)
    strange = [name for name in names if name not in known]
    if strange or not names or len(set(names)) < len(names):
        raise GroodError(f"a group names OOD sets, each once, of {list(known)}; got {names}")
    return names


def paired_names(
    group: Group, n: int, sizes: Mapping[str, int], other_n: int, other_sizes: Mapping[str, int]
) -> list[str]:
    """The names of a group that two methods have scores of, as many of one as of the other."""
    if group is None and sizes.keys() != other_sizes.keys():
        raise GroodError(
            f"the methods have scores of different sets, {list(sizes)} and {list(other_sizes)}; name a group that "
            "both have"
        )
    names = names_of(sizes, group)
    for name, size, other in [("ID", n, other_n), *((name, sizes[name], other_sizes.get(name)) for name in names)]:
        if size != other:
            raise GroodError(
                f"the methods have {size} and {other or 'no'} scores of {name}; a paired comparison needs the same "
                "samples in the same order"
            )
    return names


def _precision(true: Counts, false: Counts) -> Floats:
    # Where nothing is found, nothing was drawn, and 0 / 1 is multiplied by 0.
    precision: Floats = true / np.maximum(true + false, 1)
    return precision


def _frozen(scores: Floats) -> Floats:
    scores.flags.writeable = False  # placements are kept for them
    return scores
