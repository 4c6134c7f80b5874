"""A world without some classes is one that has never known them."""

from __future__ import annotations

import pytest
import torch

from torch_grood.errors import GroodError
from torch_grood.evaluation.outputs import Head, Outputs, World


def _world() -> World:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, generator=generator)
    head = Head(torch.randn(4, 5, generator=generator), torch.randn(4, generator=generator))
    outputs = Outputs(features, features @ head.weight.T + head.bias, torch.arange(40) % 4)
    return World(outputs, outputs.take(torch.arange(20)), head)


def test_without_classes() -> None:
    world = _world()
    reduced = world.without([1])
    assert reduced.left_out == {1}
    assert reduced.n_classes == 3
    kept = world.train.labels != 1  # type: ignore[operator]
    assert torch.equal(reduced.train.features, world.train.features[kept])
    assert reduced.train.labels.tolist() == [0, 1, 2] * 10  # type: ignore[union-attr]
    assert reduced.head is not None
    torch.testing.assert_close(reduced.train.features @ reduced.head.weight.T + reduced.head.bias, reduced.train.logits)
    assert reduced.val is not None
    assert len(reduced.val) == 15
    assert len(world.train) == 40


def test_of_classes_marks_the_others() -> None:
    seen = _world().train.of_classes(torch.tensor([0, 2]))
    assert seen.labels is not None
    assert seen.labels.tolist() == [0, -1, 1, -1] * 10
    assert seen.logits.shape == (40, 2)


@pytest.mark.parametrize("classes", [[0, 1, 2], [4], [-1]])
def test_classes_that_cannot_be_left_out(classes: list[int]) -> None:
    with pytest.raises(GroodError, match="two at least must be left"):
        _world().without(classes)


def test_a_reduced_world_is_not_reduced_again() -> None:
    with pytest.raises(GroodError, match="all at once"):
        _world().without([0]).without([1])


def test_shapes_must_agree() -> None:
    with pytest.raises(GroodError, match=r"got \(3, 2\) and \(4, 2\)"):
        Outputs(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(GroodError, match="one label for each of 3 samples"):
        Outputs(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2))
