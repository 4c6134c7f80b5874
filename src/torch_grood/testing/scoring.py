"""Laws of scores: a score belongs to its sample alone, and says how much it looks out of distribution (OOD)."""

from __future__ import annotations

import sys
import tempfile
import threading
import unittest
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_grood.testing.clause import clause, require, require_same
from torch_grood.testing.uses import Samples, Use

LEAST_AUROC = 0.9
# Float32 arithmetic in a detector's own way; half precision is off by a thousandth.
DTYPE_TOLERANCE = 1e-4
SCALES = (2.0**-7, 2.0**-3, 1.0, 2.0**3, 2.0**7, 2.0**10)
_THREADS, _ROUNDS = 8, 5


def auroc(known: Tensor, unknown: Tensor) -> float:
    """The share of pairs in which the unknown sample scores higher; ties count half."""
    difference = unknown[:, None] - known
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def _require_scores(scores: Tensor, n: int, when: str) -> None:
    require(tuple(scores.shape) == (n,), f"the scores of {n} samples have shape {tuple(scores.shape)} {when}")
    require(scores.dtype == torch.float64, f"the scores are {scores.dtype} {when}; float64 is required")
    require(scores.device.type == "cpu", f"the scores are on {scores.device} {when}; the CPU is required")
    require(not scores.requires_grad, f"the scores carry a graph of gradients {when}, which keeps the batch in memory")
    bad = (~scores.isfinite()).nonzero().flatten()
    require(len(bad) == 0, f"{len(bad)} of {n} scores are not finite {when}: {scores[bad[:1]].tolist()}")


def _require_close(scores: Tensor, expected: Tensor, when: str) -> None:
    error = float((scores - expected).abs().max() / expected.abs().max())
    require(error <= DTYPE_TOLERANCE, f"a score changed by {error:.1e} of the largest {when}")


@clause()
def scores_are_float64_on_the_cpu(use: Use) -> None:
    """A score is one finite float64 number a sample, (n,), on the CPU and without a gradient.

    Whatever the classifier computes in, scores can then be sorted, compared and stored in one way. Float32 scores tie,
    and a tie at the threshold decides for both.
    """
    _require_scores(use.score(use.fitted(), use.queries), len(use.queries), "after a fit on float32")


@clause()
def higher_is_more_ood(use: Use) -> None:
    """Obvious outliers score higher than known samples: AUROC above 0.9 where the classes are far apart.

    Every tool that takes scores assumes the direction; a confidence returned as it is ranks all of them upside down.
    """
    detector = use.fitted()
    found = auroc(use.score(detector, use.known), use.score(detector, use.unknown))
    hint = "; it seems to be a confidence: return its negative" if found < 0.3 else ""
    require(found > LEAST_AUROC, f"AUROC is {found:.3f} on an easy set{hint}")


@clause()
def batch_does_not_matter(use: Use) -> None:
    """A sample has the same score and decision, bit for bit, alone, in any batch, and in any order.

    Otherwise a result cannot be found again, and an attacker chooses the batch. Matrix products of another shape round
    differently: work in blocks of one size.
    """
    detector = use.ready()
    expected = use.outcome(detector)
    n = len(use.queries)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    for when, parts in {
        "in batches of one": [use.queries[i : i + 1] for i in range(n)],
        "in batches of seven": list(torch.split(use.queries, 7)),
        "in another order": [use.queries[order]],
        "among nine times as many": [use.queries.repeat(9, *[1] * (use.queries.ndim - 1))],
    }.items():
        outcomes = [use.outcome(detector, part) for part in parts]
        found = {name: torch.cat([outcome[name] for outcome in outcomes]) for name in expected}
        if when == "in another order":
            found = {name: value[order.argsort()] for name, value in found.items()}
        require_same({name: value[:n] for name, value in found.items()}, expected, when)


@clause()
def every_float_dtype_is_taken(use: Use) -> None:
    """Float64, float32, float16 and bfloat16 are taken; the same numbers give the same scores, to 1e-4 of the largest.

    The dtype says how features were stored, not how accurately to compare them: distances in half precision lose the
    order of scores, and overflow at 65,504. On images, inputs and classifier have the dtype; the classifier's own
    rounding in half precision is not the detector's.
    """
    expected = use.score(use.fitted(), use.queries)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        cast = replace(use, dtype=dtype)
        scores = cast.score(cast.fitted(), cast.queries)
        _require_scores(scores, len(expected), f"for {dtype}")
        if use.name == "features" or dtype.itemsize >= 4:
            _require_close(scores, expected, f"for {dtype}")


