"""Published figures: the files that come with the package, and what is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from published_files import HEAD, read

from torch_grood.errors import GroodError
from torch_grood.evaluation.published import published_names, read_published
from torch_grood.evaluation.spec import read_spec

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
