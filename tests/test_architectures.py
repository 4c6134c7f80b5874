"""Real architectures with random weights: head, early layer, feature dimension, mixing, and a fit end to end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from models import left_alone, teach
from torch_grood import GROOD, FeatureExtractor, Mixup
from torch_grood.data import ImageLoader, image_loader, read_source
from torch_grood.data.images import load_image
from torch_grood.models import NewModel, new_model
from torch_grood.outliers import OutlierContext, TrainingSamples

if TYPE_CHECKING:
    from PIL.Image import Image

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


class Paper(NamedTuple):
    """A network as the paper uses it, at its own size."""

    spec: str
    head: str
    early_layer: str
    d: int
    early_shape: tuple[int, ...]


# Maps after the first stage, tokens with the class token after the second block, maps in NHWC after the first stage.
PAPER = [
    Paper("torchvision:resnet50.IMAGENET1K_V1", "fc", "layer1", 2048, (256, 56, 56)),
    Paper("torchvision:vit_b_16.IMAGENET1K_V1", "heads.head", "encoder.layers.encoder_layer_1", 768, (197, 768)),
    Paper("torchvision:swin_t.IMAGENET1K_V1", "head", "features.1", 768, (56, 56, 96)),
    # Its preprocessing differs from theirs: bicubic, 248 to 224, mean and standard deviation 0.5.
    Paper("timm:vit_tiny_patch16_224", "head", "blocks.1", 192, (197, 192)),
]


@pytest.fixture(scope="module", params=PAPER, ids=lambda paper: paper.spec.replace(":", "-"))
def paper(request: pytest.FixtureRequest) -> tuple[Paper, NewModel]:
    """A network with random weights and three classes, and what there is to know of it."""
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    torch.manual_seed(0)
    made = new_model(request.param.spec, 3)
    made.model.eval()
    return request.param, made


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,val,ood}/<class>/*.jpg of about 300×260 pixels; each class has a colour of its own."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    colours = torch.tensor([[60, 120, 200], [200, 60, 120], [120, 200, 60], [128, 128, 128]])
    for split, n in (("train", 2), ("val", 1), ("ood", 1)):
        for label, name in enumerate("abc") if split != "ood" else [(3, "x")]:
            for number in range(n):
                target = folder / split / name
                target.mkdir(parents=True, exist_ok=True)
                noise = 25 * torch.randn(260 + 7 * number, 300, 3, generator=generator)
                pixels = (colours[label] + noise).clamp(0, 255).byte().numpy()
                Image.fromarray(pixels).save(target / f"{number}.jpg")
    return folder


@SLOW
def test_the_papers_networks(paper: tuple[Paper, NewModel]) -> None:
    known, made = paper
    inputs = images(2, 224)
    seen: list[Tensor] = []
    with left_alone(made.model):
        extractor = FeatureExtractor(made.model)
        extractor.resolve(inputs, early=True)
        assert (extractor.head, extractor.early_layer) == (known.head, known.early_layer)
        plain = extractor(inputs, seen.append)
        prototypes = torch.stack([seen[0][1], seen[0][0], seen[0].mean(0)]).double()
        samples = TrainingSamples(inputs, torch.tensor([0, 2]))
        context = OutlierContext(torch.zeros(3, known.d), extractor, prototypes, samples)
        own = Mixup(2, lam=1.0).features(context)
        mixed = Mixup(2, lam=0.5).features(context)
    assert plain.features.shape == (2, known.d)
    assert plain.logits.shape == (2, 3)
    assert seen[0].shape == (2, *known.early_shape)
    assert torch.equal(own, plain.features), "λ = 1 resumes to the plain features, bit for bit"
    difference = (plain.features[0] - plain.features[1]).norm()
    assert (mixed - plain.features).norm(dim=1).min() > 1e-2 * difference


@SLOW
def test_the_papers_networks_detect(paper: tuple[Paper, NewModel], photos: Path, tmp_path: Path) -> None:
    known, made = paper
    model, transform = made.model, made.transform
    assert transform is not None
    photo = load_image(photos / "ood/x/0.jpg")
    assert torch.equal(transform(photo), _prepared_by_its_package(known.spec, photo))

    def loader(name: str) -> ImageLoader:
        return image_loader(read_source(photos / name), transform, batch_size=4, workers=0)

    training, labels = (torch.cat(parts) for parts in zip(*[batch[:2] for batch in loader("train")], strict=True))
    teach(model, model.get_submodule(known.head), training, labels)
    detector = GROOD(model, Mixup(n=3), head=known.head, early_layer=known.early_layer)
    detector.fit(loader("train"), progress=False)
    assert detector.fit_info_.n_features == known.d
    assert detector.fit_info_.classifier_accuracy == 1.0
    # Of three images, one may be a false alarm and two may not.
    detector.calibrate(loader("val"), fpr=0.5, progress=False)
    scores = detector.score(loader("ood"), progress=False)
    detector.save(tmp_path / "x.grood")
    again = GROOD.load(tmp_path / "x.grood", model)
    assert torch.equal(again.score(loader("ood"), progress=False), scores)
    assert scores.shape == (1,)
    assert bool(scores > 0)
    assert detector.score(training[:2], progress=False).max() < 1e-3 * scores.max(), "they are their own neighbours"
    assert again.predict(training[:2], progress=False).label.tolist() == labels[:2].tolist()


def _prepared_by_its_package(spec: str, image: Image) -> Tensor:
    """An image as torchvision or timm themselves prepare it for a network."""
    package, _, name = spec.partition(":")
    if package == "timm":
        data = pytest.importorskip("timm").data
        config = pytest.importorskip("timm").get_pretrained_cfg(name).to_dict()
        return data.create_transform(**data.resolve_data_config(pretrained_cfg=config))(image)
    network, _, weights = name.partition(".")
    return pytest.importorskip("torchvision.models").get_model_weights(network)[weights].transforms()(image)
