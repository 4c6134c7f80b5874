"""eq. 7: streaming class means against the mean of the whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_grood import ClassPrototypes, GroodError
from torch_grood.prototypes import as_labels


def data(n: int = 60, classes: int = 4, shape: tuple[int, ...] = (5,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,), generator=generator)])
    return torch.randn(n, *shape, generator=generator), labels


def whole(activations: Tensor, labels: Tensor, classes: int = 4) -> Tensor:
    return torch.stack([activations[labels == y].double().mean(0) for y in range(classes)])


# --- The mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (2, 3, 4), (1, 1, 1, 7), (3, 48, 48)])
@pytest.mark.parametrize("batch", [1, 7, 60])
def test_streaming_equals_the_mean_of_the_whole(shape: tuple[int, ...], batch: int) -> None:
    activations, labels = data(shape=shape)
    prototypes = ClassPrototypes(4)
    for part, part_labels in zip(activations.split(batch), labels.split(batch), strict=True):
        prototypes.update(part, part_labels)
    assert prototypes.means.dtype == torch.float64
    torch.testing.assert_close(prototypes.means, whole(activations, labels), rtol=1e-13, atol=1e-14)
    assert torch.equal(prototypes.counts, torch.bincount(labels))
    assert prototypes.sample_size == torch.Size(shape).numel()


def test_large_activations_are_summed_as_small_ones_are() -> None:
    # 4,097 numbers a sample are added one by one, 4,096 in a batch; both in float64 and in the order of the samples.
    activations, labels = data(30, shape=(4097,))
    large, small = ClassPrototypes(4), ClassPrototypes(4)
    large.update(activations, labels)
    small.update(activations[:, :4096], labels)
    torch.testing.assert_close(large.means[:, :4096], small.means, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(large.means, whole(activations, labels), rtol=1e-13, atol=1e-14)
    assert torch.equal(large.counts, small.counts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("d", [3, 5000])
def test_every_float_type_is_summed_in_float64(dtype: torch.dtype, d: int) -> None:
    # 3,000 samples of 60,000 each overflow float16, and float32 sums of them are not exact.
    activations = torch.full((3000, d), 59968.0, dtype=dtype)
    prototypes = ClassPrototypes(1)
    prototypes.update(activations, torch.zeros(3000, dtype=torch.int64))
    assert torch.equal(prototypes.means, activations[:1].double())


def test_float64_activations_keep_their_precision() -> None:
    value = torch.full((3, 2), 1 / 3, dtype=torch.float64)
    prototypes = ClassPrototypes(1)
    prototypes.update(value, [0, 0, 0])
    torch.testing.assert_close(prototypes.means, value[:1], rtol=4e-16, atol=0)


def test_a_million_additions_lose_nothing() -> None:
    value = torch.tensor(0.1, dtype=torch.float32)
    prototypes = ClassPrototypes(2)
    for _ in range(10):
        prototypes.update(value.expand(100_000, 1), torch.zeros(100_000, dtype=torch.int64))
    prototypes.update(torch.ones(1, 1), [1])
    assert prototypes.counts.tolist() == [1_000_000, 1]
    assert float(prototypes.means[0, 0]) == pytest.approx(float(value.double()), rel=1e-12)
    # A float32 sum would be off by 1 % (0.1009…).
    assert float(prototypes.means[0, 0]) != pytest.approx(0.1009, rel=1e-3)


def test_the_order_of_samples_and_batches_changes_nothing() -> None:
    # Sums of small integers are exact: the bits are the same, not just the values.
    activations, labels = data()
    activations = (64 * activations).round()
    plain, shuffled = ClassPrototypes(4), ClassPrototypes(4)
    plain.update(activations, labels)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    for part in order.split(11):
        shuffled.update(activations[part], labels[part])
    assert torch.equal(plain.means, shuffled.means)


def test_duplicating_the_data_changes_nothing() -> None:
    activations, labels = data()
    once, twice = ClassPrototypes(4), ClassPrototypes(4)
    once.update(activations, labels)
    twice.update(torch.cat([activations, activations]), torch.cat([labels, labels]))
    torch.testing.assert_close(once.means, twice.means, rtol=1e-14, atol=1e-15)


def test_no_normalisation() -> None:
    prototypes = ClassPrototypes(1)
    prototypes.update(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), [0, 0])
    assert prototypes.means.tolist() == [[1.5, 0.5]]


def test_the_input_is_neither_changed_nor_kept() -> None:
    activations, labels = data()
    activations.requires_grad_()
    before = activations.detach().clone()
    prototypes = ClassPrototypes(4)
    prototypes.update(activations, labels)
    expected = prototypes.means
    assert torch.equal(activations.detach(), before)
    assert not expected.requires_grad
    with torch.no_grad():
        activations.zero_()
    assert torch.equal(prototypes.means, expected)


def test_an_empty_batch_adds_nothing() -> None:
    prototypes = ClassPrototypes(1)
    prototypes.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert prototypes.sample_size == 0
    prototypes.update(torch.ones(1, 3), [0])
    prototypes.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert prototypes.counts.tolist() == [1]


def test_huge_finite_activations_are_no_error() -> None:
    # Their float16 sum overflows; each of them is finite.
    prototypes = ClassPrototypes(1)
    prototypes.update(torch.full((4, 2), 6e4, dtype=torch.float16), [0] * 4)
    assert prototypes.means.tolist() == [[60000.0, 60000.0]]


# --- Merging ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 59), max_size=4), st.permutations(range(5)))
def test_merging_parts_in_any_order_equals_the_whole(cuts: list[int], order: list[int]) -> None:
    activations, labels = data()
    activations = (64 * activations).round()
    bounds = [0, *sorted(cuts), 60]
    merged = ClassPrototypes(4)
    ranges = list(itertools.pairwise(bounds))
    for position in order:
        if position < len(ranges):
            start, stop = ranges[position]
            part = ClassPrototypes(4)
            part.update(activations[start:stop], labels[start:stop])
            merged.merge(part)
    assert torch.equal(merged.means, whole(activations, labels))
    assert torch.equal(merged.counts, torch.bincount(labels))


def test_merging_leaves_the_other_alone() -> None:
    first, second = ClassPrototypes(1), ClassPrototypes(1)
    second.update(torch.ones(1, 2), [0])
    first.merge(second)
    first.update(torch.full((1, 2), 3.0), [0])
    first.merge(second)
    assert second.means.tolist() == [[1.0, 1.0]]
    assert second.counts.tolist() == [1]
    assert first.counts.tolist() == [3]
    assert first.means.tolist() == [[5 / 3, 5 / 3]]


def test_merging_what_is_empty_on_either_side() -> None:
    activations, labels = data()
    filled, empty = ClassPrototypes(4), ClassPrototypes(4)
    filled.update(activations, labels)
    expected = filled.means
    filled.merge(ClassPrototypes(4))
    assert torch.equal(filled.means, expected)
    empty.merge(filled)
    assert torch.equal(empty.means, expected)
    nothing = ClassPrototypes(4)
    nothing.merge(ClassPrototypes(4))
    assert nothing.counts.sum() == 0


def test_merging_other_classes_is_an_error() -> None:
    with pytest.raises(GroodError, match=r"cannot merge prototypes of classes \('b',\) into those of \('a',\)"):
        ClassPrototypes(["a"]).merge(ClassPrototypes(["b"]))
    # The same names in another order are other rows.
    with pytest.raises(GroodError, match="cannot merge"):
        ClassPrototypes(["a", "b"]).merge(ClassPrototypes(["b", "a"]))


def test_merging_other_shapes_is_an_error_and_changes_nothing() -> None:
    first, second = ClassPrototypes(1), ClassPrototypes(1)
    first.update(torch.ones(1, 2), [0])
    second.update(torch.ones(1, 3), [0])
    with pytest.raises(GroodError, match=r"sums of shape \(1, 3\) into sums of shape \(1, 2\)"):
        first.merge(second)
    assert first.counts.tolist() == [1]


# --- Names and labels ---------------------------------------------------------------------------------------------


def test_names_and_rows_may_be_mixed() -> None:
    prototypes = ClassPrototypes(["cat", "dog", "eel"])
    prototypes.update(torch.tensor([[1.0], [2.0], [3.0], [5.0]]), ["eel", 0, "dog", "eel"])
    assert prototypes.classes == ("cat", "dog", "eel")
    assert prototypes.means.tolist() == [[2.0], [3.0], [3.0]]


def test_integer_labels_are_rows_even_if_the_names_are_integers() -> None:
    prototypes = ClassPrototypes([10, 20])
    prototypes.update(torch.tensor([[1.0], [2.0]]), [0, 1])
    assert prototypes.classes == (10, 20)
    assert prototypes.means.tolist() == [[1.0], [2.0]]
    with pytest.raises(GroodError, match="label 20 of sample 0 is out of range"):
        prototypes.update(torch.ones(1, 1), [20])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type_of_labels(dtype: torch.dtype) -> None:
    assert ClassPrototypes(3).rows(torch.tensor([2, 0]).to(dtype), 2).tolist() == [2, 0]


def test_labels_of_numpy_lists_and_columns() -> None:
    assert as_labels(np.array([1, 2]), 2).tolist() == [1, 2]
    assert as_labels([1, 2], 2).tolist() == [1, 2]
    assert as_labels(torch.tensor([[1], [2]]), 2).tolist() == [1, 2]
    assert as_labels(np.array([1], dtype=np.uint8), 1).dtype == torch.int64


def test_names_in_a_numpy_array() -> None:
    assert ClassPrototypes(["a", "b"]).rows(np.array(["b", "a"]), 2).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 3]), r"label 3 of sample 1 is out of range: there are 3 classes, labels 0 to 2 \(1 of 2"),
        (torch.tensor([-1, 0]), "label -1 of sample 0 is out of range"),
        (torch.tensor([0.0, 1.0]), r"labels must be integers .*got torch.float32; convert with .long\(\)"),
        (torch.tensor([True, False]), "labels must be integers .*got torch.bool"),
        (torch.eye(3)[:2], r"expected 2 labels.*\(2, 3\); for one-hot labels pass labels.argmax\(1\)"),
        (torch.eye(3, dtype=torch.int64)[:2], "for one-hot labels"),
        (torch.tensor([0]), r"expected 2 labels, one a sample, got shape \(1,\)"),
        (torch.tensor([0, 1, 2]), r"expected 2 labels, one a sample, got shape \(3,\)"),
        (torch.tensor(0), r"expected 2 labels, one a sample, got shape \(\)"),
        (["a", "b"], r"label 'a' of sample 0 is not one of the classes \(0, 1, 2\)"),
        ([0, "b"], r"label 'b' of sample 1 is not one of the classes"),
    ],
)
def test_bad_labels_are_named_and_add_nothing(labels: object, message: str) -> None:
    prototypes = ClassPrototypes(3)
    prototypes.update(torch.ones(1, 2), [0])
    with pytest.raises(GroodError, match=message):
        prototypes.update(torch.ones(2, 2), labels)  # type: ignore[arg-type]
    assert prototypes.counts.tolist() == [1, 0, 0]
    assert prototypes._sums is not None
    assert prototypes._sums.sum() == 2


def test_missing_labels_of_a_batch() -> None:
    with pytest.raises(GroodError, match="labels are missing; pass batches of"):
        as_labels(None, 2)


def test_missing_labels_are_an_error_of_ours() -> None:
    with pytest.raises(GroodError, match="labels are missing"):
        ClassPrototypes(2).update(torch.ones(2, 2), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [[None, 1], [[1], [2, 3]]])
def test_labels_that_make_no_tensor_are_an_error_of_ours(labels: list[object]) -> None:
    with pytest.raises(GroodError):
        ClassPrototypes(4).update(torch.ones(2, 2), labels)  # type: ignore[arg-type]


# --- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [4, 5000])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_sample_is_named_and_nothing_is_added(d: int, value: float) -> None:
    prototypes = ClassPrototypes(2)
    prototypes.update(torch.ones(2, d), [0, 1])
    broken = torch.ones(5, d)
    broken[[2, 4], 1] = value
    with pytest.raises(GroodError, match=r"sample 2 of the batch has a NaN or infinite activation \(2 of 5 samples"):
        prototypes.update(broken, [0, 1, 0, 1, 0])
    assert prototypes.counts.tolist() == [1, 1]
    assert torch.equal(prototypes.means, torch.ones(2, d, dtype=torch.float64))


def test_infinities_of_both_signs_do_not_hide_each_other() -> None:
    broken = torch.tensor([[torch.inf, 1.0], [-torch.inf, 1.0]])
    with pytest.raises(GroodError, match=r"sample 0 .*2 of 2 samples"):
        ClassPrototypes(1).update(broken, [0, 0])


def test_a_broken_scalar_activation_is_named() -> None:
    with pytest.raises(GroodError, match="sample 1"):
        ClassPrototypes(1).update(torch.tensor([1.0, torch.nan]), [0, 0])


def test_one_number_a_sample() -> None:
    prototypes = ClassPrototypes(2)
    prototypes.update(torch.tensor([1.0, 3.0, 5.0]), [0, 0, 1])
    assert prototypes.means.tolist() == [2.0, 5.0]


def test_another_shape_than_before() -> None:
    prototypes = ClassPrototypes(1)
    prototypes.update(torch.ones(1, 3, 8, 8), [0])
    with pytest.raises(GroodError, match=r"\(3, 9, 9\) a sample .*\(3, 8, 8\)"):
        prototypes.update(torch.ones(1, 3, 9, 9), [0])
    assert prototypes.counts.tolist() == [1]


def test_a_class_without_samples_is_named_with_the_remedy() -> None:
    prototypes = ClassPrototypes(["cat", "dog", "eel"])
    prototypes.update(torch.ones(2, 2), [0, 2])
    with pytest.raises(
        GroodError, match=r"no training sample has label 1 \('dog'\); GROOD needs at least one per class. Pass classes="
    ):
        _ = prototypes.means
    with pytest.raises(GroodError, match="no training sample has label 0;"):
        _ = ClassPrototypes(2).means


def test_bad_class_names() -> None:
    for wrong in ("cat", None, 1.5):
        with pytest.raises(GroodError, match="classes must be a number of classes or their names"):
            ClassPrototypes(wrong)  # type: ignore[arg-type]
    with pytest.raises(GroodError, match="class 'a' is named twice"):
        ClassPrototypes(["b", "a", "c", "a"])
    for nothing in (0, -1, []):
        with pytest.raises(GroodError, match="there is no class"):
            ClassPrototypes(nothing)
