"""What happens to a fitted detector: rounded gradients in a file, more training samples, and samples that must go."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from format_file import parts, seal
from models import batches, left_alone, patterns, taught_mlp
from torch_grood import GROOD, ExactIndex, FaissIndex, FormatError, GroodError, KCenterCoreset, NotFittedError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors import GradientStore, StoreOptions
from torch_grood.neighbors.store import StoreWriter

DTYPES = ["float32", "float16", "int8"]


def gaussians(n: int, seed: int, classes: int = 4, d: int = 8) -> tuple[Tensor, Tensor]:
    """Features (n, d) around one centre a class, and labels."""
    centres = 3 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(n) % classes
    return centres[labels] + torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), labels


def fitted(n: int = 120, **arguments: Any) -> GROOD:
    return GROOD(None, **arguments).fit_features(*gaussians(n, 1)).calibrate_features(gaussians(100, 2)[0], fpr=0.1)


QUERIES = torch.cat([gaussians(60, 3)[0], 4 * torch.randn(20, 8, generator=torch.Generator().manual_seed(4))])


def stored(detector: GROOD) -> GradientStore:
    return detector._need_state().searcher.gradients


def learned(detector: GROOD) -> tuple[Any, ...]:
    """All that maintenance could change, by value."""
    state, store = detector._need_state(), stored(detector)
    tensors = [store.log_magnitude, store.codes, state.sample_ids, state.class_prototypes, state.ood_prototype]
    tensors += [] if store.scale is None else [store.scale]
    threshold = None if detector.threshold_ is None else detector.threshold_.log_scores.tolist()
    return (
        *[x.tolist() for x in tensors],
        store.log_rounding,
        state.info,
        state.classes,
        threshold,
    )


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Save a detector, and alter the tensors of its file by a function."""

    def edit(detector: GROOD, alter: Callable[[dict[str, Tensor]], object]) -> Path:
        detector.save(tmp_path / "detector.grood")
        header, tensors = parts(tmp_path / "detector.grood")
        alter(tensors)
        seal(tmp_path / "edited.grood", header, tensors)
        return tmp_path / "edited.grood"

    return edit


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_detector_scores_the_same_bits(dtype: str, tmp_path: Path) -> None:
    detector = fitted(store=dtype)
    detector.save(tmp_path / "detector.grood")
    other = GROOD.load(tmp_path / "detector.grood")
    assert learned(other) == learned(detector)
    assert other.store.dtype == dtype
    assert torch.equal(other.log_score_features(QUERIES), detector.log_score_features(QUERIES))
    # What was loaded can be maintained as what was fitted.
    for one in (detector, other):
        one.add_features(*gaussians(40, 5))
        one.remove([3, 125])
    assert learned(other) == learned(detector)
    assert stored(other).dtype == dtype


def test_a_smaller_dtype_makes_a_smaller_file(tmp_path: Path) -> None:
    sizes = []
    for dtype in DTYPES:
        detector = GROOD(None, store=dtype).fit_features(*gaussians(400, 1, d=64))
        detector.save(tmp_path / dtype)
        sizes.append((tmp_path / dtype).stat().st_size)
        assert detector.stored_bytes_ == StoreOptions(dtype).nbytes(400, 64)
    assert sizes[0] - sizes[1] >= 400 * (2 * 64 - 4) - 500
    assert sizes[1] - sizes[2] >= 400 * 64 - 500


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]))


def put(name: str, row: int, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name][row].fill_(value)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (put("direction_scale", 5, 2.0), "not ones that a fit gives"),
        (put("direction_scale", 5, -1.0), "'direction_scale' is negative or NaN"),
        (put("direction_scale", 5, float("nan")), "'direction_scale' is negative or NaN"),
        (put("direction_scale", 5, float("inf")), "holds NaN or infinity"),
        (replace("direction_scale", Tensor.neg), "negative or NaN"),
        (replace("direction_scale", lambda x: x * 1.00001), "not ones that a fit gives"),
        (replace("direction_scale", Tensor.double), "'direction_scale' does not fit the directions"),
        (replace("direction_scale", lambda x: x[1:].clone()), "'direction_scale' does not fit"),
        (replace("direction_scale", lambda x: x[:, None].clone()), "'direction_scale' does not fit"),
        (drop("direction_scale"), "'direction_scale' does not fit"),
        (drop("direction"), "'direction' is missing or of a wrong type"),
        (put("direction", 5, 3), "not ones that a fit gives"),
        (replace("direction", lambda x: x.roll(1, 0)), "not ones that a fit gives"),
        (replace("direction", lambda x: x.to(torch.int16)), "'direction' is missing or of a wrong type"),
        (replace("direction", lambda x: x[:, 1:].clone()), "do not fit together: direction is"),
        (replace("direction", Tensor.float), "'direction_scale' does not fit"),
    ],
)
def test_rounded_gradients_that_were_altered(
    dtype: str, alter: Callable[..., object], message: str, edited: Callable[..., Path]
) -> None:
    with pytest.raises(FormatError, match=message):
        GROOD.load(edited(fitted(store=dtype), alter))


