"""Published figures beside ours: what may be compared, what is found, and the verdict."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_results import SETS, done, methods, results, run
from published_files import read

from torch_grood.errors import GroodError
from torch_grood.evaluation.published import Deviation, deviations_grid, read_published, verdict, verify
from torch_grood.evaluation.results import Accuracy, MethodResult, SetInfo, SpecInfo, comparability


def only(found: list[Deviation], where: str = "near", method: str | None = None) -> Deviation:
    (one,) = (one for one in found if one.where == where and method in (None, one.method))
    return one


# MSP's near AUROC is 88.5 in the results.
@pytest.mark.parametrize(
    ("figure", "extra", "finding"),
    [
        ("88.50", "", "agrees"),
        ("88.5", "", "agrees"),
        ("88.505", "", "off"),
        ("88.50001", "", "off"),
        ("88", "", "agrees"),
        ("89", "", "agrees"),
        ("88.51", "", "off"),
        ("88.51", "tolerance = 0.01", "within tolerance"),
        ("88.52", "tolerance = 0.01", "off"),
        ("88.6", "tolerance = 0.06", "within tolerance"),
        ("88.6", "tolerance = 0.04", "off"),
        ('"88.70 ± 0.10"', "", "within std"),
        ('"88.71 ± 0.10"', "", "off"),
        ('"88.71 ± 0.10"', "within_std = 2.1", "within std"),
        ('"88.70 ± 0.00"', "", "off"),
        ('"88.30 ± 0.10"', "", "within std"),
        ('"88.29 ± 0.10"', "", "off"),
        ('"88.50 ± 0.10"', "", "agrees"),
    ],
)
def test_findings(tmp_path: Path, figure: str, extra: str, finding: str) -> None:
    found = only(verify(results(), read(tmp_path, f"{extra}\n[figures.msp]\nnear = {figure}")))
    assert found.finding == finding
    assert found.ours is not None
    assert found.ours.mean == pytest.approx(88.5)
    assert found.difference == pytest.approx(88.5 - float(figure.strip('"').partition(" ")[0]))
    assert verdict([found]).is_confirmed == (finding != "off")


def test_ours_is_the_mean_over_the_runs(tmp_path: Path) -> None:
    published = read(tmp_path, "[figures.msp]\nnear = 88.50\n[figures.msp.sets]\ncifar100 = 88.00\ntin = 88.9")
    found = verify(results(3), published)
    assert [(one.scope, one.where, one.finding) for one in found] == [
        ("group", "near", "agrees"),
        ("set", "cifar100", "agrees"),
        ("set", "tin", "off"),
    ]
    assert found[0].ours is not None
    assert found[0].ours.std == pytest.approx(0.1224744871)
    assert found[0].ours.n == 3
    assert found[2].reason == "by +0.10"


def test_groups_and_sets_that_are_not_whole_are_not_compared(tmp_path: Path) -> None:
    published = read(tmp_path, "[figures.msp]\nfar = 92.00\nsets = { mnist = 92.00, svhn = 91.00, lsun = 80.00 }")
    found = {one.where: one for one in verify(results(), published)}
    assert {one.finding for one in found.values()} == {"not comparable", "missing"}
    assert found["far"].reason == "MNIST: 10,000 of 70,000 images; SVHN: absent (no such folder)"
    assert found["far"].difference == pytest.approx(0)
    assert (found["mnist"].finding, found["mnist"].reason) == ("not comparable", "MNIST: 10,000 of 70,000 images")
    assert (found["svhn"].finding, found["svhn"].reason) == ("missing", "SVHN: absent (no such folder)")
    assert (found["lsun"].finding, found["lsun"].reason) == ("missing", "the results have no set lsun")
    assert verdict(list(found.values())) == (
        False,
        "nothing could be compared: MNIST: 10,000 of 70,000 images; SVHN: absent (no such folder); "
        "4 could not be compared",
    )


def test_other_sets_are_not_compared(tmp_path: Path) -> None:
    text = "[sets]\nnear = { %s }\n[figures.msp]\nnear = 88.50\nsets = { tin = 89.00 }"
    same = verify(results(), read(tmp_path, text % "tin = 7793, cifar100 = 0"))
    assert [one.finding for one in same] == ["agrees", "agrees"]
    other = verify(results(), read(tmp_path, text % "tin = 7793"))
    assert only(other).reason == "the near sets are cifar100, tin here, tin there"
    assert only(other, "tin").finding == "agrees"
    count = verify(results(), read(tmp_path, text % "tin = 10000, cifar100 = 9000"))
    assert [one.reason for one in count] == ["tin has 7,793 images here, 10,000 there"] * 2
    with pytest.raises(GroodError, match="theirs has figures of the benchmark cifar10, and the results are of flowers"):
        verify(replace(results(), spec=SpecInfo("flowers", "Flowers", "0")), read(tmp_path, text % "tin = 1"))


def test_an_id_set_that_is_not_whole_hinders_each_set(tmp_path: Path) -> None:
    sets = (*SETS[:2], SetInfo("test", "CIFAR-10 test", "test", 900, 9_000, "incomplete"), *SETS[3:])
    msp = methods()[0]
    msp = replace(msp, groups={group: replace(means, comparable=False) for group, means in msp.groups.items()})
    found = results(sets=sets, comparable=comparability(sets), runs=(run(methods=(msp,)),), comparisons=())
    deviation = only(verify(found, read(tmp_path, "[figures.msp]\nsets = { tin = 89.00 }")), "tin")
    assert (deviation.finding, deviation.reason) == ("not comparable", "ID CIFAR-10 test: 900 of 9,000 images")


def test_other_checkpoints_are_not_compared(tmp_path: Path) -> None:
    figures = "[figures.msp]\nnear = 88.50\n[figures.knn]\nnear = 80.00\nid_accuracy = 94.00"
    found = verify(results(), read(tmp_path, f'id_accuracy = "95.2 ± 0.1"\n{figures}'))
    assert only(found, method="MSP").finding == "agrees"
    assert only(found, method="KNN").finding == "not comparable"
    assert only(found, method="KNN").reason == (
        "other checkpoints: ID accuracy is 95.00 % here, 94.00 % there (their ResNet-18)"
    )
    other = verify(results(), read(tmp_path, f'id_accuracy = "95.3 ± 0.1"\n{figures}'))
    assert only(other, method="MSP").finding == "not comparable"
    assert not verdict(other).is_confirmed
    exact = verify(results(), read(tmp_path, f"id_accuracy = 95.01\ntolerance = 0.01\n{figures}"))
    assert only(exact, method="MSP").finding == "agrees"


def test_checkpoints_are_known_by_their_hash(tmp_path: Path) -> None:
    ours = [one.weights_sha256 for one in results(3).runs]
    # The accuracy need not agree, if it is the same file.
    text = 'id_accuracy = 50\nweights_sha256 = ["%s", "%s"]\n[figures.msp]\nnear = 88.50'
    published = read(tmp_path, text % (ours[0], ours[1]))
    assert only(verify(results(1), published)).finding == "agrees"
    found = only(verify(results(3), published))
    assert (found.finding, found.reason) == ("not comparable", "other checkpoints: theirs are their ResNet-18")


def test_methods_are_found_by_name_and_configuration(tmp_path: Path) -> None:
    text = """\
