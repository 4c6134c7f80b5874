"""Approximate search: true distances, measured quality, errors that say what faiss wants.

Rows come and go without training, and foreign numbers can abuse nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_grood import GROOD, ExactIndex, FaissIndex, FormatError, GroodError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors import (
    GradientIndex,
    GradientStore,
    IndexQuality,
    Neighbors,
    StoreOptions,
    faiss_state,
    log_distance,
    make_index,
)
from torch_grood.neighbors import faiss as faiss_module
from torch_grood.neighbors import store as store_module
from torch_grood.neighbors.store import StoreWriter

MakeGradients = Callable[..., PolarGradients]
BruteForce = Callable[[PolarGradients, PolarGradients], NDArray[np.float64]]

# Those that are taken apart and put together, and others.
KEPT = [
    "Flat",
    "SQ8",
    "SQ4",
    "SQfp16",
    "PQ8x4",
    "IVF20,Flat",
    "IVF20,SQ8",
    "IVF20,PQ8x4",
    "IVF20_HNSW4,Flat",
    "HNSW16",
    "HNSW8,SQ8",
    "HNSW8_PQ8x4np",
    "PCA8,Flat",
    "PCAR8,HNSW8",
    "RR16,IVF10,Flat",
    "OPQ8_16,IVF10,PQ8x4",
    "Pad40,OPQ4_8,IVF10_HNSW4,SQ6",
]
REBUILT = ["LSH", "PQ8x4,RFlat", "PQ8x4fs", "IVF20,PQ8x4fs"]
FACTORIES = KEPT + REBUILT


def assert_true_distances(found: Neighbors, queries: PolarGradients, stored: PolarGradients) -> None:
    n, k = found.row.shape
    assert found.row.min() >= 0
    assert found.row.max() < len(stored.log_magnitude)
    assert all(len(set(row)) == k for row in found.row.tolist())
    for column in range(k):
        expected = log_distance(queries, stored.take(found.row[:, column]))
        assert torch.equal(found.log_distance[:, column], expected)
    assert bool((found.log_distance[:, 1:] >= found.log_distance[:, :-1]).all())
    assert len(found.log_distance) == n


@pytest.fixture(scope="module")
def stored(make_gradients: MakeGradients) -> PolarGradients:
    return make_gradients(1200, 32, seed=1)


@pytest.fixture(scope="module")
def queries(make_gradients: MakeGradients) -> PolarGradients:
    return make_gradients(60, 32, seed=2)


# --- What is found ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("k", [1, 5])
def test_distances_are_true_and_at_least_the_least(
    factory: str, k: int, stored: PolarGradients, queries: PolarGradients
) -> None:
    searcher = FaissIndex(factory).build(stored)
    found = searcher.search(queries, k)
    assert_true_distances(found, queries, stored)
    exact = ExactIndex().build(stored).search(queries, k)
    assert bool((found.log_distance >= exact.log_distance).all())
    assert searcher.quality is not None
    assert searcher.quality.n_queries == 256
    if k == 1:
        # The quality was measured on other queries of the same distribution: it must tell what is found here.
        recall = float((found.log_distance[:, 0] == exact.log_distance[:, 0]).double().mean())
        assert abs(searcher.quality.recall_at_1 - recall) < 0.25
        inflation = float((found.log_distance[:, 0] - exact.log_distance[:, 0]).exp().mean())
        assert abs(searcher.quality.score_inflation - inflation) < 0.1


@pytest.mark.parametrize("low", [-0.001, -3.0, -100.0])
def test_flat_equals_exact(make_gradients: MakeGradients, low: float) -> None:
    stored, queries = make_gradients(700, 24, seed=3, low=low), make_gradients(100, 24, seed=4, low=low)
    # Rows far below the largest one are all alike in the float32 of faiss: only large queries are told apart.
    queries.log_magnitude.clamp_(min=-6)
    stored.log_magnitude[:350].clamp_(min=-6)
    searcher = FaissIndex("Flat", candidates=32).build(stored)
    found, exact = searcher.search(queries, 4), ExactIndex().build(stored).search(queries, 4)
    assert torch.equal(found.log_distance, exact.log_distance)
    assert torch.equal(found.row, exact.row)


def test_quality_of_flat_is_perfect(stored: PolarGradients) -> None:
    quality = FaissIndex("Flat").build(stored).quality
    assert quality is not None
    assert quality.recall_at_1 == 1.0
    assert quality.score_inflation == 1.0


def test_quality_of_a_bad_index_shows(stored: PolarGradients) -> None:
    quality = FaissIndex("IVF40,Flat", {"nprobe": 1}, candidates=1).build(stored).quality
    assert quality is not None
    assert 0.01 < quality.recall_at_1 < 0.8
    assert 1.001 < quality.score_inflation < 2


def test_parameters_are_applied(stored: PolarGradients, queries: PolarGradients) -> None:
    one = FaissIndex("IVF40,Flat", {"nprobe": 1}).build(stored)
    all_lists = FaissIndex("IVF40,Flat", {"nprobe": 40}).build(stored)
    assert one.quality is not None
    assert all_lists.quality is not None
    assert one.quality.recall_at_1 < all_lists.quality.recall_at_1 == 1.0
    exact = ExactIndex().build(stored).search(queries, 3)
    assert torch.equal(all_lists.search(queries, 3).row, exact.row)


def test_more_candidates_mend_a_coarse_code(stored: PolarGradients) -> None:
    few, many = (FaissIndex("PQ4x4", candidates=c).build(stored).quality for c in (1, 200))
    assert few is not None
    assert many is not None
    assert few.recall_at_1 < many.recall_at_1


def test_the_common_part_of_the_gradients_costs_no_precision(make_gradients: MakeGradients) -> None:
    # All gradients are one vector plus a thousandth: without centring, the float32 of faiss cancels.
    noise = make_gradients(800, 16, seed=1)
    direction = torch.ones(1, 16, dtype=torch.float64) + 1e-3 * noise.direction.double()
    unit = (direction / direction.norm(dim=1, keepdim=True)).float()
    gradients = PolarGradients(torch.full((800,), -30.0, dtype=torch.float64), unit)
    stored, queries = gradients.take(slice(0, 700)), gradients.take(slice(700, None))
    searcher = FaissIndex("Flat", candidates=2).build(stored)
    assert torch.equal(searcher.search(queries).row, ExactIndex().build(stored).search(queries).row)


def test_the_scale_of_the_gradients_changes_nothing(stored: PolarGradients, queries: PolarGradients) -> None:
    # A shift by a power of two rounds all log magnitudes below it alike; e^-2000 underflows in any float.
    shifted = [x._replace(log_magnitude=(x.log_magnitude * 2**20).round() / 2**20) for x in (stored, queries)]
    far = [x._replace(log_magnitude=x.log_magnitude - 2000) for x in shifted]
    assert torch.equal(
        FaissIndex("IVF20,PQ8x4").build(shifted[0]).search(shifted[1]).row,
        FaissIndex("IVF20,PQ8x4").build(far[0]).search(far[1]).row,
    )


def test_queries_that_are_gigantic_or_zero(make_gradients: MakeGradients, brute_force: BruteForce) -> None:
    stored = make_gradients(300, 8, seed=1, low=-230, high=-225)
    queries = make_gradients(4, 8, seed=2)
    queries.direction[3] = 0.0
    for factory in ("Flat", "IVF5,Flat", "HNSW8"):
        found = FaissIndex(factory).build(stored).search(queries, 2)
        assert_true_distances(found, queries, stored)
        expected = np.sort(brute_force(queries, stored), axis=1)[:, :2]
        np.testing.assert_allclose(found.log_distance[:3].numpy(), expected[:3], atol=1e-12)


def test_duplicated_rows(make_gradients: MakeGradients) -> None:
    few = make_gradients(20, 8)
    stored = few.take(torch.arange(200) % 20)
    found = FaissIndex("Flat", candidates=9).build(stored).search(few, 3)
    assert bool((found.log_distance == -torch.inf).all())
    # All ten copies are candidates; the lowest rows come first.
    assert torch.equal(found.row, torch.arange(20)[:, None] + torch.tensor([0, 20, 40]))
    assert_true_distances(found, few, stored)
    searcher = FaissIndex("IVF4,Flat").build(stored)
    assert searcher.quality is not None
    assert searcher.quality.recall_at_1 == 1.0
    assert searcher.quality.score_inflation == 1.0


def test_rows_that_are_all_equal() -> None:
    stored = PolarGradients(torch.zeros(50, dtype=torch.float64), torch.eye(4)[[0] * 50])
    searcher = FaissIndex("IVF3,Flat").build(stored)
    assert bool((searcher.search(stored, 5).log_distance == -torch.inf).all())


def test_one_row(make_gradients: MakeGradients) -> None:
    searcher = FaissIndex("Flat").build(make_gradients(1, 4))
    assert searcher.quality is None
    assert searcher.search(make_gradients(3, 4, seed=1)).row.tolist() == [[0]] * 3


# --- Empty cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [5, 400, 1200])
def test_where_lists_run_out_the_search_is_exact(k: int, stored: PolarGradients, queries: PolarGradients) -> None:
    # One of 40 lists holds some 30 rows and none holds all: faiss fills up with -1.
    searcher = FaissIndex("IVF40,Flat", {"nprobe": 1}).build(stored)
    found = searcher.search(queries, k)
    assert_true_distances(found, queries, stored)
    if k == 1200:
        exact = ExactIndex().build(stored).search(queries, k)
        assert torch.equal(found.row, exact.row)
        assert torch.equal(found.log_distance, exact.log_distance)


class _Stub:
    """A faiss index that finds what it is told to."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = np.array(rows)

    def search(self, vectors: NDArray[np.float32], wanted: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        return np.full(self.rows.shape, 3.4e38, np.float32), self.rows


@pytest.mark.parametrize(
    "rows", [[[-1, -1], [-1, -1]], [[-1, -1], [2, -1]], [[-1, 1], [2, -1]], [[4, -1], [3, 2]], [[0, 1], [-1, -1]]]
)
def test_missing_rows_are_never_row_minus_one(make_gradients: MakeGradients, rows: list[list[int]]) -> None:
    stored, queries = make_gradients(5, 3, seed=1), make_gradients(2, 3, seed=2)
    searcher: Any = FaissIndex("Flat").build(stored)
    searcher._index = _Stub(rows)
    found = searcher.search(queries)
    assert_true_distances(found, queries, stored)
    exact = ExactIndex().build(stored).search(queries)
    for i, proposed in enumerate(rows):
        valid = [row for row in proposed if row >= 0]
        if valid:
            best = min(valid, key=lambda row: float(log_distance(queries.take([i]), stored.take([row]))))  # type: ignore[arg-type]
            assert int(found.row[i]) == best
        else:
            assert int(found.row[i]) == int(exact.row[i])


# --- Reproducibility ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_same_seed_gives_the_same_searcher(factory: str, stored: PolarGradients, queries: PolarGradients) -> None:
    first, second = (FaissIndex(factory, train_size=600).build(stored, seed=5) for _ in range(2))
    assert first.quality == second.quality
    assert torch.equal(first.search(queries, 3).row, second.search(queries, 3).row)


def test_the_seed_draws_the_training_sample(stored: PolarGradients, queries: PolarGradients) -> None:
    # Too small a sample to train on alike: other seeds, other lists.
    index = FaissIndex("IVF40,Flat", train_size=40, candidates=1)
    rows = {tuple(index.build(stored, seed=seed).search(queries).row.flatten().tolist()) for seed in range(3)}
    assert len(rows) > 1


def test_a_batch_finds_what_each_query_finds_alone(stored: PolarGradients, queries: PolarGradients) -> None:
    searcher = FaissIndex("IVF20,Flat").build(stored)
    whole = searcher.search(queries, 2)
    for i in range(0, 60, 7):
        alone = searcher.search(queries.take(slice(i, i + 1)), 2)
        assert torch.equal(alone.row[0], whole.row[i])
        assert torch.equal(alone.log_distance[0], whole.log_distance[i])


@pytest.mark.parametrize("factory", ["Flat", "IVF20,Flat", "PCA16,IVF20,PQ4x4", "PQ2x4", "HNSW8"])
def test_a_batch_beyond_the_threshold_of_blas(factory: str, make_gradients: MakeGradients) -> None:
    # From 128,000 numbers on, faiss 1.15 takes distances by expansion and not from differences.
    stored, queries = make_gradients(500, 32, seed=1), make_gradients(4200, 32, seed=2)
    searcher = FaissIndex(factory).build(stored)
    whole = searcher.search(queries)
    for i in range(0, 4200, 100):
        alone = searcher.search(queries.take(slice(i, i + 1)))
        assert torch.equal(alone.row[0], whole.row[i])
        assert torch.equal(alone.log_distance[0], whole.log_distance[i])


def test_building_and_searching_change_no_input(stored: PolarGradients, queries: PolarGradients) -> None:
    before = [x.clone() for x in (*stored, *queries)]
    FaissIndex("IVF20,Flat").build(stored).search(queries)
    assert all(torch.equal(a, b) for a, b in zip(before, (*stored, *queries), strict=True))


# --- Parameters ---------------------------------------------------------------------------------------------------


def core_of(searcher: Any) -> Any:
    """The index behind the transforms; it lives as long as the searcher."""
    return faiss_state._unwrapped(faiss, searcher._index)[1]


def test_nested_parameters_reach_their_index(stored: PolarGradients) -> None:
    parameters = {"nprobe": 7, "quantizer_efSearch": 33, "max_codes": 500}
    lists = FaissIndex("PCA16,IVF20_HNSW4,SQ8", parameters).build(stored)
    core = core_of(lists)
    assert (core.nprobe, core.max_codes, faiss.downcast_index(core.quantizer).hnsw.efSearch) == (7, 500, 33)
    graph = FaissIndex("HNSW8", {"efSearch": 21, "efConstruction": 55}).build(stored)
    assert (core_of(graph).hnsw.efSearch, core_of(graph).hnsw.efConstruction) == (21, 55)


def test_a_parameter_of_construction_is_set_before_it(stored: PolarGradients) -> None:
    links = [
        FaissIndex("HNSW4", {"efConstruction": n}).build(stored).tensors()["index.graph.neighbors"] for n in (1, 100)
    ]
    assert not torch.equal(*links)


def test_a_wider_search_finds_more(stored: PolarGradients) -> None:
    for factory, name in (("HNSW4", "efSearch"), ("PCA24,IVF40,Flat", "nprobe")):
        few, many = (FaissIndex(factory, {name: n}).build(stored).quality for n in (1, 40))
        assert few is not None
        assert many is not None
        assert few.recall_at_1 + 0.1 < many.recall_at_1
        assert few.score_inflation > many.score_inflation


@pytest.mark.parametrize(("parameters", "ordered"), [({}, False), ({"ht": 64}, True)])
def test_centroids_are_ordered_only_for_who_uses_it(
    parameters: dict[str, float], ordered: bool, make_gradients: MakeGradients
) -> None:
    searcher = FaissIndex("PQ2x3", parameters).build(make_gradients(200, 8))
    assert core_of(searcher).do_polysemous_training == ordered


@pytest.mark.parametrize(("factory", "inner"), [("HNSW4_PQ2x3", "storage"), ("PQ2x3,RFlat", "base_index")])
def test_centroids_of_an_inner_index_are_not_ordered(factory: str, inner: str, make_gradients: MakeGradients) -> None:
    searcher = FaissIndex(factory).build(make_gradients(200, 8))
    assert not faiss.downcast_index(getattr(core_of(searcher), inner)).do_polysemous_training


# --- Training and streaming ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "d", "size"),
    [
        ("SQ8", 32, 65_536),
        ("PQ8x4", 32, 65_536),
        ("IVF4,Flat", 32, 65_536),
        ("IVF1024,Flat", 32, 262_144),
        ("PCA16,IVF1024,PQ8x4", 32, 262_144),
        ("PQ8x12", 32, 256 * 4096),
        # At most 2 GiB, but never fewer rows than centroids.
        ("IVF4096,Flat", 2048, 262_144),
        ("IVF20000,Flat", 2**16, 20_000),
    ],
)
def test_no_more_is_trained_on_than_faiss_uses(factory: str, d: int, size: int) -> None:
    assert faiss_module._train_size(faiss.index_factory(d, factory), d) == size