def test_float32_has_no_scale(edited: Callable[..., Path]) -> None:
    with pytest.raises(FormatError, match="'direction_scale' does not fit"):
        GROOD.load(edited(fitted(), lambda tensors: tensors.__setitem__("direction_scale", torch.ones(120))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_added_gradients_are_stored_as_fitted_ones(dtype: str, index: str) -> None:
    detector = fitted(store=dtype, index="exact" if index == "exact" else FaissIndex("Flat", candidates=50))
    before, threshold = detector.log_score_features(QUERIES), detector.threshold_
    features, labels = gaussians(50, 5)
    assert detector.add_features(features, labels) is detector
    field = detector._need_state().gradient_field
    both = [field(part).gradients for part in (gaussians(120, 1)[0], features)]
    gradients = PolarGradients(*(torch.cat(pair) for pair in zip(*both, strict=True)))
    writer = StoreWriter(170, 8, StoreOptions(dtype))
    writer.append(gradients)
    expected = writer.finish()
    assert torch.equal(stored(detector).codes, expected.codes)
    assert torch.equal(stored(detector).log_magnitude, expected.log_magnitude)
    assert stored(detector).log_rounding == expected.log_rounding
    found = ExactIndex().build(expected).search(field(QUERIES).gradients).log_distance.flatten()
    after = detector.log_score_features(QUERIES)
    assert torch.equal(after, found)
    assert bool((after <= before).all())
    assert bool((after < before).any())
    assert detector.threshold_ is threshold
    info = detector.fit_info_
    assert (info.n_samples, info.n_indexed, info.n_added, info.n_left_out) == (170, 170, 50, 0)


def test_the_false_alarm_rate_is_still_kept() -> None:
    detector = GROOD(None).fit_features(*gaussians(200, 1)).calibrate_features(gaussians(500, 2)[0], fpr=0.1)
    fresh = gaussians(2000, 6)[0]
    before = detector.predict_features(fresh)
    after = detector.add_features(*gaussians(400, 5)).predict_features(fresh)
    # No sample that passed is called OOD now.
    assert not bool((after.is_ood & ~before.is_ood).any())
    assert float(after.is_ood.double().mean()) < 0.1 + 4 * (0.1 * 0.9 * (1 / 500 + 1 / 2000)) ** 0.5
    assert int(after.is_ood.sum()) < int(before.is_ood.sum())


def test_positions_go_on_where_those_before_ended() -> None:
    detector = fitted()
    for start, seed in ((120, 5), (160, 6)):
        features, labels = gaussians(40, seed)
        detector.add_features(features, labels)
        found = detector.predict_features(features)
        assert torch.equal(found.neighbor, torch.arange(start, start + 40))
        assert bool((found.score == 0).all())
    assert detector.fit_info_.n_read == 200


def test_wrongly_classified_samples_are_counted_but_not_stored() -> None:
    detector = fitted()
    features, labels = gaussians(40, 5)
    predictions = labels.clone()
    predictions[::4] = (labels[::4] + 1) % 4
    detector.add_features(features, labels, predictions)
    assert detector._need_state().sample_ids[120:].tolist() == [120 + i for i in range(40) if i % 4]
    info = detector.fit_info_
    assert (info.n_samples, info.n_indexed, info.n_added) == (160, 150, 40)
    assert detector.add_features(features, labels, (labels + 1) % 4).fit_info_.n_indexed == 150


def test_names_are_labels() -> None:
    features, labels = gaussians(40, 5)
    names = ["a", "b", "c", "d"]
    by_name, by_position = (
        GROOD(None).fit_features(*gaussians(120, 1), classes=names).add_features(features, given)
        for given in ([names[i] for i in labels.tolist()], labels)
    )
    expected, found = learned(by_position), learned(by_name)
    assert found[:5] == expected[:5]
    with pytest.raises(GroodError, match="label 'z' of sample 1 is not one of the classes"):
        by_name.add_features(features[:2], ["a", "z"])


def test_nothing_to_add_changes_nothing() -> None:
    detector = fitted(store="int8")
    before = learned(detector)
    detector.add_features(torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64))
    assert learned(detector) == before


def nan_at(row: int) -> Tensor:
    features = gaussians(40, 5)[0]
    features[row, 2] = torch.nan
    return features


LABELS = torch.arange(40) % 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nan_at(33), LABELS), r"feature 2 of sample 33 is nan"),
        ((gaussians(40, 5)[0], LABELS + 1), "label 4 of sample 3 is out of range: there are 4 classes"),
        ((gaussians(40, 5)[0], LABELS - 1), "label -1 of sample 0 is out of range"),
        ((gaussians(40, 5)[0], LABELS.float()), "labels must be integers"),
        ((gaussians(40, 5)[0], LABELS[1:]), "expected 40 labels, one a sample"),
        ((gaussians(40, 5)[0], None), "labels are missing"),
        ((gaussians(40, 5)[0], LABELS, LABELS + 1), "positions among the 4 classes, got 1 to 4"),
        ((gaussians(40, 5)[0], LABELS, LABELS - 1), "positions among the 4 classes, got -1 to 2"),
        ((gaussians(40, 5)[0], LABELS, LABELS[1:]), "expected 40 labels"),
        ((gaussians(40, 5)[0][:, 1:], LABELS), r"expected features of shape \(n, 8\)"),
        ((torch.zeros(0, 5), LABELS[:0]), r"expected features of shape \(n, 8\)"),
        ((gaussians(40, 5)[0].long(), LABELS), "of a float dtype"),
    ],
)
def test_a_sample_that_cannot_be_added(
    arguments: tuple[Any, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In parts of 10, so that the sample is in a later one.
    monkeypatch.setattr("torch_grood.detector.GRADIENT_ROWS", 10)
    detector = fitted(store="int8")
    before = learned(detector)
    with pytest.raises(GroodError, match=message):
        detector.add_features(*arguments)
    assert learned(detector) == before


def test_parts_of_any_size_add_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = gaussians(45, 5)
    predictions = torch.where(torch.arange(45) % 7 == 0, (labels + 1) % 4, labels)
    whole = fitted().add_features(features, labels, predictions)
    parts = fitted()
    monkeypatch.setattr("torch_grood.detector.GRADIENT_ROWS", 10)
    assert learned(parts.add_features(features, labels, predictions)) == learned(whole)


def test_an_unfitted_detector_has_nothing_to_maintain() -> None:
    for action in (lambda: GROOD(None).add_features(*gaussians(4, 1)), lambda: GROOD(None).remove([0])):
        with pytest.raises(NotFittedError):
            action()
    with pytest.raises(GroodError, match=r"no model; use the method for features \(add_features\)"):
        fitted().add([gaussians(4, 1)])


class Named:
    """A loader whose data set names its classes."""

    def __init__(self, parts: Iterable[Any], classes: list[Any]) -> None:
        self.parts = list(parts)
        self.dataset = SimpleNamespace(classes=classes)

    def __iter__(self) -> Any:
        return iter(self.parts)


def test_images_are_added_as_their_features_are() -> None:
    model = taught_mlp()
    loader = batches(*patterns(60, shape=(6,)), size=16)
    inputs, labels = patterns(30, shape=(6,), seed=5)
    by_image, by_feature = (GROOD(model).fit(loader, progress=False) for _ in range(2))
    with left_alone(model):
        by_image.add([(inputs[:0], labels[:0]), *batches(inputs, labels, 16)], progress=False)
    found = by_feature.extract(batches(inputs, labels, 16), progress=False)
    by_feature.add_features(found.features, labels, found.logits.argmax(1))
    assert by_image.fit_info_.n_added == 30
    assert torch.equal(by_image._need_state().sample_ids, by_feature._need_state().sample_ids)
    assert torch.equal(by_image.log_score(inputs), by_feature.log_score(inputs))


def test_classes_that_were_left_out_stay_out() -> None:
    model = taught_mlp()
    loader = Named(batches(*patterns(60, shape=(6,)), size=16), ["a", "b", "c"])
    detector = GROOD.paper(model).fit(loader, classes=["a", "c"], progress=False)
    inputs, labels = patterns(30, shape=(6,), seed=5)
    n_before, n_read = detector.fit_info_.n_indexed, detector.fit_info_.n_read
    detector.add(batches(inputs, labels, 16), progress=False)
    info = detector.fit_info_
    assert (info.n_added, info.n_left_out, info.n_read) == (20, 30, n_read + 30)
    added = detector._need_state().sample_ids[n_before:] - n_read
    assert set((added % 3).tolist()) == {0, 2}


def test_classes_of_the_added_data_are_found_by_name() -> None:
    model = taught_mlp()
    loader = Named(batches(*patterns(60, shape=(6,)), size=16), ["a", "b", "c"])
    inputs, labels = patterns(30, shape=(6,), seed=5)
    plain, named = (GROOD.paper(model).fit(loader, progress=False) for _ in range(2))
    plain.add(batches(inputs, labels, 16), progress=False)
    # The same images in a data set that numbers the classes otherwise, and lacks one.
    kept = labels != 1
    named.add(Named(batches(inputs[kept], (labels[kept] == 0).long(), 16), ["c", "a"]), progress=False)
    assert plain.fit_info_.n_indexed > named.fit_info_.n_indexed > 60 - 5
    own = named.log_score(inputs[kept]).exp()
    assert float((own < 1e-6).double().mean()) > 0.9
    before = learned(named)
    with pytest.raises(GroodError, match="the data have a class 'zebra', which is none of the detector's 3 classes"):
        named.add(Named(batches(inputs, labels, 16), ["a", "zebra"]), progress=False)
    assert learned(named) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: x, "add needs labels; pass a loader"),
        (lambda x, y: [], "gave no training sample"),
        (lambda x, y: [(x[:0], y[:0])], "gave no training sample"),
        (lambda x, y: [(x, y), (x[:, :5], y)], "cannot be added: the detector was fitted on images of shape"),
        (lambda x, y: [(x, y), (x, y + 5)], "label 5 of sample 0 is out of range"),
        (lambda x, y: [(x, y), (x * torch.nan, y)], "feature 0 of sample 6 is nan"),
        (lambda x, y: [(x, y), (x, None)], "labels are missing"),
    ],
)
def test_images_that_cannot_be_added(change: Callable[..., Any], message: str) -> None:
    model = taught_mlp()
    detector = GROOD(model).fit(batches(*patterns(60, shape=(6,)), size=16), progress=False)
    before = learned(detector)
    with pytest.raises(GroodError, match=message), left_alone(model):
        detector.add(change(*patterns(6, shape=(6,), seed=5)), progress=False)
    assert learned(detector) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_removed_gradients_are_not_in_the_file(dtype: str, tmp_path: Path) -> None:
    detector = fitted(store=dtype)
    store, ids = stored(detector), [0, 17, 119]
    traces = [tensor[row].numpy().tobytes() for row in ids for tensor in (store.codes, store.log_magnitude)]
    detector.save(tmp_path / "before")
    before = detector.log_score_features(QUERIES)
    assert detector.remove(ids) == 3
    detector.save(tmp_path / "after")
    for trace in traces:
        assert trace in (tmp_path / "before").read_bytes()
        assert trace not in (tmp_path / "after").read_bytes()
    assert detector.threshold_ is None
    with pytest.raises(NotFittedError, match="not calibrated"):
        detector.predict_features(QUERIES)
    after = detector.log_score_features(QUERIES)
    assert bool((after >= before).all())
    assert not set(ids) & set(detector._need_state().sample_ids.tolist())
    info = detector.fit_info_
    assert (info.n_samples, info.n_indexed, info.n_removed) == (120, 117, 3)
    other = GROOD.load(tmp_path / "after")
    assert torch.equal(other.log_score_features(QUERIES), after)


