"""The contract suite passes what is sound, and finds each defect by the clause that is there for it."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import unittest
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from defects import DEFECTS, Defect
from nearest_mean import NearestMean
from nearest_mean_of_logits import NearestMeanOfLogits
from variants import VARIANTS
from wrapper import Reloaded, Wrapper

from torch_grood import GROOD, FaissIndex, GroodError
from torch_grood.testing import BrokenContractError, CheckResult, check_detector, detector_checks, scoring
from torch_grood.testing.suite import CLAUSES

FRESH = "fresh_process_loads_the_same"
Make = Callable[[Any], Any]


def outcomes(make: Make, uses: list[str], without: tuple[str, ...] = ()) -> dict[str, str]:
    """What each clause says of a detector: "", or its message; clauses that say nothing of it are left out."""
    found = {}
    for name, check in detector_checks(make, uses=uses):
        if name.partition("-")[2] in without:
            continue
        try:
            check()
        except unittest.SkipTest:
            continue
        except BrokenContractError as error:
            found[name] = str(error)
        else:
            found[name] = ""
    return found


def assert_sound(make: Make, uses: list[str], without: tuple[str, ...] = ()) -> None:
    found = outcomes(make, uses, without)
    assert {name: message for name, message in found.items() if message} == {}
    clauses = [clause for clause in CLAUSES if clause.name not in without]
    expected = {f"{use}-{clause.name}" for use in uses for clause in clauses if use in clause.uses}
    skipped = {f"{use}-gpu_is_taken" for use in uses} if not torch.cuda.is_available() else set()
    assert found.keys() == expected - skipped


# --- Sound detectors pass ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["features", "images"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"index": FaissIndex("IVF2,Flat", {"nprobe": 2})}, {"store": "int8"}],
    ids=["exact", "faiss", "int8"],
)
def test_grood_keeps_the_contract(use: str, arguments: dict[str, Any]) -> None:
    assert_sound(lambda model: GROOD(model, **arguments), [use], without=(FRESH,) if "store" in arguments else ())


@pytest.mark.parametrize("use", ["features", "images"])
def test_grood_keeps_it_after_it_was_loaded(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reloaded, "folder", tmp_path, raising=False)
    assert_sound(Reloaded, [use], without=(FRESH,))


@pytest.mark.parametrize("index", ["HNSW8", "IVF2,Flat"])
def test_what_an_approximate_index_gives_up(index: str) -> None:
    """It is built in the order of the samples, and misses some neighbours."""
    found = outcomes(lambda model: GROOD(model, index=index), ["features"], without=(FRESH,))
    assert {name for name, message in found.items() if message} == {"features-order_of_samples_does_not_matter"}


def test_the_wrapper_of_the_defects_is_sound() -> None:
    assert_sound(Wrapper, ["features", "images"], without=(FRESH,))


def test_detectors_by_others_keep_it() -> None:
    assert_sound(lambda _: NearestMean(), ["features"])
    assert_sound(NearestMeanOfLogits, ["images"])


# --- Defective ones do not -----------------------------------------------------------------------------------------


def names(defects: list[Defect]) -> list[str]:
    return [defect.make.__name__ for defect in defects]


@pytest.mark.parametrize("defect", DEFECTS + VARIANTS, ids=names(DEFECTS + VARIANTS))
def test_each_defect_is_found_by_its_clause(defect: Defect) -> None:
    if defect.clause == "gpu_is_taken" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device on this machine")
    with pytest.raises(BrokenContractError, match=defect.message) as raised:
        dict(detector_checks(defect.make))[f"{defect.use}-{defect.clause}"]()
    (law,) = (clause.law for clause in CLAUSES if clause.name == defect.clause)
    assert str(raised.value).startswith(f"{defect.clause}, on {defect.use}. Seen: ")
    assert f"Required: {law}" in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS, ids=names(DEFECTS))
def test_each_defect_is_found_by_no_other_clause(defect: Defect) -> None:
    """But for those that are listed with it, for a reason."""
    # A fresh process takes seconds: only for the defects that show there alone.
    without = () if defect.clause == FRESH else (FRESH,)
    found = outcomes(defect.make, [defect.use], without)
    failed = {name.partition("-")[2]: message for name, message in found.items() if message}
    skipped = {"gpu_is_taken"} if not torch.cuda.is_available() else set()
    assert failed.keys() == {defect.clause, *defect.also} - skipped, failed


def test_each_clause_has_its_defect() -> None:
    assert {clause.name for clause in CLAUSES} == {defect.clause for defect in DEFECTS}


@pytest.mark.parametrize(
    ("error", "dtype", "message"),
    [(0.0, torch.float64, ""), (1e-3, torch.float64, "a score changed by 1.0e-03 of the largest on the GPU"),
     (0.0, torch.float32, "the scores are torch.float32 on the GPU; float64 is required")],
)  # fmt: skip
def test_the_comparison_with_a_gpu(
    error: float, dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none, the CPU takes its place. The third detector that is made is the one that is used on it."""
    made: list[Any] = []

    class OnGpu(NearestMean):
        def score_features(self, features: Any) -> Any:
            scores = super().score_features(features)
            return (scores * (1 + error)).to(dtype) if made[2:3] == [self] else scores

    def make(_: Any) -> Any:
        made.append(OnGpu())
        return made[-1]

    monkeypatch.setattr(scoring, "_gpu", lambda: "cpu")
    check = dict(detector_checks(make))["features-gpu_is_taken"]
    if message:
        with pytest.raises(BrokenContractError, match=message):
            check()
    else:
        check()


