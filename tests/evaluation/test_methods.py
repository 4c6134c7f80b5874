"""What all methods keep to: their notation, what they take and refuse, and that scoring changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from worlds import C, Cnn, D, Images, Mixed, Task, image_outputs, image_world

from torch_grood import GROOD
from torch_grood.errors import GroodError
from torch_grood.evaluation import auroc
from torch_grood.evaluation.methods import (
    METHODS,
    Ash,
    Gen,
    Grood,
    Knn,
    Method,
    MethodUnavailableError,
    Mls,
    Msp,
    Nci,
    NnGuide,
    Odin,
    Scale,
    Scorer,
    She,
    Vim,
    base,
    grood,
    method_of,
    methods_of,
)
from torch_grood.evaluation.outputs import Head, Outputs, World
from torch_grood.outliers import HighEnergy, Mixup, UniformNoise

TASK = Task()
WORLD = TASK.world()
TEST = TASK.known(33)
OTHER = Task(seed=9).world()
ON_FEATURES = [name for name in METHODS if name != "odin"]
NEEDS_HEAD = ["vim", "react", "dice", "ash", "she", "scale", "nnguide", "fdbd", "nci", "gradnorm", "vra"]


def scorer(name: str, world: World = WORLD) -> Scorer:
    return METHODS[name]().fit(world)


# What every method keeps to.


@pytest.mark.parametrize("name", ON_FEATURES)
def test_one_score_a_sample(name: str) -> None:
    """float64 (n,), whatever else is in the batch and in whatever order."""
    score = scorer(name)
    scores = score(TEST)
    assert scores.shape == (33,)
    assert scores.dtype == torch.float64
    assert scores.device.type == "cpu"
    alone = torch.cat([score(TEST.take(torch.tensor([i]))) for i in range(33)])
    torch.testing.assert_close(alone, scores, rtol=1e-5, atol=1e-6)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(score(TEST.take(order)), scores[order], rtol=1e-5, atol=1e-6)
    assert len(scores.unique()) > 20


@pytest.mark.parametrize("name", ON_FEATURES)
def test_higher_is_more_ood(name: str) -> None:
    score = scorer(name)
    # What is far from all classes is far from the background, too, and RMDS takes the difference.
    least = 0.8 if name == "rmds" else 0.9
    assert auroc(score(TASK.known(100)), score(TASK.unknown(100))) > least


@pytest.mark.parametrize("name", ON_FEATURES)
def test_a_fit_keeps_nothing_of_another(name: str) -> None:
    method = METHODS[name]()
    first = method.fit(WORLD)
    before = first(TEST)
    second = method.fit(OTHER)
    assert torch.equal(first(TEST), before)
    assert torch.equal(method.fit(WORLD)(TEST), before)
    fresh = METHODS[name]().fit(Task(seed=9).world())(TEST)
    assert torch.equal(second(TEST), fresh)


@pytest.mark.parametrize("name", ON_FEATURES)
def test_nothing_is_changed(name: str) -> None:
    """Neither what it is fitted on and scores, nor the global generator, nor whether gradients are taken."""
    task = Task(seed=3)
    world, test = task.world(), task.known(20)
    assert world.val is not None
    tensors = [
        world.train.features, world.train.logits, world.val.features, *task.head, test.features, test.logits,
    ]  # fmt: skip
    copies = [tensor.clone() for tensor in tensors]
    state = torch.random.get_rng_state()
    METHODS[name]().fit(world)(test)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ON_FEATURES)
def test_gradients_do_not_leak(name: str) -> None:
    attached = Outputs(TEST.features.clone().requires_grad_(), TEST.logits.clone().requires_grad_())
    assert not scorer(name)(attached).requires_grad
    train = replace(WORLD.train, features=WORLD.train.features.clone().requires_grad_())
    assert not scorer(name, replace(WORLD, train=train))(TEST).requires_grad


@pytest.mark.parametrize("name", ON_FEATURES)
def test_half_precision_is_taken(name: str) -> None:
    """As features are kept to save room; they are widened before anything is computed."""

    def half(outputs: Outputs) -> Outputs:
        return replace(outputs, features=outputs.features.half(), logits=outputs.logits.half())

    assert WORLD.val is not None
    world = replace(WORLD, train=half(WORLD.train), val=half(WORLD.val))
    widened = replace(half(TEST), features=TEST.features.half().float(), logits=TEST.logits.half().float())
    score = scorer(name, world)
    assert score(half(TEST)).isfinite().all()
    torch.testing.assert_close(score(half(TEST)), score(widened))


@pytest.mark.parametrize("name", ON_FEATURES)
def test_classes_can_be_left_out(name: str) -> None:
    """A reduced world is a world of its own: only its classes count, and logits of the others are an error."""
    reduced = WORLD.without([1, 3])
    score = scorer(name, reduced)
    kept = torch.tensor([0, 2, 4])
    test = TEST.of_classes(kept)
    scores = score(test)
    assert scores.shape == (33,)
    assert reduced.head is not None
    again = World(reduced.train, reduced.val, reduced.head, reduced.outliers, seed=reduced.seed)
    assert torch.equal(scorer(name, again)(test), scores)
    with pytest.raises(GroodError, match=r"fitted on 24 features and 3 logits a sample, got 24 and 5"):
        score(TEST)


def test_outliers_are_made_without_the_classes_left_out() -> None:
    reduced = WORLD.without([4])
    assert isinstance(reduced.outliers, Mixed)
    reduced.outliers.asked.clear()
    Grood(outliers="mixup", n=7, lam=0.8).fit(reduced)
    assert reduced.outliers.asked == [(Mixup(7, 0.8), frozenset({4}))]


@pytest.mark.parametrize("name", [*METHODS])
@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (TASK.known(0), r"the set to be scored has no samples"),
        (Outputs(torch.zeros(2, D - 1), torch.zeros(2, C)), r"24 features and 5 logits a sample, got 23 and 5"),
        (Outputs(torch.zeros(2, D), torch.zeros(2, C + 1)), r"24 features and 5 logits a sample, got 24 and 6"),
        (Outputs(torch.zeros(2, D), torch.tensor([[0.0] * C, [torch.nan] * C])), r"logits that are not.* index 1"),
        (Outputs(torch.full((2, D), torch.inf), torch.zeros(2, C)), r"features that are not finite.* index 0"),
    ],
)
def test_bad_outputs_are_refused(name: str, outputs: Outputs, message: str) -> None:
    world = image_world(Cnn().eval()) if name == "odin" else WORLD
    score = scorer(name, world)
    with pytest.raises(GroodError, match=message):
        score(outputs)


@pytest.mark.parametrize("name", METHODS)
def test_bad_training_outputs_are_refused(name: str) -> None:
    with pytest.raises(GroodError, match="the training set has no samples"):
        scorer(name, replace(WORLD, train=TASK.known(0)))
    broken = WORLD.train.features.clone()
    broken[17, 3] = torch.nan
    with pytest.raises(GroodError, match="the training set has features that are not finite, the first at index 17"):
        scorer(name, replace(WORLD, train=replace(WORLD.train, features=broken)))


def test_infinities_that_cancel_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though only sums are looked at; and by their position in the whole set, which is looked at in parts."""
    monkeypatch.setattr(base, "_ROWS", 3)
    broken = TEST.features.clone()
    broken[4, 0], broken[5, 0] = torch.inf, -torch.inf
    with pytest.raises(GroodError, match="index 4"):
        scorer("mls")(replace(TEST, features=broken))


