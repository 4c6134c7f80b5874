"""The filter of exact search: attempts to make its bounds lose the nearest row."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

import test_cifar10 as cifar10
from torch_grood import GROOD, ExactIndex
from torch_grood.gradients import PolarGradients
from torch_grood.models import load_model
from torch_grood.neighbors import GradientStore, Neighbors, StoreOptions
from torch_grood.neighbors import exact as exact_module
from torch_grood.neighbors import filter as filter_module
from torch_grood.neighbors.filter import BoundFilter
from torch_grood.neighbors.pairs import UNDERFLOW
from torch_grood.neighbors.store import StoreWriter

MakeGradients = Callable[..., PolarGradients]
BruteForce = Callable[[PolarGradients, PolarGradients], NDArray[np.float64]]
WIDTHS = [(13,), (29,), (13, 29), (5, 40)]


def crowded(n: int, d: int, seed: int, spread: float = 0.01) -> PolarGradients:
    """Gradients around one direction whose components have one sign, so that rounding errors add up."""
    generator = torch.Generator().manual_seed(seed)
    vectors = 1 + spread * torch.randn(n, d, generator=generator, dtype=torch.float64)
    log_magnitude = -torch.rand(n, generator=generator, dtype=torch.float64)
    return PolarGradients(log_magnitude, (vectors / vectors.norm(dim=1, keepdim=True)).float())


def clustered(n: int, d: int, seed: int, low: float = -3.0, spread: float = 0.1) -> PolarGradients:
    """Gradients around ten directions that are the same for every seed."""
    centres = torch.randn(10, d, generator=torch.Generator().manual_seed(1234), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(10, (n,), generator=generator)
    vectors = centres[chosen] + spread * torch.randn(n, d, generator=generator, dtype=torch.float64)
    log_magnitude = low * torch.rand(n, generator=generator, dtype=torch.float64)
    return PolarGradients(log_magnitude, (vectors / vectors.norm(dim=1, keepdim=True)).float())


def principal_axes(stored: PolarGradients) -> Tensor:
    vectors = stored.vectors().double()
    return torch.linalg.eigh(vectors.T @ vectors).eigenvectors.flip(1)


def random_axes(d: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q


def make_filter(
    stored: PolarGradients | GradientStore, widths: tuple[int, ...] = (13,), budget: int = 2**28
) -> BoundFilter:
    store = GradientStore.of(stored)
    return BoundFilter(store, principal_axes(store.take(slice(None))), widths, budget)


def plain(queries: PolarGradients, stored: PolarGradients | GradientStore, k: int = 1) -> Neighbors:
    return ExactIndex(prune=False).build(stored).search(queries, k)


def assert_same(found: Neighbors, expected: Neighbors) -> None:
    assert torch.equal(found.log_distance, expected.log_distance)
    assert torch.equal(found.row, expected.row)


def assert_true(
    found: Neighbors, queries: PolarGradients, stored: PolarGradients, k: int, brute_force: BruteForce
) -> None:
    """The k least distances of numpy's float64, in units of the larger vector of the pair."""
    distance = brute_force(queries, stored)
    rows = found.row.numpy()
    unit = np.maximum(queries.log_magnitude.numpy()[:, None], stored.log_magnitude.numpy()[rows])
    expected = np.exp(np.sort(distance, axis=1)[:, :k] - unit)
    for claimed in (found.log_distance.numpy(), np.take_along_axis(distance, rows, axis=1)):
        np.testing.assert_allclose(np.exp(claimed - unit), expected, rtol=1e-12, atol=1e-14)