def test_one_that_is_made_once() -> None:
    detector = GROOD(None)
    with pytest.raises(BrokenContractError, match="`make` returned the same detector twice; it must make a new one"):
        check_detector(lambda _: detector, uses=["features"])


# --- The interface -------------------------------------------------------------------------------------------------


def test_results() -> None:
    results = check_detector(lambda _: NearestMean(), uses=["features"], raise_error=False)
    assert [result.name for result in results] == [name for name, _ in detector_checks(NearestMean)]
    statuses = {result.name: (result.status, result.message) for result in results}
    assert statuses["features-fit_is_idempotent"] == ("passed", "")
    assert statuses["images-fit_is_idempotent"] == ("skipped", "`uses` does not name images")
    assert all(result.clause.endswith(".") for result in results)
    assert results[0] == CheckResult(results[0].name, results[0].clause, "passed", "")


def test_a_failure_raises_or_is_a_result() -> None:
    class Silent(NearestMean):
        def fit_features(self, features: Any, labels: Any) -> None:
            super().fit_features(features, labels)

    with pytest.raises(BrokenContractError, match=r"fit_returns_self, on features\. Seen: fit_features returned None"):
        check_detector(lambda _: Silent(), uses=["features"])
    results = check_detector(lambda _: Silent(), uses=["features"], raise_error=False)
    (failed,) = (result for result in results if result.status == "failed")
    assert failed.name == "features-fit_returns_self"
    assert failed.message.startswith("fit_returns_self, on features. Seen: ")
    (skipped,) = (result for result in results if result.name == f"features-{FRESH}")
    assert skipped.status == "skipped"
    assert re.search(r"^another process cannot import .*Silent; define it in a module$", skipped.message)


def test_a_module_that_another_process_cannot_import() -> None:
    module = ModuleType("made_here")
    module.Made = type("Made", (NearestMean,), {"__module__": "made_here", "__qualname__": "Made"})  # type: ignore[attr-defined]
    sys.modules["made_here"] = module
    try:
        check = dict(detector_checks(lambda _: module.Made()))[f"features-{FRESH}"]
        with pytest.raises(unittest.SkipTest, match=r"cannot import Made; .* \(No module named 'made_here'\)"):
            check()
    finally:
        del sys.modules["made_here"]


def test_what_a_detector_cannot_do_is_skipped() -> None:
    class ScoresAlone(NearestMean):
        calibrate_features = predict_features = save = load = None

    results = check_detector(lambda _: ScoresAlone(), uses=["features"])
    reasons = {result.name: result.message for result in results if result.status == "skipped"}
    assert reasons["features-promised_rate_is_kept"] == "ScoresAlone has no method calibrate_features"
    assert reasons["features-file_is_no_pickle"] == "ScoresAlone has no method save"
    assert "features-higher_is_more_ood" not in reasons


def test_predictions_without_p_values() -> None:
    class Flags(NearestMean):
        def predict_features(self, features: Any) -> Any:
            found = super().predict_features(features)
            return type("Flagged", (), {"is_ood": found.is_ood})()

    results = check_detector(lambda _: Flags(), uses=["features"])
    (skipped,) = (result for result in results if result.name == "features-p_values_agree")
    assert (skipped.status, skipped.message) == ("skipped", "its predictions have no p_value")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda _: object(),
            r"object has no method fit_features; a detector for features has at least that\. If it is",
        ),
        (
            lambda model: model.nothing,
            r"make\(None\) raised AttributeError.*; if the detector is not for features, say",
        ),
    ],
)
def test_what_is_no_detector(make: Make, message: str) -> None:
    with pytest.raises(BrokenContractError, match=message):
        check_detector(make, uses=["features"])