def test_large_finite_numbers_are_no_infinities() -> None:
    """Their sum overflows; each of them does not."""
    features = torch.full((3, D), 1e308, dtype=torch.float64)
    assert scorer("mls")(Outputs(features, torch.zeros(3, C))).tolist() == [0.0] * 3


@dataclass(frozen=True)
class Bad(Method):
    """Gives what it is made to give."""

    name: ClassVar[str] = "bad"
    title: ClassVar[str] = "Bad"
    reference: ClassVar[str] = "nobody"
    gives: ClassVar[Callable[[int], Tensor]]

    def _fit(self, world: World) -> Scorer:
        return lambda outputs: type(self).gives(len(outputs))


def test_no_nan_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bad, "gives", lambda n: torch.full((n,), torch.nan), raising=False)
    with pytest.raises(GroodError, match=r"Bad gives NaN for 33 of 33 samples, the first at index 0"):
        Bad().fit(WORLD)(TEST)
    monkeypatch.setattr(Bad, "gives", lambda n: torch.zeros(n, 1))
    with pytest.raises(GroodError, match=r"gave scores \(33, 1\) for 33 samples"):
        Bad().fit(WORLD)(TEST)
    monkeypatch.setattr(Bad, "gives", lambda n: torch.full((n,), torch.inf))
    assert Bad().fit(WORLD)(TEST).isinf().all()