@clause()
def gpu_is_taken(use: Use) -> None:
    """Inputs, and a classifier, on a GPU give the CPU's scores, to 1e-4 of the largest; they are returned on the CPU.

    Where the features were made is no property of a sample.
    """
    gpu = _gpu()
    if gpu is None:
        raise unittest.SkipTest("torch finds no CUDA device on this machine")
    on_gpu = replace(use, device=gpu)
    expected, scores = use.score(use.fitted(), use.queries), on_gpu.score(on_gpu.fitted(), on_gpu.queries)
    _require_scores(scores, len(expected), "on the GPU")
    _require_close(scores, expected, "on the GPU")


def _gpu() -> str | None:
    return "cuda" if torch.cuda.is_available() else None


@clause()
def kind_of_tensor_does_not_matter(use: Use) -> None:
    """Strided, gradient-carrying and inference-mode tensors, and calls in inference mode, give the same bits.

    They are how tensors come out of slices, training loops and servers.
    """
    expected = use.outcome(use.ready())
    for kind in ("strided", "gradient-carrying", "inference-mode"):
        detector = use.new()
        use.fit(detector, Samples(_of_kind(use.train.inputs, kind), use.train.labels))
        if use.decides(detector):
            use.calibrate(detector, Samples(_of_kind(use.held_out.inputs, kind), use.held_out.labels))
        found = use.outcome(detector, _of_kind(use.queries, kind))
        require_same(found, expected, f"for {kind} tensors")
        _require_scores(found["the score"], len(use.queries), f"for {kind} tensors")
    with torch.inference_mode():
        detector = use.ready()
    require_same(use.outcome(detector), expected, "after a fit within torch.inference_mode()")
    with torch.inference_mode():
        require_same(use.outcome(detector), expected, "within torch.inference_mode()")


def _of_kind(tensor: Tensor, kind: str) -> Tensor:
    """The same numbers, in another kind of tensor."""
    if kind == "strided":
        # Neither rows nor columns are contiguous.
        turned = tensor.transpose(0, -1)
        return torch.stack([turned, turned + 1], -1)[..., 0].transpose(0, -1)
    if kind == "gradient-carrying":
        return tensor.clone().requires_grad_()
    with torch.inference_mode():
        return tensor.clone()


@clause()
def scale_of_features_does_not_matter(use: Use) -> None:
    """At feature scales from 0.01 to 1000, scores stay finite and rank the same samples sensibly: AUROC above 0.9.

    Networks differ that much in scale. Exponentials of distances underflow to nothing but zeros, squares overflow.
    """
    for scale in SCALES:
        scaled = replace(use, scale=scale)
        detector = scaled.fitted()
        known, unknown = scaled.score(detector, scaled.known), scaled.score(detector, scaled.unknown)
        together, when = torch.cat([known, unknown]), f"with the features times {scale:g}"
        bad = int((~together.isfinite()).sum())
        require(bad == 0, f"{bad} of {len(together)} scores are NaN or infinite {when}")
        require(bool((together != together[0]).any()), f"all scores are {together[0]:g} {when}")
        found = auroc(known, unknown)
        require(found > LEAST_AUROC, f"AUROC is {found:.3f} {when}")


@clause()
def scoring_changes_nothing(use: Use) -> None:
    """Scoring and predicting leave the detector as it is: the same samples score the same afterwards, and a saved file
    has the same bytes.

    A detector that learns from what it is asked can be taught that an attack is normal.
    """
    detector = use.ready()
    with tempfile.TemporaryDirectory() as folder:
        before = _saved(use, detector, Path(folder) / "before")
        expected = use.outcome(detector)
        for _ in range(3):
            use.outcome(detector, use.unknown)
        require_same(use.outcome(detector), expected, "after other samples were scored")
        require(_saved(use, detector, Path(folder) / "after") == before, "the saved file differs after scoring")


def _saved(use: Use, detector: Any, path: Path) -> bytes | None:
    if not use.has(detector, "save"):
        return None
    detector.save(path)
    return path.read_bytes()


@clause()
def threads_do_not_matter(use: Use) -> None:
    """Eight threads that score at once get the bits that one gets.

    A server calls one detector from many threads. State that a call leaves in the detector, or in the classifier's
    hooks and modes, reaches the wrong caller.
    """
    detector = use.ready()
    parts = [use.queries.roll(thread, 0)[: 8 + thread] for thread in range(_THREADS)]
    expected = [use.outcome(detector, part) for part in parts]
    found: list[list[dict[str, Tensor]]] = [[] for _ in parts]
    errors: list[Exception] = []
    start = threading.Barrier(_THREADS)

    def work(thread: int) -> None:
        start.wait()
        try:
            for _ in range(_ROUNDS):
                found[thread].append(use.outcome(detector, parts[thread]))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(_THREADS)]
    interval = sys.getswitchinterval()
    # Threads that take turns a thousand times as often meet a race in few calls.
    sys.setswitchinterval(5e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    require(not errors, f"a thread of eight raised {errors[:1]!r}")
    for serial, outcomes in zip(expected, found, strict=True):
        for outcome in outcomes:
            require_same(outcome, serial, "with eight threads at once, compared with one")
