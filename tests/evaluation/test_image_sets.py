from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from torch_grood.errors import GroodError
from torch_grood.evaluation.image_sets import (
    ResolvedSets,
    data_root,
    find_overlaps,
    overlaps,
    resolve,
    survey,
)
from torch_grood.evaluation.spec import BenchmarkSpec, read_spec

REAL = Path(os.environ.get("GROOD_DATA", "~/.cache/torch-grood/openood")).expanduser()

SPEC = """
name = "toy"
[id.train]
folder = "train"
[id.val]
list = "lists/val.txt"
root = "images"
count = 2
[id.test]
list = "lists/test.txt"
root = "images"
count = 3
[val_ood]
folder = "stones"
[near.weeds]
list = "lists/weeds.txt"
root = "images"
count = 2
archives = ["images"]
[far.noise]
folder = "noise"
count = 2
[archives.images]
folder = "images"
manual = "ask around"
"""

LISTS = {
    "val": ("id/v0.png 0", "id/v1.png 1"),
    "test": ("id/t0.png 0", "id/t1.png 1", "id/t2.png 1"),
    "weeds": ("weeds/w0.png -1", "weeds/w1.png 7"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The toy benchmark, complete; each file's content is its path."""
    files = [f"images/{line.split()[0]}" for lines in LISTS.values() for line in lines]
    files += ["train/rose/0.png", "train/tulip/0.png", "train/tulip/1.png"]
    files += ["stones/deep/0.png", "noise/0.png", "noise/a/1.png"]
    for name in files:
        _write(tmp_path / name, name)
    for name, lines in LISTS.items():
        _write(tmp_path / "lists" / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    _write(tmp_path / "toy.toml", SPEC)
    return tmp_path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _spec(root: Path, old: str = "", new: str = "") -> BenchmarkSpec:
    assert old in SPEC
    _write(root / "toy.toml", SPEC.replace(old, new))
    return read_spec(root / "toy.toml")


def _resolve(root: Path, allow_missing: bool = False) -> ResolvedSets:
    return resolve(read_spec(root / "toy.toml"), root, allow_missing)


def test_a_complete_benchmark(root: Path) -> None:
    found = _resolve(root)
    assert [(one.key, one.group, len(one), one.is_complete) for one in found] == [
        ("train", "id", 3, True),
        ("val", "id", 2, True),
        ("test", "id", 3, True),
        ("val_ood", "val_ood", 1, True),
        ("weeds", "near", 2, True),
        ("noise", "far", 2, True),
    ]
    assert found.train.source.classes == ("rose", "tulip")
    assert found.test.source.labels == (0, 1, 1)
    assert found.near[0].source.paths == (str(root / "images/weeds/w0.png"), str(root / "images/weeds/w1.png"))
    assert found.near[0].source.labels is None, "an OOD set has no classes, whatever its list says"
    assert (found.left_out, found.warnings) == ((), ())


def test_survey_tells_complete_incomplete_absent_and_broken(root: Path) -> None:
    (root / "noise/a/1.png").unlink()
    (root / "stones/deep/0.png").unlink()
    (root / "stones/deep").rmdir()
    (root / "images/id/t1.png").unlink()
    (root / "lists/weeds.txt").unlink()
    reports = {report.spec.key: report for report in survey(read_spec(root / "toy.toml"), root)}
    assert {key: report.status for key, report in reports.items()} == {
        "train": "complete",
        "val": "complete",
        "test": "broken",
        "val_ood": "absent",
        "weeds": "absent",
        "noise": "incomplete",
    }
    assert str(reports["noise"]) == "incomplete (1 of 2)"
    assert str(reports["weeds"]) == f"absent (no list {root}/lists/weeds.txt)"
    assert str(reports["val_ood"]) == f"absent (nothing in {root}/stones)"
    assert "1 of 3 listed files are missing" in reports["test"].reason
    assert f"line 2: {root}/images/id/t1.png" in reports["test"].reason


def test_survey_of_some_sets(root: Path) -> None:
    spec = read_spec(root / "toy.toml")
    assert [report.spec.key for report in survey(spec, root, ["noise", "train"])] == ["train", "noise"]
    with pytest.raises(GroodError, match="toy has no set 'weed'; it has train, val, test, val_ood, weeds, noise"):
        survey(spec, root, ["weed"])


def test_an_absent_set_is_told_from_one_with_holes(root: Path) -> None:
    spec = read_spec(root / "toy.toml")
    (root / "images/weeds/w0.png").unlink()
    assert survey(spec, root, ["weeds"])[0].status == "broken"
    (root / "images/weeds/w1.png").unlink()
    report = survey(spec, root, ["weeds"])[0]
    assert report.status == "absent"
    assert report.reason == f"none of the images that {root}/lists/weeds.txt lists in {root}/images"


def test_all_problems_are_listed_with_the_remedy(root: Path) -> None:
    (root / "noise/0.png").unlink()
    (root / "lists/weeds.txt").unlink()
    (root / "lists/val.txt").write_text("id/v0.png 0\n")
    with pytest.raises(GroodError) as caught:
        _resolve(root)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"toy: 3 of 6 image sets under {root} cannot be used as they are:"
    assert lines[1] == "  val (id): incomplete (1 of 2)"
    assert lines[2].startswith("  weeds (near): absent (no list")
    assert lines[3] == "  noise (far): incomplete (1 of 2)"
    assert f"grood data {root}/toy.toml --root {root}; or go on with what is there (allow_missing" in lines[4]


def test_missing_sets_may_be_allowed_and_stay_marked(root: Path) -> None:
    (root / "noise/0.png").unlink()
    (root / "lists/weeds.txt").unlink()
    (root / "stones/deep/0.png").unlink()
    found = _resolve(root, allow_missing=True)
    assert (found.near, found.val_ood, [one.key for one in found.far]) == ((), None, ["noise"])
    assert [report.spec.key for report in found.left_out] == ["val_ood", "weeds"]
    assert not found.far[0].is_complete
    assert found.warnings == (
        "noise has 1 images instead of 2: its figures cannot be compared with published ones",
        "left out, because they are not there: val_ood, weeds; means of their groups are not comparable",
    )


def test_an_id_set_may_be_short_if_that_is_allowed(root: Path) -> None:
    (root / "lists/test.txt").write_text("id/t0.png 0\nid/t1.png 1\n")
    with pytest.raises(GroodError, match=r"test \(id\): incomplete \(2 of 3\)"):
        _resolve(root)
    assert not _resolve(root, allow_missing=True).test.is_complete


@pytest.mark.parametrize("name", ["val", "test"])
def test_id_sets_must_be_there_in_any_case(root: Path, name: str) -> None:
    (root / f"lists/{name}.txt").unlink()
    with pytest.raises(GroodError, match=rf"{name} \(id\): absent") as caught:
        _resolve(root, allow_missing=True)
    assert "allow_missing" not in str(caught.value)


def test_nothing_broken_is_allowed(root: Path) -> None:
    (root / "images/weeds/w0.png").unlink()
    for allow_missing in (False, True):
        with pytest.raises(GroodError, match=r"weeds \(near\): broken .*1 of 2 listed files are missing") as caught:
            _resolve(root, allow_missing)
        assert "allow_missing" not in str(caught.value)


def test_some_ood_set_must_be_left(root: Path) -> None:
    (root / "lists/weeds.txt").unlink()
    for path in (root / "noise/0.png", root / "noise/a/1.png"):
        path.unlink()
    with pytest.raises(GroodError, match="none of its OOD test sets is under"):
        _resolve(root, allow_missing=True)


@pytest.mark.parametrize("line", ["../secret.png -1", "weeds/../../secret.png -1", "{root}/secret.png -1"])
def test_a_downloaded_list_does_not_lead_out_of_its_folder(root: Path, line: str) -> None:
    _write(root / "secret.png", "secret")
    _write(root / "lists/weeds.txt", f"weeds/w0.png -1\n{line.format(root=root)}\n")
    with pytest.raises(GroodError, match=r"secret\.png', which does not lie under"):
        _resolve(root)
    # A user's own list, which no archive brings, may name what it likes.
    own = _spec(root, 'archives = ["images"]\n')
    assert len(resolve(own, root).near[0]) == 2


def test_dots_in_names_are_no_way_out(root: Path) -> None:
    _write(root / "images/weeds/a..b.png", "dots")
    _write(root / "lists/weeds.txt", "weeds/w0.png -1\nweeds/a..b.png -1\n")
    assert len(_resolve(root).near[0]) == 2


def test_id_images_need_labels(root: Path) -> None:
    _write(root / "lists/test.txt", "id/t0.png 0\nid/t1.png -1\nid/t2.png 1\n")
    with pytest.raises(GroodError, match=r"test \(id\): broken .*line 2: label −1 stands for OOD"):
        _resolve(root, allow_missing=True)


def test_class_folders_of_id_sets_must_agree(root: Path) -> None:
    spec = _spec(root, 'list = "lists/test.txt"\nroot = "images"\ncount = 3', 'folder = "test"')
    _write(root / "test/tulip/0.png", "x")
    with pytest.raises(GroodError, match="class folders of train and test differ: rose only in one"):
        resolve(spec, root)
    _write(root / "test/rose/0.png", "y")
    assert resolve(spec, root).test.source.labels == (0, 1)


@pytest.mark.parametrize(
    ("validation", "test", "sets"),
    [
        ("images/id/v1.png", "images/id/t2.png", "val and test"),
        ("images/id/v1.png", "images/weeds/w0.png", "val and weeds"),
        ("stones/deep/0.png", "noise/a/1.png", "val_ood and noise"),
    ],
)
def test_validation_images_among_test_images_are_refused(root: Path, validation: str, test: str, sets: str) -> None:
    (root / test).write_text((root / validation).read_text())
    with pytest.raises(GroodError, match="toy: 1 validation images are also test images") as caught:
        _resolve(root)
    assert f"{root}/{validation} in {sets}, there as {root}/{test}" in str(caught.value)


def test_the_same_file_in_two_lists_is_refused(root: Path) -> None:
    _write(root / "lists/val.txt", "id/v0.png 0\nid/t1.png 1\n")
    with pytest.raises(GroodError, match=r"  .*/id/t1\.png in val and test\n"):
        _resolve(root)


def test_equal_sizes_are_no_overlap_and_training_images_do_not_count(root: Path) -> None:
    (root / "images/id/v0.png").write_text("aaaa")
    (root / "images/id/t0.png").write_text("aaab")
    (root / "train/rose/0.png").write_text("aaab")
    (root / "noise/0.png").write_text((root / "images/id/t1.png").read_text())
    assert find_overlaps(_resolve(root)) == ()


def test_empty_files_are_no_overlap(root: Path) -> None:
    for name in ("id/v0.png", "id/t1.png"):
        _write(root / "images" / name, "")
    assert find_overlaps(_resolve(root)) == ()


def test_only_files_of_a_shared_size_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _resolve(root)
    images = sorted((root / "images").rglob("*.png"))
    for position, path in enumerate([*images, root / "stones/deep/0.png", *(root / "noise").rglob("*.png")]):
        path.write_text("x" * (position + 1))
    (root / "images/id/t0.png").write_text("y" * (root / "images/id/v1.png").stat().st_size)
    read: list[str] = []
    hash_of = overlaps._hash
    monkeypatch.setattr(overlaps, "_hash", lambda path: read.append(Path(path).name) or hash_of(path))
    assert find_overlaps(found) == ()
    assert sorted(read) == ["t0.png", "v1.png"]


def test_images_listed_twice_are_told(root: Path) -> None:
    _write(root / "lists/weeds.txt", "weeds/w0.png -1\nweeds/w0.png -1\n")
    found = _resolve(root)
    assert [(one.sets, one.first) for one in find_overlaps(found)] == [
        (("weeds", "weeds"), str(root / "images/weeds/w0.png"))
    ]
    assert found.warnings == (f"weeds lists 1 images more than once: {root}/images/weeds/w0.png",)


def test_equal_images_of_a_built_in_benchmark_are_a_warning_but_a_shared_file_is_not(root: Path) -> None:
    (root / "images/id/t2.png").write_text((root / "images/id/v1.png").read_text())
    built_in = dataclasses.replace(read_spec(root / "toy.toml"), home=None)
    warnings = resolve(built_in, root).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("1 test images equal a validation image, as the benchmark has it: ")
    _write(root / "lists/val.txt", "id/v0.png 0\nid/t1.png 1\n")
    with pytest.raises(GroodError, match="1 validation images are also test images"):
        resolve(built_in, root)


def test_an_own_spec_without_roots_stands_among_its_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROOD_DATA", raising=False)
    own, built_in = read_spec(root / "toy.toml"), read_spec("cifar10")
    assert (data_root(own), data_root(built_in)) == (root, Path("data"))
    monkeypatch.setenv("GROOD_DATA", "~/images")
    assert (data_root(own), data_root(built_in)) == (root, Path.home() / "images")
    assert data_root(own, "elsewhere") == data_root(built_in, "elsewhere") == Path("elsewhere")


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "benchmark_imglist/cifar10").is_dir(), reason=f"no images in {REAL}")
def test_cifar10s_lists_have_no_overlap() -> None:
    found = resolve(read_spec("cifar10"), REAL, allow_missing=True)
    assert [len(one) for one in found][:6] == [50_000, 1_000, 9_000, 1_000, 9_000, 7_793]
    assert find_overlaps(found) == ()