def test_scores_are_those_of_the_gradients_that_stay() -> None:
    detector = fitted()
    gradients = stored(detector).take(slice(None))
    ids = torch.arange(0, 120, 3)
    assert detector.remove(ids) == 40
    kept = torch.ones(120, dtype=torch.bool)
    kept[ids] = False
    queries = detector._need_state().gradient_field(QUERIES).gradients
    expected = ExactIndex().build(gradients.take(kept)).search(queries).log_distance.flatten()
    assert torch.equal(detector.log_score_features(QUERIES), expected)


@pytest.mark.parametrize("index", ["exact", "faiss"])
def test_neighbours_have_their_names_after_a_removal(index: str) -> None:
    features, _ = gaussians(120, 1)
    detector = fitted(index="exact" if index == "exact" else FaissIndex("Flat"))
    detector.remove(range(0, 60, 2))
    detector.calibrate_features(gaussians(100, 2)[0])
    found = detector.predict_features(features)
    stays = torch.ones(120, dtype=torch.bool)
    stays[torch.arange(0, 60, 2)] = False
    assert torch.equal(found.neighbor[stays], torch.arange(120)[stays])
    assert bool(stays[found.neighbor].all())
    assert bool((found.score[~stays] > 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_added_and_removed_again_is_as_before(dtype: str) -> None:
    detector, untouched = fitted(store=dtype), fitted(store=dtype)
    detector.add_features(*gaussians(40, 5))
    assert detector.remove(torch.arange(120, 160)) == 40
    assert learned(detector)[:5] == learned(untouched)[:5]
    assert torch.equal(detector.log_score_features(QUERIES), untouched.log_score_features(QUERIES))
    # Positions are never given twice.
    assert detector.add_features(*gaussians(4, 6))._need_state().sample_ids[-4:].tolist() == [160, 161, 162, 163]


@pytest.mark.parametrize(
    "ids",
    [
        [3, 5],
        (5, 3),
        {3, 5},
        frozenset({3, 5}),
        [3, 3, 5, 5, 3],
        torch.tensor([3, 5], dtype=torch.int32),
        torch.tensor([[3], [5]]),
        np.array([3, 5]),
    ],
)
def test_every_kind_of_sample_ids(ids: Any) -> None:
    detector = fitted()
    assert detector.remove(ids) == 2
    assert detector._need_state().sample_ids.tolist() == [i for i in range(120) if i not in (3, 5)]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "sample ids must be integers, positions in the training set; got None"),
        ("abc", "sample ids must be integers"),
        (torch.ones(120, dtype=torch.bool), "sample ids must be integers"),
        (np.ones(120, dtype=bool), "sample ids must be integers"),
        ([3.0, 5.0], "sample ids must be integers.*got"),
        ({3.5}, "sample ids must be integers"),
        ({"a", 3}, "sample ids must be integers"),
        ([1j], "sample ids must be integers"),
        ([2**70], "sample ids must be integers"),
        ([[1], [2, 3]], "sample ids must be integers"),
        ([120], "sample ids are positions from 0 to 119 in the training set, got 120 to 120"),
        ([5, -1], "positions from 0 to 119 in the training set, got -1 to 5"),
        (range(120), "no stored gradient would be left; a detector needs at least one"),
    ],
)
def test_sample_ids_that_cannot_be_removed(ids: Any, message: str) -> None:
    detector = fitted()
    before = learned(detector)
    with pytest.raises(GroodError, match=message):
        detector.remove(ids)
    assert learned(detector) == before