def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.float32]]:
    """The samples that indexes are trained on from now on."""
    samples: list[NDArray[np.float32]] = []
    sample = faiss_module._sample

    def recorded(*arguments: Any) -> NDArray[np.float32]:
        samples.append(sample(*arguments))
        return samples[-1]

    monkeypatch.setattr(faiss_module, "_sample", recorded)
    return samples


def test_the_sample_is_of_the_size_asked_for(stored: PolarGradients, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = trained_on(monkeypatch)
    for size in (100, 1199, 5000, None):
        FaissIndex("IVF2,Flat", train_size=size).build(stored)
    assert [len(sample) for sample in samples] == [100, 1199, 1200, 1200]
    # Every row comes once.
    assert len(np.unique(samples[1], axis=0)) == 1199
    FaissIndex("HNSW4").build(stored)
    FaissIndex("Flat").build(stored)
    assert len(samples) == 4


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("factory", ["IVF20,SQ8", "PCA8,Flat", "OPQ4_16,HNSW8"])
def test_rows_come_in_chunks(
    dtype: str,
    factory: str,
    stored: PolarGradients,
    queries: PolarGradients,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 4 * 32 * 100)
    monkeypatch.setattr(faiss_module, "_SAMPLE_ROWS", 100)
    monkeypatch.setattr(faiss_module, "_ADD_ROWS", 30)
    # With no memory at all the store is a file.
    writer = StoreWriter(1200, 32, StoreOptions(dtype, memory=0, folder=tmp_path))
    writer.append(stored)
    store = writer.finish()
    taken: list[int] = []
    vectors = faiss_module._Space.vectors

    def recorded(space: Any, gradients: PolarGradients) -> NDArray[np.float32]:
        taken.append(len(gradients.log_magnitude))
        return vectors(space, gradients)

    monkeypatch.setattr(faiss_module._Space, "vectors", recorded)
    searcher = FaissIndex(factory, train_size=300, quality_queries=0).build(store)
    assert sum(taken) == 1200 + 300 + 1200 + 1
    assert max(taken) == 100
    # Rounded rows are rows as well.
    found = searcher.search(queries, 3)
    assert_true_distances(found, queries, store.take(slice(None)))
    again = FaissIndex(factory, train_size=300).build(store.take(slice(None)))
    assert torch.equal(again.search(queries, 3).row, found.row)


def test_search_in_blocks(stored: PolarGradients, queries: PolarGradients, monkeypatch: pytest.MonkeyPatch) -> None:
    searcher = FaissIndex("IVF20,Flat", {"nprobe": 3}).build(stored)
    whole = searcher.search(queries, 2)
    monkeypatch.setattr(faiss_module, "_BYTE_BUDGET", 7 * (64 * 16 + 24 * 32))
    asked: list[int] = []
    propose = searcher._propose  # type: ignore[attr-defined]
    monkeypatch.setattr(searcher, "_propose", lambda q, k: asked.append(len(q.log_magnitude)) or propose(q, k))
    blocks = searcher.search(queries, 2)
    assert asked == [7] * 8 + [4]
    assert torch.equal(blocks.row, whole.row)
    assert torch.equal(blocks.log_distance, whole.log_distance)


@pytest.mark.parametrize("factory", ["Flat", "IVF20,Flat", "PCA16,IVF20,SQ8", "HNSW8"])
def test_no_query_is_no_error(factory: str, stored: PolarGradients, queries: PolarGradients) -> None:
    found = FaissIndex(factory).build(stored).search(queries.take(slice(0, 0)), 2)
    assert found.row.shape == found.log_distance.shape == (0, 2)


# --- Quality ------------------------------------------------------------------------------------------------------


class _Proposals:
    """A faiss index that proposes given rows to whoever asks, as many as are wanted."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = np.array(rows)
        self.wanted: list[int] = []

    def search(self, vectors: NDArray[np.float32], wanted: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        self.wanted.append(wanted)
        return np.zeros((len(vectors), wanted), np.float32), self.rows[:, :wanted]


def on_a_line(*lengths: float, d: int = 1) -> PolarGradients:
    """Gradients of given lengths along the first axis."""
    return PolarGradients(torch.tensor(lengths, dtype=torch.float64).log(), torch.eye(d)[[0] * len(lengths)])


def measured(stored: PolarGradients, candidates: int, proposals: dict[int, list[int]]) -> tuple[IndexQuality, Any]:
    """Quality where `proposals` says for each row what faiss proposes to it."""
    n = len(stored.log_magnitude)
    searcher: Any = FaissIndex("Flat", candidates=candidates, quality_queries=0).build(stored)
    searcher._config = FaissIndex("Flat", candidates=candidates)
    own = np.random.default_rng([0, 1]).permutation(n)
    searcher._index = _Proposals([proposals[int(row)] for row in own])
    searcher.measure(0)
    return searcher.quality, searcher._index


def test_quality_is_that_of_a_new_query() -> None:
    stored = on_a_line(0.1, 0.2, 0.4, 1.0)
    # One candidate: faiss is asked for two. The own row goes, and where it was missed the last does.
    quality, index = measured(stored, 1, {0: [0, 1], 1: [1, 2], 2: [1, 0], 3: [3, 2]})
    assert index.wanted == [2]
    # 1 finds 2 instead of 0, twice as far; the others find the nearest.
    assert quality.recall_at_1 == 0.75
    assert quality.score_inflation == pytest.approx((1 + 2 + 1 + 1) / 4, rel=1e-6)
    assert quality.n_queries == 4
    # Another row takes the place of the own one: no more than one candidate counts.
    quality, _ = measured(stored, 1, {0: [2, 1], 1: [1, 0], 2: [2, 1], 3: [3, 2]})
    assert quality.recall_at_1 == 0.75
    assert quality.score_inflation == pytest.approx((3 + 1 + 1 + 1) / 4, rel=1e-6)


def test_who_finds_nothing_is_searched_for_exactly() -> None:
    quality, _ = measured(on_a_line(0.1, 0.2, 0.4, 1.0), 1, {0: [0, -1], 1: [-1, -1], 2: [2, 1], 3: [-1, 0]})
    # An own row that was missed costs the last place, here the only one with a row.
    assert quality.recall_at_1 == 1.0
    assert quality.score_inflation == 1.0


@pytest.mark.parametrize("n", [2, 3, 8])
def test_quality_of_fewer_rows_than_candidates(n: int, make_gradients: MakeGradients) -> None:
    for factory in ("Flat", "HNSW4", "IVF1,Flat"):
        quality = FaissIndex(factory, candidates=8).build(make_gradients(n, 4)).quality
        assert quality == IndexQuality(1.0, 1.0, n)


def test_no_quality_is_measured_where_none_is_asked_for(stored: PolarGradients) -> None:
    searcher = FaissIndex("IVF4,Flat", quality_queries=0).build(stored)
    assert searcher.quality is None
    assert "exact" not in vars(searcher)


def test_inflation_of_missed_duplicates_is_left_out() -> None:
    quality, _ = measured(on_a_line(0.1, 0.1, 0.4, 1.0), 1, {0: [0, 2], 1: [1, 0], 2: [2, 1], 3: [3, 2]})
    assert quality.recall_at_1 == 0.75
    assert quality.score_inflation == 1.0


# --- Rows that come and go ----------------------------------------------------------------------------------------

IN_MEMORY = StoreOptions()


def raw(searcher: Any, queries: PolarGradients) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """What faiss itself answers."""
    found: tuple[NDArray[np.float32], NDArray[np.int64]] = searcher._index.search(searcher._space.vectors(queries), 20)
    return found


def assert_same_index(first: Any, second: Any, queries: PolarGradients) -> None:
    """To the bit, distances of faiss included."""
    for a, b in zip(raw(first, queries), raw(second, queries), strict=True):
        assert np.array_equal(a, b)
    for x, y in zip(first.search(queries, 3), second.search(queries, 3), strict=True):
        assert torch.equal(x, y)


def learned(searcher: Any) -> dict[str, Tensor]:
    """What training gives: not lists and graphs of the rows."""
    return {
        name: tensor
        for name, tensor in searcher.tensors().items()
        if not name.startswith(("index.lists", "index.graph"))
    }


def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(faiss_module, "_sample", refuse)


@pytest.mark.parametrize("factory", FACTORIES)
def test_rows_are_added_without_training(
    factory: str,
    stored: PolarGradients,
    queries: PolarGradients,
    make_gradients: MakeGradients,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searcher: Any = FaissIndex(factory, candidates=30).build(stored)
    before, quality = raw(searcher, queries), searcher.quality
    no_training(monkeypatch)
    added = make_gradients(150, 32, seed=3, high=1.0)
    more: Any = searcher.with_added(added, IN_MEMORY, seed=2)
    assert len(more.gradients) == more._index.ntotal == 1350
    found = more.search(queries, 5)
    assert_true_distances(found, queries, more.gradients.take(slice(None)))
    # Most of the new rows find themselves, even by coarse codes.
    itself = more.search(added).row.flatten() == torch.arange(1200, 1350)
    assert itself.double().mean() > 0.4
    assert all(torch.equal(x, learned(more)[name]) for name, x in learned(searcher).items())
    assert more.quality is not None
    assert more.quality is not quality
    # The old searcher is as it was.
    assert searcher._index.ntotal == 1200
    assert searcher.quality == quality
    assert all(np.array_equal(a, b) for a, b in zip(before, raw(searcher, queries), strict=True))


@pytest.mark.parametrize("factory", FACTORIES)
def test_rows_are_removed_without_training(
    factory: str, stored: PolarGradients, queries: PolarGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    searcher: Any = FaissIndex(factory, candidates=30).build(stored)
    before, quality = raw(searcher, queries), searcher.quality
    no_training(monkeypatch)
    rows = (torch.arange(1200) % 3 != 1).nonzero().flatten()
    fewer: Any = searcher.with_only(rows, IN_MEMORY, seed=2)
    assert len(fewer.gradients) == fewer._index.ntotal == 800
    assert torch.equal(fewer.gradients.codes, stored.direction[rows])
    found = fewer.search(queries, 5)
    assert_true_distances(found, queries, stored.take(rows))
    assert fewer.search(stored.take(rows)).row.flatten().eq(torch.arange(800)).double().mean() > 0.4
    assert all(torch.equal(x, learned(fewer)[name]) for name, x in learned(searcher).items())
    assert fewer.quality is not None
    assert fewer.quality is not quality
    assert searcher._index.ntotal == 1200
    assert all(np.array_equal(a, b) for a, b in zip(before, raw(searcher, queries), strict=True))


def test_rows_stay_in_their_lists(stored: PolarGradients, make_gradients: MakeGradients) -> None:
    searcher = FaissIndex("IVF20,Flat").build(stored)
    lists = searcher.tensors()["index.lists"]
    assert lists.unique().tolist() == list(range(20))
    rows = torch.arange(5, 1200, 2)
    assert torch.equal(searcher.with_only(rows, IN_MEMORY).tensors()["index.lists"], lists[rows])
    # The new ones go where faiss would have them: copies to the list of what they copy.
    more = searcher.with_added(stored.take(rows), IN_MEMORY).tensors()["index.lists"]
    assert torch.equal(more, torch.cat([lists, lists[rows]]))


def test_a_graph_grows(stored: PolarGradients, make_gradients: MakeGradients) -> None:
    searcher = FaissIndex("HNSW8").build(stored)
    more = searcher.with_added(make_gradients(100, 32, seed=5), IN_MEMORY)
    levels = searcher.tensors()["index.graph.levels"]
    assert torch.equal(more.tensors()["index.graph.levels"][:1200], levels)
    # With none removed it is not the graph that adding all anew gives.
    assert not torch.equal(
        more.tensors()["index.graph.neighbors"],
        FaissIndex("HNSW8").build(more.gradients).tensors()["index.graph.neighbors"],
    )


def test_added_rows_of_any_magnitude(stored: PolarGradients, make_gradients: MakeGradients) -> None:
    # The unit stays that of the fit; rows that are far larger must not become infinite.
    giants = make_gradients(5, 32, seed=8, low=300, high=400)
    for factory in ("Flat", "IVF20,Flat", "HNSW8"):
        index = FaissIndex(factory)
        more = index.build(stored).with_added(giants, IN_MEMORY)
        assert bool((more.search(giants).log_distance.flatten() == -torch.inf).all())
        distances, rows = raw(more, giants)
        assert np.isfinite(distances[:, 0]).all()
        assert (rows[:, 0] >= 1200).all()
        assert_same_index(more, index.restore(more.gradients, more.tensors()), giants)


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows_are_added_and_left(n: int, stored: PolarGradients, make_gradients: MakeGradients) -> None:
    for factory in ("Flat", "IVF4,Flat", "HNSW4", "PCA8,SQ8"):
        searcher = FaissIndex(factory).build(stored)
        assert len(searcher.with_added(make_gradients(n, 32, seed=6), IN_MEMORY).gradients) == 1200 + n
        one = searcher.with_only(torch.tensor([17]), IN_MEMORY)
        assert one.quality is None
        assert one.search(stored.take(slice(0, 3))).row.tolist() == [[0]] * 3


def test_what_faiss_cannot_copy(stored: PolarGradients) -> None:
    searcher = FaissIndex("L2norm,Flat").build(stored)
    with pytest.raises(GroodError, match=r"'L2norm,Flat' .*clone not supported.*index='exact'"):
        searcher.with_only(torch.arange(5), IN_MEMORY)


# --- State --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", KEPT)
def test_an_index_is_put_together_to_the_bit(
    factory: str,
    stored: PolarGradients,
    queries: PolarGradients,
    make_gradients: MakeGradients,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = FaissIndex(factory, candidates=3)
    built = index.build(stored, seed=3)
    more = built.with_added(make_gradients(100, 32, seed=5), IN_MEMORY)
    fewer = built.with_only(torch.arange(0, 1200, 2), IN_MEMORY)
    no_training(monkeypatch)
    for searcher in (built, more, fewer):
        quality = IndexQuality(0.25, 1.5, 9)
        restored = index.restore(searcher.gradients, searcher.tensors(), quality=quality)
        assert_same_index(searcher, restored, queries)
        assert restored.quality == quality
        assert index.restore(searcher.gradients, searcher.tensors(), seed=0).quality is not None
        state = restored.tensors()
        assert state.keys() == searcher.tensors().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in searcher.tensors().items())
    # What was put together goes on as what was built.
    again = index.restore(built.gradients, built.tensors())
    assert_same_index(again.with_added(make_gradients(100, 32, seed=5), IN_MEMORY), more, queries)
    assert_same_index(again.with_only(torch.arange(0, 1200, 2), IN_MEMORY), fewer, queries)


@pytest.mark.parametrize("factory", REBUILT)
def test_other_kinds_are_built_again_from_the_seed(
    factory: str, stored: PolarGradients, queries: PolarGradients
) -> None:
    index = FaissIndex(factory, train_size=600)
    searcher = index.build(stored, seed=3)
    assert searcher.tensors() == {}
    quality = IndexQuality(0.25, 1.5, 9)
    restored = index.restore(searcher.gradients, {}, seed=3, quality=quality)
    assert_same_index(searcher, restored, queries)
    assert restored.quality == quality
    with pytest.raises(FormatError, match=r"no stored state|lacks its"):
        index.restore(searcher.gradients, FaissIndex("Flat").build(stored).tensors())


def test_without_a_state_an_index_is_built_from_the_seed(stored: PolarGradients, queries: PolarGradients) -> None:
    index = FaissIndex("IVF20,Flat", train_size=600)
    built = index.build(stored, seed=3)
    restored = index.restore(built.gradients, {}, seed=3)
    assert_same_index(built, restored, queries)
    assert restored.quality == built.quality


def test_names_and_types_of_the_state(stored: PolarGradients) -> None:
    tensors = FaissIndex("PCA16,IVF20_HNSW4,PQ4x4").build(stored).tensors()
    described = {name: (str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in tensors.items()}
    n_links = described.pop("index.quantizer.graph.neighbors")
    assert n_links[0] == "int32"
    assert described == {
        "index.unit": ("float64", ()),
        "index.centre": ("float32", (32,)),
        "index.transform0.matrix": ("float32", (16, 32)),
        "index.transform0.bias": ("float32", (16,)),
        "index.quantizer.vectors": ("float32", (20, 16)),
        "index.quantizer.graph.levels": ("int32", (20,)),
        "index.quantizer.graph.entry": ("int32", ()),
        "index.pq.centroids": ("float32", (4, 16, 4)),
        "index.lists": ("int32", (1200,)),
    }
    assert FaissIndex("SQ6").build(stored).tensors()["index.sq.range"].shape == (64,)
    assert ExactIndex().build(stored).tensors() == {}


def test_whitening_that_is_not_finite_is_refused() -> None:
    # All rows lie on a line: its other directions have no extent to divide by.
    with pytest.raises(GroodError, match=r"'PCAW4,Flat' over 50 gradients .*what it learned is not finite"):
        FaissIndex("PCAW4,Flat").build(on_a_line(*torch.linspace(0.1, 1, 50).tolist(), d=8))


# --- Attacks ------------------------------------------------------------------------------------------------------

LISTS, GRAPH = "PCA16,IVF20_HNSW4,PQ4x4", "HNSW4,SQ8"
FLOATS = [
    *[(LISTS, name) for name in ("unit", "centre", "transform0.matrix", "transform0.bias", "quantizer.vectors")],
    *[(LISTS, "pq.centroids"), (GRAPH, "unit"), (GRAPH, "centre"), (GRAPH, "sq.range")],
]
INTEGERS = [
    *[(LISTS, f"quantizer.graph.{name}") for name in ("levels", "neighbors", "entry")],
    *[(LISTS, "lists"), (GRAPH, "graph.levels"), (GRAPH, "graph.neighbors"), (GRAPH, "graph.entry")],
]


@pytest.fixture(scope="module")
def states(stored: PolarGradients) -> dict[str, dict[str, Tensor]]:
    return {factory: FaissIndex(factory).build(stored).tensors() for factory in (LISTS, GRAPH)}


def test_all_tensors_are_attacked(states: dict[str, dict[str, Tensor]]) -> None:
    names = {(factory, name.removeprefix("index.")) for factory, state in states.items() for name in state}
    assert names == {*FLOATS, *INTEGERS}


@pytest.mark.parametrize(("factory", "name"), FLOATS + INTEGERS)
@pytest.mark.parametrize("change", ["missing", "dtype", "longer", "shorter", "empty", "extra axis"])
def test_a_tensor_of_another_form(factory: str, name: str, change: str, states: Any, stored: PolarGradients) -> None:
    tensors = dict(states[factory])
    tensor = tensors.pop(f"index.{name}")
    rows = tensor[None] if tensor.ndim == 0 else tensor
    if change != "missing":
        tensors[f"index.{name}"] = {
            "dtype": tensor.to(torch.int64 if tensor.dtype != torch.int64 else torch.int32),
            "longer": torch.cat([rows, rows]),
            "shorter": rows[:-1],
            "empty": rows[:0],
            "extra axis": tensor[None],
        }[change]
    with pytest.raises(FormatError, match=r"the index lacks its|of the index is|in a file"):
        FaissIndex(factory).restore(GradientStore.of(stored), tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("factory", "name"), FLOATS)
def test_a_tensor_that_is_not_finite(
    factory: str, name: str, value: float, states: Any, stored: PolarGradients
) -> None:
    tensor = states[factory][f"index.{name}"].clone()
    tensor.view(-1)[-1] = value
    with pytest.raises(FormatError, match=r"the index lacks its|holds NaN or infinity"):
        FaissIndex(factory).restore(GradientStore.of(stored), {**states[factory], f"index.{name}": tensor})


@pytest.mark.parametrize(
    ("factory", "name", "value", "message"),
    [
        (LISTS, "lists", -1, "lies in none of the 20 lists"),
        (LISTS, "lists", 20, "lies in none of the 20 lists"),
        (LISTS, "lists", -(2**31), "lies in none of the 20 lists"),
        (LISTS, "centre", 1.1, "lacks its centre"),
        (LISTS, "quantizer.graph.neighbors", 20, "are not all among its 20 rows"),
        (LISTS, "quantizer.graph.neighbors", -2, "are not all among its 20 rows"),
        (LISTS, "quantizer.graph.entry", 20, "no row of the highest level"),
        (GRAPH, "graph.neighbors", 1200, "are not all among its 1200 rows"),
        (GRAPH, "graph.neighbors", -(2**31), "are not all among its 1200 rows"),
        (GRAPH, "graph.levels", 0, "graph.levels of the index are not from 1 to"),
        (GRAPH, "graph.levels", -1, "graph.levels of the index are not from 1 to"),
        (GRAPH, "graph.levels", 2**31 - 1, "graph.levels of the index are not from 1 to"),
        # A level more than is there moves all the slots after it.
        (GRAPH, "graph.levels", 3, r"graph.neighbors of the index is torch.int32 \("),
        (GRAPH, "graph.entry", -1, "no row of the highest level"),
        (GRAPH, "graph.entry", 1200, "no row of the highest level"),
    ],
)
def test_a_number_out_of_range(
    factory: str, name: str, value: float, message: str, states: Any, stored: PolarGradients
) -> None:
    tensor = states[factory][f"index.{name}"].clone()
    first = int((states[factory]["index.graph.levels"] == 1).nonzero()[0]) if name == "graph.levels" else 0
    tensor.view(-1)[first] = value
    with pytest.raises(FormatError, match=message):
        FaissIndex(factory).restore(GradientStore.of(stored), {**states[factory], f"index.{name}": tensor})


def test_a_link_to_a_row_that_lacks_the_level(states: Any, stored: PolarGradients) -> None:
    # Its slots on that level would be read beyond its own, and at the end beyond all memory.
    state = states[GRAPH]
    levels, neighbors = state["index.graph.levels"], state["index.graph.neighbors"].clone()
    empty = faiss.IndexHNSWFlat(1, 4)
    slots = faiss.vector_to_array(empty.hnsw.cum_nneighbor_per_level)
    ends = torch.from_numpy(slots)[levels.long()].cumsum(0)
    high = int((levels == levels.max()).nonzero()[0])
    low = int((levels == 1).nonzero()[-1])
    neighbors[ends[high] - 1] = low
    with pytest.raises(FormatError, match="lie on a level that they lack"):
        FaissIndex(GRAPH).restore(GradientStore.of(stored), {**state, "index.graph.neighbors": neighbors})
    # On the lowest level every row may be linked.
    neighbors = state["index.graph.neighbors"].clone()
    neighbors[ends[high - 1] if high else 0] = low
    FaissIndex(GRAPH).restore(GradientStore.of(stored), {**state, "index.graph.neighbors": neighbors})


def test_an_entry_below_the_highest_level(states: Any, stored: PolarGradients) -> None:
    low = (states[GRAPH]["index.graph.levels"] == 1).nonzero()[0, 0].to(torch.int32)
    with pytest.raises(FormatError, match="no row of the highest level"):
        FaissIndex(GRAPH).restore(GradientStore.of(stored), {**states[GRAPH], "index.graph.entry": low})


def test_tensors_that_the_index_does_not_have(states: Any, stored: PolarGradients) -> None:
    with pytest.raises(FormatError, match=r"the index has no graph.levels; the file was altered"):
        FaissIndex(LISTS).restore(
            GradientStore.of(stored),
            {**states[LISTS], "index.graph.levels": states[GRAPH]["index.graph.levels"]},
        )
    for factory in ("Flat", "IVF20,Flat", "PCA8,IVF20_HNSW4,PQ4x4", GRAPH):
        with pytest.raises(FormatError):
            FaissIndex(factory).restore(GradientStore.of(stored), states[LISTS])


@pytest.mark.parametrize("factory", [LISTS, GRAPH])
def test_numbers_altered_at_random(factory: str, states: Any, stored: PolarGradients, queries: PolarGradients) -> None:
    """Nothing comes of it but an error or a searcher that works, of which rows can be added and removed."""
    generator = random.Random(3)
    n_restored = n_errors = 0
    for trial in range(60):
        tensors = {name: tensor.clone() for name, tensor in states[factory].items()}
        name = generator.choice(list(tensors))
        flat = tensors[name].view(-1)
        if trial % 3:
            for _ in range(generator.choice([1, 20])):
                flat.numpy().view(np.uint8)[generator.randrange(flat.nbytes)] ^= 1 << generator.randrange(8)
        elif flat.is_floating_point():
            flat.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(trial)) * 1e20)
        else:
            flat.copy_(torch.randint(0, 20, flat.shape, generator=torch.Generator().manual_seed(trial)))
        try:
            searcher = FaissIndex(factory).restore(GradientStore.of(stored), tensors, quality=IndexQuality(1.0, 1.0, 1))
        except FormatError:
            n_errors += 1
            continue
        assert_true_distances(searcher.search(queries, 3), queries, stored)
        if trial % 5 == 0:
            searcher.with_added(queries, IN_MEMORY).with_only(torch.arange(0, 1200, 3), IN_MEMORY)
        n_restored += 1
    assert min(n_restored, n_errors) > 5


@pytest.mark.parametrize(
    "factory",
    [
        "Nope", "", "NSG8", "IMI2x4,Flat", "RQ4x4", "LSQ4x4", "IDMap,Flat", "L2norm,Flat", "ITQ8,LSH",
        "IVF4(IVF4,Flat),Flat", "Flat,Flat", "PCA8", "IVF4", "IVF4,", "IVF4,Flat,Refine(SQ8)", "IVF4,HNSW8",
        "PCA8,PCA8,PCA8,Flat", " Flat",
        "Flat\n", "PQ٤,RFlat", "HNSW16_NSG4", "IVF4,PQ8+16", "PQ8x4fsr", "FlatDedup",
        "IVF" + "0" * 100 + "4,Flat",
    ],
)  # fmt: skip
def test_kinds_that_no_file_may_ask_for(factory: str, stored: PolarGradients) -> None:
    with pytest.raises(GroodError, match=r"cannot be kept in a file; the kinds that can are Flat, SQ, PQ, IVF, HNSW"):
        FaissIndex(factory).restore(GradientStore.of(stored), {})


@pytest.mark.parametrize(
    "factory",
    [
        "HNSW1000000000", "HNSW1", "HNSW0", "HNSW129", "IVF4_HNSW1,Flat", "IVF0,Flat", "IVF5000,Flat", "PQ0", "PQ8x0",
        "PQ8x13", "PQ8x30", "HNSW8_PQ4x12", "PCA0,Flat", "PCA33,Flat", "PCA4000,Flat", "OPQ0,PQ8", "OPQ8_64,PQ8",
        "RR33,Flat", "Pad129,Flat", "Pad4000,Flat", "IVF99999999999999999999,Flat", "PQ4x4294967299",
    ],
)  # fmt: skip
def test_sizes_that_no_file_may_ask_for(factory: str, stored: PolarGradients) -> None:
    with pytest.raises(GroodError, match="too large for 1200 gradients of dimension 32 in a file"):
        FaissIndex(factory).restore(GradientStore.of(stored), {})


@pytest.mark.parametrize(
    ("factory", "n", "d"),
    [
        ("PCA8,Flat", 10, 20_000),
        ("LSHr", 10, 20_000),
        ("PQ8x12", 10, 100_000),
        ("HNSW128", 10**7, 8),
        ("Pad64,Flat", 10**7, 1),
    ],
)
def test_sizes_that_only_a_large_file_may_ask_for(factory: str, n: int, d: int) -> None:
    with pytest.raises(GroodError, match=f"too large for {n} gradients of dimension {d} in a file"):
        faiss_state.check_storable(factory, {}, n, d)


@pytest.mark.parametrize(
    ("factory", "n", "d"),
    [
        ("IVF4096,SQ8", 1_281_167, 2048),
        ("OPQ64_128,IVF4096,PQ64", 1_281_167, 2048),
        ("IVF65536_HNSW32,PQ64", 1_281_167, 2048),
        ("HNSW64", 1_281_167, 2048),
        ("PCAR64,HNSW32_SQ8", 50_000, 342),
        ("IVF4096,Flat", 10, 8),
        ("Pad352,OPQ32,PQ32x12np", 50_000, 342),
        ("LSHrt", 50_000, 342),
        ("IVF256,PQ32x4fs,RFlat", 50_000, 342),
    ],
)
def test_what_people_use_can_be_stored(factory: str, n: int, d: int) -> None:
    parameters = {"nprobe": 64, "efSearch": 512, "quantizer_efSearch": 200, "ht": 0, "max_codes": 0, "k_factor_rf": 4}
    faiss_state.check_storable(factory, parameters, n, d)


def test_there_may_be_as_many_lists_as_there_are_centres() -> None:
    # After nearly all rows were removed.
    centres = {"index.quantizer.vectors": torch.zeros(5000, 2)}
    faiss_state.check_storable("IVF5000,Flat", {}, 10, 2, centres)
    for rows, columns in ((4999, 2), (10**12, 0)):
        centres = {"index.quantizer.vectors": torch.zeros(rows, columns)}
        with pytest.raises(GroodError, match="too large"):
            faiss_state.check_storable("IVF5000,Flat", {}, 10, 2, centres)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nprobe", 0), ("nprobe", -1), ("nprobe", 5000), ("efSearch", 10**9), ("quantizer_efSearch", 10**6), ("ht", -1),
        ("efConstruction", 1e9), ("k_factor_rf", 65), ("k_factor_rf", 0), ("nprobe", 0.5), ("verbose", 1), ("", 1),
        ("quantizer_quantizer_nprobe", 1), ("nprobe\n", 1),
    ],
)  # fmt: skip
def test_parameters_that_no_file_may_set(name: str, value: float, stored: PolarGradients) -> None:
    with pytest.raises(GroodError, match=r"the search parameter .* cannot be kept in a file with 1200 gradients"):
        FaissIndex("IVF4,Flat", {name: value}).restore(GradientStore.of(stored), {})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**31, -(10**400)])
def test_parameters_that_no_integer_holds(value: float) -> None:
    with pytest.raises(GroodError, match="'nprobe' must be a number below 2"):
        FaissIndex("IVF4,Flat", {"nprobe": value})


def test_a_parameter_of_another_index_shows_at_once(states: Any, stored: PolarGradients) -> None:
    index = FaissIndex(GRAPH, {"nprobe": 4})
    with pytest.raises(GroodError, match="could not set parameter nprobe"):
        index.restore(GradientStore.of(stored), states[GRAPH], quality=IndexQuality(1.0, 1.0, 1))


# --- GPU ----------------------------------------------------------------------------------------------------------


class _GpuFaiss:
    """faiss as its GPU build is, with as many GPUs and kinds of index as it is told."""

    def __init__(self, n_gpus: int, refuses: str = "no kind") -> None:
        self.n_gpus = n_gpus
        self.refuses = refuses
        self.searches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(faiss, name)

    def get_num_gpus(self) -> int:
        return self.n_gpus

    def StandardGpuResources(self) -> object:  # noqa: N802
        return object()

    def index_cpu_to_gpu(self, resources: object, device: int, index: Any) -> Any:
        assert device == 0
        if self.refuses in type(index).__name__:
            raise RuntimeError("Error in cloner:\nThis index type is not implemented on GPU.")
        return _GpuIndex(self, index)


class _GpuIndex:
    def __init__(self, owner: _GpuFaiss, index: Any) -> None:
        self.owner = owner
        self.index = index

    def search(self, vectors: NDArray[np.float32], wanted: int) -> Any:
        self.owner.searches.append(wanted)
        return self.index.search(vectors, wanted)


def on(gpu_faiss: _GpuFaiss, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_module, "require", lambda name, extra: gpu_faiss)


@pytest.mark.parametrize("wanted", [None, True])
def test_a_gpu_is_used(
    wanted: bool | None, stored: PolarGradients, queries: PolarGradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = FaissIndex("IVF20,Flat").build(stored).search(queries, 3)
    gpu = _GpuFaiss(1)
    on(gpu, monkeypatch)
    searcher = FaissIndex("IVF20,Flat", gpu=wanted).build(stored)
    found = searcher.search(queries, 3)
    assert gpu.searches == [1, 9, 24]
    assert torch.equal(found.row, expected.row)
    assert torch.equal(found.log_distance, expected.log_distance)
    # What is added is added on the CPU and searched on the GPU; what is kept comes from the CPU.
    more = searcher.with_added(queries, IN_MEMORY)
    gpu.searches.clear()
    assert bool((more.search(queries).log_distance == -torch.inf).all())
    assert gpu.searches == [8]
    assert "index.lists" in more.tensors()
    # More neighbours than a GPU gives are searched for on the CPU.
    monkeypatch.setattr(faiss_module, "_MOST_ON_GPU", 23)
    assert torch.equal(searcher.search(queries, 3).row, found.row)
    assert gpu.searches == [8]


def test_a_gpu_is_left_alone(stored: PolarGradients, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = _GpuFaiss(1)
    on(gpu, monkeypatch)
    FaissIndex("Flat", gpu=False).build(stored)
    assert gpu.searches == []


@pytest.mark.parametrize(
    ("gpu", "factory", "reason"),
    [
        (_GpuFaiss(0), "Flat", "built without GPU support, or there is no GPU"),
        (_GpuFaiss(1, "HNSW"), "HNSW8", "This index type is not implemented on GPU"),
        (None, "Flat", "built without GPU support, or there is no GPU"),
    ],
)
def test_where_there_is_no_gpu(
    gpu: _GpuFaiss | None,
    factory: str,
    reason: str,
    stored: PolarGradients,
    queries: PolarGradients,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = FaissIndex(factory, gpu=False).build(stored).search(queries)
    if gpu is not None:
        on(gpu, monkeypatch)
    elif hasattr(faiss, "index_cpu_to_gpu"):
        pytest.skip("a GPU build")
    assert torch.equal(FaissIndex(factory).build(stored).search(queries).row, expected.row)
    with pytest.raises(GroodError, match=rf"gpu=True, but .*{reason}\. Install a faiss-gpu build .*or leave gpu out"):
        FaissIndex(factory, gpu=True).build(stored)


def test_where_an_index_is_searched_is_no_part_of_it() -> None:
    assert "gpu" not in FaissIndex("Flat", gpu=True).config()
    with pytest.raises(GroodError, match="gpu must be True, False or None, got 'cuda'"):
        FaissIndex("Flat", gpu="cuda")  # type: ignore[arg-type]


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (FaissIndex("Nope"), "could not parse index string Nope"),
        (FaissIndex("PQ7"), "dimension of the vector"),
        (FaissIndex("IVF5000,Flat"), "Number of training points"),
        (FaissIndex("IVF4,Flat", train_size=3), "Number of training points"),
        (FaissIndex("IVF4,Flat", {"nprob": 3}), "could not set parameter nprob"),
        (FaissIndex("Flat", {"efSearch": 3}), "could not set parameter efSearch"),
    ],
)
def test_what_faiss_cannot_build(index: FaissIndex, reason: str, stored: PolarGradients) -> None:
    with pytest.raises(
        GroodError,
        match=f"faiss cannot build index '{index.factory}' over 1200 gradients of dimension 32: .*{reason}.*"
        "another factory string, or index='exact'",
    ):
        index.build(stored)


def test_too_few_samples_name_their_number(make_gradients: MakeGradients) -> None:
    with pytest.raises(GroodError, match=r"'IVF4,Flat' over 3 gradients .*Use fewer lists"):
        FaissIndex("IVF4,Flat").build(make_gradients(3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": 0}, "candidates must be a positive integer, got 0"),
        ({"candidates": -3}, "candidates must be a positive integer, got -3"),
        ({"candidates": 1.5}, "candidates must be a positive integer, got 1.5"),
        ({"train_size": 0}, "train_size must be a positive integer"),
        ({"quality_queries": -1}, "quality_queries must be"),
        ({"parameters": {"nprobe": "4"}}, "a search parameter is a name and a number, got 'nprobe': '4'"),
        ({"parameters": [4]}, "a mapping of parameters"),
        ({"parameters": {"nprobe": 0}}, "faiss cannot build"),
        ({"parameters": {"nprobe": -1}}, "faiss cannot build"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str, stored: PolarGradients) -> None:
    with pytest.raises(GroodError, match=message):
        FaissIndex("IVF4,Flat", **arguments).build(stored)


def test_a_negative_seed() -> None:
    with pytest.raises(GroodError, match=r"seed must be an integer from 0 to 2\^63 - 1, got -1"):
        GROOD(None, index="Flat", seed=-1)


@pytest.mark.parametrize("k", [0, 1201])
def test_k_out_of_range(k: int, stored: PolarGradients, queries: PolarGradients) -> None:
    with pytest.raises(GroodError, match=f"asked for k={k} neighbours among 1200"):
        FaissIndex("Flat").build(stored).search(queries, k)


def test_nothing_to_search(make_gradients: MakeGradients) -> None:
    with pytest.raises(GroodError, match="no gradient to search"):
        FaissIndex("Flat").build(make_gradients(0, 3))


def test_make_index_takes_a_factory_string() -> None:
    index: GradientIndex = make_index("IVF1024,Flat")
    assert index == FaissIndex("IVF1024,Flat")
    assert index.spec == "IVF1024,Flat"


def test_config_describes_the_index() -> None:
    index = FaissIndex("Flat", {"nprobe": 3.0}, candidates=5, train_size=7, quality_queries=9)
    assert FaissIndex(index.factory, **index.config()) == index
