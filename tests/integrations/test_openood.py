from __future__ import annotations

import importlib
import logging
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openood_standin import BasePostprocessor, Evaluator, loader
from torch import Tensor, nn

from models import ResidualNet, left_alone, patterns, taught_cnn
from torch_grood import (
    GROOD,
    GroodError,
    HighEnergy,
    Mixup,
    NotFittedError,
    OutlierSamples,
    PrototypeMean,
    UniformNoise,
)
from torch_grood.evaluation import auroc
from torch_grood.integrations.openood import SWEEP, GROODPostprocessor

PACKAGE = "torch_grood.integrations.openood"


def noise(n: int, seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Images that belong to no class; some of OpenOOD's lists have labels of another task."""
    return scale * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.full((n,), -1)


@pytest.fixture(scope="module")
def loaders() -> dict[str, Any]:
    other_task = noise(30, 22, 3.0)[0], torch.arange(30)
    return {
        "id": {
            "train": loader(*patterns(90), order=True),
            "val": loader(*patterns(30, seed=2)),
            "test": loader(*patterns(60, seed=3)),
        },
        "ood": {
            "val": loader(*noise(30, 20)),
            "near": {"a": loader(*noise(40, 21)), "b": loader(*other_task)},
            "far": {"c": loader(*noise(50, 23, 5.0))},
        },
    }


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return taught_cnn()


@pytest.fixture(scope="module")
def plain(net: nn.Module) -> GROOD:
    return GROOD.paper(net).fit(loader(*patterns(90), order=True), progress=False)


def evaluated(net: nn.Module, loaders: dict[str, Any], postprocessor: GROODPostprocessor) -> Evaluator:
    """With the stand-in of OpenOOD's base class if the module was imported without one."""
    return Evaluator(net, loaders, postprocessor, base=GROODPostprocessor.__mro__[1])


def fresh(net: nn.Module, loaders: dict[str, Any], **arguments: Any) -> GROODPostprocessor:
    postprocessor = GROODPostprocessor(**arguments)
    postprocessor.setup(net, loaders["id"], loaders["ood"])
    return postprocessor


def test_the_whole_loop(net: nn.Module, loaders: dict[str, Any], plain: GROOD) -> None:
    evaluator = evaluated(net, loaders, GROODPostprocessor())
    found = evaluator.eval_ood(progress=False)
    assert list(found) == ["a", "b", "nearood", "c", "farood"]
    known = plain.score(patterns(60, seed=3)[0])
    for name, images in (("a", noise(40, 21)[0]), ("b", noise(30, 22, 3.0)[0]), ("c", noise(50, 23, 5.0)[0])):
        assert found[name]["AUROC"] == pytest.approx(auroc(known, plain.score(images)), abs=1e-6)
        assert found[name]["AUROC"] > 0.9
    labels = plain.extract(patterns(60, seed=3)[0]).logits.argmax(1)
    assert found["a"]["ACC"] == pytest.approx(float((labels == patterns(60, seed=3)[1]).double().mean()))


def test_confidence_is_minus_the_log_score(net: nn.Module, loaders: dict[str, Any], plain: GROOD) -> None:
    postprocessor = fresh(net, loaders)
    images, labels = patterns(60, seed=3)
    prediction, confidence, label = postprocessor.inference(net, loaders["id"]["test"], progress=False)
    assert (prediction.dtype, confidence.dtype, label.dtype) == (np.int64, np.float64, np.int64)
    in_batches = torch.cat([plain.log_score(part) for part in images.split(16)])
    assert np.array_equal(confidence, -in_batches.numpy())
    assert np.array_equal(label, labels.numpy())
    assert np.array_equal(prediction, net(images).argmax(1).numpy())
    one = postprocessor.postprocess(net, images[:16])
    assert torch.equal(one[0], torch.from_numpy(prediction[:16]))
    assert torch.equal(one[1], torch.from_numpy(confidence[:16]))


def test_the_class_is_the_classifiers(loaders: dict[str, Any]) -> None:
    """Not the nearest class prototype's, where they differ."""
    net = taught_cnn()
    with torch.no_grad():
        net[-1].bias[0] += 6
    postprocessor = fresh(net, loaders)
    prediction, _, _ = postprocessor.inference(net, loaders["id"]["test"], progress=False)
    images = patterns(60, seed=3)[0]
    assert np.array_equal(prediction, net(images).argmax(1).numpy())
    assert postprocessor.detector_ is not None
    assert not np.array_equal(prediction, postprocessor.detector_.assess(images).prototype_label.numpy())


@pytest.mark.parametrize("batch_size", [1, 7, 90, 500])
def test_every_training_sample_is_seen(net: nn.Module, loaders: dict[str, Any], plain: GROOD, batch_size: int) -> None:
    """Sorted by class, whatever the size of the batches: none is left out, and all classes are mixed."""
    train = loader(*patterns(90), order=True, batch_size=batch_size)
    postprocessor = GROODPostprocessor()
    postprocessor.setup(net, {"train": train}, {})
    assert postprocessor.detector_ is not None
    info = postprocessor.detector_.fit_info_
    assert (info.n_samples, info.n_correct, info.n_indexed, info.n_outliers) == (90, 90, 90, 90)
    images = patterns(30, seed=9)[0]
    torch.testing.assert_close(
        postprocessor.postprocess(net, images)[1], -plain.log_score(images), rtol=1e-4, atol=1e-4
    )


def test_a_training_image_is_finite_and_the_most_known(net: nn.Module, loaders: dict[str, Any]) -> None:
    postprocessor = fresh(net, loaders)
    train = patterns(90)[0][torch.arange(90).remainder(3).argsort(stable=True)]
    confidence = postprocessor.postprocess(net, torch.cat([train[:16], noise(4, 30)[0]]))[1]
    assert bool(confidence.isfinite().all())
    assert confidence[:16].min() > confidence[16:].max()
    exact = postprocessor.detector_
    assert exact is not None
    same = exact.extract(train[:16]).features
    assert exact.log_score_features(same).min() == -float("inf")
    found = Evaluator.metrics(
        postprocessor.inference(net, loader(train, torch.zeros(90, dtype=torch.int64)), progress=False),
        postprocessor.inference(net, loader(*noise(20, 31)), progress=False),
    )
    assert found["AUROC"] > 0.9


def test_what_the_evaluator_reads(net: nn.Module) -> None:
    postprocessor = GROODPostprocessor()
    assert (postprocessor.APS_mode, postprocessor.hyperparam_search_done) == (False, False)
    assert postprocessor.config is None
    assert not hasattr(postprocessor, "setup_flag")  # Its presence makes OpenOOD's script write a pickle.
    assert GROODPostprocessor(sweep=SWEEP).APS_mode
    assert GROODPostprocessor("a config").config == "a config"
    assert list(postprocessor.args_dict) == ["lam"]


def test_the_search(net: nn.Module, loaders: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    sweep = {"outliers": ["mixup", "noise", "mean", "val_ood"], "lam": [0.1, 0.9]}
    postprocessor = GROODPostprocessor(sweep=sweep)
    evaluator = evaluated(net, loaders, postprocessor)
    assert postprocessor.hyperparam_search_done
    assert evaluator.tried[:2] == [["mixup", 0.1], ["noise", 0.1]]
    assert len(evaluator.found) == 8
    best = evaluator.tried[int(np.argmax(evaluator.found))]
    assert postprocessor.get_hyperparam() == best
    assert f"Final hyperparam: {best}" in capsys.readouterr().out
    images = patterns(20, seed=9)[0]
    again = fresh(net, loaders, outliers=best[0], lam=best[1])
    torch.testing.assert_close(
        postprocessor.postprocess(net, images)[1], again.postprocess(net, images)[1], rtol=1e-9, atol=1e-9
    )


class _Counting:
    """A loader that counts how often it is read."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.n_read = inner, 0

    def __iter__(self) -> Iterator[Any]:
        self.n_read += 1  # When the first batch is taken: a progress bar may ask for more iterators.
        yield from self.inner


@pytest.mark.parametrize("make", [taught_cnn, lambda: ResidualNet().eval()], ids=["cnn", "residual"])
def test_each_candidate_is_as_a_fit_of_its_own_in_one_pass(make: Any, loaders: dict[str, Any]) -> None:
    net = make()
    train, val_ood = _Counting(loaders["id"]["train"]), loaders["ood"]["val"]
    sweep = {"n": [20, None], "lam": [0.1, 0.6], "outliers": ["mixup", "noise", "mean", "val_ood", "energy"]}
    postprocessor = GROODPostprocessor(sweep=sweep, seed=3)
    postprocessor.setup(net, {"train": train}, {"val": val_ood})
    images = patterns(20, seed=9)[0]
    for n, lam, name in [(20, 0.1, "mixup"), (None, 0.6, "mixup"), (20, 0.6, "noise"), (None, 0.1, "mean"),
                         (20, 0.1, "val_ood"), (20, 0.1, "energy"), (None, 0.6, "energy")]:  # fmt: skip
        postprocessor.set_hyperparam([n, lam, name])
        assert postprocessor.get_hyperparam() == [n, lam, name]
        sources = {"energy": HighEnergy(n), "mixup": Mixup(n, lam), "noise": UniformNoise(n or 100),
                   "mean": PrototypeMean(), "val_ood": OutlierSamples(val_ood, n)}  # fmt: skip
        alone = GROOD(net, sources[name], seed=3).fit(loaders["id"]["train"], progress=False)
        torch.testing.assert_close(
            postprocessor.postprocess(net, images)[1], -alone.log_score(images), rtol=1e-9, atol=1e-9
        )
        assert postprocessor.detector_ is not None
        info, expected = postprocessor.detector_.fit_info_, alone.fit_info_
        assert (info.outlier_source, info.uses_ood_data) == (expected.outlier_source, expected.uses_ood_data)
        assert (info.n_outliers, info.n_correct) == (expected.n_outliers, expected.n_correct)
        assert info.uses_ood_data == (name == "val_ood")
    assert train.n_read == 1
    # Nor does it take another pass where enough was kept, though it is not in the sweep.
    postprocessor.set_hyperparam([50, 0.6, "mixup"])
    assert train.n_read == 1
    postprocessor.args_dict = {"outliers": [UniformNoise(10)]}
    postprocessor.set_hyperparam([UniformNoise(10)])
    assert train.n_read == 1


def test_a_sweep_without_what_is_set_later_reads_again(net: nn.Module, loaders: dict[str, Any]) -> None:
    train = _Counting(loaders["id"]["train"])
    postprocessor = GROODPostprocessor(outliers="mean", sweep={"outliers": ["mean", "noise"]})
    postprocessor.setup(net, {"train": train}, {})
    postprocessor.set_hyperparam(["noise"])
    assert train.n_read == 1
    postprocessor.set_hyperparam(["mixup"])
    assert train.n_read == 2
    for n, n_read in ((20, 3), (10, 3), (50, 4)):
        postprocessor.args_dict = {"n": [20], "outliers": ["mixup"]}
        if n == 20:
            postprocessor.n = n
            postprocessor.setup(net, {"train": train}, {})
        postprocessor.set_hyperparam([n, "mixup"])
        assert postprocessor.detector_ is not None
        assert (postprocessor.detector_.fit_info_.n_outliers, train.n_read) == (n, n_read)
    postprocessor.set_hyperparam([None, "mixup"])
    images = patterns(20, seed=9)[0]
    alone = fresh(net, loaders).postprocess(net, images)[1]
    torch.testing.assert_close(postprocessor.postprocess(net, images)[1], alone, rtol=1e-9, atol=1e-9)


def test_lambda_may_be_set_without_a_search(net: nn.Module, loaders: dict[str, Any]) -> None:
    expected = fresh(net, loaders, lam=0.3).postprocess(net, patterns(9)[0] + 1)
    before = GROODPostprocessor()
    before.set_hyperparam([0.3])
    before.setup(net, loaders["id"], loaders["ood"])
    after = fresh(net, loaders)
    after.set_hyperparam([0.3])
    for postprocessor in (before, after):
        assert postprocessor.get_hyperparam() == [0.3]
        assert torch.equal(postprocessor.postprocess(net, patterns(9)[0] + 1)[1], expected[1])


def test_wrong_hyperparameters_change_nothing(net: nn.Module, loaders: dict[str, Any]) -> None:
    for postprocessor in (fresh(net, loaders), fresh(net, loaders, sweep=SWEEP)):
        before = postprocessor.postprocess(net, patterns(9)[0] + 1)[1]
        for values, message in (
            ([2.0], "lam is the weight"),
            ([0.1, 0.2], "a list of values for lam"),
            (0.1, "a list of values for lam"),
            ("0", "a list of values for lam"),
            ([None], "lam is the weight"),
        ):
            with pytest.raises(GroodError, match=message):
                postprocessor.set_hyperparam(values)
        assert postprocessor.get_hyperparam() == [0.9]
        assert torch.equal(postprocessor.postprocess(net, patterns(9)[0] + 1)[1], before)
    unset = GROODPostprocessor()
    with pytest.raises(GroodError, match="lam is the weight"):
        unset.set_hyperparam([2.0])
    assert unset.get_hyperparam() == [0.9]


@pytest.mark.parametrize("sweep", [None, {"lam": [0.2, 0.9], "outliers": ["mixup", "noise"]}])
def test_a_network_in_train_mode_is_left_as_it_was(loaders: dict[str, Any], sweep: Any) -> None:
    net = taught_cnn().train()
    net[3].eval()  # Frozen by its user, as is common.
    train = list(loaders["id"]["train"])  # A DataLoader draws from the global random state itself.
    postprocessor = GROODPostprocessor(sweep=sweep)
    images = patterns(9, seed=9)[0]
    with left_alone(net):
        postprocessor.setup(net, {"train": train}, {})
        if sweep:
            postprocessor.set_hyperparam([0.9, "mixup"])
        confidence = postprocessor.postprocess(net, images)[1]
        assert torch.equal(confidence, postprocessor.postprocess(net, images)[1])
    quiet = fresh(net.eval(), loaders).postprocess(net, images)[1]
    torch.testing.assert_close(confidence, quiet, rtol=1e-9, atol=1e-9)


def test_the_last_setup_counts(net: nn.Module, loaders: dict[str, Any]) -> None:
    images = patterns(20, seed=9)[0]
    for sweep in (None, SWEEP):
        postprocessor = GROODPostprocessor(sweep=sweep)
        postprocessor.setup(taught_cnn(seed=8), {"train": loader(*patterns(30, seed=4))}, {})
        postprocessor.setup(net, loaders["id"], loaders["ood"])
        expected = fresh(net, loaders, sweep=sweep).postprocess(net, images)
        assert torch.equal(postprocessor.postprocess(net, images)[1], expected[1])


def test_a_setup_that_fails_changes_nothing(net: nn.Module, loaders: dict[str, Any]) -> None:
    images = patterns(9, seed=9)[0]
    for sweep in (None, SWEEP):
        postprocessor = fresh(net, loaders, sweep=sweep)
        before = postprocessor.postprocess(net, images)[1]
        for id_loaders, message in (
            ({"train": []}, "gave no training sample"),
            ({"test": loaders["id"]["test"]}, r"needs the training set, id_loader_dict\['train'\]; got 'test'"),
            ({"train": loader(*noise(9, 1))}, "label -1"),
            ({"train": [{"data": images}]}, "labels are missing"),
            ({"train": [{"label": torch.zeros(3)}]}, "found no images in a batch with the keys label"),
            ({"train": loaders["id"]["train"].dataset}, "wrap it: DataLoader"),
            ({"train": None}, "got NoneType"),
            ({"train": loader(*patterns(1))}, "no training sample"),
        ):
            with pytest.raises(GroodError, match=message):
                postprocessor.setup(taught_cnn(seed=8), id_loaders, {})
        assert torch.equal(postprocessor.postprocess(net, images)[1], before)


def test_only_the_network_of_the_setup_is_scored(net: nn.Module, loaders: dict[str, Any]) -> None:
    with pytest.raises(NotFittedError, match="not set up"):
        GROODPostprocessor().postprocess(net, patterns(2)[0])
    postprocessor = fresh(net, loaders)
    with pytest.raises(GroodError, match="another network"):
        postprocessor.inference(taught_cnn(seed=8), loaders["id"]["test"])
    wrapped = nn.DataParallel(net)
    assert torch.equal(
        postprocessor.postprocess(wrapped, patterns(2)[0])[0], postprocessor.postprocess(net, patterns(2)[0])[0]
    )
    with pytest.raises(GroodError, match=r"expected a torch\.nn\.Module"):
        GROODPostprocessor().setup({"backbone": net}, loaders["id"], {})  # type: ignore[arg-type]


def test_inference_on_strange_loaders(net: nn.Module, loaders: dict[str, Any]) -> None:
    postprocessor = fresh(net, loaders)
    images = patterns(4)[0]
    for given, message in (
        ([], "gave no image"),
        ([{"data": images[:0], "label": torch.zeros(0)}], "gave no image"),
        ([{"data": images}], "labels are missing"),
        ([{"data": images, "label": torch.arange(3)}], "expected 4 labels"),
        ([{"data": images[:, :1], "label": torch.arange(4)}], "Give all sets the same preprocessor"),
        ("test", "loader of batches, got str"),
    ):
        with pytest.raises(GroodError, match=message):
            postprocessor.inference(net, given, progress=False)
    prediction, _, label = postprocessor.inference(net, [{"data": images, "label": [-1, 5, 0, 1]}], progress=False)
    assert len(prediction) == 4
    assert label.tolist() == [-1, 5, 0, 1]


@pytest.mark.parametrize("sweep", [None, SWEEP])
def test_images_of_another_size(loaders: dict[str, Any], sweep: Any) -> None:
    """A network that averages takes any size, but another transform means other scores."""
    net = ResidualNet().eval()
    postprocessor = fresh(net, loaders, sweep=sweep)
    with pytest.raises(GroodError, match=r"shape \(3, 9, 9\) cannot be scored.*shape \(3, 8, 8\)"):
        postprocessor.postprocess(net, torch.zeros(2, 3, 9, 9))
    mixed = [{"data": torch.randn(9, 3, size, size), "label": torch.arange(9) % 3} for size in (8, 9)]
    # What is mixed must have one size.
    postprocessor = GROODPostprocessor(outliers="mean", sweep=sweep and {"outliers": ["mean"]})
    postprocessor.setup(net, {"train": mixed}, {})
    assert postprocessor.postprocess(net, torch.zeros(2, 3, 7, 7))[1].shape == (2,)


def test_strange_arguments(net: nn.Module, loaders: dict[str, Any]) -> None:
    for arguments, message in (
        ({"outliers": "mixop"}, "one of energy, mixup, noise, mean, val_ood"),
        ({"lam": -1}, "lam is the weight"),
        ({"n": 0}, "at least 1"),
        ({"sweep": {}}, "sweep names values to try"),
        ({"sweep": {"k": [1]}}, "sweep names values to try for outliers, lam, n"),
        ({"sweep": {"lam": 0.5}}, r"sweep\['lam'\] must be a list"),
        ({"sweep": {"lam": []}}, r"sweep\['lam'\] must be a list"),
        ({"sweep": {"outliers": "mixup"}}, r"sweep\['outliers'\] must be a list"),
        ({"sweep": {"lam": [0.5, 2]}}, "lam is the weight"),
        ({"seed": -1}, "seed must be"),
        ({"index": 3}, "index"),
        ({"store": "float8"}, "float8"),
    ):
        with pytest.raises(GroodError, match=message):
            GROODPostprocessor(**arguments)  # type: ignore[arg-type]
    with pytest.raises(GroodError, match=r"val_ood.*there are none here"):
        GROODPostprocessor(outliers="val_ood").setup(net, loaders["id"], {"near": {}})
    with pytest.raises(GroodError, match="head='nothing' is no module"):
        GROODPostprocessor(head="nothing").setup(net, loaders["id"])


@pytest.mark.parametrize("sweep", [None, {"n": [20, 30]}])
def test_options_reach_grood(net: nn.Module, loaders: dict[str, Any], sweep: Any) -> None:
    options = {"index": "IVF2,Flat", "head": "8", "early_layer": "4", "seed": 5, "store": "int8"}
    postprocessor = fresh(net, loaders, n=20, sweep=sweep, **options)
    detector = postprocessor.detector_
    assert detector is not None
    assert (detector.index.spec, detector.head, detector.early_layer, detector.seed, detector.store.dtype) == tuple(
        options.values()
    )
    expected = GROOD(net, Mixup(20), **options).fit(loaders["id"]["train"], progress=False)  # type: ignore[arg-type]
    torch.testing.assert_close(detector.ood_prototype_, expected.ood_prototype_)


def test_a_source_of_the_users_own(net: nn.Module, loaders: dict[str, Any]) -> None:
    postprocessor = fresh(net, loaders, outliers=OutlierSamples(loader(*noise(12, 40))))
    assert postprocessor.detector_ is not None
    assert postprocessor.detector_.fit_info_.n_outliers == 12
    assert postprocessor.detector_.fit_info_.uses_ood_data


@pytest.fixture
def with_openood(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module as it is imported where OpenOOD is installed."""
    package, postprocessors = types.ModuleType("openood"), types.ModuleType("openood.postprocessors")
    postprocessors.BasePostprocessor = BasePostprocessor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openood", package)
    monkeypatch.setitem(sys.modules, "openood.postprocessors", postprocessors)
    monkeypatch.delitem(sys.modules, PACKAGE)
    return importlib.import_module(PACKAGE)


def test_it_is_a_postprocessor_of_openood(
    with_openood: types.ModuleType, net: nn.Module, loaders: dict[str, Any]
) -> None:
    postprocessor = with_openood.GROODPostprocessor()
    assert isinstance(postprocessor, BasePostprocessor)
    found = Evaluator(net, loaders, postprocessor).eval_ood(progress=False)
    assert found["farood"]["AUROC"] > 0.9
    with pytest.raises(TypeError, match="should inherit"):
        Evaluator(net, loaders, object())


def test_the_code_of_the_page_runs(
    with_openood: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    net: nn.Module,
    loaders: dict[str, Any],
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text(encoding="utf-8")
    section = page.partition("## OpenOOD")[2].partition("## pytorch-ood")[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2

    def evaluator(net: nn.Module, *, id_name: str, data_root: str, postprocessor: Any) -> Evaluator:
        assert (id_name, data_root) == ("cifar10", "data")
        return Evaluator(net, loaders, postprocessor)

    api = types.ModuleType("openood.evaluation_api")
    api.Evaluator = evaluator  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openood.evaluation_api", api)
    names: dict[str, Any] = {"net": net}
    for block in blocks:
        exec(block, names)
    assert names["postprocessor"].hyperparam_search_done
    assert f"{names['postprocessor'].lam}\n" in capsys.readouterr().out


def test_a_broken_openood_is_said_and_does_not_stop_the_import(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openood", types.ModuleType("openood"))  # It has no postprocessors.
    monkeypatch.delitem(sys.modules, PACKAGE)
    with caplog.at_level(logging.WARNING, logger="torch_grood"):
        module = importlib.import_module(PACKAGE)
    assert "OpenOOD is installed but" in caplog.text
    assert module.GROODPostprocessor().APS_mode is False


def test_without_openood_the_import_says_nothing() -> None:
    code = (
        f"import sys, warnings\nwarnings.simplefilter('error')\nimport {PACKAGE}\nprint('pytorch_ood' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "False", "")
