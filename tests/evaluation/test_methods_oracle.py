"""Each method against pytorch-ood's own detector, called as its documentation says, and against its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytorch_ood.detector as ood
import torch
from pytorch_ood.benchmark.base import Benchmark
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset
from worlds import C, Cnn, D, Task, image_outputs, image_world

from torch_grood.evaluation import auroc
from torch_grood.evaluation.methods import (
    Ash,
    Dice,
    Energy,
    Fdbd,
    Gen,
    Knn,
    Mds,
    Method,
    Mls,
    Nci,
    NnGuide,
    Odin,
    React,
    Rmds,
    Scale,
    Vim,
    method_of,
)
from torch_grood.evaluation.methods import base as methods_base
from torch_grood.evaluation.outputs import Head, Outputs, World

TASK = Task(seed=4)
WORLD = TASK.world(600)
KNOWN, UNKNOWN = TASK.known(300), TASK.unknown(200)
WEIGHT, BIAS = TASK.head
HEAD = nn.Linear(D, C).requires_grad_(False)
HEAD.weight.copy_(WEIGHT)
HEAD.bias.copy_(BIAS)


def _flat_head(maps: Tensor) -> Tensor:
    logits: Tensor = HEAD(maps.flatten(1))
    return logits


def _maps(features: Tensor) -> Tensor:
    return features[:, :, None, None]


def _labels() -> Tensor:
    assert WORLD.train.labels is not None
    return WORLD.train.labels


def _fitted_on_features(detector: Any) -> Callable[[Outputs], Tensor]:
    detector.fit_features(WORLD.train.features, _labels())
    return lambda outputs: detector.predict_features(outputs.features)  # type: ignore[no-any-return]


def _on_maps(detector: Any, fit: bool = False) -> Callable[[Outputs], Tensor]:
    assert WORLD.val is not None
    if fit:
        detector.fit_feature_maps(_maps(WORLD.val.features), WORLD.val.labels)
    return lambda outputs: detector.predict_feature_maps(_maps(outputs.features))  # type: ignore[no-any-return]


def _on_logits(detector: Any, fit: bool = False) -> Callable[[Outputs], Tensor]:
    assert WORLD.val is not None
    if fit:
        detector.fit_logits(WORLD.val.logits, WORLD.val.labels)
    return lambda outputs: detector.predict_logits(outputs.logits).detach()  # type: ignore[no-any-return]


# What each method is, in pytorch-ood's terms.
THEIRS: dict[str, Callable[[], Callable[[Outputs], Tensor]]] = {
    "msp": lambda: _on_logits(ood.MaxSoftmax(None)),
    "mls": lambda: _on_logits(ood.MaxLogit(None)),
    "energy": lambda: _on_logits(ood.EnergyBased(None)),
    "energy:temperature=10": lambda: _on_logits(ood.EnergyBased(None, t=10.0)),
    "entropy": lambda: _on_logits(ood.Entropy(None)),
    "gen": lambda: _on_logits(ood.GEN(None, gamma=0.1, M=100)),
    "gen:gamma=2:M=3": lambda: _on_logits(ood.GEN(None, gamma=2.0, M=3)),
    "klm": lambda: _on_logits(ood.KLMatching(None), fit=True),
    "temp_scaling": lambda: _on_logits(ood.TemperatureScaling(None), fit=True),
    "mds": lambda: _fitted_on_features(ood.Mahalanobis(None)),
    "rmds": lambda: _fitted_on_features(ood.RMD(None)),
    "knn": lambda: _fitted_on_features(ood.KNN(None, k=50)),
    "knn:k=3": lambda: _fitted_on_features(ood.KNN(None, k=3)),
    "vim": lambda: _fitted_on_features(ood.ViM(None, d=D // 2, w=WEIGHT, b=BIAS)),
    "vim:dim=7": lambda: _fitted_on_features(ood.ViM(None, d=7, w=WEIGHT, b=BIAS)),
    "she": lambda: _fitted_on_features(ood.SHE(None, HEAD)),
    "nnguide:alpha=1": lambda: _fitted_on_features(ood.NNGuide(None, HEAD, k=100)),
    "nnguide:alpha=1:k=5": lambda: _fitted_on_features(ood.NNGuide(None, HEAD, k=5)),
    "fdbd": lambda: _fitted_on_features(ood.fDBD(None, HEAD)),
    "nci": lambda: _fitted_on_features(ood.NCI(None, HEAD, alpha=0.0001)),
    "nci:alpha=0": lambda: _fitted_on_features(ood.NCI(None, HEAD, alpha=0.0)),
    "dice": lambda: _fitted_on_features(ood.DICE(None, WEIGHT, BIAS, p=0.9)),
    "dice:p=35": lambda: _fitted_on_features(ood.DICE(None, WEIGHT, BIAS, p=0.35)),
    "react": lambda: _on_maps(ood.ReAct(None, _flat_head, percentile=0.9), fit=True),
    "react:percentile=55": lambda: _on_maps(ood.ReAct(None, _flat_head, percentile=0.55), fit=True),
    "vra": lambda: _on_maps(ood.VRA(None, _flat_head, lower_percentile=0.1, upper_percentile=0.9), fit=True),
    "ash": lambda: _on_maps(ood.ASH(None, _flat_head, variant="ash-b", percentile=0.9)),
    "ash:variant=p:percentile=65": lambda: _on_maps(ood.ASH(None, _flat_head, variant="ash-p", percentile=0.65)),
    "ash:variant=s": lambda: _on_maps(ood.ASH(None, _flat_head, variant="ash-s", percentile=0.9)),
    "scale": lambda: _on_maps(ood.SCALE(None, _flat_head, percentile=0.85)),
    "scale:percentile=65": lambda: _on_maps(ood.SCALE(None, _flat_head, percentile=0.65)),
    "gradnorm": lambda: lambda outputs: ood.GradNorm(
        HEAD, param_filter=lambda name: name == "weight"
    ).predict(outputs.features),
}  # fmt: skip


@pytest.mark.parametrize("text", THEIRS)
@pytest.mark.parametrize("budget", [None, 1], ids=["whole", "one row at a time"])
def test_equals_pytorch_ood(text: str, budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores up to rounding, and AUROC to 1e-6, however small the parts that memory leaves room for."""
    if budget is not None:
        monkeypatch.setattr(methods_base, "_BUDGET", budget)
    theirs, ours = THEIRS[text](), method_of(text).fit(WORLD)
    for outputs in (KNOWN, UNKNOWN):
        torch.testing.assert_close(ours(outputs), theirs(outputs).double(), rtol=1e-4, atol=1e-5)
    assert auroc(ours(KNOWN), ours(UNKNOWN)) == pytest.approx(auroc(theirs(KNOWN), theirs(UNKNOWN)), abs=1e-6)