@pytest.fixture
def always_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of any size are filtered, whether or not this pays."""
    monkeypatch.setattr(exact_module, "_SMALLEST", 1)
    monkeypatch.setattr(exact_module, "_CANDIDATE", 0)
    monkeypatch.setattr(exact_module, "_NUMBER", 0)


@contextmanager
def products_at(precision: str, bits: int) -> Iterator[None]:
    """Set torch's precision, and round what is multiplied to so many bits, whatever the processor does."""

    def rounded(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)

    true_mm, true_mv = torch.mm, torch.mv
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "mm", lambda left, right: true_mm(rounded(left), rounded(right)))
            patch.setattr(torch, "mv", lambda left, right: true_mv(rounded(left), rounded(right)))
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("axes", ["principal", "random"])
@pytest.mark.parametrize("k", [1, 5, 33])
def test_the_nearest_of_clustered_gradients(
    brute_force: BruteForce, widths: tuple[int, ...], axes: str, k: int
) -> None:
    stored, queries = clustered(1001, 48, seed=1), clustered(60, 48, seed=2)
    chosen = principal_axes(stored) if axes == "principal" else random_axes(48)
    found = BoundFilter(GradientStore.of(stored), chosen, widths, 2**28).search(queries, k)
    assert_same(found, plain(queries, stored, k))
    assert_true(found, queries, stored, k, brute_force)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 333])
@pytest.mark.parametrize("widths", [(13,), (5, 15)])
def test_few_rows_and_every_k(make_gradients: MakeGradients, n: int, widths: tuple[int, ...]) -> None:
    stored, queries = make_gradients(n, 20, seed=1), make_gradients(30, 20, seed=2)
    filter_ = make_filter(stored, widths)
    for k in {1, min(n, 5), min(n, 32), min(n, 33), n}:
        assert_same(filter_.search(queries, k), plain(queries, stored, k))


@pytest.mark.parametrize("widths", [(13,), (5, 15)])
@pytest.mark.parametrize("n_queries", [1, 8])
def test_all_rows_are_one(widths: tuple[int, ...], n_queries: int) -> None:
    # Everything ties: all rows are candidates, which are compared one at a time for want of memory.
    one = clustered(1, 20, seed=1)
    stored, queries = one.take(torch.zeros(100, dtype=torch.int64)), clustered(n_queries, 20, seed=2)
    for k in (1, 4):
        found = make_filter(stored, widths, 1).search(queries, k)
        assert torch.equal(found.row, torch.arange(k).expand(n_queries, k))
        assert_same(found, plain(queries, stored, k))


def test_among_duplicates_the_lowest_rows_come_first() -> None:
    few = clustered(7, 20, seed=1)
    rows = torch.randint(7, (700,), generator=torch.Generator().manual_seed(0))
    stored = few.take(rows)
    for k in (1, 40):
        assert_same(make_filter(stored).search(few, k), plain(few, stored, k))


def test_magnitudes_that_differ_by_thirty_orders(make_gradients: MakeGradients, brute_force: BruteForce) -> None:
    low = float(np.log(1e-30))
    stored, queries = make_gradients(900, 20, seed=1, low=low), make_gradients(100, 20, seed=2, low=-29)
    for widths in ((13,), (5, 15)):
        assert_true(make_filter(stored, widths).search(queries, 3), queries, stored, 3, brute_force)


@pytest.mark.usefixtures("always_filter")
@pytest.mark.parametrize("k", [1, 5, 32, 33])
def test_queries_of_every_scale_in_one_batch(make_gradients: MakeGradients, brute_force: BruteForce, k: int) -> None:
    stored = make_gradients(500, 20, seed=1, low=-302, high=-300)
    queries = make_gradients(80, 20, seed=2, low=-500, high=-100)
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    assert searcher.nbytes > 0
    assert_true(searcher.search(queries, k), queries, stored, k, brute_force)


@pytest.mark.usefixtures("always_filter")
def test_queries_inside_and_outside_of_the_scale_keep_their_places(make_gradients: MakeGradients) -> None:
    stored, queries = make_gradients(500, 20, seed=1, low=-2), make_gradients(80, 20, seed=2, low=-2)
    # Far below, the nearest is the smallest row; every third query stays inside.
    queries.log_magnitude[torch.arange(80) % 3 > 0] += 40
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    assert_same(searcher.search(queries, 2), plain(queries, stored, 2))


