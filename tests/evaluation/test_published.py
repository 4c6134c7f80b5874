"""Published figures: the files that come with the package, what is read, and what a comparison says."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from benchmark_results import SETS, done, methods, results, run

from torch_grood.errors import GroodError
from torch_grood.evaluation.published import (
    Deviation,
    Published,
    deviations_grid,
    published_names,
    read_published,
    verdict,
    verify,
)
from torch_grood.evaluation.results import Accuracy, MethodResult, SetInfo, SpecInfo, comparability
from torch_grood.evaluation.spec import read_spec

HEAD = """\
name = "theirs"
benchmark = "cifar10"
source = "their paper"
checkpoints = "their ResNet-18"
"""
# Near and far AUROC by CIFAR-10, CIFAR-100, ImageNet-200 and ImageNet-1k (ResNet-50), typed from another copy of the
# leaderboard than the files were made from.
LEADERBOARD = {
    "msp": "88.03 90.73 80.27 77.76 83.34 90.13 76.02 85.23",
    "mls": "87.52 91.10 81.05 79.67 82.90 91.11 76.46 89.57",
    "energy": "87.58 91.21 80.91 79.77 82.50 90.86 75.89 89.47",
    "knn": "90.64 92.96 80.18 82.40 81.57 93.16 71.10 90.18",
    "rmds": "89.80 92.20 80.15 82.92 82.57 88.06 76.99 86.38",
    "vim": "88.68 93.48 74.98 81.70 78.68 91.26 72.08 92.68",
    "gen": "88.20 91.35 81.31 79.68 83.68 91.36 76.85 89.76",
    "fdbd": "90.42 93.16 81.26 79.85 84.27 93.45 76.63 92.77",
    "nci": "88.86 91.27 81.03 81.32 83.50 93.71 78.69 95.53",
    "ash": "75.27 78.49 78.20 80.58 82.38 93.90 78.17 95.74",
    "scale": "82.55 86.39 80.99 81.42 84.84 93.98 81.36 96.53",
}
BENCHMARKS = ("cifar10", "cifar100", "imagenet200", "imagenet")


def read(tmp_path: Path, text: str, head: str = HEAD) -> Published:
    path = tmp_path / "theirs.toml"
    path.write_text(head + text, encoding="utf-8")
    return read_published(path)


def only(found: list[Deviation], where: str = "near", method: str | None = None) -> Deviation:
    (one,) = (one for one in found if one.where == where and method in (None, one.method))
    return one


@pytest.mark.parametrize("name", published_names())
def test_the_files_of_the_package_fit_the_specs_and_methods(name: str) -> None:
    from torch_grood.evaluation.methods import METHODS

    found = read_published(name)
    assert found.name == name
    spec = read_spec(found.benchmark)
    ours = {group: {one.key: one.count for one in getattr(spec, group)} for group in ("near", "far")}
    assert ours == {group: dict(sets) for group, sets in found.sets.items()}
    assert {method.method for method in found.methods.values()} <= set(METHODS)
    assert found.id_accuracy is not None
    for method in found.methods.values():
        for group, figure in method.groups.items():
            assert group in ("near", "far")
            assert 35 < figure.value < 98
            assert figure.decimals == (1 if (name, method.method) == ("openood-v1.5-imagenet", "grood") else 2)
            # Every other figure of these is a mean over three checkpoints.
            assert (figure.std is not None) == (
                found.benchmark != "imagenet"
                and method.method != "grood"
                and (found.benchmark == "imagenet200" or method.method not in ("fdbd", "nci"))
            )


@pytest.mark.parametrize("method", LEADERBOARD)
def test_the_leaderboard(method: str) -> None:
    expected = LEADERBOARD[method].split()
    found = [read_published(f"openood-v1.5-{name}").methods[method].groups for name in BENCHMARKS]
    printed = [f"{groups[group].value:.2f}" for groups in found for group in ("near", "far")]
    assert printed == expected


def test_what_grood_claims() -> None:
    claims = [read_published(f"openood-v1.5-{name}").methods.get("grood") for name in BENCHMARKS]
    assert [claim and {group: str(figure) for group, figure in claim.groups.items()} for claim in claims] == [
        {"near": "91.16"}, {"far": "84.44"}, None, {"near": "78.9"},
    ]  # fmt: skip
    assert all("README" in claim.source for claim in claims if claim)


def test_a_file_is_read(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        """\
id_accuracy = "95.0 ± 0.3"
tolerance = 0.05
within_std = 3
weights_sha256 = ["%s"]
[sets]
near = { cifar100 = 9000, tin = 0 }
[figures.knn]
near = "90.6 +- 0.25"
far = "92.960 +/- 0.1"
sets = { tin = 91 }
[figures.tuned]
method = "grood"
config = { outliers = "noise", n = 100, lam = 0.90 }
near = 90.10
source = "elsewhere"
note = "lucky"
"""
        % ("0" * 64),
    )
    assert (found.name, found.benchmark, found.source, found.tolerance, found.within_std) == (
        "theirs", "cifar10", "their paper", 0.05, 3.0,
    )  # fmt: skip
    assert found.sets == {"near": {"cifar100": 9_000, "tin": 0}}
    assert found.weights_sha256 == {"0" * 64}
    knn, tuned = found.methods["knn"], found.methods["tuned"]
    assert (knn.method, knn.groups["near"], knn.groups["far"]) == ("knn", (90.6, 0.25, 1), (92.96, 0.1, 3))
    assert knn.sets == {"tin": (91.0, None, 0)}
    assert knn.id_accuracy == (95.0, 0.3, 1)
    # A trailing zero of a number counts.
    assert tuned.groups["near"] == (90.1, None, 2)
    assert str(tuned.groups["near"]) == "90.10"
    assert (tuned.method, tuned.config) == ("grood", {"outliers": "noise", "n": 100, "lam": 0.9})
    assert (tuned.source, tuned.checkpoints, tuned.note) == ("elsewhere", "their ResNet-18", "lucky")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no figures; add a table such as"),
        ("[figures.knn]", r"\[figures.knn\] has no figure; expected near, far or sets"),
        ("figures = 1", "figures is no table"),
        ("[figures]\nknn = 90", "knn is no table"),
        ("[figures.knn]\nnear = true", r"\[figures.knn\] near is True; expected per cent"),
        ("[figures.knn]\nnear = nan", "near is NaN; expected per cent"),
        ("[figures.knn]\nnear = inf", "near is Infinity; expected per cent"),
        ("[figures.knn]\nnear = -1.0", "near is -1.0; expected per cent"),
        ("[figures.knn]\nnear = 100.1", "near is 100.1; expected per cent"),
        ("[figures.knn]\nnear = 9e1", r"near is 9E\+1; expected per cent"),
        ('[figures.knn]\nnear = "90 ± x"', "near is 90 ± x; expected per cent"),
        ('[figures.knn]\nnear = ["90"]', r"near is \['90'\]; expected per cent"),
        ("[figures.knn]\nnaer = 90", r"\[figures.knn\] unknown key 'naer'; expected method, config, near"),
        ("[figures.knn]\nnear = 90\nmethod = ''", "method is ''; expected a text"),
        ("[figures.knn]\nnear = 90\n[figures.knn.config]\nk = [1]", r"\[figures.knn.config\] k is \[1\]"),
        ("[figures.knn]\nnear = 90\n[figures.knn.config]\nk = 1e999", "k is 1E"),
        ("[figures.knn]\nnear = 90\n[figures.knn.sets]\ntin = -1", r"\[figures.knn.sets\] tin is -1"),
        ("tolerance = -1\n[figures.knn]\nnear = 90", "tolerance is -1; expected a number, 0 to 100"),
        ("tolerance = nan\n[figures.knn]\nnear = 90", "tolerance is NaN; expected a number"),
        ("within_std = true\n[figures.knn]\nnear = 90", "within_std is True; expected a number"),
        ("tolerence = 1\n[figures.knn]\nnear = 90", "unknown key 'tolerence'; expected name, benchmark"),
        ("weights_sha256 = 'x'\n[figures.knn]\nnear = 90", "no list of SHA-256"),
        ("[sets]\nmiddle = {}\n[figures.knn]\nnear = 90", r"\[sets\] unknown key 'middle'; expected near, far"),
        ("[sets]\nnear = { a = -1 }\n[figures.knn]\nnear = 90", r"\[sets.near\] a is -1; expected a number of images"),
        ("[figures.knn]\nnear = 90\nnear = 91", "is no TOML file"),
        ("[figures.knn", "is no TOML file"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GroodError, match=message) as error:
        read(tmp_path, text)
    assert "theirs.toml" in str(error.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    for key in ("name", "benchmark", "source", "checkpoints"):
        head = "".join(line for line in HEAD.splitlines(keepends=True) if not line.startswith(key))
        with pytest.raises(GroodError, match=f"the key {key} is missing"):
            read(tmp_path, "[figures.knn]\nnear = 90", head)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GroodError, match=r"no published figures 'openood-v1.5-cifar11'; did you mean openood-v1.5-cif"):
        read_published("openood-v1.5-cifar11")
    with pytest.raises(GroodError, match=r"there are openood-v1.5-cifar10, openood.* Or give a TOML file"):
        read_published("zzz")
    with pytest.raises(GroodError, match=r"absent\.toml cannot be read: No such file"):
        read_published(tmp_path / "absent.toml")
    with pytest.raises(GroodError, match="cannot be read"):
        read_published(tmp_path)
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(GroodError, match="larger than 1 MiB"):
        read_published(large)
    large.write_bytes(b"x = \xff")
    with pytest.raises(GroodError, match="is no TOML file"):
        read_published(large)
    large.write_bytes(b"x = " + b"[" * 50_000)
    with pytest.raises(GroodError, match="is no TOML file"):
        read_published(large)


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
    assert found[1].reason.startswith("GROOD is judged, given before this one")
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