def test_one_position_alone() -> None:
    assert fitted().remove(5) == 1  # type: ignore[arg-type]


def test_removing_what_was_never_stored_keeps_the_threshold() -> None:
    features, labels = gaussians(120, 1)
    predictions = torch.where(torch.arange(120) == 7, (labels + 1) % 4, labels)
    detector = GROOD(None).fit_features(features, labels, predictions).calibrate_features(gaussians(100, 2)[0])
    before = learned(detector)
    for ids in ([7], [], set(), torch.empty(0, dtype=torch.int64)):
        assert detector.remove(ids) == 0
    assert learned(detector) == before
    assert detector.remove([7, 8]) == 1
    assert detector.remove([8]) == 0


def test_a_covering_radius_is_forgotten_by_a_removal_only() -> None:
    detector = fitted(subset=KCenterCoreset(n=40))
    radius = detector.fit_info_.covering_radius
    assert radius is not None
    assert detector.add_features(*gaussians(10, 5)).fit_info_.covering_radius == radius
    detector.remove([int(detector._need_state().sample_ids[0])])
    assert detector.fit_info_.covering_radius is None


def test_a_failing_index_leaves_the_detector_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = fitted()
    before = learned(detector)

    def fail(*_: object, **__: object) -> None:
        raise GroodError("no room")

    monkeypatch.setattr(ExactIndex, "build", fail)
    for action in (lambda: detector.add_features(*gaussians(4, 5)), lambda: detector.remove([1])):
        with pytest.raises(GroodError, match="no room"):
            action()
    assert learned(detector) == before


def test_maintenance_goes_to_disk_beyond_the_budget(tmp_path: Path) -> None:
    in_memory, on_disk = fitted(), fitted(store=StoreOptions(memory=0, folder=tmp_path))
    for detector in (in_memory, on_disk):
        detector.add_features(*gaussians(40, 5)).remove([1, 130])
    assert learned(on_disk) == learned(in_memory)
    assert list(tmp_path.iterdir()) == []