def test_nan_of_a_method_is_said() -> None:
    """SCALE divides by the sum of a sample's largest features, and this sample has none."""
    dark = TASK.outputs(torch.zeros(1, D))
    with pytest.raises(GroodError, match=r"SCALE gives NaN for 1 of 1 samples.*not defined for such features"):
        scorer("scale")(dark)


# What is not there.


@pytest.mark.parametrize("name", NEEDS_HEAD)
def test_without_a_last_layer(name: str) -> None:
    with pytest.raises(MethodUnavailableError, match=r"needs the last layer.*not one linear layer"):
        scorer(name, replace(WORLD, head=None))
    head = Head(torch.zeros(C, D - 1), torch.zeros(C))
    with pytest.raises(GroodError, match=r"weight \(5, 24\) and bias \(5,\), got \(5, 23\)"):
        scorer(name, replace(WORLD, head=head))


@pytest.mark.parametrize("name", [name for name in ON_FEATURES if name not in NEEDS_HEAD])
def test_others_need_no_last_layer(name: str) -> None:
    assert torch.equal(scorer(name, replace(WORLD, head=None))(TEST), scorer(name)(TEST))


def test_needs_are_what_is_needed() -> None:
    for name in ON_FEATURES:
        needs = METHODS[name]().needs
        assert ("head" in needs) == (name in NEEDS_HEAD), name
        without = {"labels": replace(WORLD, train=replace(WORLD.train, labels=None)), "head": replace(WORLD, head=None)}
        if name == "temp_scaling":
            without["labels"] = replace(WORLD, val=TASK.outputs(TEST.features))
        for what, world in without.items():
            if what in needs:
                with pytest.raises(MethodUnavailableError, match="needs the l"):
                    scorer(name, world)
            else:
                scorer(name, world)
    assert Odin().needs == {"images"}
    assert Grood().needs == {"labels"}
    assert Grood(outliers="mixup").needs == {"labels", "outliers"}
    assert Grood(outliers="ood").needs == {"labels", "ood"}
    assert Grood(outliers="mean").needs == {"labels"}


@pytest.mark.parametrize("name", ["mds", "rmds", "she", "grood"])
def test_classes_without_samples(name: str) -> None:
    assert WORLD.train.labels is not None
    few = WORLD.train.take((WORLD.train.labels != 2) & (WORLD.train.labels != 4))
    with pytest.raises(MethodUnavailableError, match="class 2 has no training sample, nor have 1 others"):
        scorer(name, replace(WORLD, train=few))
    with pytest.raises(GroodError, match="training labels must be 0 to 4, a class for each logit; got -1 to 4"):
        scorer(name, replace(WORLD, train=replace(WORLD.train, labels=WORLD.train.labels.clone().index_fill_(
            0, torch.tensor([3]), -1))))  # fmt: skip


def test_a_class_that_is_never_right() -> None:
    logits = WORLD.train.logits.clone()
    logits[:, 3] -= 1e4
    with pytest.raises(MethodUnavailableError, match="class 3 has no training sample that is classified correctly"):
        She().fit(replace(WORLD, train=replace(WORLD.train, logits=logits)))


def test_too_few_samples() -> None:
    small = replace(WORLD, train=TASK.known(60))
    with pytest.raises(MethodUnavailableError, match=r"KNN takes the distance to the 61th.*there are only 60"):
        Knn(k=61).fit(small)
    assert Knn(k=60).fit(small)(TEST).isfinite().all()
    with pytest.raises(MethodUnavailableError, match=r"NNGuide takes the 100 nearest.*there are only 60"):
        NnGuide().fit(small)


