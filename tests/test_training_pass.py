"""What a training pass is made of can be stopped and taken up again, to the bit."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from models import batches, patterns, taught_cnn
from torch_grood import GroodError, Mixup
from torch_grood.features import FeatureExtractor
from torch_grood.outliers import SampleReservoir
from torch_grood.prototypes import ClassPrototypes
from torch_grood.training_pass import TrainingPass, shape_and_range


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("n", [1, 7, 40, 100])
def test_a_reservoir_of_positions_keeps_the_same_images(n: int, seed: int) -> None:
    images, runner_up = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(5)), torch.arange(40) % 7
    images[30:33] = images[3]
    whole, by_position = SampleReservoir(n, seed), SampleReservoir(n, seed)
    asked: list[int] = []

    def read(positions: list[int]) -> list[Tensor]:
        asked.extend(positions)
        return [images[position] for position in positions]

    for start in range(0, 40, 9):
        part = slice(start, start + 9)
        whole.offer(images[part], runner_up[part])
        priorities = by_position.priorities(images[part])
        assert priorities.dtype == torch.int64
        by_position.offer_positions(priorities, torch.arange(40)[part], runner_up[part])
    for most in (None, 5):
        one, other = whole.samples(most), by_position.samples(most, read)
        assert one is not None
        assert other is not None
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.runner_up, other.runner_up)
    assert len(asked) == min(n, 40) + min(n, 5)


def test_priorities_use_all_64_bits() -> None:
    priorities = SampleReservoir(3, 0).priorities(torch.rand(200, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert 60 < int((priorities < 0).sum()) < 140


def test_a_reservoir_notices_another_image() -> None:
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    reservoir = SampleReservoir(2, 0)
    reservoir.offer_positions(reservoir.priorities(images), torch.tensor([10, 11, 12, 13]), torch.zeros(4))
    with pytest.raises(GroodError, match=r"training image 1\d is another one than when its features were kept"):
        reservoir.samples(None, lambda positions: [images[0] + 1 for _ in positions])


@pytest.mark.parametrize("shape", [(5,), (3, 4, 4), (5000,)])
def test_prototypes_go_on_from_restored_sums(shape: tuple[int, ...]) -> None:
    activations, labels = torch.randn(30, *shape, generator=torch.Generator().manual_seed(1)), torch.arange(30) % 4
    whole, before, after = (ClassPrototypes(4) for _ in range(3))
    for start in range(0, 30, 6):
        part = slice(start, start + 6)
        whole.update(activations[part], labels[part])
        (before if start < 18 else after).update(activations[:0], labels[:0])
        if start < 18:
            before.update(activations[part], labels[part])
        else:
            if start == 18:
                for rows in (torch.tensor([2, 0]), torch.tensor([1, 3])):
                    after.restore(rows, before.sums_of(rows), torch.device("cpu"))
                after.counts += before.counts
            after.update(activations[part], labels[part])
    assert torch.equal(after.means, whole.means)
    kept = before.sums_of(torch.tensor([1]))
    before.update(activations, labels)
    assert not torch.equal(kept, before.sums_of(torch.tensor([1]))), "a copy"


def test_there_are_no_sums_before_the_first_sample() -> None:
    with pytest.raises(GroodError, match="no sample was added yet"):
        ClassPrototypes(2).sums_of(torch.tensor([0]))


def training_pass(chosen: list[int] | None = None) -> TrainingPass:
    return TrainingPass(FeatureExtractor(taught_cnn()), Mixup(n=5), 0, [], chosen)


def test_a_pass_takes_all_batches_and_says_once_what_it_keeps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torch_grood")
    images, labels = patterns(20)
    passed = training_pass()
    passed.run(batches(images, labels, 6), progress=False)
    assert (passed.n_samples, passed.n_read, passed.n_left_out, passed.batch_size) == (20, 20, 0, 6)
    assert [len(part) for part in passed.features.drain()] == [6, 6, 6, 2]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("fit keeps 128 bytes a sample (32 features), ")


def test_samples_that_are_left_out_keep_their_place() -> None:
    images, labels = patterns(20)
    passed = training_pass([0, 2])
    passed.run(batches(images, labels, 6), progress=False)
    assert (passed.n_samples, passed.n_read, passed.n_left_out) == (13, 20, 7)
    assert passed.left_out() == [1]
    assert torch.cat(passed.sample_ids).tolist() == [i for i in range(20) if i % 3 != 1]
    assert [i for i, content in enumerate(torch.cat(passed.hashes).tolist()) if content == 0] == list(range(1, 20, 3))
    assert passed.rows_of(torch.tensor([2, 0])).tolist() == [1, 0]
    for label in (1, 3, -1):
        with pytest.raises(GroodError, match=f"label {label} is none of the 2 classes"):
            passed.rows_of(torch.tensor([0, label]))


def test_errors_tell_which_samples_they_are_about() -> None:
    images, labels = patterns(20)
    images[9] = torch.nan
    with pytest.raises(GroodError, match="in training samples 6 to 11: sample 3 of the batch has a NaN"):
        training_pass().run(batches(images, labels, 6), progress=False)


def test_the_range_of_images() -> None:
    images = torch.arange(24.0).view(2, 3, 2, 2)
    shape, channel_range = shape_and_range(images)
    assert shape == (3, 2, 2)
    assert channel_range is not None
    assert [bound.tolist() for bound in channel_range] == [[0, 4, 8], [15, 19, 23]]
    assert shape_and_range(images.long()) == ((3, 2, 2), None)
