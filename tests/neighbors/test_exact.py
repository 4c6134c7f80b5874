"""Exact search against brute force, and attempts to break the bounds that its candidates come from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from torch_grood import ExactIndex, GroodError
from torch_grood.gradients import GradientField, PolarGradients
from torch_grood.neighbors import GradientSearcher, Neighbors, log_distance, make_index
from torch_grood.neighbors import brute as brute_module
from torch_grood.neighbors import exact as exact_module

MakeGradients = Callable[..., PolarGradients]
BruteForce = Callable[[PolarGradients, PolarGradients], NDArray[np.float64]]


def gradients(log_magnitude: Tensor | list[float], direction: Tensor | list[list[float]]) -> PolarGradients:
    """Gradients of the given directions, brought to unit length."""
    vectors = torch.as_tensor(direction, dtype=torch.float64)
    length = vectors.norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, vectors / length, 0.0).float()
    return PolarGradients(torch.as_tensor(log_magnitude, dtype=torch.float64), unit)


def all_distances(queries: PolarGradients, stored: PolarGradients) -> Tensor:
    """`log_distance` of all pairs, (n, N): no candidates, no bounds."""
    n = len(stored.log_magnitude)
    rows = [log_distance(queries.take(torch.full((n,), i)), stored) for i in range(len(queries.log_magnitude))]
    return torch.stack(rows)


def assert_nearest_to_the_bit(found: Neighbors, queries: PolarGradients, stored: PolarGradients, k: int) -> None:
    """The k least of all distances, bit for bit, and among equal distances the lowest rows."""
    distance, row = all_distances(queries, stored).sort(dim=1, stable=True)
    assert torch.equal(found.log_distance, distance[:, :k])
    assert torch.equal(found.row, row[:, :k])


def assert_nearest(
    found: Neighbors, queries: PolarGradients, stored: PolarGradients, k: int, brute_force: BruteForce
) -> None:
    """The k least distances, up to the rounding of float64, at k different rows.

    Distances are compared in units of the larger vector of the pair, where both sides round at 2⁻⁵².
    """
    distance = brute_force(queries, stored)
    expected = np.sort(distance, axis=1)[:, :k]
    rows = found.row.numpy()
    assert found.log_distance.shape == rows.shape == expected.shape
    assert all(len(set(row)) == k for row in rows.tolist())
    assert bool((found.log_distance[:, 1:] >= found.log_distance[:, :-1]).all())
    unit = np.maximum(queries.log_magnitude.numpy()[:, None], stored.log_magnitude.numpy()[rows])
    for claimed in (found.log_distance.numpy(), np.take_along_axis(distance, rows, axis=1)):
        np.testing.assert_allclose(np.exp(claimed - unit), np.exp(expected - unit), rtol=1e-12, atol=1e-14)


# --- The distance itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, -40.0, -300.0, -690.0, -1e4])
@pytest.mark.parametrize("gap", [0.0, 1e-6, 1.0, 30.0, 340.0])
def test_log_distance_equals_fifty_digits(make_gradients: MakeGradients, offset: float, gap: float) -> None:
    first = make_gradients(5, 6, seed=1, low=offset - 1, high=offset)
    second = make_gradients(5, 6, seed=2, low=offset - gap - 1, high=offset - gap)
    for a, b in itertools.permutations([first, second]):
        found = log_distance(a, b)
        with mpmath.workdps(50):
            for i in range(5):
                sizes = [mpmath.exp(mpmath.mpf(x.log_magnitude[i].item())) for x in (a, b)]
                pairs = zip(a.direction[i].tolist(), b.direction[i].tolist(), strict=True)
                square = mpmath.fsum((sizes[0] * mpmath.mpf(u) - sizes[1] * mpmath.mpf(v)) ** 2 for u, v in pairs)
                assert abs(mpmath.log(square) / 2 - mpmath.mpf(found[i].item())) < 1e-15 * (3 + abs(offset))


def test_log_distance_of_almost_equal_gradients() -> None:
    # One direction, magnitudes a relative 1e-9 apart: the difference is 1e-9 of them, and nothing else is lost.
    first, second = gradients([-50.0], [[3.0, 4.0]]), gradients([-50.0 - 1e-9], [[3.0, 4.0]])
    length = float(first.direction.double().norm())
    exact = -50.0 + np.log(length) + np.log(-np.expm1((-50.0 - 1e-9) - (-50.0)))
    assert float(log_distance(first, second)) == pytest.approx(exact, abs=1e-6)


def test_log_distance_is_symmetric_and_minus_infinity_for_equals(make_gradients: MakeGradients) -> None:
    first, second = make_gradients(50, 7, seed=1), make_gradients(50, 7, seed=2)
    assert torch.equal(log_distance(first, second), log_distance(second, first))
    assert torch.equal(log_distance(first, first), torch.full((50,), -torch.inf, dtype=torch.float64))


def test_distance_to_the_zero_vector_is_the_norm() -> None:
    zero, other = gradients([-1.0], [[0.0, 0.0]]), gradients([-2.0], [[0.0, 5.0]])
    assert float(log_distance(zero, other)) == pytest.approx(-2.0, abs=1e-15)
    assert float(log_distance(zero, zero._replace(log_magnitude=torch.tensor([-9.0]).double()))) == -torch.inf


def test_distance_to_the_zero_vector_does_not_underflow() -> None:
    zero, other = gradients([-0.1], [[0.0, 0.0]]), gradients([-400.0], [[0.0, 5.0]])
    assert float(log_distance(zero, other)) == pytest.approx(-400.0)
    assert float(log_distance(other, zero)) == pytest.approx(-400.0)


# --- Against brute force ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 2, 3, 16, 257, 2048])
@pytest.mark.parametrize("n", [1, 2, 63, 500])
def test_random_gradients(make_gradients: MakeGradients, brute_force: BruteForce, n: int, d: int) -> None:
    stored, queries = make_gradients(n, d, seed=1), make_gradients(20, d, seed=2)
    searcher = ExactIndex().build(stored)
    assert searcher.quality is None
    for k in {1, min(3, n), n}:
        found = searcher.search(queries, k)
        assert_nearest(found, queries, stored, k, brute_force)
        assert_nearest_to_the_bit(found, queries, stored, k)


def test_more_rows_than_a_tile_and_more_queries_than_a_group(make_gradients: MakeGradients) -> None:
    stored, queries = make_gradients(2 * brute_module._TILE_ROWS + 37, 8, seed=1), make_gradients(300, 8, seed=2)
    found = ExactIndex().build(stored).search(queries, 5)
    assert found.row.max() >= 2 * brute_module._TILE_ROWS
    assert_nearest_to_the_bit(found, queries, stored, 5)


@pytest.mark.parametrize("budget", [1, 1000, 64 * 16 * 256, 10**6])
@pytest.mark.parametrize("k", [1, 7, 100, 333])
def test_tiny_byte_budgets_give_the_same_result(make_gradients: MakeGradients, budget: int, k: int) -> None:
    # 333 rows in tiles of 64: the last tile holds 13, fewer than k.
    stored, queries = make_gradients(333, 12, seed=1, low=-40), make_gradients(20, 12, seed=2, low=-40)
    expected = ExactIndex().build(stored).search(queries, k)
    found = ExactIndex(byte_budget=budget).build(stored).search(queries, k)
    assert torch.equal(found.log_distance, expected.log_distance)
    assert torch.equal(found.row, expected.row)
    assert_nearest_to_the_bit(found, queries, stored, k)


@pytest.mark.parametrize("budget", [1, 2**28])
def test_stored_rows_find_themselves(make_gradients: MakeGradients, budget: int) -> None:
    stored = make_gradients(500, 9, low=-700)
    found = ExactIndex(byte_budget=budget).build(stored).search(stored, 2)
    assert torch.equal(found.row[:, 0], torch.arange(500))
    assert bool((found.log_distance[:, 0] == -torch.inf).all())
    assert bool(found.log_distance[:, 1].isfinite().all())


@pytest.mark.parametrize("budget", [1, 2**28])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_among_duplicates_the_lowest_rows_come_first(make_gradients: MakeGradients, budget: int, k: int) -> None:
    few = make_gradients(5, 6, low=-60)
    rows = torch.arange(40) % 5
    stored = few.take(rows[torch.randperm(40, generator=torch.Generator().manual_seed(0))])
    found = ExactIndex(byte_budget=budget).build(stored).search(few, k)
    assert_nearest_to_the_bit(found, few, stored, k)


def test_all_rows_are_one() -> None:
    # Everything ties with everything: all pairs are candidates, and groups are split for want of memory.
    stored = gradients(torch.full((700,), -5.0), torch.ones(700, 4))
    queries = gradients(torch.full((300,), -4.0), torch.ones(300, 4))
    for budget in (4096, 2**28):
        found = ExactIndex(byte_budget=budget).build(stored).search(queries, 3)
        assert torch.equal(found.row, torch.arange(3).expand(300, 3))
        assert len(found.log_distance.unique()) == 1


def test_zero_vectors_among_rows_and_queries(make_gradients: MakeGradients, brute_force: BruteForce) -> None:
    # π is finite where h = p_ood, but the gradient is the zero vector: its magnitude must count for nothing.
    stored, queries = make_gradients(60, 5, seed=1, low=-20), make_gradients(30, 5, seed=2, low=-20)
    stored.direction[[3, 10, 59]] = 0.0
    queries.direction[[0, 7]] = 0.0
    found = ExactIndex().build(stored).search(queries, 60)
    assert_nearest(found, queries, stored, 60, brute_force)
    assert found.row[0, :3].tolist() == found.row[7, :3].tolist() == [3, 10, 59]
    assert bool((found.log_distance[[0, 7], :3] == -torch.inf).all())


def test_only_zero_vectors() -> None:
    zeros = gradients([-1.0, -200.0, -3.0], torch.zeros(3, 2))
    found = ExactIndex().build(zeros).search(zeros, 3)
    assert torch.equal(found.row, torch.arange(3).expand(3, 3))
    assert bool((found.log_distance == -torch.inf).all())


def test_a_loud_zero_vector_does_not_hide_quiet_rows(brute_force: BruteForce) -> None:
    # The zero vector at log π = -1 is nearest for a small query (distance = its norm) but one that it equals almost.
    stored = gradients([-1.0, -60.0, -60.0], [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    queries = gradients([-60.0, -60.0, -60.0], [[1.0, 0.1], [0.1, 1.0], [-1.0, -1.0]])
    found = ExactIndex().build(stored).search(queries)
    assert found.row.flatten().tolist() == [1, 2, 0]
    assert_nearest(found, queries, stored, 1, brute_force)


@pytest.mark.parametrize("k", [1, 3])
def test_magnitudes_from_one_to_the_smallest_float64(
    make_gradients: MakeGradients, brute_force: BruteForce, k: int
) -> None:
    stored, queries = make_gradients(400, 5, seed=1, low=-700), make_gradients(200, 5, seed=2, low=-700)
    found = ExactIndex().build(stored).search(queries, k)
    assert_nearest(found, queries, stored, k, brute_force)


def test_magnitudes_far_below_float64(make_gradients: MakeGradients) -> None:
    # The result depends on ratios only.
    stored, queries = make_gradients(100, 5, seed=1, low=-9), make_gradients(50, 5, seed=2, low=-9)
    near = ExactIndex().build(stored).search(queries)
    shifted = [x._replace(log_magnitude=x.log_magnitude - 2.0**13) for x in (stored, queries)]
    far = ExactIndex().build(shifted[0]).search(shifted[1])
    assert torch.equal(near.row, far.row)
    torch.testing.assert_close(far.log_distance + 2.0**13, near.log_distance, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_hostile_sets(brute_force: BruteForce, data: st.DataObject) -> None:
    d = data.draw(st.integers(1, 4))
    n, m = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 12))
    magnitude = st.one_of(st.sampled_from([0.0, -1e-7, -1.0, -29.9, -30.1, -33.0, -88.0, -104.0]), st.floats(-300, 0))
    component = st.sampled_from([0.0, 1.0, -1.0, 1.0 + 2**-20, 1e-4, 3.0, -1e-12])
    vector = st.lists(component, min_size=d, max_size=d)

    def draw(count: int) -> PolarGradients:
        # Few distinct rows, repeated: ties and duplicates are common.
        distinct = data.draw(st.lists(st.tuples(magnitude, vector), min_size=1, max_size=12))
        picks = data.draw(st.lists(st.integers(0, len(distinct) - 1), min_size=count, max_size=count))
        return gradients([distinct[i][0] for i in picks], [distinct[i][1] for i in picks])

    stored, queries = draw(n), draw(m)
    k = data.draw(st.integers(1, n))
    budget = data.draw(st.sampled_from([1, 10_000, 2**28]))
    found = ExactIndex(byte_budget=budget).build(stored).search(queries, k)
    assert_nearest(found, queries, stored, k, brute_force)


# --- Attacks on the bound -----------------------------------------------------------------------------------------


def near_ties(d: int, ratio: float, spread: float, n: int = 600) -> tuple[PolarGradients, PolarGradients]:
    """Queries, and rows whose distances from them differ by a relative `spread`; ‖row‖ / ‖query‖ = e^ratio."""
    generator = torch.Generator().manual_seed(d)
    base = torch.randn(1, d, generator=generator, dtype=torch.float64)
    rows = base + spread * torch.randn(n, d, generator=generator, dtype=torch.float64)
    queries = torch.randn(20, d, generator=generator, dtype=torch.float64)
    # Half of the queries lie in the direction of the rows, where distances are the difference of large numbers.
    queries[:10] = base + 0.01 * queries[:10]
    magnitude = ratio + spread * torch.randn(n, generator=generator, dtype=torch.float64)
    return gradients(torch.zeros(20), queries), gradients(magnitude, rows)


@pytest.mark.parametrize("d", [1, 2, 3, 64, 1024])
@pytest.mark.parametrize("ratio", [0.0, -1e-7, 3.0, -3.0, -8.0, -12.0])
@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-7])
def test_rows_that_almost_tie(d: int, ratio: float, spread: float) -> None:
    queries, stored = near_ties(d, ratio, spread)
    found = ExactIndex(prune=False).build(stored).search(queries, 4)
    assert_nearest_to_the_bit(found, queries, stored, 4)


@pytest.mark.parametrize("ratio", [0.0, 3.0, -3.0, -8.0, -12.0])
@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-7])
def test_the_filter_loses_no_row_that_almost_ties(ratio: float, spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CANDIDATE", "_NUMBER"):
        monkeypatch.setattr(exact_module, name, 0)
    monkeypatch.setattr(exact_module, "_SMALLEST", 1)
    queries, stored = near_ties(64, ratio, spread)
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    assert_nearest_to_the_bit(searcher.search(queries, 4), queries, stored, 4)


def test_the_matrix_product_alone_would_be_wrong() -> None:
    # The attacks above are attacks: float32 products pick another row for many of these queries.
    queries, stored = near_ties(64, 0.0, 1e-7)
    products = queries.direction @ stored.direction.T
    b = stored.log_magnitude.exp().float()
    guess = (b.square() - 2 * b * products).argmin(1)
    assert int((guess != all_distances(queries, stored).argmin(1)).sum()) > 5


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_products_of_one_sign_accumulate_rounding(sign: float) -> None:
    # 2,048 equal products: rounding errors of the sum do not cancel.
    generator = torch.Generator().manual_seed(0)
    direction = torch.ones(400, 2048, dtype=torch.float64)
    direction += 1e-6 * torch.randn(400, 2048, generator=generator, dtype=torch.float64)
    stored, queries = gradients(torch.zeros(390), direction[:390]), gradients(torch.zeros(10), sign * direction[390:])
    assert_nearest_to_the_bit(ExactIndex().build(stored).search(queries, 3), queries, stored, 3)


@pytest.mark.parametrize("d", [1, 3, 64])
def test_rows_that_almost_tie_for_the_zero_vector(d: int) -> None:
    # Norms alone decide; directions are of unit length up to the rounding to float32, which decides here.
    _, stored = near_ties(d, -5.0, 1e-7)
    zero = gradients([-5.0, -2.0], torch.zeros(2, d))
    assert_nearest_to_the_bit(ExactIndex().build(stored).search(zero, 4), zero, stored, 4)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_every_matmul_precision_gives_exact_results(precision: str, make_gradients: MakeGradients) -> None:
    stored, queries = make_gradients(2000, 64, seed=1), make_gradients(100, 64, seed=2)
    tied_queries, tied = near_ties(64, 0.0, 1e-5)
    with matmul_precision(precision):
        found = ExactIndex().build(stored).search(queries, 5)
        found_tied = ExactIndex().build(tied).search(tied_queries, 5)
    assert_nearest_to_the_bit(found, queries, stored, 5)
    assert_nearest_to_the_bit(found_tied, tied_queries, tied, 5)


@contextmanager
def rounded_products(bits: int) -> Iterator[None]:
    """Round what is multiplied to so many bits, as bfloat16 (8) and TF32 (11) do, whatever the processor."""
    true_addmm = torch.addmm

    def rounded(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "addmm", lambda bias, left, right: true_addmm(bias, rounded(left), rounded(right)))
        yield


def rows_that_round_alike(bits: int) -> tuple[PolarGradients, PolarGradients]:
    """Rows of two values (1 + x)/8 and (1 - y)/8: all 32 errors of a kind have one sign, and do not average out.

    Below x = 2⁻ᵇⁱᵗˢ, 1 + x is rounded down and near rows seem far; above, it is rounded up and far ones seem near.
    """
    x = torch.linspace(0.97, 1.03, 800, dtype=torch.float64)[:, None] * 2.0**-bits
    y = 1 - (2 - (1 + x).square()).sqrt()
    rows = torch.cat([(1 + x).expand(-1, 32), (1 - y).expand(-1, 32)], dim=1)
    return gradients([0.0], torch.ones(1, 64)), gradients(torch.zeros(800), rows.flip(0))


@pytest.mark.parametrize(("precision", "bits"), [("medium", 8), ("high", 11)])
def test_products_of_the_stated_precision_give_exact_results(
    precision: str, bits: int, make_gradients: MakeGradients
) -> None:
    sets = [
        (make_gradients(100, 64, seed=2), make_gradients(2000, 64, seed=1)),
        near_ties(64, -1.0, 1e-3),
        rows_that_round_alike(bits),
    ]
    for queries, stored in sets:
        with matmul_precision(precision), rounded_products(bits):
            found = ExactIndex().build(stored).search(queries, 5)
        assert_nearest_to_the_bit(found, queries, stored, 5)


def test_autocast_gives_exact_results(make_gradients: MakeGradients) -> None:
    stored, queries = make_gradients(3000, 64, seed=1), make_gradients(300, 64, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ExactIndex().build(stored).search(queries, 5)
    assert_nearest_to_the_bit(found, queries, stored, 5)


@pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"), reason="torch ≥ 2.9 has this setting"
)
def test_the_newer_precision_setting_gives_exact_results(make_gradients: MakeGradients) -> None:
    stored, queries = make_gradients(2000, 64, seed=1), make_gradients(100, 64, seed=2)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        found = ExactIndex().build(stored).search(queries, 5)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert_nearest_to_the_bit(found, queries, stored, 5)


# --- Laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 7, 64, 512])
def test_the_same_bits_alone_and_among_a_thousand(make_gradients: MakeGradients, d: int) -> None:
    # Magnitudes spread over several groups of scale, so that a query's group depends on its company.
    stored, queries = make_gradients(1500, d, seed=1, low=-15), make_gradients(1000, d, seed=2, low=-80)
    searcher = ExactIndex().build(stored)
    whole = searcher.search(queries, 3)
    for i in range(0, 1000, 37):
        alone = searcher.search(queries.take(slice(i, i + 1)), 3)
        assert torch.equal(alone.log_distance[0], whole.log_distance[i])
        assert torch.equal(alone.row[0], whole.row[i])
    part = searcher.search(queries.take(slice(100, 357)), 3)
    assert torch.equal(part.log_distance, whole.log_distance[100:357])
    assert torch.equal(part.row, whole.row[100:357])


def test_the_same_row_alone_and_in_a_batch_where_rows_are_tiny(make_gradients: MakeGradients) -> None:
    base = torch.randn(1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = make_gradients(3000, 16, seed=1).direction
    stored = gradients(torch.full((3000,), -95.0), base + 1e-5 * noise)
    queries = make_gradients(64, 16, seed=2, low=-0.01)
    searcher = ExactIndex().build(stored)
    # All rows are equally far in float64: which is named is left open, the distance is not.
    alone = torch.cat([searcher.search(queries.take(slice(i, i + 1))).log_distance for i in range(64)])
    assert torch.equal(alone, searcher.search(queries).log_distance)


def test_the_same_bits_alone_and_in_a_batch_of_very_long_features(make_gradients: MakeGradients) -> None:
    first, second = make_gradients(10, 40_000, seed=1), make_gradients(10, 40_000, seed=2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = log_distance(first, second)
        alone = torch.cat([log_distance(first.take(slice(i, i + 1)), second.take(slice(i, i + 1))) for i in range(10)])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, whole)


def test_permuting_the_rows_permutes_the_result(make_gradients: MakeGradients) -> None:
    stored, queries = make_gradients(500, 6, seed=1), make_gradients(40, 6, seed=2)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    plain = ExactIndex().build(stored).search(queries, 3)
    permuted = ExactIndex().build(stored.take(order)).search(queries, 3)
    assert torch.equal(order[permuted.row], plain.row)
    assert torch.equal(permuted.log_distance, plain.log_distance)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_scores_at_every_feature_scale(scale: float) -> None:
    # From features to scores, against 50 digits throughout; directions are rounded to float32 on both sides.
    generator = torch.Generator().manual_seed(4)
    prototypes = scale * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    features = prototypes[torch.arange(48) % 4] + 0.5 * scale * torch.randn(
        48, 6, generator=generator, dtype=torch.float64
    )
    field = GradientField(prototypes, prototypes.mean(0) + scale)
    stored, queries = field(features[:40]).gradients, field(features[40:]).gradients
    found = ExactIndex().build(stored).search(queries)

    def vectors(part: PolarGradients) -> list[list[mpmath.mpf]]:
        sizes = [mpmath.exp(mpmath.mpf(x)) for x in part.log_magnitude.tolist()]
        return [
            [size * mpmath.mpf(u) for u in row]
            for size, row in zip(sizes, part.direction.float().tolist(), strict=True)
        ]

    with mpmath.workdps(50):
        rows = vectors(stored)
        for i, query in enumerate(vectors(queries)):
            squares = [mpmath.fsum((a - b) ** 2 for a, b in zip(query, row, strict=True)) for row in rows]
            best = min(squares)
            assert int(found.row[i]) == squares.index(best)
            assert abs(mpmath.log(best) / 2 - mpmath.mpf(found.log_distance[i].item())) < 1e-11


# --- Interface ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 11])
def test_k_out_of_range(make_gradients: MakeGradients, k: int) -> None:
    searcher = ExactIndex().build(make_gradients(10, 3))
    with pytest.raises(GroodError, match=f"asked for k={k} neighbours among 10 stored gradients"):
        searcher.search(make_gradients(2, 3), k)


def test_no_query(make_gradients: MakeGradients) -> None:
    found = ExactIndex().build(make_gradients(10, 3)).search(make_gradients(0, 3), 2)
    assert found.log_distance.shape == found.row.shape == (0, 2)


def test_nothing_to_search(make_gradients: MakeGradients) -> None:
    with pytest.raises(GroodError, match="no gradient to search"):
        ExactIndex().build(make_gradients(0, 3))


def test_a_search_changes_nothing(make_gradients: MakeGradients) -> None:
    stored, queries = make_gradients(100, 5, seed=1), make_gradients(10, 5, seed=2)
    before = [x.clone() for x in (*stored, *queries)]
    searcher = ExactIndex().build(stored)
    first, second = searcher.search(queries, 2), searcher.search(queries, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, (*stored, *queries), strict=True))
    assert torch.equal(first.row, second.row)
    assert torch.equal(first.log_distance, second.log_distance)


def test_float64_directions_are_rounded_as_stored_ones_are(make_gradients: MakeGradients) -> None:
    stored = make_gradients(50, 4)
    doubled = stored._replace(direction=stored.direction.double() * (1 + 1e-12))
    searcher: GradientSearcher = ExactIndex(device="cpu").build(doubled)
    assert searcher.gradients.codes.dtype == torch.float32
    assert bool((searcher.search(doubled).log_distance == -torch.inf).all())


def test_make_index() -> None:
    assert make_index("exact") == ExactIndex()
    index = ExactIndex(byte_budget=5)
    assert make_index(index) is index
    assert index.spec == "exact"
    for wrong in ("", "  ", None, 5):
        with pytest.raises(GroodError, match="index must be 'exact', a faiss factory string or a GradientIndex"):
            make_index(wrong)  # type: ignore[arg-type]


def low_rank(n: int, d: int, rank: int, seed: int, spread: float) -> PolarGradients:
    """Gradients near a subspace that is the same for every seed, around twenty of its directions."""
    fixed = torch.Generator().manual_seed(1234)
    centres = torch.randn(20, rank, generator=fixed) @ torch.randn(rank, d, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(20, (n,), generator=generator)
    return gradients(
        -0.2 * torch.rand(n, generator=generator).double(),
        centres[chosen] + spread * torch.randn(n, d, generator=generator),
    )


def test_a_filter_is_chosen_where_it_pays() -> None:
    stored, queries = low_rank(20_000, 128, 5, 1, 0.05), low_rank(20, 128, 5, 2, 0.05)
    # Few rows of each cluster remain: nearly the whole of a row's distance to others is inside the first directions.
    stored.log_magnitude.mul_(300)
    queries.log_magnitude.mul_(300)
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    assert all(m in exact_module._WIDTHS for m in searcher.widths)
    assert list(searcher.widths) == sorted(set(searcher.widths))
    assert searcher.nbytes >= 4 * 20_000 * searcher.widths[0]
    assert_same_result(searcher.search(queries, 3), ExactIndex(prune=False).build(stored).search(queries, 3))


def assert_same_result(found: Neighbors, expected: Neighbors) -> None:
    assert torch.equal(found.log_distance, expected.log_distance)
    assert torch.equal(found.row, expected.row)


def test_brute_force_is_chosen_where_all_directions_are_alike(make_gradients: MakeGradients) -> None:
    # In 300 dimensions random directions are all equally far apart, and no few numbers tell which is nearest.
    searcher = ExactIndex().build(make_gradients(4000, 300, low=-0.1))
    assert searcher.widths == ()
    assert searcher.nbytes == 0


def test_brute_force_is_chosen_where_it_is_asked_for() -> None:
    stored = low_rank(20_000, 128, 5, 1, 0.05)
    stored.log_magnitude.mul_(300)
    assert ExactIndex(prune=False).build(stored).widths == ()


def test_brute_force_is_chosen_for_few_numbers() -> None:
    assert ExactIndex().build(low_rank(8000, 128, 5, 1, 0.0)).widths == ()
    assert ExactIndex().build(low_rank(3, 500_000, 1, 1, 0.0)).widths == ()


def test_many_equal_rows_choose_something_exact() -> None:
    # A stored gradient's nearest is at distance 0: the sample says nothing of queries from elsewhere.
    stored = low_rank(10, 256, 5, 1, 0.05).take(torch.arange(5000) % 10)
    queries = low_rank(3, 256, 5, 2, 0.05)
    assert_same_result(
        ExactIndex().build(stored).search(queries, 2), ExactIndex(prune=False).build(stored).search(queries, 2)
    )


def test_zero_vectors_and_tiny_rows_do_not_disturb_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, queries = low_rank(2000, 64, 5, 1, 0.05), low_rank(30, 64, 5, 2, 0.05)
    stored.direction[::3] = 0.0
    stored.log_magnitude[1::3] -= 700
    monkeypatch.setattr(exact_module, "_SMALLEST", 1)
    monkeypatch.setattr(exact_module, "_CANDIDATE", 0)
    monkeypatch.setattr(exact_module, "_NUMBER", 0)
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    # Only from the rows that are left is the result told apart; two thirds of all are equally far in float64.
    found, expected = (x.search(queries).log_distance for x in (searcher, ExactIndex(prune=False).build(stored)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [5, 300, 1030])
@pytest.mark.parametrize("kind", ["random", "one direction", "zero", "tiny"])
def test_principal_axes_are_orthonormal(d: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if d == 1030:
        # Beyond this, by iteration.
        monkeypatch.setattr(exact_module, "_ALL_AXES", 100)
        d = 130
    vectors = torch.randn(400, d, generator=torch.Generator().manual_seed(0))
    if kind == "one direction":
        vectors = vectors[:, :1] * torch.ones(d)
    elif kind == "zero":
        vectors = torch.zeros(400, d)
    elif kind == "tiny":
        vectors *= 1e-18
    count = min(d, 61)
    before = torch.get_rng_state()
    axes = exact_module._principal_axes(vectors, count)
    assert torch.equal(torch.get_rng_state(), before)
    assert axes.dtype == torch.float64
    if bool(axes.isfinite().all()):
        assert axes.shape[0] == d
        assert axes.shape[1] >= count
        product = axes.T @ axes
        # The margin of the residuals, 1e-6, is the root of what may be lost.
        assert float((product - torch.eye(len(product), dtype=torch.float64)).abs().max()) < 1e-13


@pytest.mark.parametrize("by_iteration", [False, True])
def test_principal_axes_hold_most_of_the_vectors(by_iteration: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_iteration:
        monkeypatch.setattr(exact_module, "_ALL_AXES", 1)
    vectors = low_rank(500, 130, 6, 1, 0.01).direction
    axes = exact_module._principal_axes(vectors, 13)
    held = [float((vectors.double() @ axes[:, :m]).square().sum() / vectors.double().square().sum()) for m in (1, 6)]
    exact = torch.linalg.svdvals(vectors.double()).square()
    assert held[0] == pytest.approx(float(exact[0] / exact.sum()), abs=1e-3)
    assert held[1] == pytest.approx(float(exact[:6].sum() / exact.sum()), abs=1e-6)


def test_many_dimensions_give_exact_results(monkeypatch: pytest.MonkeyPatch) -> None:
    stored, queries = low_rank(1100, 1030, 5, 1, 0.05), low_rank(20, 1030, 5, 2, 0.05)
    monkeypatch.setattr(exact_module, "_CANDIDATE", 0)
    monkeypatch.setattr(exact_module, "_NUMBER", 0)
    monkeypatch.setattr(exact_module, "_WIDTHS", (13, 29))
    before = torch.get_rng_state()
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_result(searcher.search(queries, 2), ExactIndex(prune=False).build(stored).search(queries, 2))


def test_axes_that_are_not_finite_leave_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_module, "_SMALLEST", 1)
    monkeypatch.setattr(exact_module, "_CANDIDATE", 0)
    monkeypatch.setattr(exact_module, "_NUMBER", 0)
    monkeypatch.setattr(exact_module, "_principal_axes", lambda vectors, count: torch.full((64, 61), torch.nan))
    assert ExactIndex().build(low_rank(500, 64, 5, 1, 0.05)).widths == ()


@pytest.mark.parametrize(("n", "count"), [(1, 5), (5, 5), (7, 3), (1000, 64), (3, 1)])
def test_a_spread_of_rows(n: int, count: int) -> None:
    rows = exact_module._spread(n, count)
    assert len(rows.unique()) == len(rows) == min(n, count)
    assert 0 <= int(rows.min()) <= int(rows.max()) <= n - 1