def test_every_method_has_an_oracle() -> None:
    from torch_grood.evaluation.methods import METHODS

    elsewhere = {"grood", "odin"}
    assert {text.partition(":")[0] for text in THEIRS} | elsewhere == set(METHODS)


@pytest.mark.parametrize(("temperature", "eps"), [(1000.0, 0.0014), (10.0, 0.0028), (1.0, 0.0)])
def test_odin_equals_pytorch_ood(temperature: float, eps: float) -> None:
    model = Cnn().eval()
    world = image_world(model)
    assert world.model is not None
    images = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    theirs = ood.ODIN(model, eps=eps, temperature=temperature, norm_std=list(world.model.std)).predict(images)
    ours = Odin(temperature=temperature, eps=eps).fit(world)(image_outputs(model, images))
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-7)
    assert len(ours.unique()) > 10


# Defaults and grids as in OpenOOD v1.5; a change of one changes published figures.


def test_openood_defaults() -> None:
    assert (React().percentile, Ash().percentile, Ash().variant, Scale().percentile, Dice().p) == (90, 90, "b", 85, 90)
    assert (Knn().k, Gen().gamma, Gen().M, NnGuide().k, NnGuide().alpha, Nci().alpha) == (50, 0.1, 100, 100, 0.01, 1e-4)
    assert (Odin().temperature, Odin().eps, Energy().temperature) == (1000, 0.0014, 1)
    assert React.grid == {"percentile": (85, 90, 95, 99)}
    assert Ash.grid == Scale.grid == {"percentile": (65, 70, 75, 80, 85, 90, 95)}
    assert Nci.grid == {"alpha": (0.0001, 0.001, 0.01, 0.1)}
    assert Odin.grid == {"temperature": (1, 10, 100, 1000), "eps": (0.0014, 0.0028)}
    assert Gen.grid == {"gamma": (0.01, 0.1, 0.5, 1, 2, 5, 10), "M": (10, 50, 100, 200, 500, 1000)}
    assert Energy.grid == {"temperature": (1, 10, 100, 1000)}


