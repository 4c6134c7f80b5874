"""eq. 5 against automatic differentiation, 50-digit arithmetic and its laws."""

from __future__ import annotations

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_grood import GroodError, log_ood_probability, ood_gradient
from torch_grood.gradients import BLOCK_ROWS, GradientField, PolarGradients, polar_ood_gradient

EPSILON = torch.finfo(torch.float64).eps
SCALES = [0.01, 1.0, 100.0]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(n: int = 20, classes: int = 5, d: int = 16, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Features around their class prototypes, the class prototypes, the OOD prototype."""
    prototypes = normal(classes, d, seed=2)
    features = prototypes[torch.arange(n) % classes] + 0.7 * normal(n, d, seed=1)
    return scale * features, scale * prototypes, 0.6 * scale * normal(d, seed=3)


def ncp_loss(feature: Tensor, classes: Tensor, ood: Tensor, label: int) -> Tensor:
    """The cross-entropy of softmax(-distances), written down without the library."""
    scores = -torch.cat([(feature - classes).norm(dim=1), (feature - ood).norm()[None]])
    return -(scores[label] - scores.exp().sum().log())


def reference(feature: Tensor, classes: Tensor, ood: Tensor) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """Log π and the direction of one sample with 50 digits."""
    with mpmath.workdps(50):
        h, *prototypes = ([mpmath.mpf(x) for x in row.double().tolist()] for row in (feature, *classes, ood))
        distances = [mpmath.sqrt(mpmath.fsum((a - b) ** 2 for a, b in zip(h, p, strict=True))) for p in prototypes]
        # Shifting by the largest score is exact enough in 50 digits, and mpmath's exponent does not underflow.
        total = mpmath.fsum(mpmath.exp(-distance) for distance in distances)
        log_pi = -distances[-1] - mpmath.log(total)
        size = distances[-1] or mpmath.mpf(1)
        return log_pi, [(a - b) / size for a, b in zip(h, prototypes[-1], strict=True)]


def reach(features: Tensor, classes: Tensor, ood: Tensor) -> float:
    """The largest distance from p_ood: rounding errors of all distances are proportional to it."""
    return float(torch.cat([features.double(), classes.double()]).sub(ood.double()).norm(dim=1).max())


def worst_log_error(features: Tensor, classes: Tensor, ood: Tensor) -> float:
    """Largest error of log π, in units of what a float64 distance must lose: ε·(1 + reach)."""
    found = log_ood_probability(features, classes, ood)
    errors = [
        abs(mpmath.mpf(value) - reference(feature, classes, ood)[0])
        for value, feature in zip(found.tolist(), features, strict=True)
    ]
    return float(max(errors)) / (EPSILON * (1 + reach(features, classes, ood)))


# --- Automatic differentiation and differences --------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "d"), [(1, 1), (2, 3), (10, 16), (50, 200)])
def test_equals_autograd_for_every_label(classes: int, d: int) -> None:
    features, prototypes, ood = problem(6, classes, d)
    found = ood_gradient(features, prototypes, ood)
    for feature, gradient in zip(features, found, strict=True):
        for label in range(classes):
            variable = ood.clone().requires_grad_()
            (expected,) = torch.autograd.grad(ncp_loss(feature, prototypes, variable, label), variable)
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-16)


def test_equals_finite_differences() -> None:
    features, prototypes, ood = problem(4, 3, 5)
    found, step = ood_gradient(features, prototypes, ood), 1e-5
    for feature, gradient in zip(features, found, strict=True):
        for axis in range(5):
            shift = torch.zeros(5, dtype=torch.float64)
            shift[axis] = step
            above, below = (ncp_loss(feature, prototypes, ood + sign * shift, 0) for sign in (1, -1))
            assert float(gradient[axis]) == pytest.approx(float((above - below) / (2 * step)), rel=1e-6, abs=1e-9)


def test_a_step_against_the_gradient_lowers_the_loss() -> None:
    # The sign, without any formula of ours: p_ood moves away from the ID sample.
    features, prototypes, ood = problem(1)
    moved = ood - 0.1 * ood_gradient(features, prototypes, ood)[0]
    assert ncp_loss(features[0], prototypes, moved, 0) < ncp_loss(features[0], prototypes, ood, 0)
    assert (features[0] - moved).norm() > (features[0] - ood).norm()


def test_worked_example() -> None:
    # Distances 4, 3 and 5: π = 1 / (e + e² + 1).
    found = ood_gradient(
        torch.tensor([[3.0, 4.0]], dtype=torch.float64),
        torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )
    pi = 1 / (torch.tensor(1.0, dtype=torch.float64).exp() + torch.tensor(2.0, dtype=torch.float64).exp() + 1)
    torch.testing.assert_close(found, pi * torch.tensor([[0.6, 0.8]], dtype=torch.float64), rtol=1e-15, atol=0)


# --- 50 digits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_log_pi_is_as_accurate_as_float64_distances_allow(scale: float) -> None:
    assert worst_log_error(*problem(scale=scale)) < 8


@pytest.mark.parametrize("scale", SCALES)
def test_gradient_equals_reference(scale: float) -> None:
    features, prototypes, ood = problem(8, scale=scale)
    found = polar_ood_gradient(features, prototypes, ood)
    vectors = ood_gradient(features, prototypes, ood)
    for row, feature in enumerate(features):
        log_pi, direction = reference(feature, prototypes, ood)
        for column, component in enumerate(direction):
            assert abs(float(found.direction[row, column]) - component) < 4 * EPSILON
            expected = float(mpmath.exp(log_pi) * component)
            assert float(vectors[row, column]) == pytest.approx(expected, rel=1e-11, abs=1e-300)


def test_log_pi_far_below_the_range_of_float64() -> None:
    features, prototypes, ood = problem(scale=1e4)
    features = prototypes[:1] + 1e-3 * features
    found = log_ood_probability(features, prototypes, ood)
    assert found.max() < -1e4
    assert torch.equal(ood_gradient(features, prototypes, ood), torch.zeros_like(features))
    for value, feature in zip(found.tolist(), features, strict=True):
        expected = reference(feature, prototypes, ood)[0]
        assert abs((mpmath.mpf(value) - expected) / expected) < 1e-13


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("distance", [3e-2, 1e-2, 3e-3, 1.1e-3, 1e-3, 9e-4, 1e-4, 1e-8, 1e-12, 0.0])
def test_close_to_a_prototype_nothing_cancels(scale: float, distance: float) -> None:
    # ‖h‖² + ‖p‖² - 2h·p is trusted down to 1e-6 of its terms: a distance loses a factor 1e3 / 2 of ε there, and the
    # sums of squares a few ε more.
    _, prototypes, ood = problem(scale=scale)
    features = prototypes + distance * scale * normal(5, 16, seed=9)
    assert worst_log_error(features, prototypes, ood) < 3000
    assert torch.equal(GradientField(prototypes, ood)(features).nearest, torch.arange(5))


coordinate = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1e-3, 1e3, 1.0 + 2**-23]),
    st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_small_problem(data: st.DataObject) -> None:
    d, classes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    points = data.draw(
        st.lists(st.lists(coordinate, min_size=d, max_size=d), min_size=classes + 2, max_size=classes + 2)
    )
    numbers = torch.tensor(points, dtype=torch.float64)
    features, prototypes, ood = numbers[:1], numbers[1:-1], numbers[-1]
    assert worst_log_error(features, prototypes, ood) < 3000
    found = polar_ood_gradient(features, prototypes, ood)
    expected = 0.0 if torch.equal(features[0], ood) else 1.0
    assert float(found.direction.norm()) == pytest.approx(expected, abs=1e-14)
    assert float(found.log_magnitude) <= 0


# --- Laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
def test_norm_is_pi(scale: float) -> None:
    features, prototypes, ood = problem(scale=scale)
    log_pi = log_ood_probability(features, prototypes, ood)
    assert torch.all(log_pi <= 0)
    unit = float(log_pi.max())
    torch.testing.assert_close(
        ood_gradient(features, prototypes, ood, log_scale=unit).norm(dim=1), (log_pi - unit).exp(), rtol=1e-14, atol=0
    )


def test_log_scale_divides_by_its_exponential() -> None:
    features, prototypes, ood = problem()
    plain = ood_gradient(features, prototypes, ood)
    scaled = ood_gradient(features, prototypes, ood, log_scale=-2.0)
    torch.testing.assert_close(scaled, plain * torch.tensor(2.0, dtype=torch.float64).exp(), rtol=1e-14, atol=0)


def test_log_scale_keeps_gradients_representable_at_any_feature_scale() -> None:
    features, prototypes, ood = problem(scale=1e3)
    features = prototypes[:1] + 1e-2 * features
    log_pi = log_ood_probability(features, prototypes, ood)
    assert log_pi.max() < -750
    scaled = ood_gradient(features.float(), prototypes.float(), ood.float(), log_scale=float(log_pi.max()))
    assert float(scaled.norm(dim=1).max()) == pytest.approx(1, rel=1e-2)


def test_permuting_classes_changes_nothing_but_their_rows() -> None:
    features, prototypes, ood = problem(100, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    plain, permuted = GradientField(prototypes, ood)(features), GradientField(prototypes[order], ood)(features)
    torch.testing.assert_close(plain.gradients.log_magnitude, permuted.gradients.log_magnitude, rtol=1e-14, atol=1e-15)
    assert torch.equal(plain.gradients.direction, permuted.gradients.direction)
    assert torch.equal(plain.nearest, order[permuted.nearest])


@pytest.mark.parametrize(("classes", "d"), [(1, 1), (3, 7), (10, 512), (100, 64)])
def test_the_same_bits_alone_in_a_batch_and_at_any_place(classes: int, d: int) -> None:
    features, prototypes, ood = problem(1000, classes, d)
    field = GradientField(prototypes, ood)
    whole = field(features)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    shuffled = field(features[order])
    assert torch.equal(shuffled.gradients.log_magnitude, whole.gradients.log_magnitude[order])
    assert torch.equal(shuffled.gradients.direction, whole.gradients.direction[order])
    assert torch.equal(shuffled.nearest, whole.nearest[order])
    for row in [0, 1, BLOCK_ROWS - 1, BLOCK_ROWS, 517, 999]:
        alone = field(features[row : row + 1])
        assert torch.equal(alone.gradients.log_magnitude[0], whole.gradients.log_magnitude[row])
        assert torch.equal(alone.gradients.direction[0], whole.gradients.direction[row])
        assert alone.nearest[0] == whole.nearest[row]
    for start, stop in [(0, 63), (1, 65), (500, 565), (3, 1000)]:
        part = field(features[start:stop])
        assert torch.equal(part.gradients.log_magnitude, whole.gradients.log_magnitude[start:stop])
        assert torch.equal(part.gradients.direction, whole.gradients.direction[start:stop])


def test_a_view_of_features_gives_the_bits_of_its_copy() -> None:
    features, prototypes, ood = problem(40, 5, 16)
    wide = torch.zeros(80, 32, dtype=torch.float64)
    wide[::2, ::2] = features
    assert torch.equal(ood_gradient(wide[::2, ::2], prototypes, ood), ood_gradient(features, prototypes, ood))


def test_translation_changes_not_one_bit_where_it_is_exact() -> None:
    # Multiples of 2⁻¹⁰ below 2⁵ and an offset of 2³⁰: all sums are exact in float64.
    features, prototypes, ood = ((1024 * x).round() / 1024 for x in problem())
    plain = GradientField(prototypes, ood)(features)
    moved = GradientField(prototypes + 2.0**30, ood + 2.0**30)(features + 2.0**30)
    assert torch.equal(plain.gradients.log_magnitude, moved.gradients.log_magnitude)
    assert torch.equal(plain.gradients.direction, moved.gradients.direction)


def test_prototypes_far_from_the_origin_stay_accurate() -> None:
    features, prototypes, ood = (x + 1e6 for x in problem())
    assert worst_log_error(features, prototypes, ood) < 8


def test_an_ood_prototype_far_from_everything_stays_accurate() -> None:
    features, prototypes, ood = problem()
    assert worst_log_error(features, prototypes, ood + 1e4) < 8


def test_rotation_rotates_the_gradient() -> None:
    features, prototypes, ood = problem(d=6)
    rotation = torch.linalg.qr(normal(6, 6, seed=5)).Q
    torch.testing.assert_close(
        ood_gradient(features @ rotation, prototypes @ rotation, ood @ rotation),
        ood_gradient(features, prototypes, ood) @ rotation,
        rtol=1e-12,
        atol=1e-15,
    )


def test_a_duplicated_class_counts_twice() -> None:
    # exp(-log π) = 1 + Σ exp(D_ood - D_y): another copy of class 0 adds its term again.
    features, prototypes, ood = problem()
    once = (-log_ood_probability(features, prototypes, ood)).exp()
    twice = (-log_ood_probability(features, torch.cat([prototypes, prototypes[:1]]), ood)).exp()
    term = ((features - ood).norm(dim=1) - (features - prototypes[0]).norm(dim=1)).exp()
    torch.testing.assert_close(twice - once, term, rtol=1e-11, atol=0)


def test_nearest_prototype_is_the_nearest() -> None:
    features, prototypes, ood = problem(300, 20)
    expected = torch.cdist(features, prototypes, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    assert len(expected.unique()) > 5
    assert torch.equal(GradientField(prototypes, ood)(features).nearest, expected)


# --- Special places -----------------------------------------------------------------------------------------------


def test_at_the_ood_prototype_the_gradient_is_zero_and_pi_finite() -> None:
    _, prototypes, ood = problem()
    found = polar_ood_gradient(ood[None], prototypes, ood)
    assert torch.equal(found.direction, torch.zeros(1, 16, dtype=torch.float64))
    assert float(found.log_magnitude) == pytest.approx(float(reference(ood, prototypes, ood)[0]), rel=1e-14)


def test_at_a_class_prototype() -> None:
    _, prototypes, ood = problem()
    found = polar_ood_gradient(prototypes, prototypes, ood)
    torch.testing.assert_close(found.direction.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert worst_log_error(prototypes, prototypes, ood) < 8


def test_all_prototypes_in_one_place() -> None:
    # π = 1 / (C + 1), whatever h.
    features = normal(5, 4, seed=0)
    same = torch.full((3, 4), 2.0, dtype=torch.float64)
    torch.testing.assert_close(
        log_ood_probability(torch.cat([features, same[:1]]), same, same[0]).exp(),
        torch.full((6,), 0.25, dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )


def test_no_sample() -> None:
    found = polar_ood_gradient(torch.zeros(0, 3), torch.ones(2, 3), torch.zeros(3))
    assert found.log_magnitude.shape == (0,)
    assert found.direction.shape == (0, 3)


def test_almost_at_the_ood_prototype_the_direction_is_a_unit_vector() -> None:
    features = torch.tensor([[1e-200, 0.0]], dtype=torch.float64)
    found = polar_ood_gradient(features, torch.ones(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    assert float(found.direction.norm()) in (0.0, 1.0)


# --- Types --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_is_computed_in_float64(dtype: torch.dtype) -> None:
    features, prototypes, ood = (x.to(dtype) for x in problem())
    found = ood_gradient(features, prototypes, ood)
    assert found.dtype == dtype
    expected = ood_gradient(features.double(), prototypes.double(), ood.double())
    assert torch.equal(found, expected.to(dtype))
    log_pi = log_ood_probability(features, prototypes, ood)
    assert log_pi.dtype == torch.float64
    assert torch.equal(log_pi, log_ood_probability(features.double(), prototypes.double(), ood.double()))


def test_no_graph_is_kept_and_nothing_is_changed() -> None:
    features, prototypes, ood = (x.requires_grad_() for x in problem())
    before = [x.detach().clone() for x in (features, prototypes, ood)]
    assert not ood_gradient(features, prototypes, ood).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (features, prototypes, ood), strict=True))


def test_take_and_vectors() -> None:
    gradients = PolarGradients(torch.tensor([0.0, -1.0], dtype=torch.float64), torch.eye(2))
    assert gradients.take(slice(1, 2)).log_magnitude.tolist() == [-1.0]
    vectors = gradients.vectors(-1.0)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, torch.tensor([[torch.e, 0.0], [0.0, 1.0]]))


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_broken_feature_is_named(value: float, dtype: torch.dtype) -> None:
    features, prototypes, ood = problem(150)
    features[[101, 140], 3] = value
    with pytest.raises(GroodError, match=rf"feature 3 of sample 101 is {value} \(2 of 150 samples affected\).*leave"):
        ood_gradient(features.to(dtype), prototypes.to(dtype), ood.to(dtype))


def test_rows_are_counted_from_the_first_of_the_whole_set() -> None:
    features, prototypes, ood = problem()
    features[4, 3] = torch.nan
    with pytest.raises(GroodError, match="feature 3 of sample 1004 is nan"):
        GradientField(prototypes, ood)(features, first=1000)


def test_a_broken_row_of_all_infinities_is_named() -> None:
    with pytest.raises(GroodError, match="feature 0 of sample 1 is inf"):
        ood_gradient(torch.tensor([[0.0, 0.0], [torch.inf, torch.inf]]), torch.ones(2, 2), torch.ones(2))


@pytest.mark.parametrize("which", ["class", "ood"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_prototype_is_an_error(which: str, value: float) -> None:
    features, prototypes, ood = problem()
    (prototypes[2] if which == "class" else ood)[1] = value
    features[:, 1] = 1.0
    with pytest.raises(GroodError, match="prototype is not finite"):
        ood_gradient(features, prototypes, ood)


def test_an_infinite_class_prototype_is_an_error_on_either_side() -> None:
    features, prototypes, ood = torch.full((1, 2), -1.0), torch.ones(3, 2), torch.zeros(2)
    prototypes[0, 1] = torch.inf
    with pytest.raises(GroodError, match="prototype is not finite"):
        ood_gradient(features, prototypes, ood)


def test_features_too_large_for_float64_are_an_error() -> None:
    features, prototypes, ood = problem()
    features[4] = 1e200
    with pytest.raises(GroodError, match=r"sample 4 .*too large for float64"):
        ood_gradient(features, prototypes, ood)


@pytest.mark.parametrize(
    ("features", "prototypes", "ood", "message"),
    [
        ((2, 4), (2, 3), (3,), r"expected features of shape \(n, 3\).*got \(2, 4\)"),
        ((3,), (2, 3), (3,), r"expected features of shape \(n, 3\).*got \(3,\)"),
        ((2, 3, 1), (2, 3), (3,), r"got \(2, 3, 1\)"),
        ((2, 3), (0, 3), (3,), r"got \(0, 3\) and \(3,\)"),
        ((2, 3), (2, 3), (4,), r"got \(2, 3\) and \(4,\)"),
        ((2, 3), (2, 3), (1, 3), r"got \(2, 3\) and \(1, 3\)"),
        ((2, 3), (3,), (3,), r"got \(3,\) and \(3,\)"),
    ],
)
def test_shapes_that_do_not_fit(
    features: tuple[int, ...], prototypes: tuple[int, ...], ood: tuple[int, ...], message: str
) -> None:
    with pytest.raises(GroodError, match=message):
        ood_gradient(torch.zeros(features), torch.zeros(prototypes), torch.zeros(ood))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_features_that_are_no_floats(dtype: torch.dtype) -> None:
    with pytest.raises(GroodError, match=rf"must be of a float dtype, got {dtype}; convert"):
        ood_gradient(torch.ones(2, 3).to(dtype), torch.ones(2, 3), torch.ones(3))
