"""Which gradients are stored: sampling per class, the greedy k-centre coreset, and the bound that it gives."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from torch_grood import GROOD, ClassSample, GroodError, KCenterCoreset
from torch_grood.gradients import PolarGradients, polar_ood_gradient
from torch_grood.neighbors import Coverage, GradientStore, StoreOptions, log_distance
from torch_grood.neighbors import subset as subset_module
from torch_grood.neighbors.store import StoreWriter
from torch_grood.neighbors.subset import make_subset

MakeGradients = Callable[..., PolarGradients]
BruteForce = Callable[[PolarGradients, PolarGradients], NDArray[np.float64]]


@contextmanager
def small_blocks(pool: int = 5) -> Iterator[None]:
    """Pools and blocks so small that a handful of gradients takes all paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subset_module, "_POOL", pool)
        patch.setattr(subset_module, "_BLOCK_ROWS", 3)
        patch.setattr(subset_module, "_BLOCK_CENTRES", 2)
        patch.setattr(subset_module, "_PAIR_NUMBERS", 64)
        yield


def cover(gradients: PolarGradients | GradientStore, **arguments: Any) -> Coverage:
    return KCenterCoreset(**arguments).cover(GradientStore.of(gradients), progress=False)


def joined(*parts: PolarGradients) -> PolarGradients:
    return PolarGradients(*(torch.cat(field) for field in zip(*parts, strict=True)))


