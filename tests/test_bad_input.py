"""Bad input, each with its error: what was given, what was expected, and the remedy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models import MLP, batches, left_alone, patterns, taught_cnn, taught_mlp
from torch_grood import GROOD, Mixup, PrototypeMean, UniformNoise
from torch_grood.errors import GroodError, NotFittedError


def fitted() -> GROOD:
    return GROOD(taught_cnn()).fit(batches(*patterns(30), 10))


def fit_on(loader: Any, **arguments: Any) -> GROOD:
    model = taught_cnn()
    with left_alone(model):
        return GROOD(model, **arguments).fit(loader)


# --- Loaders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loader",
    [[], iter(()), [(torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))]],
    ids=["list", "iterator", "empty-batch"],
)
def test_empty_loader(loader: Any) -> None:
    with pytest.raises(GroodError, match="gave no training sample; check the path and the loader"):
        fit_on(loader)


def test_nothing_to_score_or_calibrate() -> None:
    detector = fitted()
    for act, name in ((detector.score, "score"), (detector.calibrate, "calibrate")):
        for nothing in ([], torch.zeros(0, 3, 8, 8), [torch.zeros(0, 3, 8, 8)]):
            with pytest.raises(GroodError, match=f"no image to {name}; check the path and the loader"):
                act(nothing)
    detector.calibrate(patterns(30, seed=1)[0])
    with pytest.raises(GroodError, match="no image to predict"):
        detector.predict([])
    with pytest.raises(GroodError, match="gave no image; check the path and the loader"):
        detector.extract([])


@pytest.mark.parametrize(
    "loader", [5, None, object(), "data/train", {"a": 1}], ids=["int", "none", "object", "path", "dict"]
)
def test_what_is_no_loader(request: pytest.FixtureRequest, loader: Any) -> None:
    with pytest.raises(GroodError, match=r"(?i)loader"):
        fit_on(loader)


@pytest.mark.parametrize("images", [5, None, "data/test.png", {"images": torch.zeros(1, 3, 8, 8)}])
def test_what_is_no_tensor_and_no_loader(images: Any) -> None:
    with pytest.raises(GroodError, match="expected a tensor of images or a loader of batches, got"):
        fitted().score(images)


def test_loader_of_lists() -> None:
    inputs, labels = patterns(4)
    loader = [[inputs.tolist(), labels.tolist()]]
    with pytest.raises(
        GroodError, match=r"expected a tensor of images \(n, ...\) in each batch, got list; use a DataL"
    ):
        fit_on(loader)
    with pytest.raises(GroodError, match="got list; use a DataLoader"):
        fitted().score(loader)


def test_images_as_numpy() -> None:
    inputs, labels = patterns(12)
    with pytest.raises(GroodError, match=r"expected a tensor of images.* got ndarray; use a DataLoader"):
        fit_on([(inputs.numpy(), labels)])
    with pytest.raises(GroodError, match=r"expected a tensor of images.* got ndarray"):
        fitted().score(inputs.numpy())
    with pytest.raises(GroodError, match=r"expected a tensor of images.* got ndarray"):
        fitted().score([inputs.numpy()])


def test_a_batch_of_other_keys() -> None:
    with pytest.raises(GroodError, match="found no images in a batch with the keys img, label; expected one of pixel"):
        fit_on([{"img": torch.zeros(4, 3, 8, 8), "label": torch.zeros(4)}])
    with pytest.raises(GroodError, match=r"empty tuple; expected \(images, labels\)"):
        fit_on([()])


def test_a_data_set_instead_of_a_loader() -> None:
    """Its items look like batches: (c, h, w) passes for a batch of c grey images without a channel axis."""
    inputs, labels = patterns(12)
    with pytest.raises(GroodError, match="DataLoader"):
        fit_on(TensorDataset(inputs, labels))


def test_a_tensor_instead_of_a_loader_at_fit() -> None:
    with pytest.raises(GroodError, match="loader"):
        fit_on(patterns(12)[0])


def test_one_image_without_its_batch_dimension() -> None:
    inputs, _ = patterns(4)
    with pytest.raises(GroodError, match=r"shape \(8, 8\) cannot be scored.*fitted on images of shape \(3, 8, 8\)"):
        fitted().score(inputs[0])
    model = taught_mlp()
    table, labels = patterns(30, shape=(6,))
    detector = GROOD(model).fit(batches(table, labels, 10))
    with pytest.raises(GroodError, match=r"expected a batch of images.*got shape \(6,\); add a batch dimension"):
        detector.score(table[0])


# --- Labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["images", "tuple", "dict", "none"])
def test_missing_labels(batch: str) -> None:
    inputs, _ = patterns(9)
    loader: Any = {
        "images": [inputs],
        "tuple": [(inputs,)],
        "dict": [{"image": inputs}],
        "none": [(inputs, None)],
    }[batch]
    with pytest.raises(GroodError, match=r"after training sample 0: labels are missing; pass batches of \(images, lab"):
        fit_on(loader)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y.float(), r"labels must be integers.*got torch.float32; convert with .long\(\)"),
        (lambda y: y.bool(), "got torch.bool"),
        (lambda y: [float(v) for v in y], "got torch.float32"),
        (lambda y: y - 1, "label -1 of sample 0 is out of range: there are 3 classes, labels 0 to 2"),
        (lambda y: y + 1, r"label 3 of sample 2 is out of range.*\(3 of 10 samples affected\)"),
        (lambda y: nn.functional.one_hot(y, 3), r"expected 10 labels, one a sample, got shape \(10, 3\).*argmax\(1\)"),
        (lambda y: y[:-1], r"expected 10 labels, one a sample, got shape \(9,\)"),
        (lambda y: y[0], r"expected 10 labels, one a sample, got shape \(\)"),
        (lambda y: 1, r"expected 10 labels, one a sample, got shape \(\)"),
        (lambda y: ["cat"] * 10, r"label 'cat' of sample 0 is not one of the classes \(0, 1, 2\)"),
        (lambda y: "cat", "label"),
        (lambda y: [None] * 10, "label"),
        (lambda y: [[0, 1], [2]], "label"),
        (lambda y: [2**70] * 10, "label"),
    ],
    ids=[
        "float", "bool", "float-list", "negative", "beyond", "one-hot", "too-few", "scalar", "int", "unknown-name",
        "string", "nones", "ragged", "huge",
    ],
)  # fmt: skip
def test_bad_labels(request: pytest.FixtureRequest, change: Any, said: str) -> None:
    """In the second batch, after a good one."""
    inputs, labels = patterns(20)
    loader = [(inputs[:10], labels[:10]), (inputs[10:], change(torch.arange(10) % 3))]
    with pytest.raises(GroodError, match=f"in the batch after training sample 10: .*{said}"):
        fit_on(loader)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: y.float(), "labels must be integers"),
        (lambda y: y - 1, "label -1 of sample 0 is out of range"),
        (lambda y: y[:-1], "expected 9 labels, one a sample, got shape"),
        (lambda y: None, "labels are missing"),
        (lambda y: [None] * 9, "label"),
        (lambda y: 3, "label"),
    ],
)
def test_bad_labels_of_features(request: pytest.FixtureRequest, change: Any, said: str) -> None:
    with pytest.raises(GroodError, match=said):
        GROOD(None).fit_features(torch.randn(9, 4), change(torch.arange(9) % 3))


def test_bad_predictions_of_features() -> None:
    features, labels = torch.randn(9, 4), torch.arange(9) % 3
    for predictions, said in (
        (labels.float(), "integers"),
        (labels[:-1], "expected 9 labels"),
        ((labels + 1) % 3, "wrong on all 9 training samples"),
    ):
        with pytest.raises(GroodError, match=said):
            GROOD(None).fit_features(features, labels, predictions)


def test_names_as_predictions() -> None:
    names = ["a", "b", "c"] * 3
    try:
        detector = GROOD(None).fit_features(torch.randn(9, 4), names, names)
    except GroodError:
        return
    assert detector.fit_info_.classifier_accuracy == 1.0


def test_a_class_never_seen() -> None:
    inputs, labels = patterns(30)
    with pytest.raises(GroodError, match=r"no training sample has label 2; GROOD needs at least one.*classes=\[…\]"):
        fit_on(batches(inputs[labels != 2], labels[labels != 2], 10))
    with pytest.raises(GroodError, match=r"no training sample has label 1"):
        GROOD(None).fit_features(torch.randn(4, 3), [0, 0, 2, 2])
    with pytest.raises(GroodError, match=r"no training sample has label 2 \('dog'\)"):
        GROOD(None).fit_features(torch.randn(4, 3), [0, 0, 1, 1], classes=["cat", "cow", "dog"])


def test_a_batch_without_a_correct_prediction_works() -> None:
    inputs, labels = patterns(30)
    labels[10:20] = (labels[10:20] + 1) % 3
    detector = fit_on(batches(inputs, labels, 10))
    assert detector.fit_info_.n_indexed == 20
    assert detector.fit_info_.n_samples == 30


def test_no_correct_prediction_at_all() -> None:
    inputs, labels = patterns(30)
    with pytest.raises(GroodError, match=r"wrong on all 30 training samples, so there is no gradient.*transform"):
        fit_on(batches(inputs, (labels + 1) % 3, 10))


# --- NaN and infinity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("outliers", [Mixup(5), PrototypeMean()], ids=str)
def test_a_training_image_with_nan_is_named(request: pytest.FixtureRequest, value: float, outliers: Any) -> None:
    inputs, labels = patterns(30)
    inputs[14] = value
    with pytest.raises(GroodError) as caught:
        fit_on(batches(inputs, labels, 10), outliers=outliers)
    message = str(caught.value)
    assert "NaN or infinite" in message
    assert "training samples 10 to 19" in message, message
    assert "sample 4 of the batch" in message


@pytest.mark.parametrize("outliers", [Mixup(5), PrototypeMean()], ids=str)
def test_the_very_first_image_with_nan_is_named(outliers: Any) -> None:
    inputs, labels = patterns(30)
    inputs[0] = torch.nan
    with pytest.raises(GroodError, match="NaN or infinite") as caught:
        fit_on(batches(inputs, labels, 10), outliers=outliers)
    assert "sample 0" in str(caught.value)


def test_a_scored_image_with_nan_is_named() -> None:
    inputs, _ = patterns(20, seed=3)
    inputs[13] = torch.nan
    detector = fitted()
    with pytest.raises(GroodError, match=r"sample 13 is nan \(1 of 20 samples affected\); GROOD needs finite"):
        detector.score(inputs)


def test_a_scored_image_with_nan_in_a_later_batch_is_named_by_its_position() -> None:
    inputs, labels = patterns(30, seed=3)
    inputs[23] = torch.nan
    with pytest.raises(GroodError) as caught:
        fitted().score(batches(inputs, labels, 10))
    message = str(caught.value)
    assert "23" in message or ("20" in message and "sample 3" in message), message


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_with_nan_are_named(value: float) -> None:
    features = torch.randn(30, 4)
    detector = GROOD(None).fit_features(features, torch.arange(30) % 3)
    bad = features.clone()
    bad[17, 2] = value
    with pytest.raises(GroodError, match="sample 17"):
        GROOD(None).fit_features(bad, torch.arange(30) % 3)
    for act in (detector.score_features, detector.calibrate_features):
        with pytest.raises(GroodError, match=f"feature 2 of sample 17 is {value}"):
            act(bad)
    with pytest.raises(GroodError, match="OOD prototype is not finite"):
        GROOD(None).fit_features(features, torch.arange(30) % 3, ood_features=bad)


def test_a_feature_with_nan_far_down_is_named_by_its_row() -> None:
    features = torch.randn(9000, 4)
    detector = GROOD(None).fit_features(features[:30], torch.arange(30) % 3)
    features[8999, 1] = torch.nan
    with pytest.raises(GroodError, match="feature 1 of sample 8999 is nan"):
        detector.score_features(features)


def test_half_precision_that_overflows_is_named() -> None:
    model = taught_cnn()
    model[0].weight.data.abs_()
    inputs, labels = patterns(30)
    with torch.no_grad():
        labels[3:] = model(inputs[3:]).argmax(1)
    model.half()
    inputs[14] = 60000.0
    with pytest.raises(GroodError, match="half precision may overflow"):
        GROOD(model, outliers=PrototypeMean()).fit(batches(inputs, labels, 10))


# --- Shapes --------------------------------------------------------------------------------------------------------


def test_wrong_channel_count_at_fit() -> None:
    inputs, labels = patterns(12, shape=(1, 8, 8))
    with pytest.raises(GroodError, match=r"cannot run on a batch of shape \(4, 1, 8, 8\).*number of channels.*transf"):
        fit_on(batches(inputs, labels, 6))


def test_wrong_size_at_fit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))
    inputs, labels = patterns(12, shape=(3, 9, 9))
    with left_alone(model), pytest.raises(GroodError, match=r"cannot run on a batch of shape.*Check the size"):
        GROOD.paper(model).fit(batches(inputs, labels, 6))


def test_wrong_number_of_columns() -> None:
    inputs, labels = patterns(12, shape=(7,))
    with pytest.raises(GroodError, match=r"cannot run on a batch of shape \(4, 7\)"):
        GROOD(MLP()).fit(batches(inputs, labels, 6))


@pytest.mark.parametrize("outliers", [Mixup(5), UniformNoise(10), PrototypeMean()], ids=str)
@pytest.mark.parametrize("early", [None, "5"])
def test_images_of_several_sizes_at_fit_work_or_say_what_to_do(
    request: pytest.FixtureRequest, outliers: Any, early: str | None
) -> None:
    small, large = patterns(15)[0], patterns(15, shape=(3, 12, 12))[0]
    loader = [(small, torch.arange(15) % 3), (large, torch.arange(15) % 3)]
    try:
        detector = GROOD(taught_cnn(), outliers=outliers, early_layer=early).fit(loader)
    except GroodError as error:
        assert "size" in str(error) or "shape" in str(error)  # noqa: PT017
        return
    assert detector.fit_info_.image_shape == ()
    assert detector.score(small).shape == detector.score(large).shape == (15,)


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 8, 8), (3, 9, 9), (3, 8, 7)])
def test_wrong_shape_at_score_even_where_the_network_would_take_it(shape: tuple[int, ...]) -> None:
    detector = fitted().calibrate(patterns(30, seed=1)[0])
    images = torch.randn(4, *shape)
    for act in (detector.score, detector.predict, detector.calibrate, lambda x: detector.score([(x, None)])):
        with pytest.raises(GroodError, match=rf"shape \({shape[0]}, .*fitted on images of shape \(3, 8, 8\).*same tra"):
            act(images)


def test_wrong_dimension_of_features() -> None:
    detector = GROOD(None).fit_features(torch.randn(9, 4), [0, 1, 2] * 3)
    for bad, said in (
        (torch.randn(5, 3), r"expected features of shape \(n, 4\).*got \(5, 3\)"),
        (torch.randn(4), r"expected features \(n, d\) of a float dtype, got \(4,\)"),
        (torch.zeros(5, 4, dtype=torch.int64), "float dtype, got .* of torch.int64"),
        (torch.randn(5, 4, 1), r"expected features \(n, d\)"),
    ):
        with pytest.raises(GroodError, match=said):
            detector.score_features(bad)
    with pytest.raises(GroodError, match="ood_features have dimension 3, the training features 4"):
        GROOD(None).fit_features(torch.randn(9, 4), [0, 1, 2] * 3, ood_features=torch.randn(2, 3))
    with pytest.raises(GroodError, match="ood_features has no row"):
        GROOD(None).fit_features(torch.randn(9, 4), [0, 1, 2] * 3, ood_features=torch.randn(0, 4))


def test_no_features() -> None:
    with pytest.raises(GroodError, match="features has no row"):
        GROOD(None).fit_features(torch.zeros(0, 4), [])


@pytest.mark.parametrize(
    "bad",
    ["abc", None, [["a"]], object(), [[1.0, 2.0], [3.0]]],
    ids=["string", "none", "names", "object", "ragged"],
)
def test_what_is_no_features(bad: Any) -> None:
    with pytest.raises(GroodError):
        GROOD(None).fit_features(bad, [0, 1])


def test_logits_with_one_column() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    inputs, _ = patterns(12, shape=(6,))
    with left_alone(model), pytest.raises(GroodError, match=r"C ≥ 2 classes.*got shape \(4, 1\); wrap the model so"):
        GROOD.paper(model).fit(batches(inputs, torch.zeros(12, dtype=torch.int64), 6))


def test_one_class_data_with_mixup() -> None:
    inputs, labels = patterns(30)
    one = labels == 1
    loader = batches(inputs[one], labels[one], 5)
    with pytest.raises(GroodError, match=r"there is one class only; use PrototypeMean\(\)"):
        GROOD.paper(taught_cnn()).fit(loader, classes=[1])
    with pytest.raises(GroodError, match="no training sample has label 0"):
        fit_on(loader)


# --- fpr -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fpr", [0, 1, -0.1, 1.5, float("nan"), "0.05", None])
def test_fpr_outside_0_1(fpr: Any) -> None:
    detector = GROOD(None).fit_features(torch.randn(30, 4), torch.arange(30) % 3)
    with pytest.raises(GroodError, match=r"fpr is the share of ID samples.*between 0 and 1; got"):
        detector.calibrate_features(torch.randn(30, 4), fpr=fpr)
    assert detector.threshold_ is None


def test_fpr_that_cannot_be_promised() -> None:
    detector = GROOD(None).fit_features(torch.randn(30, 4), torch.arange(30) % 3)
    with pytest.raises(
        GroodError, match=r"0.05 cannot be promised from 18 calibration.* = 0.05263. Pass at least 19 samples, or a la"
    ):
        detector.calibrate_features(torch.randn(18, 4))
    assert detector.calibrate_features(torch.randn(19, 4)).threshold_ is not None


def test_a_failed_calibration_keeps_the_old_threshold() -> None:
    detector = fitted().calibrate(patterns(30, seed=1)[0], fpr=0.1)
    old = detector.threshold_
    for bad, fpr in ((patterns(30, seed=2)[0], 2.0), (patterns(3, seed=2)[0], 0.1), (torch.zeros(30, 1, 8, 8), 0.1)):
        with pytest.raises(GroodError):
            detector.calibrate(bad, fpr)
    assert detector.threshold_ is old


# --- Arguments -----------------------------------------------------------------------------------------------------


def test_scoring_before_fitting() -> None:
    with pytest.raises(NotFittedError, match="not fitted; call fit"):
        GROOD(taught_cnn()).score(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("seed", [None, "a", 1.5, 2**80, np.int64(3)], ids=str)
def test_seeds_work_or_are_refused_clearly(seed: Any) -> None:
    inputs, labels = patterns(30)
    try:
        fit_on(batches(inputs, labels, 10), seed=seed)
    except GroodError as error:
        assert "seed" in str(error)  # noqa: PT017


@pytest.mark.parametrize("index", [None, "", 5])
def test_bad_index(index: Any) -> None:
    with pytest.raises(GroodError, match="index must be 'exact', a faiss factory string"):
        GROOD(None, index=index)


def test_an_error_of_the_model_is_kept_as_the_cause() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("a defect of the user's model\nwith a second line")

    with pytest.raises(GroodError, match=r"cannot run on a batch .*: a defect of the user's model") as caught:
        GROOD(Broken()).fit(batches(*patterns(6, shape=(6,)), 3))
    assert isinstance(caught.value.__cause__, ValueError)


def test_workers_of_a_data_loader_and_odd_last_batch() -> None:
    inputs, labels = patterns(31)
    detector = fit_on_plain(DataLoader(TensorDataset(inputs, labels), batch_size=8, num_workers=0))
    assert detector.fit_info_.n_samples == 31


def fit_on_plain(loader: Any) -> GROOD:
    return GROOD(taught_cnn()).fit(loader)