@pytest.mark.usefixtures("always_filter")
def test_only_zero_vectors_are_left_to_brute_force() -> None:
    stored = PolarGradients(-torch.rand(200).double(), torch.zeros(200, 20))
    searcher = ExactIndex().build(stored)
    assert searcher.widths == ()
    found = searcher.search(clustered(5, 20, seed=1), 2)
    assert torch.equal(found.row, torch.arange(2).expand(5, 2))


@pytest.mark.usefixtures("always_filter")
@pytest.mark.parametrize("k", [1, 3])
def test_one_row_that_is_not_zero(brute_force: BruteForce, k: int) -> None:
    stored, queries = clustered(200, 20, seed=1), clustered(30, 20, seed=2)
    stored.direction[torch.arange(200) != 77] = 0.0
    assert_true(make_filter(stored).search(queries, k), queries, stored, k, brute_force)
    assert_true(ExactIndex().build(stored).search(queries, k), queries, stored, k, brute_force)


def test_zero_rows_and_zero_queries(brute_force: BruteForce) -> None:
    stored, queries = clustered(300, 20, seed=1), clustered(30, 20, seed=2)
    stored.direction[[3, 10, 299]] = 0.0
    queries.direction[[0, 7]] = 0.0
    found = make_filter(stored).search(queries, 4)
    assert found.row[0, :3].tolist() == found.row[7, :3].tolist() == [3, 10, 299]
    assert_true(found, queries, stored, 4, brute_force)


@pytest.mark.parametrize("widths", [(13,), (5, 15)])
def test_stored_rows_find_themselves(widths: tuple[int, ...]) -> None:
    stored = clustered(500, 20, seed=1)
    found = make_filter(stored, widths).search(stored, 2)
    assert torch.equal(found.row[:, 0], torch.arange(500))
    assert bool((found.log_distance[:, 0] == -torch.inf).all())
    assert_same(found, plain(stored, stored, 2))


@pytest.mark.usefixtures("always_filter")
def test_float64_and_strided_queries() -> None:
    stored, queries = clustered(500, 20, seed=1), clustered(50, 20, seed=2)
    expected = plain(queries, stored)
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    turned = queries.direction.T.contiguous().T
    wide = torch.zeros(50, 40)
    wide[:, ::2] = queries.direction
    for direction in (queries.direction.double(), turned, wide[:, ::2], queries.direction.flip(0).flip(0)):
        assert_same(searcher.search(queries._replace(direction=direction)), expected)
    # Rows in another order of the axes in memory, and in float64.
    for direction in (stored.direction.T.contiguous().T, stored.direction.double()):
        assert_same(ExactIndex().build(stored._replace(direction=direction)).search(queries), expected)


def test_no_query() -> None:
    stored = clustered(300, 20, seed=1)
    found = make_filter(stored).search(stored.take(slice(0, 0)), 3)
    assert found.log_distance.shape == found.row.shape == (0, 3)
    assert (found.log_distance.dtype, found.row.dtype) == (torch.float64, torch.int64)


@pytest.mark.usefixtures("always_filter")
@pytest.mark.parametrize("k", [1, 3])
def test_the_same_bits_alone_and_among_a_thousand(k: int) -> None:
    stored, queries = clustered(2000, 32, seed=1), clustered(1000, 32, seed=2, low=-60)
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    whole = searcher.search(queries, k)
    for part in [slice(i, i + 1) for i in range(0, 1000, 37)] + [slice(100, 357)]:
        assert_same(searcher.search(queries.take(part), k), Neighbors(whole.log_distance[part], whole.row[part]))


@pytest.mark.parametrize("budget", [1, 1000, 64 * 1001, 10**6])
@pytest.mark.parametrize("widths", [(13,), (5, 15)])
def test_tiny_byte_budgets_give_the_same_result(budget: int, widths: tuple[int, ...]) -> None:
    stored, queries = clustered(333, 20, seed=1), clustered(6, 20, seed=2)
    for k in (1, 7, 100):
        assert_same(make_filter(stored, widths, budget).search(queries, k), plain(queries, stored, k))


