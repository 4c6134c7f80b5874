"""Real architectures with random weights: head, early layer, feature dimension, mixing, and a fit end to end."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from models import left_alone
from torch_grood import GROOD, FeatureExtractor, Mixup

SLOW = pytest.mark.slow


def torchvision(name: str, **arguments: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision.models")
        return models.get_model(name, weights=None, num_classes=5, **arguments)

    return make


def timm(name: str, **arguments: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=5, **arguments)

    return make


def hugging_face(name: str, **arguments: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{name}Config")(num_labels=5, **arguments)
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return make


# name, model, image size, head, early layer, feature dimension
ARCHITECTURES = [
    pytest.param(torchvision("resnet18"), 64, "fc", "layer1", 512, id="tv-resnet18"),
    pytest.param(torchvision("resnet50"), 64, "fc", "layer1", 2048, id="tv-resnet50", marks=SLOW),
    pytest.param(
        torchvision("vit_b_16", image_size=64), 64, "heads.head", "encoder.layers.encoder_layer_1", 768,
        id="tv-vit_b_16", marks=SLOW,
    ),
    pytest.param(torchvision("swin_t"), 64, "head", "features.1", 768, id="tv-swin_t", marks=SLOW),
    pytest.param(torchvision("convnext_tiny"), 64, "classifier.2", "features.1", 768, id="tv-convnext", marks=SLOW),
    pytest.param(torchvision("mobilenet_v3_small"), 64, "classifier.3", "features.2", 1024, id="tv-mobilenet_v3"),
    pytest.param(
        torchvision("efficientnet_b0"), 64, "classifier.1", "features.2", 1280, id="tv-efficientnet", marks=SLOW
    ),
    pytest.param(
        torchvision("densenet121"), 64, "classifier", "features.denseblock1", 1024, id="tv-densenet", marks=SLOW
    ),
    pytest.param(torchvision("vgg11"), 64, "classifier.6", "features.5", 4096, id="tv-vgg11", marks=SLOW),
    pytest.param(timm("resnet18"), 64, "fc", "layer1", 512, id="timm-resnet18", marks=SLOW),
    pytest.param(timm("vit_tiny_patch16_224", img_size=64), 64, "head", "blocks.1", 192, id="timm-vit"),
    pytest.param(timm("convnext_atto"), 64, "head.fc", "stages.0", 320, id="timm-convnext", marks=SLOW),
    pytest.param(timm("mixer_s32_224", img_size=64), 64, "head", "blocks.0", 512, id="timm-mixer", marks=SLOW),
    pytest.param(
        hugging_face(
            "ViT", hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64, image_size=32,
            patch_size=8,
        ),
        32, "classifier", "vit.layers.0", 32, id="hf-vit",
    ),
    pytest.param(
        hugging_face("ResNet", embedding_size=16, hidden_sizes=[16, 24, 32], depths=[2, 2, 2], layer_type="basic"),
        64, "classifier.1", "resnet.encoder.stages.0", 32, id="hf-resnet",
    ),
    pytest.param(
        hugging_face("Swin", image_size=64, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4),
        64, "classifier", "swin.encoder.layers.0", 32, id="hf-swin",
    ),
    pytest.param(
        hugging_face("ConvNext", hidden_sizes=[8, 16, 24], depths=[2, 2, 2], num_stages=3),
        64, "classifier", "convnext.encoder.stages.0", 24, id="hf-convnext",
    ),
]  # fmt: skip


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make().train()


def images(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("make", "size", "head", "early", "d"), ARCHITECTURES)
def test_architecture(make: Callable[[], nn.Module], size: int, head: str, early: str, d: int) -> None:
    model = made(make)
    inputs = images(2, size)
    with left_alone(model):
        extractor = FeatureExtractor(model)
        extractor.resolve(inputs, early=True)
        # transformers 4 calls the blocks of its ViT vit.encoder.layer.
        found = str(extractor.early_layer).replace("vit.encoder.layer.", "vit.layers.")
        assert (extractor.head, found) == (head, early)
        plain = extractor(inputs)
        own = extractor(inputs, lambda e: 1.0 * e + 0.0 * e.flip(0))
        swapped = extractor(inputs, lambda e: e.flip(0))
    assert plain.features.shape == (2, d)
    assert plain.logits.shape == (2, 5)
    assert torch.equal(own.features, plain.features)
    assert torch.equal(own.logits, plain.logits)
    # A random network shrinks its input by many orders of magnitude, so that errors are relative.
    difference = (plain.features - plain.features.flip(0)).norm()
    assert difference > 1e-3 * plain.features.norm(), "the two samples must differ"
    assert (swapped.features - plain.features.flip(0)).norm() < 1e-3 * difference
    with torch.no_grad():
        torch.testing.assert_close(model.get_submodule(head)(plain.features), plain.logits, rtol=1e-4, atol=1e-6)

    train = images(12, size, seed=1)
    with torch.no_grad():
        labels = extractor(train).logits.argmax(1)
    # A random network prefers few classes: every class gets a sample, and most are classified correctly.
    labels[:5] = torch.arange(5)
    with left_alone(model):
        detector = GROOD(model, outliers=Mixup(n=6)).fit([(train[:7], labels[:7]), (train[7:], labels[7:])])
        scores = detector.score([inputs, train[7:]])
    assert scores.shape == (7,)
    assert scores.isfinite().all()
    assert (scores[:2] > 0).all()
    assert (scores[2:] < 1e-4 * scores[:2].max()).all(), "training samples are their own neighbours"
    assert detector.fit_info_.head == head
    assert detector.fit_info_.early_layer == extractor.early_layer
    assert detector.fit_info_.n_features == d
