"""Explanations against 50-digit arithmetic and numpy, their laws, and the edges."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_grood import GROOD, FaissIndex, GroodError
from torch_grood import explanation as module
from torch_grood.explanation import Explanation, explain
from torch_grood.state import FittedState

EPSILON = torch.finfo(torch.float64).eps


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n: int = 12, stored: int = 60, classes: int = 4, d: int = 6, scale: float = 1.0) -> tuple[GROOD, Tensor]:
    """A detector on `stored` training samples in float32, and n other features."""
    centres, labels = 2 * normal(classes, d, seed=1), torch.arange(stored) % classes
    training = scale * (centres[labels] + normal(stored, d, seed=2))
    detector = GROOD(None).fit_features(training.float(), labels)
    queries = scale * (centres[torch.arange(n) % classes] + 1.5 * normal(n, d, seed=3))
    return detector, queries.float()


def state_of(detector: GROOD) -> FittedState:
    return detector._need_state()


def lengths(explanation: Explanation, state: FittedState) -> tuple[Tensor, Tensor]:
    """‖u‖ of the samples, (n,), and of their neighbours, (n, k): 1 up to the rounding to float32, or 0."""
    order = state.sample_ids.argsort()
    row = order[torch.searchsorted(state.sample_ids[order], explanation.neighbor)]
    stored = state.searcher.gradients.directions(row.flatten()).double().norm(dim=1).view(row.shape)
    return explanation.direction.double().norm(dim=1), stored


def assert_law_of_cosines(explanation: Explanation, state: FittedState) -> None:
    """S² = (π - π')² + 4ππ'sin²(θ/2) for every neighbour, and the share of the second term, to float64 rounding."""
    of_sample, of_neighbor = lengths(explanation, state)
    first = explanation.log_magnitude[:, None] + of_sample.log()[:, None]
    second = explanation.neighbor_log_magnitude + of_neighbor.log()
    unit = torch.maximum(first, second)
    unit = torch.where(unit.isinf(), 0.0, unit)
    a, b = (first - unit).exp(), (second - unit).exp()
    magnitudes, directions = (a - b).square(), 4 * a * b * (explanation.neighbor_angle / 2).sin().square()
    square = (2 * (explanation.neighbor_log_distance - unit)).exp()
    # A logarithm in float64 gives its number to so much.
    tolerance = 8 * EPSILON * (4 + first.abs().nan_to_num(posinf=0).max() + second.abs().nan_to_num(posinf=0).max())
    assert float((magnitudes + directions - square).abs().max()) < tolerance
    share = explanation.direction_share
    assert bool(((share >= 0) & (share <= 1)).all())
    assert float((share * square[:, 0] - directions[:, 0]).abs().max()) < tolerance


# --- Against 50 digits and numpy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
def test_everything_equals_fifty_digits(scale: float) -> None:
    detector, queries = problem(scale=scale)
    state = state_of(detector)
    found = explain(state, queries, k=3, n_prototypes=2)
    stored = state.searcher.gradients
    with mpmath.workdps(50):

        def exact(row: Tensor) -> list[mpmath.mpf]:
            return [mpmath.mpf(x) for x in row.double().tolist()]

        def length(vector: list[mpmath.mpf]) -> mpmath.mpf:
            return mpmath.sqrt(mpmath.fsum(x**2 for x in vector))

        def minus(first: list[mpmath.mpf], second: list[mpmath.mpf]) -> list[mpmath.mpf]:
            return [x - y for x, y in zip(first, second, strict=True)]

        def near(value: Tensor, expected: mpmath.mpf, tolerance: float) -> bool:
            return bool(abs(mpmath.mpf(value.item()) - expected) <= tolerance * (1 + abs(expected)))

        prototypes = [exact(row) for row in (*state.class_prototypes, state.ood_prototype)]
        for i, h in enumerate(map(exact, queries)):
            distances = [length(minus(h, p)) for p in prototypes]
            assert near(found.ood_distance[i], distances[-1], 1e-14 * scale)
            nearest = sorted(range(len(distances) - 1), key=lambda c, d=distances: d[c])[:2]
            assert found.prototype[i].tolist() == nearest
            for j, c in enumerate(nearest):
                assert near(found.prototype_distance[i, j], distances[c], 1e-14 * max(1, scale))
            log_pi = -distances[-1] - mpmath.log(mpmath.fsum(mpmath.exp(-distance) for distance in distances))
            assert near(found.log_magnitude[i], log_pi, 1e-13)
            offset = minus(h, prototypes[-1])
            assert all(near(u, x / distances[-1], 1e-7) for u, x in zip(found.direction[i], offset, strict=True))

            # What follows is about the gradients as they are compared, with directions in float32.
            u, pi = exact(found.direction[i]), mpmath.exp(mpmath.mpf(found.log_magnitude[i].item()))
            for j, row in enumerate(found.neighbor[i].tolist()):
                v, log_other = exact(stored.directions(slice(row, row + 1))[0]), stored.log_magnitude[row]
                assert found.neighbor_log_magnitude[i, j] == log_other
                other = mpmath.exp(mpmath.mpf(log_other.item()))
                distance = length([pi * x - other * y for x, y in zip(u, v, strict=True)])
                assert near(found.neighbor_log_distance[i, j], mpmath.log(distance), 1e-15 * (1 + scale))
                cosine = mpmath.fsum(x * y for x, y in zip(u, v, strict=True)) / (length(u) * length(v))
                assert near(found.neighbor_angle[i, j], mpmath.acos(cosine), 1e-14)
                if j == 0:
                    a, b = pi * length(u), other * length(v)
                    share = 4 * a * b * mpmath.sin(mpmath.acos(cosine) / 2) ** 2 / distance**2
                    # log π is given in float64, whose rounding is 1e-12 where log π is -1e4.
                    assert near(found.direction_share[i], share, 1e-12 * (1 + scale))
                    assert found.log_score[i] == found.neighbor_log_distance[i, 0]


def test_neighbors_and_prototypes_equal_numpy() -> None:
    detector, queries = problem(n=50, stored=300, classes=9, d=20)
    state = state_of(detector)
    found = explain(state, queries, k=7, n_prototypes=4)
    vectors = found.direction.double().numpy() * found.log_magnitude.exp().numpy()[:, None]
    gradients = state.searcher.gradients
    stored = gradients.directions(slice(None)).double().numpy() * gradients.log_magnitude.exp().numpy()[:, None]
    distance = np.linalg.norm(vectors[:, None] - stored[None], axis=2)
    order = np.argsort(distance, axis=1)[:, :7]
    np.testing.assert_array_equal(found.neighbor.numpy(), order)
    np.testing.assert_allclose(
        found.neighbor_log_distance.exp().numpy(), np.take_along_axis(distance, order, 1), rtol=1e-9
    )
    to_prototypes = np.linalg.norm(queries.double().numpy()[:, None] - state.class_prototypes.numpy()[None], axis=2)
    nearest = np.argsort(to_prototypes, axis=1)[:, :4]
    np.testing.assert_array_equal(found.prototype.numpy(), nearest)
    np.testing.assert_allclose(found.prototype_distance.numpy(), np.take_along_axis(to_prototypes, nearest, 1))


def test_it_is_the_detector_that_is_explained() -> None:
    detector, queries = problem(n=50)
    detector.calibrate_features(queries + 0.1, fpr=0.1)
    predicted, found = detector.predict_features(queries), explain(state_of(detector), queries)
    assert torch.equal(found.log_score, detector.log_score_features(queries))
    assert torch.equal(found.neighbor[:, 0], predicted.neighbor)
    assert torch.equal(found.prototype[:, 0], predicted.prototype_label)
    assert [field.dtype for field in found] == [
        *(torch.float64, torch.float64, torch.float32, torch.float64, torch.int64, torch.float64),
        *(torch.int64, torch.float64, torch.float64, torch.float64, torch.float64),
    ]
    assert [tuple(field.shape[1:]) for field in found] == [(), (), (6,), (), (4,), (4,), (5,), (5,), (5,), (5,), ()]


# --- Laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 100.0, 1e4, 1e6])
@pytest.mark.parametrize("d", [1, 2, 64])
def test_the_score_parts_into_magnitude_and_direction(scale: float, d: int) -> None:
    detector, queries = problem(n=40, d=d, scale=scale)
    # Also samples that are far nearer to one another, and far larger or smaller, than training samples are.
    state = state_of(detector)
    ood = state.ood_prototype.float()
    more = torch.cat([queries, ood + 1e-3 * (queries - ood), ood + 50 * (queries - ood)])
    found = explain(state, more, k=60)
    assert_law_of_cosines(found, state)
    for field in found:
        assert not bool(field.isnan().any())


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    d=st.integers(1, 5),
    n=st.integers(1, 6),
    stored=st.integers(1, 6),
    scale=st.sampled_from([1e-8, 1e-2, 1.0, 30.0, 1e3]),
    grid=st.booleans(),
)
def test_the_law_of_cosines_at_random(seed: int, d: int, n: int, stored: int, scale: float, grid: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = scale * torch.randn(n + stored, d, generator=generator)
    if grid:
        # Many equal features, prototypes and distances, and samples at p_ood.
        features = scale * (features / scale).round().clamp(-1, 1)
    labels = torch.arange(stored) % min(stored, 2)
    detector = GROOD(None).fit_features(features[n:], labels)
    found = explain(state_of(detector), features[:n], k=3)
    assert_law_of_cosines(found, state_of(detector))
    assert torch.equal(found.log_score, detector.log_score_features(features[:n]))


def test_the_scale_of_the_features() -> None:
    # 2^e changes no bit of a direction; π, and with it who is nearest, is another.
    for exponent in (-20, 3):
        (small, queries), (large, larger) = problem(), problem(scale=2.0**exponent)
        one, two = (explain(state_of(x), q, k=60) for x, q in ((small, queries), (large, larger)))
        assert torch.equal(one.direction, two.direction)
        assert torch.equal(2.0**exponent * one.ood_distance, two.ood_distance)
        assert torch.equal(one.prototype, two.prototype)
        assert torch.equal(2.0**exponent * one.prototype_distance, two.prototype_distance)
        angles = [x.neighbor_angle.gather(1, x.neighbor.argsort(1)) for x in (one, two)]
        assert torch.equal(*angles)


def test_other_samples_and_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, queries = problem(n=300, stored=500, classes=7, d=33)
    state = state_of(detector)
    together = explain(state, queries, k=4)
    for i in range(0, 300, 13):
        alone = explain(state, queries[i : i + 1], k=4)
        for field, expected in zip(alone, together, strict=True):
            assert torch.equal(field[0], expected[i])
    monkeypatch.setattr(module, "GRADIENT_ROWS", 128)
    monkeypatch.setattr(module, "_PAIR_BYTES", 10_000)
    for field, expected in zip(explain(state, queries, k=4), together, strict=True):
        assert torch.equal(field, expected)


def test_working_memory_does_not_grow_with_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, queries = problem(n=1000)
    state = state_of(detector)
    searched: list[int] = []
    paired: list[int] = []
    search, chord = type(state.searcher).search, module._log_chord

    def counted(self: object, gradients: object, k: int = 1) -> object:
        searched.append(len(gradients.log_magnitude))  # type: ignore[attr-defined]
        return search(self, gradients, k)  # type: ignore[arg-type]

    def counted_chord(first: Tensor, second: Tensor) -> Tensor:
        paired.append(len(first))
        return chord(first, second)

    monkeypatch.setattr(module, "GRADIENT_ROWS", 256)
    monkeypatch.setattr(module, "_PAIR_BYTES", 100 * 8 * 6)
    monkeypatch.setattr(type(state.searcher), "search", counted)
    monkeypatch.setattr(module, "_log_chord", counted_chord)
    assert len(explain(state, queries, k=3).log_score) == 1000
    assert max(searched) == 256
    assert max(paired) == 100


def test_autocast_and_gradients_of_the_caller_change_nothing() -> None:
    detector, queries = problem()
    expected = explain(state_of(detector), queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = explain(state_of(detector), queries.requires_grad_())
    for field, other in zip(found, expected, strict=True):
        assert torch.equal(field, other)
        assert not field.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_of_features(dtype: torch.dtype) -> None:
    detector, queries = problem()
    rounded = queries.to(dtype)
    found, expected = (explain(state_of(detector), q) for q in (rounded, rounded.double()))
    for field, other in zip(found, expected, strict=True):
        assert torch.equal(field, other)


# --- Indexes and stores -------------------------------------------------------------------------------------------


def test_an_approximate_index_is_explained_as_it_decides() -> None:
    # One candidate, by two coarse quantizers: the score's neighbour is often not the nearest.
    centres, labels = 2 * normal(4, 8, seed=1), torch.arange(400) % 4
    index = FaissIndex("PQ2x4", candidates=1, quality_queries=0)
    training = (centres[labels] + normal(400, 8, seed=2)).float()
    detector = GROOD(None, index=index).fit_features(training, labels)
    queries = (centres[torch.arange(100) % 4] + normal(100, 8, seed=3)).float()
    found = explain(state_of(detector), queries, k=6)
    assert torch.equal(found.log_score, detector.log_score_features(queries))
    assert torch.equal(found.log_score, found.neighbor_log_distance[:, 0])
    others = found.neighbor_log_distance[:, 1:]
    assert bool((others[:, 0] < found.log_score).any())
    assert bool((others[:, 1:] >= others[:, :-1]).all())
    assert all(len(set(row)) == 6 for row in found.neighbor.tolist())
    assert_law_of_cosines(found, state_of(detector))
    one = explain(state_of(detector), queries, k=1)
    assert torch.equal(one.neighbor, found.neighbor[:, :1])
    assert torch.equal(one.direction_share, found.direction_share)


def test_a_good_approximate_index_gives_what_exact_search_gives() -> None:
    detector, queries = problem(n=30, stored=400)
    exact = explain(state_of(detector), queries)
    labels = torch.arange(400) % 4
    training = (2 * normal(4, 6, seed=1)[labels] + normal(400, 6, seed=2)).float()
    other = GROOD(None, index=FaissIndex("IVF4,Flat", {"nprobe": 4}, candidates=50)).fit_features(training, labels)
    for field, expected in zip(explain(state_of(other), queries), exact, strict=True):
        assert torch.equal(field, expected)


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_rounded_gradients_are_explained_as_they_are_stored(store: str) -> None:
    labels = torch.arange(200) % 4
    training = (2 * normal(4, 16, seed=1)[labels] + normal(200, 16, seed=2)).float()
    queries = (2 * normal(4, 16, seed=1)[labels[:50]] + normal(50, 16, seed=3)).float()
    detector = GROOD(None, store=store).fit_features(training, labels)
    state = state_of(detector)
    found = explain(state, queries)
    assert torch.equal(found.log_score, detector.log_score_features(queries))
    assert_law_of_cosines(found, state)
    exact = explain(state_of(GROOD(None).fit_features(training, labels)), queries)
    torch.testing.assert_close(found.neighbor_angle[:, 0], exact.neighbor_angle[:, 0], rtol=0, atol=0.05)


# --- Edges --------------------------------------------------------------------------------------------------------


def test_one_class_and_one_training_sample() -> None:
    detector = GROOD(None).fit_features(torch.tensor([[1.0, 0.0]]), [0], ood_features=torch.tensor([[0.0, 0.0]]))
    found = explain(state_of(detector), torch.tensor([[0.0, 2.0], [1.0, 0.0], [-3.0, 0.0]]), k=5, n_prototypes=5)
    assert found.prototype.tolist() == found.neighbor.tolist() == [[0], [0], [0]]
    torch.testing.assert_close(found.prototype_distance, torch.tensor([[5**0.5], [0], [4]], dtype=torch.float64))
    torch.testing.assert_close(found.ood_distance, torch.tensor([2.0, 1, 3], dtype=torch.float64))
    torch.testing.assert_close(
        found.neighbor_angle.flatten(), torch.tensor([math.pi / 2, 0, math.pi], dtype=torch.float64)
    )
    # The second is the training sample: nothing to share.
    assert found.log_score[1] == -math.inf
    assert found.direction_share[1] == 0
    # The third lies opposite: S = π + π'.
    pi, other = found.log_magnitude[2].exp(), found.neighbor_log_magnitude[2, 0].exp()
    torch.testing.assert_close(found.log_score[2].exp(), pi + other)
    torch.testing.assert_close(found.direction_share[2], 4 * pi * other / (pi + other).square())


def test_a_pure_difference_of_magnitude_has_no_share_of_direction() -> None:
    features, labels = torch.tensor([[4.0, 0.0], [0.0, 4.0]]), [0, 1]
    detector = GROOD(None).fit_features(features, labels, ood_features=torch.tensor([[0.0, 0.0]]))
    found = explain(state_of(detector), torch.tensor([[5.0, 0.0]]), k=2)
    assert found.neighbor_angle.tolist() == [[0.0, math.pi / 2]]
    assert found.direction_share.tolist() == [0.0]
    same = (found.log_magnitude.exp() - found.neighbor_log_magnitude[:, 0].exp()).abs()
    torch.testing.assert_close(found.log_score.exp(), same)


def test_a_sample_at_the_ood_prototype() -> None:
    training, ood = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.25, 0.25]])
    detector = GROOD(None).fit_features(training, [0, 1], ood_features=ood)
    state = state_of(detector)
    found = explain(state, torch.cat([ood, ood + 1e-3]), k=2)
    assert found.ood_distance[0] == 0
    assert found.direction[0].tolist() == [0, 0]
    assert found.neighbor_angle[0].tolist() == pytest.approx([math.pi / 2] * 2)
    # Its gradient is the zero vector, so that the score is the length of the other.
    assert found.log_score[0] == pytest.approx(float(found.neighbor_log_magnitude[0, 0]), abs=1e-7)
    assert found.log_magnitude[0] > -1
    assert found.direction_share[0] == 0
    assert_law_of_cosines(found, state)

    both = GROOD(None).fit_features(torch.cat([training, ood]), [0, 1, 0], ood_features=ood)
    found = explain(state_of(both), ood, k=3)
    assert found.neighbor.tolist()[0][0] == 2
    assert found.neighbor_angle[0].tolist() == pytest.approx([0, math.pi / 2, math.pi / 2])
    assert (found.log_score.item(), found.direction_share.item()) == (-math.inf, 0)


def test_duplicates_come_in_their_order() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    detector = GROOD(None).fit_features(features, [0, 1, 0, 0], ood_features=torch.zeros(1, 2))
    found = explain(state_of(detector), features[:1], k=9)
    assert found.neighbor.tolist() == [[0, 2, 3, 1]]
    assert found.neighbor_log_distance[0, :3].tolist() == [-math.inf] * 3
    assert found.neighbor_angle[0, :3].tolist() == [0] * 3


def test_equal_prototypes_come_in_the_order_of_the_decision() -> None:
    detector, queries = problem(n=40, classes=3)
    state = state_of(detector)
    twice = replace(
        state,
        class_prototypes=torch.cat([state.class_prototypes] * 2),
        class_ids=torch.arange(6),
        classes=tuple("abcdef"),
    )
    found = explain(twice, queries, n_prototypes=6)
    assert torch.equal(found.prototype[:, 0], twice.gradient_field(queries).nearest)
    assert found.prototype.sort(1).values.tolist() == [list(range(6))] * 40
    assert torch.equal(found.prototype_distance[:, 0], found.prototype_distance[:, 1])


def test_samples_between_two_prototypes() -> None:
    # Equally near up to rounding: the one that is named first must be the one that the detector decides for.
    prototypes = normal(2, 8, seed=1)
    detector = GROOD(None).fit_features(prototypes, torch.arange(2), ood_features=normal(1, 8, seed=2))
    state = state_of(detector)
    # On the plane that lies half-way between the two.
    axis = (prototypes[0] - prototypes[1]) / (prototypes[0] - prototypes[1]).norm()
    aside = normal(500, 8, seed=3)
    queries = prototypes.mean(0) + aside - (aside @ axis)[:, None] * axis
    nearest = state.gradient_field(queries).nearest
    by_difference = torch.cdist(queries, state.class_prototypes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert not torch.equal(nearest, by_difference)
    assert torch.equal(explain(state, queries).prototype[:, 0], nearest)


def test_classes_and_samples_are_named_by_their_positions() -> None:
    # Sample 0 is classified wrongly, so that its gradient is not stored; classes 0 and 2 take part.
    detector, queries = problem()
    labels = torch.arange(60) % 4
    training = (2 * normal(4, 6, seed=1)[labels] + normal(60, 6, seed=2)).float()
    detector = GROOD(None).fit_features(training, labels, torch.cat([labels[:1] + 1, labels[1:]]))
    state = state_of(detector)
    found = explain(state, training[1:3], k=1)
    assert found.neighbor.tolist() == [[1], [2]]
    left_out = replace(
        state, class_prototypes=state.class_prototypes[[0, 2]], class_ids=torch.tensor([0, 2]), classes=(0, 1, 2, 3)
    )
    assert set(explain(left_out, queries).prototype.flatten().tolist()) == {0, 2}


def test_no_sample() -> None:
    detector, queries = problem()
    found = explain(state_of(detector), queries[:0])
    assert [tuple(field.shape) for field in found] == [
        *((0,), (0,), (0, 6), (0,), (0, 4), (0, 4), (0, 5), (0, 5), (0, 5), (0, 5), (0,))
    ]


def test_what_is_changed_afterwards_is_not_the_detector() -> None:
    detector, queries = problem()
    before = detector.log_score_features(queries)
    for field in explain(state_of(detector), queries, k=60):
        field.fill_(0)
    assert torch.equal(detector.log_score_features(queries), before)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "5", None, float("nan")])
@pytest.mark.parametrize("name", ["k", "n_prototypes"])
def test_numbers_that_are_none(name: str, value: object) -> None:
    detector, queries = problem()
    with pytest.raises(GroodError, match=f"^{name} must be a positive integer, got "):
        explain(state_of(detector), queries, **{name: value})  # type: ignore[arg-type]


def test_numpy_integers_and_more_than_there_is() -> None:
    detector, queries = problem()
    found = explain(state_of(detector), queries, k=np.int64(10**12), n_prototypes=np.int32(99))  # type: ignore[arg-type]
    assert (found.neighbor.shape, found.prototype.shape) == ((12, 60), (12, 4))


@pytest.mark.parametrize("shape", [(), (6,), (3, 5), (2, 3, 6)])
def test_features_of_another_shape(shape: tuple[int, ...]) -> None:
    detector, _ = problem()
    with pytest.raises(GroodError, match=r"expected features of shape \(n, 6\)"):
        explain(state_of(detector), torch.zeros(shape))


def test_features_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, _ = problem()
    queries = torch.zeros(300, 6)
    queries[290, 2] = math.nan
    monkeypatch.setattr(module, "GRADIENT_ROWS", 128)
    with pytest.raises(GroodError, match="feature 2 of sample 290 is nan"):
        explain(state_of(detector), queries)
    with pytest.raises(GroodError, match="float dtype"):
        explain(state_of(detector), torch.zeros(2, 6, dtype=torch.int64))