@pytest.mark.parametrize("blocks", [1, 3, 64])
@pytest.mark.parametrize("pilot", [1, 2, 16])
@pytest.mark.parametrize("k", [1, 6])
def test_small_tiles_blocks_and_pilots(monkeypatch: pytest.MonkeyPatch, blocks: int, pilot: int, k: int) -> None:
    # Many tiles: the first part is scanned for itself, the last tile is short, some have fewer blocks than k.
    monkeypatch.setattr(filter_module, "_TILE", 1)
    monkeypatch.setattr(filter_module, "_TILE_QUERIES", 7)
    monkeypatch.setattr(filter_module, "_BLOCKS", blocks)
    monkeypatch.setattr(filter_module, "_PILOT", pilot)
    stored, queries = clustered(401, 20, seed=1), clustered(15, 20, seed=2)
    for widths in ((13,), (5, 15)):
        assert_same(make_filter(stored, widths).search(queries, k), plain(queries, stored, k))


def test_a_batch_with_too_many_candidates_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    # 16 queries tie with 2,000 rows each; the budget allows for about one query's candidates at a time.
    stored = clustered(1, 20, seed=1).take(torch.zeros(2000, dtype=torch.int64))
    queries = clustered(16, 20, seed=2)
    expected = plain(queries, stored)
    monkeypatch.setattr(filter_module, "_TILE", 16 * 128)
    candidates, queries_in_part = [], []
    decide = BoundFilter._decide

    def counted(self: BoundFilter, batch: filter_module._Batch, query: Tensor, *rest: Tensor) -> Neighbors:
        candidates.append(len(query))
        queries_in_part.append(len(batch.norm))
        return decide(self, batch, query, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(BoundFilter, "_decide", counted)
    filter_ = make_filter(stored, budget=16 * 16 * filter_module._TILE_ROWS // filter_module._TILE_QUERIES)
    assert_same(filter_.search(queries, 1), expected)
    assert sum(queries_in_part) == 16
    assert max(candidates) <= max(len(filter_._rows), filter_._byte_budget // 64)


@pytest.mark.parametrize(("precision", "bits"), [("medium", 8), ("high", 11)])
@pytest.mark.parametrize("n_queries", [1, 200])
@pytest.mark.parametrize("longer", [0.0, 4.0])
def test_the_precision_may_change_after_the_build(precision: str, bits: int, n_queries: int, longer: float) -> None:
    stored, queries = crowded(3000, 64, seed=1), crowded(200, 64, seed=2)
    queries.log_magnitude.add_(longer)
    expected = ExactIndex(prune=False).build(stored).search(queries).log_distance
    filter_ = BoundFilter(GradientStore.of(stored), principal_axes(stored), (61,), 2**28)
    with products_at(precision, bits):
        found = [filter_.search(queries.take(slice(i, i + n_queries)), 1) for i in range(0, 200, n_queries)]
    assert torch.equal(torch.cat([part.log_distance for part in found]), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_default_dtype(dtype: torch.dtype) -> None:
    stored, queries = crowded(300, 20, seed=1), crowded(20, 20, seed=2)
    expected = ExactIndex(prune=False).build(stored).search(queries).log_distance
    torch.set_default_dtype(dtype)
    try:
        found = BoundFilter(GradientStore.of(stored), principal_axes(stored), (13,), 2**28).search(queries, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.log_distance, expected)


@pytest.mark.usefixtures("always_filter")
def test_autocast_gives_exact_results() -> None:
    stored, queries = crowded(1000, 64, seed=1), crowded(50, 64, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        searcher = ExactIndex().build(stored)
        found = searcher.search(queries, 5)
    assert searcher.widths
    assert_same(found, plain(queries, stored, 5))


def test_one_row_of_many_numbers(make_gradients: MakeGradients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_grood.neighbors.exact._SMALLEST", 1)
    found = ExactIndex().build(make_gradients(1, 20)).search(make_gradients(3, 20, seed=1))
    assert found.row.tolist() == [[0], [0], [0]]


def test_a_detector_can_be_pickled(features: tuple[Tensor, Tensor]) -> None:
    detector = GROOD(None).fit_features(*features)
    other = pickle.loads(pickle.dumps(detector))
    queries = features[0] + 0.1
    assert torch.equal(other.log_score_features(queries), detector.log_score_features(queries))


@pytest.mark.usefixtures("always_filter")
def test_copies_find_the_same() -> None:
    stored, queries = clustered(500, 20, seed=1), clustered(50, 20, seed=2)
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    for other in (pickle.loads(pickle.dumps(searcher)), copy.deepcopy(searcher)):
        assert other.widths == searcher.widths
        assert_same(other.search(queries, 2), plain(queries, stored, 2))


@pytest.mark.usefixtures("always_filter")
def test_threads_may_search_at_once() -> None:
    stored, queries = clustered(1000, 20, seed=1), clustered(200, 20, seed=2)
    expected = plain(queries, stored, 2)
    searcher = ExactIndex().build(stored)
    assert searcher.widths
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: searcher.search(queries, 2), range(12)):
            assert_same(found, expected)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("widths", [(13,), (5, 15)])
def test_rounded_stores(brute_force: BruteForce, dtype: str, widths: tuple[int, ...]) -> None:
    gradients, queries = clustered(700, 20, seed=1), clustered(50, 20, seed=2)
    writer = StoreWriter(700, 20, StoreOptions(dtype))
    writer.append(gradients)
    store = writer.finish()
    for k in (1, 5):
        found = make_filter(store, widths).search(queries, k)
        assert_same(found, plain(queries, store, k))
        assert_true(found, queries, store.take(slice(None)), k, brute_force)


CHILD = """
import pickle, torch
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors import GradientStore
from torch_grood.neighbors.filter import BoundFilter
from torch_grood.neighbors.pairs import UNDERFLOW
generator = torch.Generator().manual_seed(0)
vectors = torch.randn(300, 20, generator=generator)
stored = PolarGradients(torch.zeros(300, dtype=torch.float64), vectors / vectors.norm(dim=1, keepdim=True))
"""


def run_child(code: str) -> str:
    """What a fresh process prints that takes every warning for an error."""
    command = [sys.executable, "-W", "error", "-c", CHILD + code]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    ["built", "unpickled"],
)
def test_no_warning_in_a_fresh_process(made: str, tmp_path: Path) -> None:
    # torch warns once a process: of sparse matrices, and of the strides of a single row.
    path = tmp_path / "filter.pickle"
    path.write_bytes(pickle.dumps(make_filter(clustered(300, 20, seed=1))))
    code = {
        "built": "filter_ = BoundFilter(GradientStore.of(stored), torch.eye(20).double(), (13,), 2**28)\n",
        "unpickled": f"with open({str(path)!r}, 'rb') as file: filter_ = pickle.load(file)\n",
    }[made]
    assert run_child(code + "print(filter_.search(stored.take(slice(0, 1)), 3).row.shape)") == "torch.Size([1, 3])"


@pytest.mark.parametrize("broken", ["residual", "margin", "gamma", "distance"])
def test_a_broken_bound_is_seen(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    # What these tests compare must differ where a bound is wrong, or they could not fail.
    stored, queries = clustered(2000, 48, seed=1, low=-0.1), clustered(100, 48, seed=2, low=-0.1)
    expected = plain(queries, stored)
    if broken == "residual":
        monkeypatch.setattr(filter_module, "_residual", lambda z, square: torch.zeros_like(square).float())
    elif broken == "margin":
        monkeypatch.setattr(filter_module, "_RESIDUAL_MARGIN", -0.08)
    elif broken == "gamma":
        monkeypatch.setattr(filter_module, "product_error", lambda d: 0.0 if d == 48 else -1.0)
    else:
        true_bounds = BoundFilter._true_bounds

        def too_near(self: BoundFilter, *arguments: Tensor) -> tuple[Tensor, Tensor]:
            low, error = true_bounds(self, *arguments)  # type: ignore[arg-type]
            return low - 0.05 * low.abs() * (low < 0), error

        monkeypatch.setattr(BoundFilter, "_true_bounds", too_near)
    try:
        found = make_filter(stored).search(queries, 1)
    except (IndexError, RuntimeError, ValueError):
        # No candidate was left at all.
        return
    assert not torch.equal(found.row, expected.row)


@pytest.mark.parametrize("m", [13, 125])
@pytest.mark.parametrize("make", [clustered, crowded])
def test_products_in_bfloat16_lose_no_row(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., PolarGradients], m: int
) -> None:
    monkeypatch.setattr(filter_module, "_in_bfloat16", lambda m, device: True)
    stored, queries = make(2000, 160, seed=1), make(200, 160, seed=2)
    expected = plain(queries, stored)
    filter_ = BoundFilter(GradientStore.of(stored), principal_axes(stored), (m,), 2**28)
    assert filter_._rows.dtype == torch.bfloat16
    bound = filter_._scan(filter_._batch(queries), 0, len(filter_._rows)).double()[:, :2000]
    q, g = (x.direction.double() * (x.log_magnitude - filter_.unit).exp()[:, None] for x in (queries, stored))
    g = g[filter_._order]
    true = g.square().sum(1) - 2 * q @ g.T
    assert bool((bound <= true).all())
    # Near enough to be of use.
    assert float((true - bound).min()) < 0.05 * float(true.abs().max())
    for found in (filter_.search(queries, 1), filter_.search(queries.take(slice(0, 1)), 1)):
        n = len(found.row)
        assert torch.equal(found.row, expected.row[:n])
        assert torch.equal(found.log_distance, expected.log_distance[:n])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_bound_is_above_the_true_value(data: st.DataObject) -> None:
    d, m = data.draw(st.sampled_from([(4, 1), (8, 5), (40, 13)]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q

    def directions(n: int) -> Tensor:
        kind = data.draw(st.sampled_from(["any", "inside", "outside", "collinear", "one sign", "axis"]))
        vectors = torch.randn(n, d, generator=generator, dtype=torch.float64)
        if kind == "inside":
            vectors = vectors @ axes[:, :m] @ axes[:, :m].T
        elif kind == "outside":
            vectors = vectors @ axes[:, m:] @ axes[:, m:].T
        elif kind == "collinear":
            vectors = axes.sum(1) + 10.0 ** -data.draw(st.integers(1, 9)) * vectors
        elif kind == "one sign":
            vectors = 1 + 1e-3 * vectors
        elif kind == "axis":
            vectors = axes.T[torch.arange(n) % d] * vectors[:, :1].sign()
        return (vectors / vectors.norm(dim=1, keepdim=True)).float()

    def magnitudes(n: int, low: float, high: float) -> Tensor:
        given = st.one_of(st.floats(low, high), st.sampled_from([low, high, 0.0]))
        few = torch.tensor(data.draw(st.lists(given, min_size=1, max_size=5)), dtype=torch.float64)
        return few[torch.arange(n) % len(few)]

    stored = PolarGradients(magnitudes(40, -200, 0), directions(40))
    # The unit is the largest norm; queries may be e^±30 of it.
    stored.log_magnitude[0] = 0.0
    queries = PolarGradients(magnitudes(12, -30, 30), directions(12))
    filter_ = BoundFilter(GradientStore.of(stored), axes, (m,), 2**28)
    bound = filter_._scan(filter_._batch(queries), 0, len(filter_._rows)).double()
    assert bool((bound[:, 40:] == torch.inf).all())
    q, g = (x.direction.double() * x.log_magnitude.exp()[:, None] for x in (queries, stored))
    g = g[filter_._order]
    square = g.square().sum(1)
    product = q @ g.T
    # What float64 itself may lose.
    rounding = 1e-14 * (square + 2 * q.norm(dim=1)[:, None] * g.norm(dim=1))
    underflow = UNDERFLOW * (1 + q.norm(dim=1)[:, None])
    assert bool((bound[:, :40] <= square - 2 * product + rounding + underflow).all())


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_hostile_sets(brute_force: BruteForce, data: st.DataObject) -> None:
    component = st.sampled_from([0.0, 1.0, -1.0, 1.0 + 2**-20, 1e-4, 3.0, -1e-12])
    magnitude = st.one_of(st.sampled_from([0.0, -1e-7, -1.0, -29.9]), st.floats(-30, 0))

    def draw(count: int) -> PolarGradients:
        # Few distinct rows, repeated: ties and duplicates are common.
        row = st.tuples(magnitude, st.lists(component, min_size=4, max_size=4))
        distinct = data.draw(st.lists(row, min_size=1, max_size=12))
        picks = torch.tensor(data.draw(st.lists(st.integers(0, len(distinct) - 1), min_size=count, max_size=count)))
        vectors = torch.tensor([row[1] for row in distinct], dtype=torch.float64)
        length = vectors.norm(dim=1, keepdim=True)
        unit = torch.where(length > 0, vectors / length, 0.0).float()
        return PolarGradients(torch.tensor([row[0] for row in distinct], dtype=torch.float64)[picks], unit[picks])

    stored, queries = draw(data.draw(st.integers(1, 90))), draw(data.draw(st.integers(1, 12)))
    if not bool(stored.direction.any()):
        stored.direction[0, 0] = 1.0
    stored.log_magnitude[stored.direction.any(1).nonzero()[0]] = 0.0
    k = data.draw(st.integers(1, len(stored.log_magnitude)))
    widths = data.draw(st.sampled_from([(1,), (2,), (3,), (1, 2), (1, 4)]))
    found = make_filter(stored, widths, data.draw(st.sampled_from([1, 10_000, 2**28]))).search(queries, k)
    assert_true(found, queries, stored, k, brute_force)


@pytest.mark.slow
def test_a_hundred_thousand_queries() -> None:
    stored, queries = clustered(20_000, 16, seed=1), clustered(100_000, 16, seed=2)
    searcher = ExactIndex().build(stored)
    if not searcher.widths:
        searcher._filter = make_filter(stored, (13,))
    found = searcher.search(queries)
    rows, vectors = stored.direction.double() * stored.log_magnitude.exp()[:, None], queries.direction.double()
    vectors *= queries.log_magnitude.exp()[:, None]
    square = rows.square().sum(1)
    for start in range(0, 100_000, 1000):
        part = slice(start, start + 1000)
        least, row = torch.addmm(square, vectors[part], rows.T, alpha=-2).min(1)
        claimed = found.row[part].flatten()
        mine = (vectors[part] - rows[claimed]).square().sum(1)
        theirs = (vectors[part] - rows[row]).square().sum(1)
        assert bool(((claimed == row) | (mine <= theirs * (1 + 1e-9))).all())
        expected = (least + vectors[part].square().sum(1)).log() / 2
        torch.testing.assert_close(found.log_distance[part].flatten(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    not (cifar10.DATA / "images_classic").is_dir()
    or not (cifar10.WEIGHTS / "resnet20_cifar10.pt").exists()
    or not cifar10.NETWORKS.exists(),
    reason=f"no real images and weights in {cifar10.DATA}",
)
@pytest.mark.usefixtures("always_filter")
def test_real_gradients(brute_force: BruteForce) -> None:
    model = load_model(f"{cifar10.NETWORKS}:resnet20", cifar10.WEIGHTS / "resnet20_cifar10.pt").model
    detector = GROOD(model).fit(cifar10.loader("train_cifar10", 1000), progress=False)
    state = detector._need_state()
    store = state.searcher.gradients
    stored = store.take(slice(None))
    for name in ("test_cifar10", "test_cifar100"):
        features = detector.extract(cifar10.loader(name, 200), progress=False).features
        gradients = state.gradient_field(features).gradients
        queries = gradients._replace(direction=gradients.direction.float())
        for widths in ((13,), (13, 29)):
            for k in (1, 5):
                assert_same(make_filter(store, widths).search(queries, k), plain(queries, store, k))
        found = ExactIndex().build(store).search(queries)
        assert_true(found, queries, stored, 1, brute_force)
