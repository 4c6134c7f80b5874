"""The closer look: which images are drawn, and where their gradients lie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_world import AS_PATTERNS, World, scored
from sklearn.decomposition import PCA
from torch import Tensor

from torch_grood import GROOD, PrototypeMean
from torch_grood.data import ImageSource
from torch_grood.errors import GroodError
from torch_grood.report.closer import Picked, _Plane, look_closer, pick_points, place
from torch_grood.report.pictures import PICTURE
from torch_grood.report.sets import ScoredSet, score_set


def sets_of(sizes: list[int]) -> list[ScoredSet]:
    return [scored(f"set {i}", "near", np.zeros(size)) for i, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 200), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_points_are_shared_as_evenly_as_can_be(sizes: list[int], most: int, seed: int) -> None:
    picked = pick_points(sets_of(sizes), most, seed)
    assert len(picked) == min(most, sum(sizes))
    assert picked == sorted(set(picked))
    counts = [sum(one.set == i for one in picked) for i in range(len(sizes))]
    assert all(0 <= one.position < sizes[one.set] for one in picked)
    # Who has an image left over has as many drawn as anyone, but for one.
    for count, size in zip(counts, sizes, strict=True):
        assert count == size or count >= max(counts) - 1
    assert picked == pick_points(sets_of(sizes), most, seed)


def test_points_are_drawn_by_seed() -> None:
    sets = sets_of([1000])
    assert pick_points(sets, 20, 0) != pick_points(sets, 20, 1)
    # Not the first ones: a folder is sorted.
    assert max(one.position for one in pick_points(sets, 20, 0)) > 500


def fitted(scale: float = 1.0, d: int = 8, n: int = 240, classes: int = 4, **options: object) -> tuple[GROOD, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(n) % classes
    centres = 3 * torch.randn(classes, d, generator=generator)
    features = scale * (centres[labels] + torch.randn(n, d, generator=generator))
    detector = GROOD(None, outliers=PrototypeMean(), **options)  # type: ignore[arg-type]
    return detector.fit_features(features, labels), scale * 3 * torch.randn(50, d, generator=generator)


@pytest.mark.parametrize("geometry", ["raw", "unit", "half"])
def test_angles_and_lengths_are_those_of_the_definition(geometry: str) -> None:
    detector, features = fitted(geometry=geometry, temperature=0.7)
    found = place(detector.state_, features, 0)
    state = detector.state_
    h = state.gradient_field.placed(features).double().numpy()
    prototypes, ood = state.class_prototypes.double().numpy(), state.ood_prototype.double().numpy()
    for i in range(len(h)):
        distances = np.array([np.linalg.norm(h[i] - p) for p in (*prototypes, ood)])
        weights = np.exp(-distances / 0.7)
        assert math.exp(found.log_magnitude[i]) == pytest.approx(weights[-1] / weights.sum(), rel=1e-9)
        cosines = [(h[i] - ood) @ (p - ood) / np.linalg.norm(h[i] - ood) / np.linalg.norm(p - ood) for p in prototypes]
        assert found.angle[i] == pytest.approx(math.degrees(math.acos(max(cosines))), abs=1e-4)
    assert (found.angle > 30).any()
    assert found.class_names == ("0", "1", "2", "3")
    assert found.class_plane.shape == (4, 2)
    assert found.training_angle.shape == (240,)


def test_the_plane_is_that_of_scikit_learn() -> None:
    detector, features = fitted()
    found, state = place(detector.state_, features, 0), detector.state_
    stored = state.searcher.gradients.take(torch.arange(240))
    unit = float(stored.log_magnitude.max())
    analysis = PCA(2, svd_solver="full").fit(stored.vectors(unit).double().numpy())
    own = state.gradient_field(features).gradients
    clamped = own._replace(log_magnitude=own.log_magnitude.clamp(max=unit + math.log(3)))
    for vectors, plane in ((stored.vectors(unit), None), (clamped.vectors(unit), found.plane)):
        expected = analysis.transform(vectors.double().numpy())
        if plane is None:
            order = torch.from_numpy(np.random.default_rng(0).permutation(240))
            expected, plane = expected[order], found.training_plane
        signs = np.sign((expected * plane).sum(0))
        np.testing.assert_allclose(plane, expected * signs, atol=1e-6)
    assert found.variance == pytest.approx(tuple(analysis.explained_variance_ratio_), rel=1e-6)


def test_the_plane_does_not_depend_on_the_solver_s_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = _Plane(vectors)(vectors)
    solve = torch.linalg.svd

    def other_signs(*arguments: object, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        u, s, axes = solve(*arguments, **options)
        return -u, s, -axes

    monkeypatch.setattr(torch.linalg, "svd", other_signs)
    np.testing.assert_array_equal(_Plane(vectors)(vectors), expected)


@pytest.mark.parametrize(("n", "d"), [(1, 3), (5, 1), (1, 1), (2, 4), (6, 2)])
def test_planes_of_few_axes(n: int, d: int) -> None:
    vectors = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plane = _Plane(vectors)
    found = plane(vectors)
    assert found.shape == (n, 2)
    assert np.isfinite(found).all()
    assert 0 <= sum(plane.variance) <= 1 + 1e-12
    rank = min(n - 1, d)
    if rank >= 2:
        assert found.std(0).min() > 0.01
    else:
        np.testing.assert_allclose(found[:, 1], 0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 600.0, 1e5])
@pytest.mark.parametrize("geometry", ["raw", "unit"])
def test_no_scale_of_the_features_makes_a_nan(scale: float, geometry: str) -> None:
    detector, features = fitted(scale, geometry=geometry, temperature=1.0)
    # One at p_ood, whose gradient has no direction, among the others.
    features = torch.cat([features.double(), detector.state_.ood_prototype[None], features[:1] * 100])
    found = place(detector.state_, features, 0)
    for values in (found.angle, found.log_magnitude, found.plane, found.training_plane, found.training_angle):
        assert np.isfinite(values).all()
    assert (found.angle >= 0).all()
    assert (found.angle <= 180).all()
    # The training gradients can be seen beside whatever comes.
    reach = np.abs(found.training_plane).max()
    assert reach > 0
    assert np.abs(found.plane).max() <= 4.1
    if geometry == "raw":
        assert found.angle[50] == pytest.approx(90, abs=1e-6)


def test_one_feature_and_two_stored_gradients() -> None:
    detector = GROOD(None, outliers=PrototypeMean(), geometry="raw")
    detector.fit_features(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))
    found = place(detector.state_, torch.tensor([[0.2], [5.0]]), 0)
    assert found.plane.shape == (2, 2)
    assert np.isfinite(found.plane).all()
    np.testing.assert_allclose(found.angle, 0, atol=1e-4)
    assert place(detector.state_, torch.empty(0, 1), 0).plane.shape == (0, 2)


def test_names_of_many_classes_would_cover_each_other() -> None:
    detector, features = fitted(classes=21)
    found = place(detector.state_, features, 0)
    assert found.class_names == ()
    assert found.class_plane.shape == (0, 2)


def test_the_closer_look_is_at_the_images_that_were_picked(world: World) -> None:
    sets = [
        score_set(world.detector, AS_PATTERNS, world.one(name, "near"), workers=0, progress=False)
        for name in ("near", "far")
    ]
    picked = [Picked(1, 3), Picked(0, 2), Picked(0, 19), Picked(1, 0)]
    found = look_closer(world.detector, AS_PATTERNS, sets, picked, batch_size=3, progress=False)
    scores = world.detector.score_features(found.features)
    assert scores.tolist() == pytest.approx([sets[one.set].score[one.position] for one in picked], rel=1e-5)
    for one, picture in zip(picked, found.pictures, strict=True):
        with Image.open(sets[one.set].path(one.position)) as image:
            assert picture.tobytes() == image.tobytes()


def test_images_of_several_sizes(world: World, tmp_path_factory: pytest.TempPathFactory) -> None:
    from torch_grood.data import ImageTransform

    folder = tmp_path_factory.mktemp("sizes")
    sizes = [(8, 8), (300, 8), (8, 8), (9, 30)]
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (i, 90, 20)).save(folder / f"{i}.png")
    paths = tuple(str(folder / f"{i}.png") for i in range(4))
    one = scored("sizes", "near", np.zeros(4), source=ImageSource(paths))
    as_they_are = ImageTransform(None, None, "bilinear", (0.5,) * 3, (0.2,) * 3)
    found = look_closer(world.detector, as_they_are, [one], [Picked(0, i) for i in range(4)], progress=False)
    assert found.features.shape == (4, 32)
    assert [picture.size for picture in found.pictures] == [(8, 8), (PICTURE, 3), (8, 8), (9, 30)]
    alone = look_closer(world.detector, as_they_are, [one], [Picked(0, 1)], progress=False)
    torch.testing.assert_close(alone.features, found.features[1:2])


def test_no_image_is_looked_at_twice_for_nothing(world: World) -> None:
    found = look_closer(world.detector, AS_PATTERNS, [], [], progress=False)
    assert (found.pictures, found.features.shape) == ([], (0, 32))


def test_a_file_that_has_gone_is_an_error_that_names_it(world: World) -> None:
    one = scored("gone", "near", np.zeros(1), source=ImageSource(("/nowhere/x.png",)))
    with pytest.raises(GroodError, match=r"/nowhere/x\.png: no such file"):
        look_closer(world.detector, AS_PATTERNS, [one], [Picked(0, 0)], progress=False)
