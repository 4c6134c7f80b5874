"""Approximate search: true distances of what is found, measured quality, and errors that say what faiss wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from torch_grood import GROOD, ExactIndex, FaissIndex, GroodError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors import GradientIndex, Neighbors, log_distance, make_index

MakeGradients = Callable[..., PolarGradients]
BruteForce = Callable[[PolarGradients, PolarGradients], NDArray[np.float64]]

FACTORIES = [
    "Flat",
    "SQ8",
    "PQ8x4",
    "IVF20,Flat",
    "IVF20,PQ8x4",
    "HNSW16",
    "PCA8,Flat",
    "OPQ8_16,IVF10,PQ8x4",
    "LSH",
    "PQ8x4,RFlat",
]


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
    # The quality was measured on other queries of the same distribution: it must tell what is found here.
    recall = float((found.log_distance[:, 0] == exact.log_distance[:, 0]).double().mean())
    assert abs(searcher.quality.recall_at_1 - recall) < 0.25
    inflation = float((found.log_distance[:, 0] - exact.log_distance[:, 0]).exp().mean())
    assert abs(searcher.quality.score_inflation - inflation) < 0.1
    assert searcher.quality.n_queries == 256


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


def test_building_and_searching_change_no_input(stored: PolarGradients, queries: PolarGradients) -> None:
    before = [x.clone() for x in (*stored, *queries)]
    FaissIndex("IVF20,Flat").build(stored).search(queries)
    assert all(torch.equal(a, b) for a, b in zip(before, (*stored, *queries), strict=True))


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