def test_the_dimension_of_vim() -> None:
    """256 as in OpenOOD where features are wider, else half the width."""
    generator = torch.Generator().manual_seed(0)
    for d, dim in ((300, 256), (256, 128), (24, 12), (3, 1)):
        features = torch.randn(400, d, generator=generator)
        head = Head(torch.randn(C, d, generator=generator), torch.randn(C, generator=generator))
        outputs = Outputs(features, features @ head.weight.T + head.bias)
        world = World(outputs, head=head)
        assert torch.equal(Vim().fit(world)(outputs), Vim(dim=dim).fit(world)(outputs))


# Formulas, in float64 and without pytorch-ood.


def _float64(outputs: Outputs) -> tuple[Tensor, Tensor]:
    return outputs.features.double(), outputs.logits.double()


def test_mahalanobis_distances_are_their_formulas() -> None:
    h, _ = _float64(WORLD.train)
    x, _ = _float64(KNOWN)
    means = torch.stack([h[_labels() == c].mean(0) for c in range(C)])
    within = h - means[_labels()]
    inverse = torch.linalg.inv(within.T @ within)
    to_class = torch.stack([(((x - mean) @ inverse) * (x - mean)).sum(1) for mean in means])
    torch.testing.assert_close(Mds().fit(WORLD)(KNOWN), to_class.min(0).values / 2, rtol=1e-3, atol=1e-6)
    around, centred = h - h.mean(0), x - h.mean(0)
    background = ((centred @ torch.linalg.inv(around.T @ around)) * centred).sum(1)
    torch.testing.assert_close(Rmds().fit(WORLD)(KNOWN), to_class.min(0).values - background, rtol=1e-3, atol=1e-5)