[figures.grood]
near = 91.00
[figures.with-ood]
method = "grood"
config = { outliers = "ood" }
near = 92.00
[figures.with-noise]
method = "grood"
config = { outliers = "noise" }
near = 92.00
[figures.MSP]
near = 88.50
"""
    found = verify(results(), read(tmp_path, text))
    assert [(one.method, one.theirs.value, one.finding) for one in found] == [
        ("GROOD", 91.0, "agrees"),
        # Not the best of several variants is taken, but the first.
        ("GROOD (outliers = ood)", 91.0, "not comparable"),
        ("GROOD (outliers = ood)", 92.0, "agrees"),
        ("with-noise", 92.0, "missing"),
        # Names are those of the command line.
        ("MSP", 88.5, "missing"),
    ]
    assert found[1].reason.startswith("GROOD is judged")
    assert verdict(found) == (
        True,
        "all 2 comparable figures agree; 1 could not be compared; 2 are of methods that were not run",
    )


def test_a_method_that_did_not_run_is_missing_with_its_reason(tmp_path: Path) -> None:
    found = verify(results(), read(tmp_path, "[figures.odin]\nnear = 80.00\n[figures.mds]\nnear = 80.00"))
    assert [(one.method, one.finding, one.reason) for one in found] == [
        ("ODIN", "missing", "unavailable: it needs the network, and there are features only"),
        ("mds", "missing", "not among the methods of the results"),
    ]
    assert not verdict(found).is_confirmed


def test_a_method_that_failed_in_a_run_is_not_compared(tmp_path: Path) -> None:
    failed = MethodResult("msp", "MSP", {}, "failed", "out of memory")
    found = results(runs=(run(0), run(1, methods=(failed,))), comparisons=())
    deviation = only(verify(found, read(tmp_path, "[figures.msp]\nnear = 88.50")))
    assert (deviation.finding, deviation.reason) == ("not comparable", "it is done in 1 of 2 runs")


def test_the_verdict_names_the_worst(tmp_path: Path) -> None:
    text = '[figures.msp]\nnear = 88.40\nsets = { tin = 89.00 }\n[figures.knn]\nnear = "92.00 ± 0.10"\nfar = 1'
    found = verify(results(), read(tmp_path, text))
    assert verdict(found) == (
        False,
        "2 of 3 comparable figures are off, most of all KNN near by -1.05; 1 could not be compared",
    )
    assert verdict([]) == (False, "nothing could be compared")


def test_the_table(tmp_path: Path) -> None:
    text = '[figures.msp]\nnear = 88.40\nfar = 92\n[figures.knn]\nnear = "91.00 ± 0.10"\n[figures.mds]\nnear = 1'
    grid = deviations_grid(verify(results(), read(tmp_path, text)))
    assert (
        grid.to_markdown()
        == """\
