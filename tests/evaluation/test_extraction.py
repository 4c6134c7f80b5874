"""One extraction serves all: what it gives is what the network and `GROOD.fit` give, and nothing is computed twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("PIL")

from image_world import AS_PATTERNS, loader_of, sets_of, taught_cnn, write_outliers, write_world
from PIL import Image

from models import write_patterns
from torch_grood import GROOD, Mixup, PrototypeMean, UniformNoise
from torch_grood._progress import Progress
from torch_grood.data import FeatureCache, image_loader, read_source
from torch_grood.errors import GroodError
from torch_grood.evaluation.extraction import ClassifierOutputs, extract_sets
from torch_grood.outliers import OutlierSource


class Flat(nn.Module):
    """Nothing comes before its head."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(192, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return taught_cnn()


@pytest.fixture(scope="module")
def outputs(folder: Path, model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ClassifierOutputs:
    store = FeatureCache(tmp_path_factory.mktemp("cache"))
    return extract_sets(model, sets_of(folder), store, std=AS_PATTERNS.std, progress=False)


def test_outputs_are_those_of_the_network(folder: Path, model: nn.Module, outputs: ClassifierOutputs) -> None:
    found = GROOD(model).extract(loader_of(folder / "test"), progress=False)
    assert torch.equal(outputs.test.features, found.features)
    assert torch.equal(outputs.test.logits, found.logits)
    assert outputs.test.labels is not None
    assert torch.equal(outputs.test.labels, found.labels)  # type: ignore[arg-type]
    assert {key: len(found) for key, found in outputs.ood.items()} == {"near": 24, "far": 18}
    assert outputs.ood["near"].labels is None
    assert (len(outputs.world.train), outputs.world.n_classes) == (66, 3)
    head = outputs.world.head
    assert head is not None
    torch.testing.assert_close(outputs.test.features @ head.weight.T + head.bias, outputs.test.logits)


def test_the_network_runs_once(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    first, again = (
        extract_sets(model, sets_of(folder), FeatureCache(tmp_path), std=AS_PATTERNS.std, progress=False)
        for _ in range(2)
    )
    n_images = 66 + 30 + 36 + 12 + 24 + 18
    assert first.cost.images == again.cost.images == n_images
    # Each set is probed by an image, and layers are looked for.
    assert n_images <= first.cost.network_images < n_images + 60
    assert again.cost.network_images < 60
    assert first.digests == again.digests
    assert torch.equal(first.test.logits, again.test.logits)


@pytest.mark.parametrize("source", [Mixup(n=20, lam=0.5), Mixup(n=7, lam=0.9), UniformNoise(n=4), PrototypeMean()])
def test_grood_on_outputs_is_grood_on_images(
    source: OutlierSource, folder: Path, model: nn.Module, outputs: ClassifierOutputs
) -> None:
    world = outputs.world
    assert world.outliers is not None
    on_images = GROOD(model, outliers=source).fit(loader_of(folder / "train"), progress=False)
    on_outputs = GROOD(None).fit_features(
        world.train.features,
        world.train.labels,  # type: ignore[arg-type]
        world.train.logits.argmax(1),
        ood_features=world.outliers.features(source),
    )
    expected = on_images.log_score_features(outputs.test.features)
    torch.testing.assert_close(on_outputs.log_score_features(outputs.test.features), expected, rtol=1e-9, atol=1e-9)


def test_outliers_without_a_class_know_nothing_of_it(outputs: ClassifierOutputs) -> None:
    world = outputs.world
    assert world.outliers is not None
    source = Mixup(n=60, lam=0.0)
    found = world.outliers.features(source, frozenset({1}))
    assert 20 < len(found) < 60
    # With λ = 0 an outlier is the early prototype of its partner: of two classes, two.
    assert len(found.unique(dim=0)) == 2
    assert len(world.outliers.features(source).unique(dim=0)) == 3


def test_a_network_without_an_early_layer_still_has_all_but_mixing(folder: Path, tmp_path: Path) -> None:
    flat = Flat()
    found = extract_sets(flat, sets_of(folder), FeatureCache(tmp_path), std=AS_PATTERNS.std, progress=False)
    assert found.early_layer is None
    assert found.world.outliers is not None
    with pytest.raises(GroodError, match="early"):
        found.world.outliers.features(Mixup(n=5))
    assert found.world.outliers.features(UniformNoise(n=3)).shape == (3, 192)


def test_training_images_among_the_test_images_are_counted(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    sets = sets_of(folder)._replace(test=loader_of(folder / "train"))
    found = extract_sets(model, sets, FeatureCache(tmp_path), std=AS_PATTERNS.std, progress=False)
    assert found.n_test_in_train == 66


def test_unlabelled_images_are_no_id_set(folder: Path, model: nn.Module, tmp_path: Path) -> None:
    sets = sets_of(folder)._replace(test=loader_of(folder / "near", labels=False))
    with pytest.raises(GroodError, match="'test' must have one of the classifier's classes, 0 to 2; got no labels"):
        extract_sets(model, sets, FeatureCache(tmp_path), std=AS_PATTERNS.std, progress=False)


class Counted(nn.Module):
    """Counts the batches that it sees; layers are looked for with a few images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.batches = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches += len(x) > 8
        return self.network(x)


def test_a_class_that_the_network_has_not_is_found_before_it_runs(folder: Path, tmp_path: Path) -> None:
    write_patterns(tmp_path / "test", 6, seed=1)
    (tmp_path / "list.txt").write_text("test/a/000.png 0\ntest/b/001.png 3\n")
    loader = image_loader(read_source(tmp_path / "list.txt"), AS_PATTERNS, batch_size=16, workers=0)
    network = Counted(taught_cnn())
    store = FeatureCache(tmp_path / "cache")
    with pytest.raises(
        GroodError, match=r"'test' must have .* classes, 0 to 2; got 3 for .*001.png. Take a model that"
    ):
        extract_sets(network, sets_of(folder)._replace(test=loader), store, std=AS_PATTERNS.std, progress=False)
    assert network.batches == 0


def test_a_class_without_training_images_is_found_before_the_network_runs(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train", tmp_path / "train")
    (tmp_path / "list.txt").write_text(f"{next((tmp_path / 'train/a').iterdir())} 0\n")
    loader = image_loader(read_source(tmp_path / "list.txt"), AS_PATTERNS, batch_size=16, workers=0)
    network = Counted(taught_cnn())
    store = FeatureCache(tmp_path / "cache")
    with pytest.raises(GroodError, match="no training image has label 1, 2, and the classifier's classes are 0 to 2"):
        extract_sets(network, sets_of(folder)._replace(train=loader), store, std=AS_PATTERNS.std, progress=False)
    assert network.batches == 0


class Dark(nn.Module):
    """Has no number for bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.network = taught_cnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(torch.where(x.amin((1, 2, 3), keepdim=True) > 2, torch.nan, x))


def test_an_image_without_finite_outputs_is_named(folder: Path, tmp_path: Path) -> None:
    write_outliers(tmp_path / "far", 20, seed=1)
    Image.new("RGB", (8, 8), "white").save(tmp_path / "far/018.png")
    far = loader_of(tmp_path / "far", labels=False)
    sets = sets_of(folder)._replace(ood={"far": far})
    with pytest.raises(GroodError, match=r"outputs for .*018.png \(far\) are NaN or infinite"):
        extract_sets(Dark(), sets, FeatureCache(tmp_path / "cache"), std=AS_PATTERNS.std, progress=False)


def test_fingerprints_are_of_labels_and_order_too(
    folder: Path, model: nn.Module, tmp_path: Path, outputs: ClassifierOutputs
) -> None:
    shutil.copytree(folder, tmp_path / "world")
    relabelled = tmp_path / "world/train"
    for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
        (relabelled / old).rename(relabelled / new)
    near = tmp_path / "world/near"
    for old, new in (("000", "x"), ("001", "000"), ("x", "001")):
        (near / f"{old}.png").rename(near / f"{new}.png")
    found = extract_sets(
        model, sets_of(tmp_path / "world"), FeatureCache(tmp_path), std=AS_PATTERNS.std, progress=False
    )
    assert found.digests == outputs.digests
    differing = {key for key, one in found.fingerprints.items() if one != outputs.fingerprints[key]}
    assert differing == {"train", "near"}


def test_each_set_is_named_once(
    folder: Path, model: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bars: list[str] = []

    def named(name: str) -> Progress:
        bars.append(name)
        return False

    with caplog.at_level("INFO", "torch_grood"):
        extract_sets(model, sets_of(folder), FeatureCache(tmp_path), std=AS_PATTERNS.std, progress=named)
    assert [text for text in caplog.messages if text.endswith(" images")] == [
        *("train: 66 images", "val: 30 images", "test: 36 images"),
        *("val_ood: 12 images", "near: 24 images", "far: 18 images"),
    ]
    # The training images are read twice: in the pass that mixes, and for their logits.
    assert bars == ["train", "train", "val", "test", "val_ood", "near", "far"]
    assert "continued" not in caplog.text


def test_too_many_outliers_to_mix(outputs: ClassifierOutputs) -> None:
    assert outputs.world.outliers is not None
    with pytest.raises(GroodError, match="at most 1000"):
        outputs.world.outliers.features(Mixup(n=1001))
    # Of 66 images, all are mixed.
    assert len(outputs.world.outliers.features(Mixup(n=1000, lam=0.4))) == 66