def test_too_narrow() -> None:
    with pytest.raises(MethodUnavailableError, match=r"dim = 24 leaves nothing outside.*there are 24 features"):
        Vim(dim=24).fit(WORLD)
    with pytest.raises(MethodUnavailableError, match=r"ASH with percentile = 99 keeps none of 24 features"):
        Ash(percentile=99).fit(WORLD)
    with pytest.raises(MethodUnavailableError, match=r"SCALE with percentile = 99 keeps none of 24"):
        Scale(percentile=99).fit(WORLD)


def test_a_method_of_the_grid_is_unavailable_or_works() -> None:
    for name in ON_FEATURES:
        for key, values in METHODS[name].grid.items():
            for value in values:
                method = METHODS[name]().replace(**{key: value})
                try:
                    assert method.fit(WORLD)(TEST).isfinite().all()
                except MethodUnavailableError:
                    assert (name, key) in {("knn", "k"), ("vim", "dim")}


def test_singular_covariances_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def singular(_: Tensor) -> Tensor:
        return torch.linalg.cholesky(torch.zeros(2, 2))

    monkeypatch.setattr(torch.linalg, "inv", singular)
    with pytest.raises(MethodUnavailableError, match=r"MDS cannot be fitted on these features: .*cholesky"):
        scorer("mds")


# GROOD.


def test_grood_is_grood() -> None:
    train = WORLD.train
    assert train.labels is not None
    assert isinstance(WORLD.outliers, Mixed)
    detector = GROOD(None, seed=0).fit_features(
        train.features, train.labels, train.logits.argmax(1), ood_features=WORLD.outliers.made
    )
    assert torch.equal(Grood(outliers="mixup").fit(WORLD)(TEST), detector.log_score_features(TEST.features))
    energy = GROOD(None, HighEnergy(), seed=0).fit_features(train.features, train.labels, logits=train.logits)
    assert torch.equal(Grood().fit(WORLD)(TEST), energy.log_score_features(TEST.features))
    mean = GROOD(None, seed=0).fit_features(train.features, train.labels, train.logits.argmax(1))
    assert torch.equal(Grood(outliers="mean").fit(WORLD)(TEST), mean.log_score_features(TEST.features))
    approximate = Grood(index="IVF4,Flat").fit(WORLD)(TEST)
    assert auroc(approximate, Grood(index="IVF4,Flat").fit(WORLD)(TASK.unknown(50))) > 0.9


def test_grood_asks_for_the_outliers_that_it_is_told() -> None:
    assert isinstance(WORLD.outliers, Mixed)
    WORLD.outliers.asked.clear()
    for method in (
        Grood(),
        Grood(outliers="mixup"),
        Grood(outliers="mixup", lam=0.7),
        Grood(outliers="noise"),
        Grood(outliers="noise", n=30),
    ):
        method.fit(WORLD)
    assert [source for source, _ in WORLD.outliers.asked] == [
        Mixup(), Mixup(lam=0.7), UniformNoise(), UniformNoise(30),
    ]  # fmt: skip


def test_grood_takes_the_seed_of_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """An approximate index is trained by it."""
    made: list[GROOD] = []

    class Noted(GROOD):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            made.append(self)

    monkeypatch.setattr(grood, "GROOD", Noted)
    Grood(index="IVF4,Flat").fit(replace(WORLD, seed=5))
    assert [(detector.seed, detector.index.spec) for detector in made] == [(5, "IVF4,Flat")]


def test_grood_with_real_outliers() -> None:
    everything = Grood(outliers="ood").fit(WORLD)(TEST)
    assert torch.equal(Grood(outliers="ood", n=60).fit(WORLD)(TEST), everything)
    some = Grood(outliers="ood", n=20).fit(WORLD)(TEST)
    assert not torch.equal(some, everything)
    assert torch.equal(Grood(outliers="ood", n=20).fit(WORLD)(TEST), some)
    assert not torch.equal(Grood(outliers="ood", n=20).fit(replace(WORLD, seed=1))(TEST), some)
    with pytest.raises(MethodUnavailableError, match="take 61 validation outliers, and there are only 60"):
        Grood(outliers="ood", n=61).fit(WORLD)
    with pytest.raises(MethodUnavailableError, match="needs validation outliers"):
        Grood(outliers="ood").fit(WORLD.without([0]))