def test_results_of_another_kind() -> None:
    class Numpy(NearestMean):
        def score_features(self, features: Any) -> Any:
            return super().score_features(features).numpy()

    class Bare(NearestMean):
        def predict_features(self, features: Any) -> Any:
            return super().predict_features(features).is_ood

    with pytest.raises(BrokenContractError, match="score_features returned ndarray; a tensor is required"):
        check_detector(lambda _: Numpy(), uses=["features"])
    with pytest.raises(
        BrokenContractError, match="predict_features returned Tensor without a tensor `is_ood`; return an"
    ):
        check_detector(lambda _: Bare(), uses=["features"])


@pytest.mark.parametrize("uses", ["features", [], ["text"], ["features", "sound"]])
def test_uses_that_are_none(uses: Any) -> None:
    with pytest.raises(
        GroodError, match=r"uses must name some of \['features', 'images'\], got .*; for one of them pass"
    ):
        check_detector(NearestMean, uses=uses)


def test_a_detector_instead_of_a_function() -> None:
    with pytest.raises(
        GroodError, match=r"make must be a function .* got GROOD\. Pass lambda model: Detector\(model\)"
    ):
        detector_checks(GROOD(None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "check"), [check for check in detector_checks(lambda _: NearestMean()) if check[0].startswith("features")]
)
def test_checks_as_parameters(name: str, check: Callable[[], None]) -> None:
    """As in the documentation: what is skipped is skipped by pytest."""
    assert re.fullmatch(r"(features|images)-[a-z0-9_]+", name)
    check()


def test_the_process_is_left_as_it_was() -> None:
    class Careless(NearestMean):
        def fit_features(self, features: Any, labels: Any) -> Any:
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002
            random.seed(0)
            found = super().fit_features(features, labels)
            torch.set_grad_enabled(False)
            return found

    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    stream = sys.stderr
    results = check_detector(lambda _: Careless(), uses=["features"], raise_error=False)
    assert [result.name for result in results if result.status == "failed"] == ["features-process_is_left_alone"]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert torch.is_grad_enabled()
    assert sys.stderr is stream


def test_no_progress_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        written = ""

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            self.written += text
            return len(text)

        def flush(self) -> None:
            pass

    class Talks(NearestMean):
        def fit_features(self, features: Any, labels: Any) -> Any:
            sys.stderr.write("a terminal" if sys.stderr.isatty() else "no terminal")
            return super().fit_features(features, labels)

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    _, check = detector_checks(lambda _: Talks(), uses=["features"])[0]
    check()
    assert terminal.written == "no terminal"


def test_it_needs_the_core_alone() -> None:
    """torch, numpy and the standard library; safetensors and faiss where a detector uses them."""
    code = (
        "import sys, torch, numpy, tqdm; before = set(sys.modules); import torch_grood.testing;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert set(found.stdout.split()) - set(sys.stdlib_module_names) == {"torch_grood"}


# --- The documentation ---------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "contract.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_lists_every_clause() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [(clause.name, clause.law) for clause in CLAUSES]
    assert all(clause.why for clause in CLAUSES)


def test_the_page_shows_the_detector_of_these_tests() -> None:
    tested = Path(NearestMean.score_features.__code__.co_filename).read_text(encoding="utf-8")
    assert any(tested.endswith(block) for block in blocks())


def test_the_code_of_the_page_runs() -> None:
    # Checked above, and it takes seconds.
    (first, *others), on_grood = blocks(), "check_detector(lambda model: GROOD(model))\n"
    assert first.endswith(on_grood)
    names: dict[str, Any] = {"__name__": "page"}
    for block in (first.removesuffix(on_grood), *others):
        exec(block, names)
    assert {"make", "test_contract", "NearestMean"} <= names.keys()


def test_the_page_quotes_an_error() -> None:
    page = PAGE.read_text(encoding="utf-8")
    quoted = re.search(r"^    BrokenContractError: (.*?) …\n", page, re.DOTALL | re.MULTILINE)
    (defect,) = (defect for defect in DEFECTS if defect.make.__name__ == "TakesTheQuantile")
    with pytest.raises(BrokenContractError) as raised:
        dict(detector_checks(defect.make))["features-promised_rate_is_kept"]()
    assert quoted is not None
    assert without_figures(str(raised.value)).startswith(without_figures(quoted[1]))


def without_figures(text: str) -> str:
    return re.sub(r"0\.\d+ ± 0\.\d+", "…", " ".join(text.split()))
