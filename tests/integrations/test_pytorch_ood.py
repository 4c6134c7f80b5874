from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_ood.api import DetectorInfo, FeaturesDetector, ModelNotSetException, RequiresFittingException, Task
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import MaxSoftmax
from pytorch_ood.metrics import OODMetrics
from pytorch_ood.utils import GridSearch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from models import batches, left_alone, patterns, taught_cnn
from torch_grood import GROOD, GroodError, Mixup, OutlierSamples, PrototypeMean, UniformNoise
from torch_grood.evaluation import auroc
from torch_grood.integrations.pytorch_ood import GROODDetector


def unknown(n: int, seed: int = 5) -> TensorDataset:
    """Noise of another kind than `patterns`, labelled OOD."""
    images = 2 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(images, torch.full((n,), -1))


def known(n: int, seed: int = 0) -> TensorDataset:
    return TensorDataset(*patterns(n, seed=seed))


class Patterns(Benchmark):  # type: ignore[misc]
    """A real benchmark of pytorch-ood on two OOD sets."""

    ood_names = ("noise", "other noise")

    def train_set(self) -> Dataset[Any]:
        return known(90)

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset[Any]]:
        test = TensorDataset(*patterns(60, seed=3))
        return [ConcatDataset([test, ood]) for ood in self.outliers()]

    def validation_set(self) -> Dataset[Any]:
        return ConcatDataset([known(30, seed=11), unknown(30, seed=12)])

    @staticmethod
    def outliers() -> list[TensorDataset]:
        return [unknown(40), unknown(30, seed=6)]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return taught_cnn()


@pytest.fixture(scope="module")
def fitted(net: nn.Module) -> GROODDetector:
    return GROODDetector(net).fit(DataLoader(known(90), batch_size=16))


def test_the_score_is_the_log_score_of_grood(net: nn.Module, fitted: GROODDetector) -> None:
    plain = GROOD.paper(net).fit(DataLoader(known(90), batch_size=16), progress=False)
    images = patterns(50, seed=9)[0]
    scores = fitted.predict(images)
    assert (scores.shape, scores.dtype, scores.device) == ((50,), torch.float64, images.device)
    assert torch.equal(scores, plain.log_score(images))
    assert torch.equal(fitted(images), scores)
    features = plain.extract(images).features
    assert torch.equal(fitted.predict_features(features), scores)


def test_a_benchmark_finds_the_auroc_that_ours_is(fitted: GROODDetector) -> None:
    benchmark = Patterns()
    results = benchmark.evaluate(fitted, loader_kwargs={"batch_size": 17})
    assert [found["Dataset"] for found in results] == ["noise", "other noise"]
    known_scores = fitted.predict(patterns(60, seed=3)[0])
    for found, ood in zip(results, benchmark.outliers(), strict=True):
        assert found["AUROC"] == pytest.approx(auroc(known_scores, fitted.predict(ood.tensors[0])), abs=1e-6)
        assert found["AUROC"] > 0.9


def test_a_benchmark_takes_it_among_others(net: nn.Module, fitted: GROODDetector) -> None:
    other = GROODDetector(net, outliers=PrototypeMean()).fit(DataLoader(known(90), batch_size=30))
    results = Patterns().evaluate([fitted, MaxSoftmax(net), other], loader_kwargs={"batch_size": 20}, cache=True)
    assert [found["Detector"] for found in results] == ["GROODDetector", "MaxSoftmax", "GROODDetector"] * 2
    alone = Patterns().evaluate(fitted, loader_kwargs={"batch_size": 20})
    assert [found["AUROC"] for found in results[::3]] == [found["AUROC"] for found in alone]


def test_one_image_at_a_time_is_what_a_benchmark_does_by_default(fitted: GROODDetector) -> None:
    images = patterns(6, seed=9)[0]
    alone = torch.cat([fitted.predict(image[None]) for image in images])
    torch.testing.assert_close(alone, fitted.predict(images), rtol=1e-4, atol=1e-4)