def test_grood_without_a_network() -> None:
    with pytest.raises(MethodUnavailableError, match=r"needs the network to make outliers.*use outliers=mean"):
        Grood(outliers="mixup").fit(replace(WORLD, outliers=None))
    Grood().fit(replace(WORLD, outliers=None))

    class Nothing:
        def features(self, source: object, without: frozenset[int] = frozenset()) -> Tensor:
            raise GroodError("there is no early layer")

    with pytest.raises(MethodUnavailableError, match=r"GROOD \(outliers = mixup, lam = 0.5\): there is no early layer"):
        Grood(outliers="mixup", lam=0.5).fit(replace(WORLD, outliers=Nothing()))


def test_grood_parameters_that_do_not_go_together() -> None:
    with pytest.raises(GroodError, match="lam is of outliers=mixup, not of outliers=noise"):
        Grood(outliers="noise", lam=0.5)
    with pytest.raises(GroodError, match="shrink is of outliers=energy, not of outliers=mean"):
        Grood(outliers="mean", shrink=0.5)
    with pytest.raises(GroodError, match="outliers=mean takes none"):
        method_of("grood:outliers=mean:n=100")
    with pytest.raises(GroodError, match="cannot build index 'nonsense'"):
        Grood(index="nonsense").fit(WORLD)


def test_a_walk_over_groods_grid() -> None:
    """λ is dropped where it means nothing, so that equal choices are equal methods."""
    assert Grood().replace(outliers="noise", lam=0.5) == Grood(outliers="noise")
    assert Grood(outliers="mixup", lam=0.6, n=10).replace(outliers="mean") == Grood(outliers="mean")
    assert Grood(outliers="noise", n=10).replace(lam=0.6) == Grood(outliers="noise", n=10)
    assert Grood(outliers="mixup").replace(lam=0.6) == Grood(outliers="mixup", lam=0.6)
    assert Grood().replace(lam=0.6) == Grood()
    assert Grood(shrink=0.7).replace(outliers="mean") == Grood(outliers="mean")


# ODIN.


def test_odin_without_a_network() -> None:
    with pytest.raises(MethodUnavailableError, match="ODIN runs the network, which is not there"):
        Odin().fit(WORLD)
    model = Cnn().eval()
    world = image_world(model)
    with pytest.raises(MethodUnavailableError, match="nor is it one without some of its classes"):
        Odin().fit(world.without([0]))
    with pytest.raises(MethodUnavailableError, match="ODIN needs the images"):
        Odin().fit(world)(world.train.take(torch.arange(3)))


def test_odin_leaves_the_network_alone() -> None:
    model = Cnn().eval().requires_grad_(False)
    model.body[1].train()  # Wrong, and still none of ODIN's business.
    flags = [module.training for module in model.modules()]
    images = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    Odin().fit(image_world(model))(image_outputs(model, images))
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_odin_scores_are_kept_under_their_settings() -> None:
    """The name is part of what lies on disks: another one computes all scores again."""
    model = Cnn().eval()
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = image_outputs(model, images)
    assert isinstance(outputs.images, Images)
    for method in (Odin(), Odin(eps=0.0028), Odin(temperature=10)):
        method.fit(image_world(model))(outputs)
    Odin().fit(image_world(model, std=(0.2, 0.2, 0.2)))(outputs)
    assert len(set(outputs.images.names)) == 4
    key = b'{"eps": 0.0014, "method": "odin", "norm_std": [0.25, 0.24, 0.26], "temperature": 1000.0}'
    assert outputs.images.names[0] == "odin-" + hashlib.sha256(key).hexdigest()[:16] == "odin-04394f7aafce5c6f"


# Notation.


