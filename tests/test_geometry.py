"""The unit geometry and its temperature, against plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_grood.errors import GroodError
from torch_grood.geometry import SquareSum, checked_geometry, placed
from torch_grood.prototypes import ClassPrototypes


def features(n: int = 300, d: int = 7, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_raw_is_the_features_themselves() -> None:
    h = features()
    assert placed(h, "raw") is h


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_unit_divides_by_the_length(dtype: torch.dtype) -> None:
    h = features(dtype=dtype)
    expected = h.double() / h.double().norm(dim=1, keepdim=True)
    found = placed(h, "unit")
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_half_divides_by_the_root_of_the_length(dtype: torch.dtype) -> None:
    h = 9 * features(dtype=dtype)
    expected = h.double() / h.double().norm(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(placed(h, "half").double(), expected, rtol=1e-6, atol=1e-6)


@given(st.floats(-150, 150), st.integers(0, 2**31))
def test_scale_does_not_matter(exponent: float, seed: int) -> None:
    h = features(4, seed=seed, dtype=torch.float64)
    torch.testing.assert_close(placed(h * 10.0**exponent, "unit"), placed(h, "unit"), rtol=1e-13, atol=1e-15)


def test_a_sample_has_the_same_bits_in_any_batch() -> None:
    h = features(300, 513)
    for geometry in ("half", "unit"):
        whole = placed(h, geometry)
        for start, stop in [(0, 1), (5, 6), (100, 300), (127, 130), (299, 300)]:
            assert torch.equal(placed(h[start:stop], geometry), whole[start:stop])


def test_the_zero_vector_stays_at_the_origin() -> None:
    h = features(3)
    h[1] = 0
    for geometry in ("half", "unit"):
        assert torch.equal(placed(h, geometry)[1], torch.zeros(7))
    found = placed(h, "unit")
    assert torch.equal(found[1], torch.zeros(7))
    assert found.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_become_finite(bad: float) -> None:
    h = features(3)
    h[1, 2] = bad
    found = placed(h, "unit")
    assert not found[1].isfinite().all()
    assert found[[0, 2]].isfinite().all()


def test_no_rows() -> None:
    assert placed(torch.empty(0, 5), "unit").shape == (0, 5)


@pytest.mark.parametrize("geometry", ["raw", "half", "unit"])
def test_temperature_is_the_root_mean_square_distance(geometry: str) -> None:
    h, labels = placed(features(), geometry), torch.arange(300) % 3
    prototypes = ClassPrototypes(3)
    prototypes.update(h, labels)
    expected = (h.double() - prototypes.means[labels]).square().sum(1).mean().sqrt()
    squares = SquareSum()
    for part in h.split(70):
        squares.update(part)
    assert squares.temperature(prototypes) == pytest.approx(float(expected), rel=1e-6)


def test_temperature_of_classes_of_one_point_is_positive() -> None:
    for points in (torch.eye(2), torch.zeros(2, 2)):
        prototypes, squares = ClassPrototypes(2), SquareSum()
        prototypes.update(points, [0, 1])
        squares.update(points)
        assert 0 < squares.temperature(prototypes) <= 1


@pytest.mark.parametrize("name", ["cosine", None, 1, ["unit"]])
def test_unknown_geometry(name: object) -> None:
    with pytest.raises(GroodError, match="geometry must be one of 'raw', 'half', 'unit'"):
        checked_geometry(name)