def test_samples_that_are_labelled_ood_are_not_fitted_on(net: nn.Module, fitted: GROODDetector) -> None:
    mixed = DataLoader(ConcatDataset([known(90), unknown(50)]), batch_size=16)
    detector = GROODDetector(net).fit(mixed)
    assert detector.grood_ is not None
    assert detector.grood_.fit_info_.n_samples == 90
    images = patterns(30, seed=9)[0]
    torch.testing.assert_close(detector.predict(images), fitted.predict(images), rtol=1e-9, atol=1e-9)
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 4 - 1
    by_features = GROODDetector(None).fit_features(features, labels)
    assert by_features.grood_ is not None
    assert by_features.grood_.fit_info_.n_samples == 15


def test_nothing_but_ood_is_an_error(net: nn.Module) -> None:
    with pytest.raises(GroodError, match="gave no training sample"):
        GROODDetector(net).fit(DataLoader(unknown(20), batch_size=8))
    with pytest.raises(GroodError, match="features has no row"):
        GROODDetector(None).fit_features(torch.randn(3, 4), torch.full((3,), -1))


def test_before_fit(net: nn.Module) -> None:
    detector = GROODDetector(net)
    assert detector.requires_fit
    for use in (detector.predict, detector.predict_features):
        with pytest.raises(RequiresFittingException):
            use(torch.zeros(1, 3, 8, 8))


def test_without_a_model() -> None:
    features, labels = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 2
    detector = GROODDetector(None).fit_features(features, labels)
    plain = GROOD(None).fit_features(features, labels)
    assert torch.equal(detector.predict_features(features[:7] + 1), plain.log_score_features(features[:7] + 1))
    with pytest.raises(ModelNotSetException, match="predict_features"):
        detector.predict(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ModelNotSetException, match="fit_features"):
        detector.fit([])


def test_features_with_predictions_and_outliers() -> None:
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(40, 5, generator=generator), torch.arange(40) % 2
    wrong = labels.clone()
    wrong[:6] = 1 - wrong[:6]
    outliers = torch.randn(9, 5, generator=generator)
    detector = GROODDetector(None).fit_features(features, labels, wrong, ood_features=outliers)
    assert detector.grood_ is not None
    assert detector.grood_.fit_info_.n_indexed == 34
    torch.testing.assert_close(detector.grood_.ood_prototype_, outliers.double().mean(0))


def test_a_training_image_has_a_finite_score() -> None:
    features, labels = torch.randn(40, 5, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 2
    detector = GROODDetector(None).fit_features(features, labels)
    scores = detector.predict_features(torch.cat([features[:1], features[:1] + 1e-3, features[:1] + 1]))
    assert bool(scores.isfinite().all())
    assert scores.argsort().tolist() == [0, 1, 2]


def test_what_pytorch_ood_is_told() -> None:
    info = GROODDetector.info
    assert isinstance(info, DetectorInfo)
    assert info.tasks == {Task.CLASSIFICATION}
    assert (info.paper.year, info.paper.venue) == (2025, "TMLR")
    assert issubclass(GROODDetector, FeaturesDetector)


def test_hyperparameters(net: nn.Module) -> None:
    detector = GROODDetector(net)
    assert detector.get_hyperparameters() == {"lam": 0.9}
    assert 0.9 in detector.hyperparameter_space["lam"]
    assert detector.set_hyperparameters(lam=0.3) is detector
    assert detector.get_hyperparameters() == {"lam": 0.3}
    with pytest.raises(ValueError, match="Unknown hyperparameter 'k'"):
        detector.set_hyperparameters(k=2)


@pytest.mark.parametrize(("name", "value"), [("lam", 0.3), ("n", 50), ("outliers", "noise"), ("seed", 1)])
def test_changed_settings_take_a_new_fit(net: nn.Module, name: str, value: Any) -> None:
    loader = DataLoader(known(90), batch_size=30)
    detector = GROODDetector(net).fit(loader)
    images = patterns(5, seed=9)[0]
    before = detector.predict(images)
    setattr(detector, name, value)
    with pytest.raises(RequiresFittingException, match="changed after fit"):
        detector.predict(images)
    after = detector.fit(loader).predict(images)
    if name != "seed":  # All 90 images are mixed, whatever the seed.
        assert not torch.equal(after, before)


def test_a_grid_search_leaves_the_best_fitted(net: nn.Module) -> None:
    fit_loader = DataLoader(ConcatDataset([known(90), unknown(10)]), batch_size=30)
    val_loader = DataLoader(ConcatDataset([known(40, seed=11), unknown(40, seed=12)]), batch_size=16)
    detector = GROODDetector(net)
    search = GridSearch(detector, fit_loader, val_loader, {"outliers": ["mixup", "mean", "noise"], "lam": [0.1, 0.9]})
    best = search.run()
    assert len(search.results_) == 6
    assert search.best_score_ == max(found["score"] for found in search.results_)
    assert detector.get_hyperparameters() == best
    fresh = GROODDetector(net, **best).fit(fit_loader)
    images = patterns(30, seed=9)[0]
    assert torch.equal(detector.predict(images), fresh.predict(images))


def test_a_grid_search_over_its_own_space(net: nn.Module) -> None:
    detector = GROODDetector(net)
    val_loader = DataLoader(ConcatDataset([known(20, seed=11), unknown(20, seed=12)]), batch_size=20)
    search = GridSearch(detector, DataLoader(known(60), batch_size=30), val_loader)
    assert search.run()["lam"] in GROODDetector.hyperparameter_space["lam"]
    scores = {found["params"]["lam"]: found["score"] for found in search.results_}
    assert len(scores) == 5


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("mixup", Mixup),
        ("noise", UniformNoise),
        ("mean", PrototypeMean),
        (None, Mixup),
        (UniformNoise(20), UniformNoise),
    ],
)
def test_outliers_by_name(net: nn.Module, given: Any, expected: type) -> None:
    detector = GROODDetector(net, given, lam=0.4, n=20).fit(DataLoader(known(60), batch_size=30))
    assert detector.grood_ is not None
    source = detector.grood_.outliers
    assert type(source) is expected
    assert getattr(source, "lam", 0.4) == 0.4
    assert getattr(source, "n", 20) == 20


