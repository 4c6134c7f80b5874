"""The world of the checks: exact arithmetic, the same bits each time, and classes that are easy to tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_grood.testing import world
from torch_grood.testing.scoring import SCALES, auroc
from torch_grood.testing.uses import FeatureUse, ImageUse


def forward(model: world.Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits."""
    seen: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        logits = model(images)
    handle.remove()
    return seen[0], logits


@pytest.mark.parametrize("scale", SCALES)
def test_the_forward_pass_is_exact(scale: float) -> None:
    """In float64 there are bits to spare: float32 gives the same numbers, so that it has rounded none."""
    images = torch.cat([world.images(300, seed=8)[0], world.images(300, seed=9, known=False)[0]])
    for single, double in zip(
        forward(world.classifier(scale), images),
        forward(world.classifier(scale).double(), images.double()),
        strict=True,
    ):
        assert torch.equal(single.double(), double)
        # The order of summation does not matter then, and numbers of 24 bits hold all partial sums.
        assert int((double / double[double != 0].abs().min()).abs().max()) < 2**24


def test_the_forward_pass_rounds_elsewhere() -> None:
    """The test above can fail."""
    images = world.images(30, seed=8)[0] / 3
    single, double = forward(world.classifier(), images)[1], forward(world.classifier().double(), images.double())[1]
    assert not torch.equal(single.double(), double)


def test_the_same_bits_each_time() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = world.classifier(), world.classifier(), world.classifier(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not any(module.training for module in first.modules())


def test_features_are_exact_in_every_dtype() -> None:
    features = torch.cat([world.features(300, seed=8)[0], world.features(300, seed=9, known=False)[0]])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(features.to(dtype).float(), features)


def test_the_classifier_knows_its_classes() -> None:
    images, labels = world.images(300, seed=8)
    assert float((forward(world.classifier(), images)[1].argmax(1) == labels).double().mean()) > 0.99


@pytest.mark.parametrize("kind", [FeatureUse, ImageUse])
def test_unknown_samples_are_easy(kind: type) -> None:
    """By the plainest detectors: the nearest training sample and, on images, the largest logit."""
    use = kind(lambda _: None)
    if use.name == "features":
        train, known, unknown = use.train.inputs, use.known, use.unknown
    else:
        train, known, unknown = (forward(use.model, inputs)[0] for inputs in (use.train.inputs, use.known, use.unknown))
        logits = [forward(use.model, inputs)[1].amax(1) for inputs in (use.known, use.unknown)]
        assert auroc(-logits[0], -logits[1]) > 0.95
    assert auroc(torch.cdist(known, train).amin(1), torch.cdist(unknown, train).amin(1)) > 0.95


@pytest.mark.parametrize("kind", [FeatureUse, ImageUse])
def test_no_sample_is_drawn_twice(kind: type) -> None:
    use = kind(lambda _: None)
    inputs = [use.train.inputs, use.other_train.inputs, use.held_out.inputs, use.other_held_out.inputs, use.queries]
    drawn = torch.cat(inputs).flatten(1)
    assert len(drawn.unique(dim=0)) == len(drawn)


def test_auroc() -> None:
    known, unknown = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert auroc(known, unknown) == pytest.approx((1 + 0.5 + 0 + 3) / 6)
