"""One extraction serves all: what it gives is what the network and `GROOD.fit` give, and nothing is computed twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("PIL")

from image_world import AS_PATTERNS, loader_of, sets_of, taught_cnn, write_world

from torch_grood import GROOD, Mixup, PrototypeMean, UniformNoise
from torch_grood.data import FeatureCache
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


def test_too_many_outliers_to_mix(outputs: ClassifierOutputs) -> None:
    assert outputs.world.outliers is not None
    with pytest.raises(GroodError, match="at most 1000"):
        outputs.world.outliers.features(Mixup(n=1001))
    # Of 66 images, all are mixed.
    assert len(outputs.world.outliers.features(Mixup(n=1000, lam=0.4))) == 66