def test_options_reach_grood(net: nn.Module) -> None:
    options = {"index": "IVF2,Flat", "head": "8", "early_layer": "1", "seed": 5, "store": "int8"}
    grood = GROODDetector(net, **options).fit(DataLoader(known(60), batch_size=30)).grood_  # type: ignore[arg-type]
    assert grood is not None
    assert (grood.index.spec, grood.head, grood.early_layer, grood.seed, grood.store.dtype) == tuple(options.values())


def test_real_outliers_are_reported(net: nn.Module) -> None:
    loader = batches(*unknown(30).tensors, 10)
    detector = GROODDetector(net, OutlierSamples(loader)).fit(DataLoader(known(60), batch_size=30))
    assert detector.grood_ is not None
    assert detector.grood_.fit_info_.uses_ood_data
    detector.predict(patterns(3)[0])


def test_to_moves_the_model_and_keeps_the_fit(fitted: GROODDetector) -> None:
    images = patterns(5, seed=9)[0]
    before = fitted.predict(images)
    assert fitted.device == torch.device("cpu")
    assert fitted.to("cpu") is fitted
    assert torch.equal(fitted.predict(images), before)


def test_a_copy_scores_alike(fitted: GROODDetector) -> None:
    images = patterns(5, seed=9)[0]
    assert torch.equal(copy.deepcopy(fitted).predict(images), fitted.predict(images))


def test_metrics_take_the_scores(fitted: GROODDetector) -> None:
    metrics = OODMetrics()
    for images, labels in DataLoader(ConcatDataset([known(40, seed=2), unknown(40)]), batch_size=16):
        metrics.update(fitted(images), labels)
    assert metrics.compute()["AUROC"] > 0.9


def test_a_network_in_train_mode_is_left_as_it_was() -> None:
    net = taught_cnn().train()
    net[3].eval()  # Frozen by its user, as is common.
    # Lists of batches: a DataLoader draws a seed from the global random state itself.
    loader = batches(*patterns(60), 20)
    with left_alone(net):
        detector = GROODDetector(net).fit(loader)
        scores = detector.predict(patterns(8, seed=9)[0])
    assert torch.equal(scores, detector.predict(patterns(8, seed=9)[0]))
    quiet = GROODDetector(net.eval()).fit(loader)
    assert torch.equal(scores, quiet.predict(patterns(8, seed=9)[0]))