def class_features(n: int, d: int, n_classes: int, spread: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of classes as a network gives them, their labels and the class means."""
    generator = torch.Generator().manual_seed(seed)
    means = 4 * torch.randn(n_classes, d, generator=generator)
    labels = torch.arange(n) % n_classes
    scale = spread * torch.rand(n, 1, generator=generator)
    return means[labels] + scale * torch.randn(n, d, generator=generator), labels, means


def real_like(n: int, d: int, n_classes: int, spread: float, seed: int) -> PolarGradients:
    """Gradients of such features."""
    features, _, means = class_features(n, d, n_classes, spread, seed)
    found = polar_ood_gradient(features, means, means.mean(0))
    return PolarGradients(found.log_magnitude, found.direction.float())


def radius_of(distance: NDArray[np.float64], rows: Tensor | list[int]) -> float:
    """Log of the true covering radius, from all log distances (N, N)."""
    return float(distance[:, np.asarray(rows)].min(1).max())


def naive_greedy(gradients: PolarGradients, distance: NDArray[np.float64], n: int) -> list[int]:
    """Farthest-first traversal as the textbook has it."""
    centres = [int(gradients.log_norm().argmax())]
    nearest = distance[:, centres[0]]
    while len(centres) < n:
        centres.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distance[:, centres[-1]])
    return centres


@st.composite
def gradient_sets(draw: st.DrawFn) -> PolarGradients:
    """Random gradients, gradients of classes, or scales that no float holds at once; some of them twice, some zero."""
    seed, n, d = draw(st.integers(0, 2**16)), draw(st.integers(1, 15)), draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["random", "classes", "scales", "close"]))
    if kind == "classes":
        found = real_like(n, d, draw(st.integers(1, 3)), draw(st.sampled_from([0.01, 1.0, 5.0])), seed)
    else:
        generator = torch.Generator().manual_seed(seed)
        low = {"random": -3.0, "scales": -1e4, "close": -1e-6}[kind]
        direction = torch.randn(n, d, generator=generator, dtype=torch.float64)
        if kind == "close":
            direction = direction[:1] + 1e-6 * direction
        direction /= direction.norm(dim=1, keepdim=True)
        log_magnitude = low * torch.rand(n, generator=generator, dtype=torch.float64)
        found = PolarGradients(log_magnitude, direction.float())
    copies = torch.tensor(draw(st.lists(st.integers(0, n - 1), max_size=6)), dtype=torch.int64)
    zeros = draw(st.integers(0, 2))
    nothing = PolarGradients(-torch.rand(zeros).double(), torch.zeros(zeros, d))
    return joined(found, found.take(copies), nothing)


# --- Arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "text"),
    [
        (ClassSample, {}, "ClassSample takes exactly one of ratio, n; got none"),
        (ClassSample, {"ratio": 0.1, "n": 5}, "ClassSample takes exactly one of ratio, n; got ratio=0.1, n=5"),
        (KCenterCoreset, {}, "KCenterCoreset takes exactly one of ratio, n, radius; got none"),
        (KCenterCoreset, {"n": 5, "radius": 0.1}, "exactly one of ratio, n, radius; got n=5, radius=0.1"),
        (ClassSample, {"ratio": 0}, "ratio is the share of the gradients that stay, above 0 and at most 1; got 0"),
        (ClassSample, {"ratio": 50}, "got 50. A number of gradients is n=…"),
        (ClassSample, {"ratio": math.nan}, "ratio .* got nan"),
        (ClassSample, {"ratio": "0.1"}, "ratio .* got '0.1'"),
        (ClassSample, {"ratio": True}, "ratio .* got True"),
        (KCenterCoreset, {"ratio": 10**400}, "ratio is the share"),
        (ClassSample, {"n": 0}, "n is a number of gradients, at least 1; got 0"),
        (KCenterCoreset, {"n": 2.0}, "n is a number of gradients, at least 1; got 2.0"),
        (KCenterCoreset, {"n": True}, "n is a number of gradients, at least 1; got True"),
        (KCenterCoreset, {"radius": 0}, "radius is what a score may grow by, above 0 and finite; got 0"),
        (KCenterCoreset, {"radius": -1.0}, "radius .* got -1.0"),
        (KCenterCoreset, {"radius": math.inf}, "radius .* got inf"),
        (KCenterCoreset, {"radius": math.nan}, "radius .* got nan"),
        (KCenterCoreset, {"radius": 10**400}, "radius is what a score may grow by"),
    ],
)
def test_wrong_arguments(kind: type, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(GroodError, match=text):
        kind(**arguments)


@pytest.mark.parametrize(
    ("subset", "config"),
    [
        (ClassSample(ratio=0.1), {"name": "ClassSample", "ratio": 0.1}),
        (ClassSample(n=np.int64(50)), {"name": "ClassSample", "n": 50}),
        (KCenterCoreset(ratio=1), {"name": "KCenterCoreset", "ratio": 1.0}),
        (KCenterCoreset(n=7), {"name": "KCenterCoreset", "n": 7}),
        (KCenterCoreset(radius=1e-300), {"name": "KCenterCoreset", "radius": 1e-300}),
    ],
)
def test_config_makes_the_subset_again(subset: ClassSample | KCenterCoreset, config: dict[str, Any]) -> None:
    assert subset.config() == config
    assert next(iter(subset.config())) == "name"
    again = make_subset(json.loads(json.dumps(subset.config())))
    assert again == subset
    assert type(again) is type(subset)


def test_no_config_is_no_subset() -> None:
    assert make_subset(None) is None


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "described by its name and arguments; got {}"),
        ({"name": ["ClassSample"]}, "described by its name"),
        (["ClassSample"], "described by its name"),
        ("ClassSample", "described by its name"),
        ({"name": "ClassSample"}, "takes exactly one of"),
        ({"name": "ClassSample", "radius": 0.1}, "bad arguments of subset ClassSample: .*'radius'"),
        ({"name": "KCenterCoreset", "n": 1, "seed": 1}, "bad arguments of subset KCenterCoreset: .*'seed'"),
        ({"name": "KCenterCoreset", "n": [1]}, "n is a number"),
        ({"name": "KCenterCoreset", "radius": {}}, "radius is what"),
        ({"name": "KCenterCoreset", 1: 2}, "bad arguments of subset KCenterCoreset"),
    ],
)
def test_config_from_elsewhere(config: Any, text: str) -> None:
    with pytest.raises(GroodError, match=text):
        make_subset(config)


def test_a_subset_of_the_users_own_is_remembered_but_not_run() -> None:
    config = {"name": "Mine", "depth": 3}
    foreign = make_subset(config)
    assert foreign is not None
    assert foreign.config() == config
    with pytest.raises(GroodError, match="'Mine' is not part of torch-grood; pass subset="):
        foreign.sample(torch.zeros(3, dtype=torch.int64), torch.arange(3))


@pytest.mark.parametrize(("ratio", "total", "size"), [(0.07, 100, 7), (0.1, 30, 3), (0.1, 31, 4), (1e-300, 5, 1)])
def test_ratio_is_taken_as_written(ratio: float, total: int, size: int) -> None:
    # In binary, 0.07 · 100 is 7.000000000000001.
    labels = torch.zeros(total, dtype=torch.int64)
    assert len(ClassSample(ratio=ratio).sample(labels, torch.arange(total))) == size
    gradients = PolarGradients(-torch.arange(total).double(), torch.ones(total, 1))
    assert len(cover(gradients, ratio=ratio).rows) == size


# --- Sampling per class -------------------------------------------------------------------------------------------


def test_the_least_keys_of_each_class_stay() -> None:
    labels = torch.tensor([0, 5, 0, 5, 0, 2])
    keys = torch.tensor([30, 1, 10, 2, 20, 9])
    assert ClassSample(n=2).sample(labels, keys).tolist() == [1, 2, 3, 4, 5]
    assert ClassSample(n=1).sample(labels, keys).tolist() == [1, 2, 5]
    # ceil(0.4 · 3) = 2, ceil(0.4 · 2) = 1, and at least one.
    assert ClassSample(ratio=0.4).sample(labels, keys).tolist() == [1, 2, 4, 5]
    assert ClassSample(ratio=1).sample(labels, keys).tolist() == list(range(6))
    assert ClassSample(n=10**30).sample(labels, keys).tolist() == list(range(6))


def test_sample_of_nothing_is_nothing() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    assert torch.equal(ClassSample(ratio=0.5).sample(nothing, nothing), nothing)


def test_each_subset_chooses_once() -> None:
    # Before the gradients are known, or from the gradients.
    keys = torch.arange(3)
    assert KCenterCoreset(n=1).sample(keys, keys) is None
    assert ClassSample(n=1).cover(GradientStore.of(PolarGradients(-torch.ones(3).double(), torch.ones(3, 1)))) is None


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    size=st.one_of(st.integers(1, 8), st.floats(0.01, 1)),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_sample_equals_a_loop_in_any_order(labels: list[int], size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    label, key = torch.tensor(labels), torch.randperm(len(labels), generator=generator) * 2**50
    subset = ClassSample(n=size) if isinstance(size, int) else ClassSample(ratio=size)
    chosen = subset.sample(label, key)
    expected = []
    for name in set(labels):
        rows = sorted((int(key[i]), i) for i in range(len(labels)) if labels[i] == name)
        count = min(size, len(rows)) if isinstance(size, int) else math.ceil(size * len(rows) - 1e-9)
        expected += [i for _, i in rows[: max(1, int(count))]]
    assert chosen.tolist() == sorted(expected)
    order = torch.randperm(len(labels), generator=generator)
    again = subset.sample(label[order], key[order])
    assert sorted(order[again].tolist()) == chosen.tolist()


# --- The greedy choice --------------------------------------------------------------------------------------------


@given(gradients=gradient_sets(), pool=st.integers(1, 8))
@settings(deadline=None, max_examples=15)
def test_each_centre_is_the_farthest(gradients: PolarGradients, pool: int, brute_force: BruteForce) -> None:
    """Every choice of n extends that of n - 1 by a gradient that no other is farther than, and its radius is true."""
    distance = brute_force(gradients, gradients)
    norm = gradients.log_norm()
    before: set[int] = set()
    with small_blocks(pool):
        for n in range(1, len(norm)):
            found = cover(gradients, n=n)
            rows = found.rows.tolist()
            assert rows == sorted(set(rows))
            if before == set(rows):
                # Only duplicates are left.
                assert radius_of(distance, rows) == found.log_radius == -math.inf
                continue
            assert len(rows) == n
            (new,) = set(rows) - before
            if not before:
                assert norm[new] == norm.max()
                assert not bool((norm[:new] == norm[new]).any())
            else:
                farthest = distance[:, sorted(before)].min(1)
                assert farthest[new] >= farthest.max() - 1e-9
            before = set(rows)


@given(gradients=gradient_sets(), pool=st.integers(1, 8), data=st.data())
@settings(deadline=None, max_examples=80)
def test_radius_bounds_the_true_one(
    gradients: PolarGradients, pool: int, data: st.DataObject, brute_force: BruteForce
) -> None:
    n = data.draw(st.integers(1, len(gradients.log_magnitude)))
    with small_blocks(pool):
        found = cover(gradients, n=n)
    true = radius_of(brute_force(gradients, gradients), found.rows)
    assert found.log_radius >= true
    # And by no more than what rounds: 2⁻⁴⁹ of the longest.
    if math.isfinite(true):
        longest = float(gradients.log_norm().max())
        assert found.log_radius <= np.logaddexp(true, longest - 48 * math.log(2)) + 1e-10
    else:
        assert found.log_radius == -math.inf


@pytest.mark.parametrize("low", [-1.0, -700.0, -1e4])
def test_radius_bounds_fifty_digits(low: float, make_gradients: MakeGradients) -> None:
    pairs = make_gradients(60, 5, seed=1, low=low - 3, high=low)
    for i in range(0, 60, 2):
        pair = pairs.take(slice(i, i + 2))
        found = cover(pair, n=1).log_radius
        with mpmath.workdps(50):
            sizes = [mpmath.exp(mpmath.mpf(x)) for x in pair.log_magnitude.tolist()]
            columns = zip(*pair.direction.tolist(), strict=True)
            true = mpmath.log(mpmath.fsum((sizes[0] * u - sizes[1] * v) ** 2 for u, v in columns)) / 2
            assert true <= mpmath.mpf(found) < true + 1e-10


@given(seed=st.integers(0, 2**16), n=st.integers(1, 3), spread=st.sampled_from([0.1, 3.0]))
@settings(deadline=None, max_examples=40)
def test_no_choice_is_better_than_half_the_radius(seed: int, n: int, spread: float, brute_force: BruteForce) -> None:
    gradients = real_like(9, 3, 3, spread, seed)
    distance = brute_force(gradients, gradients)
    best = min(radius_of(distance, list(rows)) for rows in itertools.combinations(range(9), n))
    assert cover(gradients, n=n).log_radius <= best + math.log(2) + 1e-9


@given(gradients=gradient_sets(), data=st.data())
@settings(deadline=None, max_examples=80)
def test_no_score_grows_by_more_than_the_radius(
    gradients: PolarGradients, data: st.DataObject, brute_force: BruteForce
) -> None:
    """S_T ≤ S_C ≤ S_T + ε for any query at all."""
    total, d = gradients.direction.shape
    found = cover(gradients, n=data.draw(st.integers(1, total)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    direction = torch.randn(30, d, generator=generator, dtype=torch.float64)
    low = data.draw(st.sampled_from([-1.0, -50.0, -1e4]))
    queries = PolarGradients(
        low * torch.rand(30, generator=generator).double(), (direction / direction.norm(dim=1, keepdim=True)).float()
    )
    # Near the gradients that went, where most is lost, and far from all.
    queries = joined(queries, gradients)
    distance = brute_force(queries, gradients)
    score, of_coreset = distance.min(1), distance[:, found.rows.numpy()].min(1)
    assert bool((of_coreset >= score).all())
    # The distances round at 2⁻⁵² of the longer vector.
    rounding = np.maximum(queries.log_magnitude.numpy(), float(gradients.log_magnitude.max())) - 36
    assert bool((of_coreset <= np.logaddexp(np.logaddexp(score, found.log_radius), rounding) + 1e-11).all())


@pytest.mark.parametrize("kind", ["random", "classes"])
def test_hundreds_equal_the_naive_loop(kind: str, make_gradients: MakeGradients, brute_force: BruteForce) -> None:
    gradients = make_gradients(500, 8, seed=1) if kind == "random" else real_like(500, 8, 4, 4.0, seed=1)
    distance = brute_force(gradients, gradients)
    with small_blocks(40):
        found = cover(gradients, n=50)
    expected = naive_greedy(gradients, distance, 50)
    assert found.rows.tolist() == sorted(expected)
    assert found.log_radius == pytest.approx(radius_of(distance, expected), abs=1e-12)


def test_the_pool_changes_nothing(make_gradients: MakeGradients) -> None:
    gradients = make_gradients(100, 7, seed=3)
    whole = cover(gradients, n=25)
    for pool in (1, 2, 17, 99):
        with small_blocks(pool):
            found = cover(gradients, n=25)
        assert torch.equal(found.rows, whole.rows)
        assert found.log_radius == whole.log_radius


class Work:
    """What a traversal reads and multiplies."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        self.products = 0
        directions, addmm = GradientStore.directions, torch.addmm

        def read(store: GradientStore, rows: Tensor | slice) -> Tensor:
            found = directions(store, rows)
            self.read.append(len(found))
            return found

        def multiply(*args: Any, **kwargs: Any) -> Tensor:
            found = addmm(*args, **kwargs)
            self.products += found.numel()
            # A NaN would hide the gradient that it stands for.
            assert bool(found.isfinite().all())
            return found

        patch.setattr(GradientStore, "directions", read)
        patch.setattr(torch, "addmm", multiply)


def test_gradients_are_read_a_few_times_and_never_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it scale: the textbook's loop reads each gradient n times, and multiplies n·N pairs."""
    gradients = real_like(4000, 16, 5, 4.0, seed=2)
    monkeypatch.setattr(subset_module, "_POOL", 200)
    monkeypatch.setattr(subset_module, "_BLOCK_ROWS", 50)
    monkeypatch.setattr(subset_module, "_PAIR_NUMBERS", 16 * 300)
    work = Work(monkeypatch)
    cover(gradients, n=300)
    assert max(work.read) <= 300
    assert sum(work.read) < 50 * 4000
    assert work.products < 0.93 * 300 * 4000


def test_scales_beyond_float64_are_not_more_work(
    monkeypatch: pytest.MonkeyPatch, make_gradients: MakeGradients
) -> None:
    # In units of the longest gradient most squares underflow, and the products would rule no pair out.
    gradients = make_gradients(400, 4, seed=1, low=-2000.0)
    monkeypatch.setattr(subset_module, "_POOL", 20)
    work = Work(monkeypatch)
    cover(gradients, n=200)
    assert max(work.read) <= 400


# --- A radius that is asked for -----------------------------------------------------------------------------------


@given(gradients=gradient_sets(), log_radius=st.floats(-30, 1))
@settings(deadline=None, max_examples=80)
def test_radius_is_kept_with_as_few_as_greedy_needs(
    gradients: PolarGradients, log_radius: float, brute_force: BruteForce
) -> None:
    with small_blocks():
        found = cover(gradients, radius=math.exp(log_radius))
        assert found.log_radius <= math.log(math.exp(log_radius))
        assert radius_of(brute_force(gradients, gradients), found.rows) <= found.log_radius
        # Rows that are equally far may come in either order, so that only the sizes are compared.
        if len(found.rows) > 1 and log_radius > float(gradients.log_norm().max()) - 25:
            fewer = cover(gradients, n=len(found.rows) - 1)
            assert fewer.log_radius > log_radius - 1e-2


@pytest.mark.parametrize("n", [1, 5, 11])
def test_radius_is_not_exceeded_in_the_last_bit(n: int, make_gradients: MakeGradients, brute_force: BruteForce) -> None:
    # n gradients have this very radius, but for rounding; nobody can prove that it is not a little more.
    gradients = make_gradients(40, 3, seed=n)
    radius = math.exp(radius_of(brute_force(gradients, gradients), cover(gradients, n=n).rows))
    found = cover(gradients, radius=radius)
    assert len(found.rows) == n + 1
    assert found.log_radius <= math.log(radius)


def test_radius_smaller_than_any_distance_keeps_all_but_duplicates(make_gradients: MakeGradients) -> None:
    gradients = make_gradients(20, 3, seed=1)
    found = cover(joined(gradients, gradients.take(torch.tensor([4, 4, 19]))), radius=1e-300)
    assert found.rows.tolist() == list(range(20))
    assert found.log_radius == -math.inf


def test_radius_larger_than_the_spread_keeps_the_longest(make_gradients: MakeGradients) -> None:
    gradients = make_gradients(20, 3, seed=1)
    found = cover(gradients, radius=3.0)
    assert found.rows.tolist() == [int(gradients.log_magnitude.argmax())]


# --- Edges --------------------------------------------------------------------------------------------------------


def test_as_many_as_there_are_is_all(make_gradients: MakeGradients) -> None:
    gradients = make_gradients(6, 3, seed=1)
    for arguments in ({"n": 6}, {"n": 10**30}, {"ratio": 1.0}):
        found = cover(gradients, **arguments)
        assert found.rows.tolist() == list(range(6))
        assert found.log_radius == -math.inf


def test_one_gradient(make_gradients: MakeGradients) -> None:
    gradients = make_gradients(1, 3, seed=1)
    for arguments in ({"n": 1}, {"ratio": 0.1}, {"radius": 0.1}):
        assert cover(gradients, **arguments) == Coverage(torch.tensor([0]), -math.inf)


def test_no_gradient(make_gradients: MakeGradients) -> None:
    with pytest.raises(GroodError, match="there is no gradient to choose from; no training sample was classified"):
        cover(make_gradients(0, 3, seed=1), radius=1.0)


def test_zero_gradients_are_all_the_same() -> None:
    # Their log π says nothing.
    gradients = PolarGradients(-torch.arange(50).double(), torch.zeros(50, 3))
    with small_blocks():
        for arguments in ({"n": 7}, {"radius": 1e-9}):
            assert cover(gradients, **arguments) == Coverage(torch.tensor([0]), -math.inf)


def test_first_is_the_lowest_of_the_longest() -> None:
    gradients = PolarGradients(torch.tensor([-2.0, -1.0, -1.0, -3.0]).double(), torch.eye(4))
    assert cover(gradients, n=1).rows.tolist() == [1]


def test_duplicates_are_not_chosen_twice(make_gradients: MakeGradients) -> None:
    gradients = make_gradients(8, 4, seed=5)
    many = gradients.take(torch.arange(8).repeat(40))
    with small_blocks():
        found = cover(many, n=100)
        fewer = cover(many, n=5)
    assert len(found.rows) == 8
    assert sorted((found.rows % 8).tolist()) == list(range(8))
    assert found.log_radius == -math.inf
    assert sorted((fewer.rows % 8).tolist()) == cover(gradients, n=5).rows.tolist()


def test_equally_far_gradients_end() -> None:
    # More of them than the pool holds: all distances are √2 until the last.
    gradients = PolarGradients(torch.zeros(40).double(), torch.eye(40))
    with small_blocks(4):
        found = cover(gradients, n=39)
    assert len(found.rows) == 39
    assert found.log_radius == pytest.approx(math.log(2) / 2, abs=1e-12)


def test_difference_below_the_last_bit_is_not_called_zero() -> None:
    # e^0 and e^(-1e-18) are one number in float64; the gradients differ all the same.
    direction = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = cover(PolarGradients(torch.tensor([0.0, -1e-18, -0.5]).double(), direction), n=2)
    assert found.rows.tolist() == [0, 2]
    assert math.log(1e-18) <= found.log_radius < math.log(1e-13)


def test_gradients_closer_than_products_can_tell() -> None:
    # On a line, 1e-10 to 1e-9 of their length apart: the squares of such distances are lost in ‖g‖² + ‖c‖² - 2⟨g, c⟩.
    generator = torch.Generator().manual_seed(0)
    place = 1e-9 * torch.randn(30, generator=generator, dtype=torch.float64).cumsum(0)
    direction = torch.randn(1, 7, generator=generator)
    gradients = PolarGradients(place - 1.0, (direction / direction.norm()).expand(30, 7))
    distance = (torch.expm1(place)[:, None] - torch.expm1(place)).abs().log().numpy() - 1
    for n in range(2, 30, 3):
        with small_blocks():
            rows = cover(gradients, n=n).rows
        expected = naive_greedy(gradients, distance, n)
        assert rows.tolist() == sorted(expected)


def test_scales_beyond_float64() -> None:
    # One gradient each e^100: greedy takes them in their order, and the radius is right at each.
    log_magnitude = torch.arange(0, -2000, -100).double()
    gradients = PolarGradients(log_magnitude, torch.ones(20, 1))
    for pool, n in itertools.product((1, 5, 20), (1, 4, 8, 12)):
        with small_blocks(pool):
            found = cover(gradients, n=n)
        # The second is any: all others are equally far from the first.
        assert len(found.rows) == n
        assert found.rows.tolist()[: n - 1] == list(range(max(1, n - 1)))[: n - 1]
        assert found.log_radius == pytest.approx(-100 * (n - 1), abs=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("memory", [None, 0])
def test_every_kind_of_store(dtype: str, memory: int | None, make_gradients: MakeGradients, tmp_path: Path) -> None:
    """The choice is among what is stored, and the radius is that of the stored gradients."""
    writer = StoreWriter(300, 9, StoreOptions(dtype, memory, tmp_path))
    writer.append(make_gradients(300, 9, seed=2))
    store = writer.finish()
    found, expected = cover(store, n=40), cover(store.take(slice(None)), n=40)
    assert torch.equal(found.rows, expected.rows)
    assert found.log_radius == expected.log_radius


def test_progress_is_told(make_gradients: MakeGradients, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []

    def progress(centres: Iterable[int]) -> Iterator[int]:
        for centre in centres:
            seen.append(centre)
            yield centre

    store = GradientStore.of(make_gradients(50, 3, seed=1))
    KCenterCoreset(n=9).cover(store, progress=progress)
    assert len(seen) == 8
    KCenterCoreset(n=9).cover(store, progress=True)
    assert "coreset" in capsys.readouterr().err


# --- In a detector ------------------------------------------------------------------------------------------------


def test_sample_in_a_detector(features: tuple[Tensor, Tensor]) -> None:
    values, labels = features
    detector = GROOD(None, subset=ClassSample(n=9)).fit_features(values, labels)
    info = detector.fit_info_
    assert (info.n_correct, info.n_indexed, info.subset) == (240, 36, {"name": "ClassSample", "n": 9})
    assert info.covering_radius is None
    order = torch.randperm(240, generator=torch.Generator().manual_seed(1))
    shuffled = GROOD(None, subset=ClassSample(n=9)).fit_features(values[order], labels[order])
    assert torch.allclose(detector.score_features(values), shuffled.score_features(values[order])[order.argsort()])
    other = GROOD(None, subset=ClassSample(n=9), seed=1).fit_features(values, labels)
    assert not torch.allclose(detector.score_features(values), other.score_features(values))


def test_coreset_in_a_detector(features: tuple[Tensor, Tensor]) -> None:
    values, labels = features
    whole = GROOD(None).fit_features(values, labels)
    detector = GROOD(None, subset=KCenterCoreset(ratio=0.1)).fit_features(values, labels)
    info = detector.fit_info_
    assert (info.n_correct, info.n_indexed, info.subset) == (240, 24, {"name": "KCenterCoreset", "ratio": 0.1})
    assert info.covering_radius is not None
    queries = torch.cat([values, values + 1, -3 * values])
    grown = detector.score_features(queries) - whole.score_features(queries)
    assert bool((grown >= 0).all())
    assert float(grown.max()) == pytest.approx(info.covering_radius)
    assert float(grown.max()) <= info.covering_radius


@pytest.mark.parametrize("subset", [ClassSample(ratio=0.2), KCenterCoreset(radius=0.01)])
def test_subset_is_kept_in_the_file(
    subset: ClassSample | KCenterCoreset, features: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    values, labels = features
    detector = GROOD(None, subset=subset).fit_features(values, labels)
    detector.save(tmp_path / "part.grood")
    again = GROOD.load(tmp_path / "part.grood")
    assert again.subset == subset
    assert again.fit_info_ == detector.fit_info_
    assert torch.equal(again.score_features(values), detector.score_features(values))


def test_brute_force_is_what_scores_are(make_gradients: MakeGradients, brute_force: BruteForce) -> None:
    # The oracle above against the distance that detectors use.
    first, second = make_gradients(20, 5, seed=1), make_gradients(20, 5, seed=2)
    assert np.allclose(np.diag(brute_force(first, second)), log_distance(first, second).numpy(), atol=1e-12)
