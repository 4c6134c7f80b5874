"""The ResNet-18 for 32×32 images has OpenOOD's names, torchvision's arithmetic, and the layers that GROOD needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torch_grood import FeatureExtractor, GroodError
from torch_grood.models import load_model
from torch_grood.training.networks import resnet18_32x32

SPEC = "torch_grood.training.networks:resnet18_32x32"


def openood_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of OpenOOD's ResNet18_32x32, from its structure: no look at our network."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, n_out: int, n_in: int, side: int) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in, side, side)

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    convolution("conv1", 64, 3, 3)
    norm("bn1", 64)
    for stage, (n_in, width) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=1):
        for block in range(2):
            here = f"layer{stage}.{block}"
            convolution(f"{here}.conv1", width, n_in if block == 0 else width, 3)
            norm(f"{here}.bn1", width)
            convolution(f"{here}.conv2", width, width, 3)
            norm(f"{here}.bn2", width)
            if block == 0 and n_in != width:
                convolution(f"{here}.shortcut.0", width, n_in, 1)
                norm(f"{here}.shortcut.1", width)
    shapes.update({"fc.weight": (classes, 512), "fc.bias": (classes,)})
    return shapes


def scrambled(model: nn.Module, seed: int) -> nn.Module:
    """The network with other numbers in every tensor, running statistics too, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                change = torch.rand(tensor.shape, generator=generator) - 0.5
                # Variances and scales stay near 1, weights small.
                tensor.copy_(
                    tensor + change * (0.8 if name.endswith(("running_var", "weight")) and tensor.ndim == 1 else 0.05)
                )
    return model


@pytest.mark.parametrize("classes", [10, 100])
def test_names_and_shapes_are_those_of_openood(classes: int) -> None:
    model = resnet18_32x32(classes)
    expected = openood_shapes(classes)
    assert len(expected) == 122
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert list(model.state_dict()) == list(expected)
    if classes == 10:
        assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("classes", [10, 100])
def test_a_checkpoint_in_openoods_form_loads(tmp_path: Path, prefix: str, classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    state = {
        name: torch.zeros((), dtype=torch.int64) if not shape else torch.rand(shape, generator=generator)
        for name, shape in openood_shapes(classes).items()
    }
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "best.ckpt")
    loaded = load_model(SPEC, tmp_path / "best.ckpt").model
    assert not loaded.training
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_a_checkpoint_of_another_network_does_not_load(tmp_path: Path) -> None:
    state = {name.replace("shortcut", "downsample"): torch.zeros(s) for name, s in openood_shapes(10).items()}
    torch.save(state, tmp_path / "best.ckpt")
    with pytest.raises(GroodError, match=r"15 missing \(layer2\.0\.shortcut\.0\.weight"):
        load_model(SPEC, tmp_path / "best.ckpt")


def with_torchvisions_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("shortcut", "downsample"): tensor for name, tensor in state.items()}


def test_it_computes_what_torchvisions_resnet18_with_another_stem_computes() -> None:
    models = pytest.importorskip("torchvision.models")
    ours = scrambled(resnet18_32x32(10), seed=3)
    theirs = models.resnet18(weights=None, num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(with_torchvisions_names(ours.state_dict()))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
    # In training too: gradients, and the running statistics after it.
    for model in (ours.train(), theirs.train()):
        model.zero_grad()
        nn.functional.cross_entropy(model(images), torch.arange(3)).backward()  # type: ignore[no-untyped-call]
    gradients = with_torchvisions_names({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    assert len(gradients) == 62
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
    for name, tensor in with_torchvisions_names(ours.state_dict()).items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_the_extractor_finds_its_head_and_its_first_stage() -> None:
    model = scrambled(resnet18_32x32(7), seed=1).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    extractor = FeatureExtractor(model)
    extractor.resolve(images, early=True)
    assert (extractor.head, extractor.early_layer) == ("fc", "layer1")
    extracted = extractor(images)
    with torch.no_grad():
        features = model.avgpool(
            model.layer4(model.layer3(model.layer2(model.layer1(torch.relu(model.bn1(model.conv1(images)))))))
        ).flatten(1)
    assert features.shape == (3, 512)
    assert torch.equal(extracted.features, features)


def test_initial_weights_follow_from_the_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            states.append(resnet18_32x32(10).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])
