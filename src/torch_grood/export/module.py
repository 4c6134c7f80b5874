"""A fitted detector as one module of plain operations, from prepared images to decisions.

The formulas are those of the core: `geometry.placed`, `gradients.GradientField`, `neighbors.pairs.log_distance` and
`log_mean`, `threshold.ConformalThreshold`. They are written again without blocks, checks and branches on values, since
what is exported is the trace of one batch, to be run on batches of any size.

The search proposes by one float32 matrix product and decides by float64 distances, as `neighbors.brute` does, but over
a fixed number of candidates. For unit directions at an angle with cosine c, and a = ‖q‖, b = ‖g‖,

    ‖q - g‖² = a² + b (b - 2ac)

so that b (b - 2ac) orders the rows of a query. a and b are in units of the query's length, or of the k-th shortest
gradient's if that is longer, by differences of logarithms: no scale of the features underflows. The product's rounding
may order rows wrongly whose distances differ by about 1e-7; more candidates than are wanted leave room for these.

Where the stored lengths are of one scale, b = s·B with a factor s of the query and a length B of the row, and the order
is that of B (sB - 2ac): the parenthesis is one product of (-2au, s) and (g, B), with no exponential for each pair. The
candidates are then looked for in the blocks of rows with the least minima alone: as many blocks as candidates suffice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_grood import GROOD
from torch_grood.features import FeatureExtractor
from torch_grood.geometry import GEOMETRIES
from torch_grood.threshold import ConformalThreshold

__all__ = ["CANDIDATES", "DetectorModule", "Outputs"]

CANDIDATES = 8
"""Rows beyond the k that are wanted whose distances are taken in float64."""

# Rows longer than e^40 of these units are not among the nearest, and their squares would overflow.
_LONGEST = 40.0
# Lengths within e^±30 of their median are of one scale.
_ONE_SCALE = 30.0
_BLOCK = 64


class Outputs(NamedTuple):
    """Of n images; fields as in `torch_grood.Prediction`, and the log score, which does not underflow.

    The last two are there with a calibration only.
    """

    label: Tensor
    prototype_label: Tensor
    log_score: Tensor
    score: Tensor
    neighbor: Tensor
    p_value: Tensor
    is_ood: Tensor


class DetectorModule(nn.Module):
    """A detector and its model as one module; its tensors are the detector's own, but those that are made from them.

    Args:
        detector: fitted.
        extractor: of its model on the CPU, which has run on a batch.
        threshold: the detector's, at the operating point that is wanted; None: scores, classes and neighbours only.
    """

    origin: Tensor
    classes: Tensor
    class_squares: Tensor
    class_ids: Tensor
    codes: Tensor
    scale: Tensor
    rows: Tensor
    length: Tensor
    log_norm: Tensor
    relative_norm: Tensor
    sample_ids: Tensor
    held_out: Tensor
    held_out_class: Tensor
    n_held_out: Tensor
    log_tau: Tensor

    def __init__(self, detector: GROOD, extractor: FeatureExtractor, threshold: ConformalThreshold | None) -> None:
        super().__init__()
        state = detector.state_
        info, store = state.info, state.searcher.gradients.to("cpu")
        self.model = extractor.model
        self._extractor = extractor
        self._power, self._temperature = GEOMETRIES[info.geometry], info.temperature
        self._k, self._candidates = info.k, min(len(store), info.k + CANDIDATES)
        classes = state.class_prototypes.double() - state.ood_prototype.double()
        self._add("origin", state.ood_prototype.double())
        self._add("classes", classes.T)
        self._add("class_squares", classes.square().sum(1))
        self._add("class_ids", state.class_ids)
        log_norm = store.log_norm()
        # Logarithms about 0 lose nothing in float32 where they matter.
        finite = log_norm[log_norm.isfinite()]
        self._centre = float(finite.median()) if len(finite) else 0.0
        self._least = store.smallest_log_norm(info.k)
        self._add("log_norm", log_norm)
        self._n_rows, self._dim = len(store), store.dim
        self._rounded = store.scale is not None
        many = len(store) >= 2 * _BLOCK * (self._candidates + 1)
        of_one_scale = len(finite) > 0 and float((finite - self._centre).abs().max()) <= _ONE_SCALE
        self._in_blocks = many and of_one_scale and not self._rounded
        if self._in_blocks:
            self._add_rows(store.codes, (log_norm - self._centre).exp().float())
        else:
            self._add("codes", store.codes)
            if store.scale is not None:
                self._add("scale", store.scale)
            self._add("relative_norm", (log_norm - self._centre).float())
        self._add("sample_ids", state.sample_ids)
        self.decides = threshold is not None
        if threshold is not None:
            self._add_threshold(threshold, state.class_ids)

    def _add(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor.detach().cpu().contiguous(), persistent=True)

    def _add_rows(self, codes: Tensor, length: Tensor) -> None:
        """(g, B) and B, with zeros up to a whole number of blocks."""
        rows = functional.pad(torch.cat([codes, length[:, None]], dim=1), (0, 0, 0, -len(codes) % _BLOCK))
        self._add("rows", rows)
        self._add("length", rows[:, -1])

    def _add_threshold(self, threshold: ConformalThreshold, class_ids: Tensor) -> None:
        """Held-out scores, and for each class prototype the τ and the number of scores that count for it."""
        self._add("held_out", threshold.log_scores)
        self._grouped = threshold.groups is not None
        if threshold.groups is None:
            log_tau, n = threshold.log_taus.expand(len(class_ids)), torch.full_like(class_ids, threshold.n)
        else:
            # A prototype without a held-out score flags nothing: p = 1 / (0 + 1).
            same = class_ids[:, None] == threshold.group_ids
            log_tau = torch.where(same, threshold.log_taus, -torch.inf).amax(1)
            log_tau = log_tau.masked_fill(~same.any(1), torch.inf)
            self._add("held_out_class", threshold.groups)
            n = (class_ids[:, None] == threshold.groups).sum(1)
        self._add("log_tau", log_tau)
        self._add("n_held_out", n)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """From prepared images, float32 (n, …), to the fields of `Outputs`, the last two only where it can decide."""
        found = self._extractor(image)
        log_magnitude, direction, prototype = self._gradients(found.features.float())
        log_score, row = self._search(log_magnitude, direction)
        label = found.logits.argmax(1)
        known = (label, self.class_ids[prototype], log_score, log_score.exp(), self.sample_ids[row])
        return (*known, *self._decisions(log_score, prototype)) if self.decides else known

    def _gradients(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """eq. 5 in polar form, with the direction in float32, and the row of the nearest class prototype."""
        offset = self._placed(features).double() - self.origin
        squares = offset.square().sum(1, keepdim=True)
        distance2 = squares + self.class_squares - 2 * (offset @ self.classes)
        ood_distance = squares.sqrt()
        scores = torch.cat([distance2.clamp(min=0).sqrt(), ood_distance], dim=1) / -self._temperature
        largest = scores.amax(1)
        log_magnitude = scores[:, -1] - largest - (scores - largest[:, None]).exp().sum(1).log()
        apart = ood_distance > 1e-150
        direction = torch.where(apart, offset / torch.where(apart, ood_distance, 1.0), 0.0)
        return log_magnitude, direction.float(), distance2.argmin(1)

    def _placed(self, features: Tensor) -> Tensor:
        if self._power == 0:
            return features
        wide = features.double()
        largest = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        wide = wide / largest
        length = wide.square().sum(1, keepdim=True).sqrt()
        wide = wide / torch.where(length == 0, 1.0, length)
        if self._power < 1:
            wide = wide * (length * largest) ** (1 - self._power)
        return wide.float()

    def _search(self, log_magnitude: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Log score, and the row of the nearest stored gradient."""
        unit = log_magnitude.clamp(min=self._least)
        # Of a query at p_ood, which has no direction, the products are 0 and the order is that of b.
        query = direction * (2 * (log_magnitude - unit).exp().float())[:, None]
        candidate, near = (self._from_blocks if self._in_blocks else self._from_all)(query, unit)
        log_distance = _log_distance(
            torch.where(direction.abs().amax(1) > 0, log_magnitude, -torch.inf)[:, None],
            direction.double()[:, None],
            self.log_norm[candidate],
            near.double(),
        )
        nearest, place = log_distance.topk(self._k, dim=1, largest=False)
        return _log_mean(nearest), candidate.gather(1, place[:, :1])[:, 0]

    def _from_all(self, query: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates and their directions, from queries 2au in units e^unit."""
        b = (self.relative_norm - (unit - self._centre).float()[:, None]).clamp(max=_LONGEST).exp()
        product = functional.linear(query, self.codes.float())
        if self._rounded:
            product = product * self.scale
        candidate = (b * (b - product)).topk(self._candidates, dim=1, largest=False).indices
        near = self.codes[candidate].float()
        return candidate, near * self.scale[candidate][..., None] if self._rounded else near

    def _from_blocks(self, query: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
        """The same, for lengths of one scale."""
        s = (self._centre - unit).exp().float()[:, None]
        order = functional.linear(torch.cat([-query, s], dim=1), self.rows) * self.length
        # One block more: the last one may seem to have a least minimum because of the rows that only fill it up.
        least = order.reshape(len(query), -1, _BLOCK).amin(2)
        block = least.topk(self._candidates + 1, dim=1, largest=False).indices
        row = (block[..., None] * _BLOCK + torch.arange(_BLOCK)).flatten(1)
        few = order.gather(1, row).masked_fill(row >= self._n_rows, torch.inf)
        candidate = row.gather(1, few.topk(self._candidates, dim=1, largest=False).indices)
        return candidate, self.rows[candidate][..., : self._dim]

    def _decisions(self, log_score: Tensor, prototype: Tensor) -> tuple[Tensor, Tensor]:
        """p-value and decision."""
        at_least = self.held_out >= log_score[:, None]
        if self._grouped:
            at_least = at_least & (self.held_out_class == self.class_ids[prototype][:, None])
        p_value = (1 + at_least.sum(1)).double() / (1 + self.n_held_out[prototype]).double()
        return p_value, log_score > self.log_tau[prototype]


def _log_distance(query_norm: Tensor, query: Tensor, stored_norm: Tensor, stored: Tensor) -> Tensor:
    """Log ‖q - g‖₂ (n, m) of n queries and m stored gradients of each, in polar form, float64."""
    unit = torch.maximum(query_norm, stored_norm)
    unit = torch.where(unit == -torch.inf, 0.0, unit)
    difference = query * (query_norm - unit).exp()[..., None] - stored * (stored_norm - unit).exp()[..., None]
    return unit + difference.square().sum(2).log() * 0.5


def _log_mean(log_distance: Tensor) -> Tensor:
    """As `neighbors.log_mean`."""
    k = log_distance.shape[1]
    largest = log_distance[:, -1]
    if k == 1:
        return largest
    unit = torch.where(largest == -torch.inf, 0.0, largest)
    return (log_distance - unit[:, None]).exp().sum(1).log() + (unit - math.log(k))