**Held against published AUROC, in %**

| method | OOD | ours | published | difference | finding |
| --- | ---: | ---: | ---: | ---: | --- |
| **MSP** | **near** | **88.50** | **88.40** | **+0.100** | **off: by +0.10** |
| MSP | far | 92.00 | 92 | +0.000 | not comparable: MNIST: 10,000 of 70,000 images; SVHN: absent (no such folder) |
| KNN | near | 90.95 | 91.00 ± 0.10 | -0.050 | within std: 0.5 of 2 std |
"""
    )
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=120, color_system=None).print(grid.to_rich())
    assert "within std: 0.5 of 2 std" in stream.getvalue()


def test_three_retrained_networks_against_the_leaderboard() -> None:
    """A run as a user would have it: the same recipe, another seed; MSP as it should be, KNN wrong."""
    msp = done("msp", "MSP", 0.8810, 0.8790, 0.9073)
    knn = done("knn", "KNN", 0.85, 0.86, 0.9296)
    found = results(runs=tuple(run(seed, methods=(msp, knn)) for seed in range(3)), comparisons=())
    deviations = verify(found, read_published("openood-v1.5-cifar10"))
    assert only(deviations, "near", "MSP").finding == "within tolerance"
    assert only(deviations, "near", "KNN").finding == "off"
    # Of the far sets one is absent and another one cut.
    assert only(deviations, "far", "MSP").finding == "not comparable"
    assert verdict(deviations).text.startswith("1 of 2 comparable figures are off, most of all KNN near by -5.14")
    # A smaller network has another accuracy, and says nothing.
    small = replace(found, runs=tuple(replace(one, accuracy=Accuracy(0.925)) for one in found.runs))
    assert verdict(verify(small, read_published("openood-v1.5-cifar10"))).text.startswith(
        "nothing could be compared: other checkpoints: ID accuracy is 92.50 % here, 95.06 ± 0.30 % there"
    )
