"""Sets of images: which class each is of, and what the detector says of them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_world import AS_PATTERNS, World, scored

from torch_grood import GROOD, GroodError
from torch_grood.data import ImageSource, read_source
from torch_grood.report import ReportSet
from torch_grood.report.sets import ROLES, ScoredSet, _class_positions, score_set

ABC = ("a", "b", "c")


def known(labels: tuple[int, ...] | None, classes: tuple[str, ...] | None = None) -> ReportSet:
    paths = tuple(f"{i}.png" for i in range(1 if labels is None else len(labels)))
    return ReportSet("known", "known", ImageSource(paths, labels, classes, "somewhere"))


@pytest.mark.parametrize(
    ("classes", "given", "labels", "expected"),
    [
        # By name, in whatever order, and not of all classes.
        (ABC, ABC, (0, 2, 1), [0, 2, 1]),
        (ABC, ("c", "a"), (0, 1, 1), [2, 0, 0]),
        # By number: names, sorted, are numbers, as in training.
        (("0", "1", "2"), ABC, (0, 2, 1), [0, 2, 1]),
        # Folders are sorted as texts: the name counts, not its place.
        (tuple(map(str, range(12))), ("0", "1", "10", "11", "2"), (0, 2, 4), [0, 10, 2]),
        # A list without names.
        (ABC, None, (2, 0), [2, 0]),
    ],
)
def test_classes_are_found(
    classes: tuple[str, ...], given: tuple[str, ...] | None, labels: tuple[int, ...], expected: list[int]
) -> None:
    found = _class_positions(known(labels, given), classes)
    assert found is not None
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("given", "labels", "named"),
    [
        (("a", "weed"), (0, 1), "'weed'"),
        # One of them is known, so that the others are no names of numbers.
        (("a", "x", "y"), (0, 1), "'x'"),
        (None, (0, 3), "3"),
        (None, (0, -1), "-1"),
        (("x", "y"), (0,), "'x'"),
    ],
)
def test_a_class_that_the_detector_has_not(given: tuple[str, ...] | None, labels: tuple[int, ...], named: str) -> None:
    with pytest.raises(GroodError, match=rf"^somewhere: the class {named} is none of the detector's 3; .* unknown"):
        _class_positions(known(labels, given), ABC)


def test_labels_of_other_images_mean_nothing() -> None:
    assert _class_positions(known(None), ABC) is None
    assert _class_positions(replace(known((7, 8)), role="near"), ABC) is None


def score(world: World, one: ReportSet, detector: GROOD | None = None, **options: object) -> ScoredSet:
    options = {"workers": 0, "progress": False} | options
    return score_set(detector or world.detector, AS_PATTERNS, one, **options)  # type: ignore[arg-type]


def test_a_set_is_what_predict_says(world: World) -> None:
    found = score(world, world.one("test", "known"), batch_size=7)
    expected = world.detector.predict(world.loader("test"), progress=False)
    np.testing.assert_array_equal(found.score, expected.score.numpy())
    assert expected.p_value is not None
    assert found.p_value is not None
    np.testing.assert_array_equal(found.p_value, expected.p_value.numpy())
    assert found.is_ood is not None
    assert found.is_ood.tolist() == expected.is_ood.tolist()
    assert expected.label is not None
    assert found.label.tolist() == expected.label.tolist()
    assert found.prototype_label.tolist() == expected.prototype_label.tolist()
    labels = read_source(world.folder / "test").labels
    assert labels is not None
    assert found.truth is not None
    assert tuple(found.truth) == labels
    assert found.accuracy == pytest.approx(np.mean(found.label == np.array(labels)))
    assert len(found) == 48
    assert not found.is_unknown


def test_another_rate_or_threshold(world: World) -> None:
    one = world.one("near", "near")
    at_tau = score(world, one, tau=1e-9)
    assert at_tau.is_ood is not None
    assert at_tau.is_ood.all()
    one = world.one("test", "known")
    at_rate, own = score(world, one, fpr=0.5), score(world, one)
    assert at_rate.is_ood is not None
    assert own.is_ood is not None
    assert at_rate.is_ood.sum() > own.is_ood.sum()


@pytest.fixture(scope="module")
def uncalibrated(world: World) -> GROOD:
    return GROOD(world.detector.model).fit(world.loader("train"), progress=False)


def test_without_a_calibration_nothing_is_decided(world: World, uncalibrated: GROOD) -> None:
    found = score(world, world.one("near", "near"), uncalibrated)
    assert found.is_ood is None
    assert found.p_value is None
    assert found.accuracy is None
    np.testing.assert_array_equal(found.score, uncalibrated.score(world.loader("near"), progress=False).numpy())
    at_tau = score(world, world.one("near", "near"), uncalibrated, tau=0.0)
    assert at_tau.p_value is None
    assert at_tau.is_ood is not None
    assert at_tau.is_ood.all()


def test_class_thresholds(world: World) -> None:
    detector = GROOD(world.detector.model).fit(world.loader("train"), progress=False)
    detector.calibrate(world.loader("val"), fpr=0.1, per_class=True, progress=False)
    assert detector.threshold_ is not None
    assert detector.threshold_.groups is not None
    found = score(world, world.one("test", "known"), detector)
    taus = dict(zip(detector.threshold_.group_ids.tolist(), detector.threshold_.log_taus.exp().tolist(), strict=True))
    assert len(set(taus.values())) > 1
    assert found.is_ood is not None
    assert found.is_ood.tolist() == [
        value > taus[label] for value, label in zip(found.score, found.prototype_label.tolist(), strict=True)
    ]


def broken(world: World, folder: Path, good: bool = True) -> ReportSet:
    """Three images: a good one between two bad ones."""
    (folder / "0.png").write_bytes(b"no image")
    images = [folder / "0.png", folder / "2.png"]
    (folder / "2.png").touch()
    if good:
        (folder / "1.png").write_bytes(Path(world.one("test", "known").source.paths[5]).read_bytes())
        images.insert(1, folder / "1.png")
    return ReportSet("some", "known", ImageSource(tuple(map(str, images)), (0, 2, 1)[: len(images)]))


def test_unreadable_images_are_left_out_and_counted(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "torch_grood"):
        found = score(world, broken(world, tmp_path), on_bad="skip")
    assert found.kept == (1,)
    assert found.path(0) == str(tmp_path / "1.png")
    # The label of the image that is left, not that of the first.
    assert found.truth is not None
    assert found.truth.tolist() == [2]
    assert [Path(path).name for path, _ in found.bad] == ["0.png", "2.png"]
    assert "some: left out 2 unreadable of 3 images" in caplog.text
    assert "the file is empty" in caplog.text


def test_unreadable_images_are_errors_unless_asked_for(world: World, tmp_path: Path) -> None:
    with pytest.raises(GroodError, match=r"0\.png"):
        score(world, broken(world, tmp_path))


def test_a_set_of_which_nothing_can_be_read(world: World, tmp_path: Path) -> None:
    with pytest.raises(GroodError, match=r"^some: none of the 2 images can be read$"):
        score(world, broken(world, tmp_path, good=False), on_bad="skip")


def test_another_error_is_not_taken_for_unreadable_images(world: World) -> None:
    with pytest.raises(GroodError, match="not fitted"):
        score_set(GROOD(world.detector.model), AS_PATTERNS, world.one("near", "near"), workers=0, progress=False)


@pytest.mark.parametrize(("role", "unknown"), [(role, role in ("near", "far", "unknown")) for role in ROLES])
def test_which_sets_are_unknown(role: str, unknown: bool) -> None:
    assert scored("a", role, [0.1]).is_unknown == unknown  # type: ignore[arg-type]


def test_scores_are_float64(world: World) -> None:
    assert score(world, world.one("near", "near")).score.dtype == np.float64