def test_knn_is_the_kth_distance_of_normalised_features() -> None:
    a, b = (_float64(outputs)[0] for outputs in (KNOWN, WORLD.train))
    a, b = (f / f.norm(dim=1, keepdim=True) for f in (a, b))
    distances = (a[:, None] - b[None]).norm(dim=2).sort(dim=1).values
    torch.testing.assert_close(Knn(k=50).fit(WORLD)(KNOWN), distances[:, 49], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(Knn(k=600).fit(WORLD)(KNOWN), distances[:, -1], rtol=1e-5, atol=1e-6)


def test_logit_methods_are_their_formulas() -> None:
    _, z = _float64(KNOWN)
    p = z.exp() / z.exp().sum(1, keepdim=True)
    expected: dict[Method, Tensor] = {
        Mls(): -z.max(1).values,
        Energy(): -z.exp().sum(1).log(),
        Energy(temperature=3): -3 * (z / 3).exp().sum(1).log(),
        method_of("msp:precision=float64"): -p.max(1).values,
    }
    for method, scores in expected.items():
        torch.testing.assert_close(method.fit(WORLD)(KNOWN), scores, rtol=1e-5, atol=1e-5)


def test_fdbd_is_its_formula() -> None:
    x, z = _float64(KNOWN)
    w, mean = WEIGHT.double(), WORLD.train.features.double().mean(0)
    expected = []
    for h, logits in zip(x, z, strict=True):
        top = int(logits.argmax())
        others = [c for c in range(C) if c != top]
        distances = [(logits[top] - logits[c]) / (w[top] - w[c]).norm() for c in others]
        expected.append(-sum(distances) / len(others) / (h - mean).norm())
    torch.testing.assert_close(Fdbd().fit(WORLD)(KNOWN), torch.stack(expected), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_gradnorm_is_its_closed_form() -> None:
    """∂/∂W of −mean log p is (p − 1/C) hᵀ, whose 1-norm is ‖p − 1/C‖₁ ‖h‖₁."""
    x, z = _float64(KNOWN)
    expected = -(z.softmax(1) - 1 / C).abs().sum(1) * x.abs().sum(1)
    torch.testing.assert_close(method_of("gradnorm").fit(WORLD)(KNOWN), expected, rtol=1e-4, atol=1e-5)


def test_react_cuts_at_the_percentile_of_validation_features() -> None:
    assert WORLD.val is not None
    cut = float(np.percentile(WORLD.val.features.numpy(), 90))
    logits = KNOWN.features.clamp(max=cut).double() @ WEIGHT.double().T + BIAS.double()
    torch.testing.assert_close(React().fit(WORLD)(KNOWN), -logits.logsumexp(1), rtol=1e-5, atol=1e-5)


def test_mahalanobis_far_from_the_origin() -> None:
    """Multiplying out must not cancel: the same distances for features that lie a thousand units off."""
    shifted = replace(WORLD, train=replace(WORLD.train, features=WORLD.train.features.double() + 1000))
    off = Mds().fit(shifted)(replace(KNOWN, features=KNOWN.features.double() + 1000))
    torch.testing.assert_close(off, Mds().fit(WORLD)(KNOWN), rtol=2e-2, atol=1e-5)


# From images, through pytorch-ood's own benchmark.


class RandomImages(Benchmark):
    """Two sets of random OOD images beside random ID images."""

    ood_names = ("bright", "coarse")

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(8)
        self.train = torch.randn(240, 3, 8, 8, generator=generator)
        self.labels = torch.arange(240) % C
        self.train += 0.8 * self.labels[:, None, None, None] / C
        self.test = torch.randn(90, 3, 8, 8, generator=generator)
        bright = torch.randn(70, 3, 8, 8, generator=generator) + 0.7
        coarse = torch.randn(80, 3, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
        self.ood = [bright, coarse]

    def train_set(self) -> Dataset[Any]:
        return TensorDataset(self.train, self.labels)

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset[Any]]:
        inside = TensorDataset(self.test, torch.zeros(len(self.test), dtype=torch.int64))
        return [
            ConcatDataset([inside, TensorDataset(images, torch.full((len(images),), -1))]) for images in self.ood
        ]  # fmt: skip


@pytest.mark.parametrize("name", ["msp", "energy", "knn", "mds", "vim"])
def test_equals_pytorch_oods_benchmark(name: str) -> None:
    """Same network, same images: their runner and ours print the same AUROC."""
    benchmark, model = RandomImages(), Cnn(seed=6).eval()
    theirs = {
        "msp": ood.MaxSoftmax(model),
        "energy": ood.EnergyBased(model),
        "knn": ood.KNN(model.features, k=50),
        "mds": ood.Mahalanobis(model.features),
        "vim": ood.ViM(model.features, d=D // 2, w=model.head.weight, b=model.head.bias),
    }[name]
    train = image_outputs(model, benchmark.train, benchmark.labels)
    if theirs.requires_fit:
        theirs.fit_features(train.features, benchmark.labels)
    results = benchmark.evaluate(theirs, loader_kwargs={"batch_size": 16})
    world = World(train, head=Head(model.head.weight.detach(), model.head.bias.detach()))
    ours = method_of(name).fit(world)
    known = ours(image_outputs(model, benchmark.test))
    for result, images in zip(results, benchmark.ood, strict=True):
        assert auroc(known, ours(image_outputs(model, images))) == pytest.approx(result["AUROC"], abs=1e-6)