def test_the_notation() -> None:
    assert method_of("knn:k=200") == Knn(k=200)
    assert method_of(" knn : k = 200 ") == Knn(k=200)
    assert method_of("grood:outliers=noise:n=100") == Grood(outliers="noise", n=100)
    assert method_of("grood:lam=none:n=none") == Grood()
    assert method_of("odin:eps=2.8e-3") == Odin(eps=0.0028)
    assert methods_of("grood,grood:outliers=noise:n=100, knn:k=200,msp") == [
        Grood(), Grood(outliers="noise", n=100), Knn(k=200), Msp(),
    ]  # fmt: skip
    assert methods_of("all") == [method() for method in METHODS.values()]
    assert methods_of("grood:index=IVF1024,Flat,msp") == [Grood(index="IVF1024,Flat"), Msp()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("knnn", r"there is no method 'knnn'; did you mean 'knn'\?"),
        ("KNN", r"there is no method 'KNN'; did you mean 'knn'\?"),
        ("ebo", r"did you mean 'energy'\?"),
        ("xyzzy", r"there is no method 'xyzzy'; there are grood, msp, mls"),
        ("knn:K=5", r"knn has no parameter 'K'; it has k \(default 50\)"),
        ("mls:k=5", r"mls has no parameter 'k'; it has none"),
        ("knn:k", r"expected knn:key=value, got 'k'"),
        ("knn:k=", r"knn: k is a whole number, at least 1; got ''"),
        ("knn:k=2.5", r"knn: k is a whole number, at least 1; got '2.5'"),
        ("knn:k=0", r"knn: k is a whole number, at least 1; got 0"),
        ("knn:k=none", r"knn: k is a whole number, at least 1; got None"),
        ("knn:k=5:k=6", r"k is given twice"),
        ("ash:percentile=100", r"percentile is a percentile, from 0 to below 100; got 100"),
        ("ash:percentile=nan", r"percentile, from 0 to below 100; got nan"),
        ("ash:variant=x", r"ash: variant is one of b, p, s; got 'x'"),
        ("energy:temperature=0", r"temperature, above 0; got 0"),
        ("nnguide:alpha=1.5", r"alpha is a share, above 0 and at most 1; got 1.5"),
        ("nci:alpha=-1", r"alpha is a weight, at least 0; got -1"),
        ("grood:outliers=real", r"outliers is one of energy, mixup, noise, mean, ood; got 'real'"),
        ("grood:lam=2", r"lam is the weight of the sample in a mix, from 0 to 1; got 2"),
        ("vra:low=95", r"low must not exceed high, got 95 and 90"),
        ("", r"expected methods, separated by commas"),
        ("msp,,knn", r"expected methods, separated by commas"),
        ("msp,knn,msp", r"MSP is in the list twice"),
        ("all,knn", r"KNN is in the list twice"),
        ("knn,k=5", r"there is no method 'k=5'"),
    ],
)
def test_notation_that_is_none(text: str, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        methods_of(text)


@given(text=st.text(max_size=30) | st.sampled_from(sorted(METHODS)).flatmap(
    lambda name: st.text(alphabet=":=,kalmp.0159en ", max_size=15).map(lambda rest: name + rest)
))  # fmt: skip
@settings(deadline=None)
def test_any_text_is_methods_or_a_clear_error(text: str) -> None:
    with contextlib.suppress(GroodError):
        assert all(isinstance(method, Method) for method in methods_of(text))


CONFIGURED: list[Method] = [
    *(method() for method in METHODS.values()),
    Knn(k=7), Grood(outliers="noise", n=5), Grood(shrink=0.8, k=3),
    Grood(outliers="mixup", lam=0.25, index="IVF4,Flat"),
    Vim(dim=3), Gen(gamma=2, M=3),
    Ash(variant="s", percentile=65), Odin(temperature=10, eps=0), Nci(alpha=0),
]  # fmt: skip


@pytest.mark.parametrize("method", CONFIGURED, ids=lambda method: method.label)
def test_configurations_go_around(method: Method) -> None:
    read: dict[str, Any] = json.loads(json.dumps(method.config(), allow_nan=False))
    name = read.pop("name")
    assert METHODS[name](**read) == method
    text = ":".join([name, *(f"{key}={'none' if value is None else value}" for key, value in read.items())])
    assert methods_of(text) == [method]
    assert method.replace() == method
    assert hash(METHODS[name](**read)) == hash(method)


def test_labels_show_what_is_not_the_default() -> None:
    assert Knn().label == "KNN"
    assert Knn(k=200).label == "KNN (k = 200)"
    assert Grood(outliers="noise", n=100).label == "GROOD (outliers = noise, n = 100)"
    assert Grood(outliers="mixup", lam=0.95).label == "GROOD (outliers = mixup, lam = 0.95)"
    assert method_of("grood:geometry=raw:k=1:shrink=none") == Grood(geometry="raw", k=1)
    assert Ash(percentile=65).label == "ASH (percentile = 65)"


def test_numbers_have_one_form() -> None:
    """90 and 90.0 are one configuration, and have one digest."""
    assert json.dumps(Ash(percentile=90).config()) == json.dumps(Ash().config())
    assert Ash(percentile=90) == Ash(percentile=90.0) == Ash()
    for bad in (True, "90", None, float("inf")):
        with pytest.raises(GroodError, match="percentile"):
            Ash(percentile=bad)  # type: ignore[arg-type]
    with pytest.raises(GroodError, match="k is a whole number"):
        Knn(k=5.0)  # type: ignore[arg-type]


def test_replace_checks_what_it_is_given() -> None:
    assert Knn().replace(k=3) == Knn(k=3)
    with pytest.raises(GroodError, match="knn has no parameter 'n'"):
        Knn().replace(n=3)
    with pytest.raises(GroodError, match="k is a whole number"):
        Knn().replace(k=0)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_reported(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.title
    assert any(character.isdigit() for character in method.reference)
    assert method().label == method.title
    assert method().needs <= {"labels", "head", "images", "outliers", "ood"}
    for key, values in method.grid.items():
        assert len(values) == len(set(values))
        for value in values:
            assert getattr(method().replace(**{key: value}), key) == value or (name, key) == ("grood", "lam")


def test_msp_precision() -> None:
    """Logit gaps of 20 and 30 are one and the same probability in float32."""
    sure = Outputs(torch.zeros(2, D), torch.tensor([[20.0] + [0.0] * (C - 1), [30.0] + [0.0] * (C - 1)]))
    single, double = Msp().fit(WORLD)(sure), Msp(precision="float64").fit(WORLD)(sure)
    assert single[0] == single[1]
    assert double[1] < double[0]


def test_knn_and_others_take_every_training_row() -> None:
    """Also those without a label, which pytorch-ood would leave out."""
    unlabelled = replace(WORLD, train=replace(WORLD.train, labels=torch.full((400,), -1)))
    for name in ("knn", "vim", "dice", "nnguide", "fdbd", "nci", "mls"):
        assert torch.equal(scorer(name, unlabelled)(TEST), scorer(name)(TEST))


def test_what_is_fitted_on_validation_images() -> None:
    """As in OpenOOD; without them the training images serve."""
    for name in ("react", "vra", "klm", "temp_scaling"):
        on_train = scorer(name, replace(WORLD, val=None))(TEST)
        assert torch.equal(scorer(name, replace(WORLD, val=WORLD.train))(TEST), on_train)
        assert not torch.equal(scorer(name)(TEST), on_train)
    for name in ("mls", "mds", "vim", "she"):
        assert torch.equal(scorer(name, replace(WORLD, val=None))(TEST), scorer(name)(TEST))


def test_bad_validation_outputs_are_refused() -> None:
    assert WORLD.val is not None
    narrow = Outputs(WORLD.val.features, WORLD.val.logits[:, :4])
    with pytest.raises(GroodError, match=r"validation set has \(24, 4\) features and logits a sample"):
        scorer("klm", replace(WORLD, val=narrow))
    broken = Outputs(WORLD.val.features.clone().fill_(torch.nan), WORLD.val.logits)
    with pytest.raises(GroodError, match="the validation set has features that are not finite, the first at index 0"):
        scorer("react", replace(WORLD, val=broken))


def test_the_bank_of_nnguide_is_drawn_by_seed() -> None:
    """Over the whole training set, which may be sorted by class."""
    assert torch.equal(NnGuide().fit(WORLD)(TEST), NnGuide().fit(WORLD)(TEST))
    assert not torch.equal(NnGuide().fit(replace(WORLD, seed=1))(TEST), NnGuide().fit(WORLD)(TEST))
    whole = NnGuide(alpha=1)
    torch.testing.assert_close(whole.fit(replace(WORLD, seed=1))(TEST), whole.fit(WORLD)(TEST))


def test_mls_is_its_formula() -> None:
    assert torch.equal(Mls().fit(WORLD)(TEST), -TEST.logits.max(1).values.double())


def test_the_example_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/benchmark.md", "exec"), {})
    assert 0.9 < float(capsys.readouterr().out) <= 1