def test_the_last_fit_counts(net: nn.Module, fitted: GROODDetector) -> None:
    detector = GROODDetector(net).fit(DataLoader(known(60, seed=4), batch_size=30))
    detector.fit(DataLoader(known(90), batch_size=16))
    images = patterns(30, seed=9)[0]
    assert torch.equal(detector.predict(images), fitted.predict(images))


def test_a_fit_that_fails_changes_nothing(fitted: GROODDetector) -> None:
    images = patterns(5, seed=9)[0]
    before = fitted.predict(images)
    for loader in ([], batches(*unknown(4).tensors, 2), batches(patterns(6)[0], torch.full((6,), 7), 3)):
        with pytest.raises(GroodError):
            fitted.fit(loader)
    with pytest.raises(GroodError, match="runs the model"):
        fitted.fit_features(torch.randn(6, 4), torch.arange(6) % 3)
    assert torch.equal(fitted.predict(images), before)


class _Strange:
    def __iter__(self) -> Iterator[str]:
        return iter(["no batch"])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (known(6), "wrap it: DataLoader"),
        (patterns(6)[0], "labels are missing"),
        ([patterns(6)[0]], "labels are missing"),
        (batches(patterns(6)[0], torch.rand(6), 3), "labels must be integers"),
        (batches(patterns(6)[0], torch.zeros(6, 3, dtype=torch.int64), 3), "labels, one a sample"),
        ([(patterns(6)[0], torch.arange(4))], "expected 6 labels"),
        (_Strange(), "expected a tensor of images"),
        (3, "expected a tensor of images or a loader"),
    ],
)
def test_strange_loaders(net: nn.Module, loader: Any, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        GROODDetector(net).fit(loader)


def test_strange_arguments(net: nn.Module, fitted: GROODDetector) -> None:
    with pytest.raises(GroodError, match=r"one of energy, mixup, noise, mean, val_ood.*got 'mixop'"):
        GROODDetector(net, "mixop")
    with pytest.raises(GroodError, match=r"there are none here; pass OutlierSamples\(loader\)"):
        GROODDetector(net, "val_ood")
    with pytest.raises(GroodError, match="lam is the weight"):
        GROODDetector(net, lam=1.5)
    with pytest.raises(GroodError, match="at least 1"):
        GROODDetector(net, "noise", n=0)
    with pytest.raises(GroodError, match=r"expected a torch\.nn\.Module"):
        GROODDetector(lambda x: x)
    with pytest.raises(GroodError, match="cannot be scored"):
        fitted.predict(torch.zeros(2, 3, 9, 9))
    with pytest.raises(GroodError, match="there is no image"):
        fitted.predict(torch.zeros(0, 3, 8, 8))


def test_gradients_do_not_flow(fitted: GROODDetector) -> None:
    images: Tensor = patterns(3)[0].requires_grad_()
    assert not fitted.predict(images).requires_grad


def test_the_code_of_the_page_runs(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = page.partition("## pytorch-ood")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3

    def benchmark(root: str, transform: Any) -> Patterns:
        assert (root, transform) == ("data", "a transform")
        return Patterns()

    monkeypatch.setattr("pytorch_ood.benchmark.CIFAR10_OpenOOD", benchmark)
    generator = torch.Generator().manual_seed(0)
    names: dict[str, Any] = {
        "net": net,
        "transform": "a transform",
        "train_features": torch.randn(30, 4, generator=generator),
        "train_labels": torch.arange(30) % 3,
        "features": torch.randn(7, 4, generator=generator),
    }
    for block in blocks:
        exec(block, names)
    assert [found["Dataset"] for found in names["results"]] == ["noise", "other noise"]
    assert capsys.readouterr().out.strip() == str(names["detector"].lam)
    assert names["scores"].shape == (7,)


def test_without_pytorch_ood_the_extra_is_named() -> None:
    code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pytorch_ood":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
import torch_grood.integrations.openood
from torch_grood import MissingDependencyError
try:
    import torch_grood.integrations.pytorch_ood
except MissingDependencyError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert "needs the package pytorch-ood" in found.stdout
    assert "pip install 'torch-grood[bench]'" in found.stdout
