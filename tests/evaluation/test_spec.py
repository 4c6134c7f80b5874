from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from torch_grood.data import PRESETS
from torch_grood.errors import GroodError
from torch_grood.evaluation.spec import BenchmarkSpec, read_spec, spec_names

SMALL = """
name = "flowers"
[id.train]
folder = "flowers/train"
[id.test]
folder = "flowers/test"
[near.weeds]
folder = "weeds"
"""

# OpenOOD v1.5: train, val, test, val_ood, then near and far.
COUNTS = {
    "cifar10": [50_000, 1_000, 9_000, 1_000, 9_000, 7_793, 70_000, 26_032, 5_640, 35_195],
    "cifar100": [50_000, 1_000, 9_000, 972, 10_000, 6_526, 70_000, 26_032, 5_640, 33_773],
    "imagenet200": [258_951, 1_000, 9_000, 1_763, 49_000, 5_879, 10_000, 5_160, 15_869],
    "imagenet": [1_281_167, 5_000, 45_000, 1_763, 49_000, 5_879, 10_000, 5_160, 15_869],
}


def _read(folder: Path, text: str) -> BenchmarkSpec:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return read_spec(path)


def test_the_built_in_benchmarks_are_openoods() -> None:
    assert spec_names() == tuple(sorted(COUNTS))
    for name, counts in COUNTS.items():
        spec = read_spec(name)
        assert (spec.name, spec.home) == (name, None)
        assert [found.count for _, found in spec.sets()] == counts
        assert spec.transform == PRESETS["imagenet" if "imagenet" in name else name]
        assert spec.val is not None
        assert spec.val_ood is not None
        groups = [group for group, _ in spec.sets()]
        assert groups[:6] == ["id", "id", "id", "val_ood", "near", "near"]
        assert set(groups[6:]) == {"far"}


@pytest.mark.parametrize("name", COUNTS)
def test_built_in_sets_lie_in_openoods_layout(name: str) -> None:
    spec = read_spec(name)
    for _, found in spec.sets():
        assert found.list is not None
        assert found.list.startswith(f"benchmark_imglist/{name}/")
        assert found.root in ("images_classic", "images_largescale")
        images = [spec.archive(key) for key in found.archives if key != "benchmark_imglist"]
        assert "benchmark_imglist" in found.archives
        assert [archive.folder.startswith(f"{found.root}/") for archive in images] == [True]
    used = {key for _, found in spec.sets() for key in found.archives}
    assert used == {archive.key for archive in spec.archives}
    for archive in spec.archives:
        assert Path(archive.folder).name == archive.key
        assert (archive.url is None) == (archive.key == "imagenet_1k")


def test_shared_archives_are_the_same_in_all_built_in_specs() -> None:
    known: dict[str, object] = {}
    for name in spec_names():
        for archive in read_spec(name).archives:
            assert known.setdefault(archive.key, archive) == archive


def test_a_small_spec_is_enough(tmp_path: Path) -> None:
    spec = _read(tmp_path, SMALL)
    assert (spec.name, spec.title, spec.reference, spec.transform) == ("flowers", "flowers", None, None)
    assert (spec.val, spec.val_ood, spec.far, spec.archives) == (None, None, (), ())
    assert [(group, found.key, found.folder) for group, found in spec.sets()] == [
        ("id", "train", "flowers/train"),
        ("id", "test", "flowers/test"),
        ("near", "weeds", "weeds"),
    ]
    assert spec.home == tmp_path
    assert spec.digest == hashlib.sha256(SMALL.encode()).hexdigest()
    assert _read(tmp_path, SMALL + "# another file\n").digest != spec.digest


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert _read(tmp_path, f"\ufeff{SMALL}").name == "flowers"


def test_everything_that_a_spec_can_say(tmp_path: Path) -> None:
    spec = _read(
        tmp_path,
        SMALL.replace('"flowers"', '"flowers"\ntitle = "Flowers"\nreference = "me"\ntransform = "imagenet"', 1)
        + """
        [id.val]
        list = "lists/val.txt"
        root = "/data/images"
        [val_ood]
        folder = "stones"
        count = 20
        [far.b]
        folder = "b"
        title = "B"
        note = "odd"
        archives = ["all"]
        [far.a]
        folder = "a"
        [archives.all]
        folder = "x/all"
        url = "https://example.org/all.zip"
        size = 12
        sha256 = "%s"
        """
        % ("0" * 64),
    )
    assert (spec.title, spec.reference, spec.transform) == ("Flowers", "me", PRESETS["imagenet"])
    assert spec.val is not None
    assert (spec.val.list, spec.val.root, spec.val.folder) == ("lists/val.txt", "/data/images", None)
    assert spec.val_ood is not None
    assert (spec.val_ood.key, spec.val_ood.count) == ("val_ood", 20)
    assert [found.key for found in spec.far] == ["b", "a"], "the order is the file's"
    assert (spec.far[0].title, spec.far[0].note, spec.far[0].archives) == ("B", "odd", ("all",))
    assert spec.archive("all").size == 12


def test_sizes_may_be_left_out_of_a_transform(tmp_path: Path) -> None:
    table = '[transform]\ninterpolation = "bilinear"\nmean = [0.5, 0.5, 0.5]\nstd = [1, 1, 1]\n'
    transform = _read(tmp_path, SMALL + table).transform
    assert transform is not None
    assert (transform.resize, transform.crop, transform.std) == (None, None, (1.0, 1.0, 1.0))


ARCHIVE = '[archives.a]\nfolder = "a"\nurl = "https://example.org/a.zip"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "no valid TOML: "),
        ("a = " + "[" * 5000, "no valid TOML: "),
        (SMALL.replace('name = "flowers"', ""), 'the key name is missing; add a line such as name = "flowers"'),
        (SMALL.replace('"flowers"', '"my flowers"', 1), "name = 'my flowers' is not a name; expected letters"),
        (SMALL.replace('"flowers"', '"../x"', 1), "is not a name"),
        (SMALL.replace('"flowers"', "3", 1), "name = 3 is not a text in one line"),
        (SMALL + "[tests.x]\n", "unknown key 'tests'; expected name, title"),
        (SMALL + "[id.extra]\nfolder = 'x'", r"\[id\]: unknown key 'extra'; expected train, val, test"),
        (SMALL + "lists = 'x'", r"\[near\.weeds\]: unknown key 'lists'; expected title, list, root, folder"),
        ('name = "x"', r"the table \[id\] is missing; add \[id.train\] and \[id.test\]"),
        (SMALL.replace("id.test", "id.val"), r"the table \[id.test\] is missing; add it with a list or a folder"),
        (SMALL.replace("[near.weeds]", "[val_ood]"), r"no OOD set to test with; add a table such as \[near.NAME\]"),
        (SMALL + "[far.weeds]\nfolder = 'x'", r"weeds stands for two sets, \[near.weeds\] and \[far.weeds\]"),
        (SMALL + "[far.test]\nfolder = 'x'", r"\[far.test\]: test is the name of another set"),
        (SMALL + '[far."a b"]\nfolder = "x"', r"\[far\]: 'a b' is no name; expected letters"),
        (SMALL + "[far.x]\n", r"\[far.x\]: a set is a list or a folder, this one has neither"),
        (SMALL + "list = 'x'", r"\[near.weeds\]: a set is a list or a folder, this one has both"),
        (SMALL + "root = 'x'", r"\[near.weeds\]: root is what a list's paths are relative to"),
        (SMALL + "count = 0", r"\[near.weeds\]: count = 0 is not a whole number from 1 on"),
        (SMALL + "count = true", r"count = True is not a whole number"),
        (SMALL + "count = 1.5", r"count = 1.5 is not a whole number"),
        (SMALL + 'title = "a\\nb"', "title = 'a.nb' is not a text in one line"),
        (SMALL + 'note = "  "', "note = '  ' is not a text in one line"),
        (SMALL + "archives = 'a'", "archives = 'a' is not names of archives in brackets"),
        (SMALL + "archives = ['a']", r"archives names 'a', but there is no table \[archives.a\]"),
        ('near = 3\nname = "x"\n' + SMALL[18:].partition("[near")[0], r"near = 3 is not a table; write it as \[near\]"),
        ('transform = "cifar"' + SMALL, "transform = 'cifar' is not one of cifar10, cifar100, imagenet"),
        (SMALL + "[transform]\nresize = 32", r"\[transform\]: a transform has the fields .* this one lacks inter"),
        (SMALL + ARCHIVE.replace('"a"', '"../a"'), r"\[archives.a\]: folder = '../a' is not a folder under the data"),
        (SMALL + ARCHIVE.replace('"a"', '"/a"'), "folder = '/a' is not a folder under"),
        (SMALL + ARCHIVE.replace('"a"', "'C:\\a'"), "is not a folder under"),
        (SMALL + ARCHIVE.replace('"a"', '"."'), "is not a folder under"),
        (SMALL + ARCHIVE.replace('"a"', "'a\\..\\..\\b'"), "is not a folder under"),
        (SMALL + ARCHIVE.replace('"a"', '".downloads/a"'), "is not a folder under"),
        (SMALL + ARCHIVE.replace('"a"', '"a/../../b"'), "is not a folder under"),
        (SMALL + ARCHIVE.replace('folder = "a"', ""), "the key folder is missing"),
        (SMALL + ARCHIVE.replace("https:", "file:"), "url = 'file://example.org/a.zip' is not an address that starts"),
        (SMALL + '[archives.a]\nfolder = "a"', "neither url nor manual"),
        (SMALL + ARCHIVE + "sha256 = 'abc'", "sha256 = 'abc' is not 64 hexadecimal digits"),
        (SMALL + ARCHIVE + "size = -1", "size = -1 is not a whole number"),
    ],
)
def test_what_a_spec_says_wrongly_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(GroodError, match=message) as caught:
        _read(tmp_path, text)
    assert str(tmp_path / "mine.toml") in str(caught.value)


def test_files_that_are_no_spec(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"name = \xff")
    (tmp_path / "large.toml").write_bytes(b"#" * 1_000_001)
    for name, message in (
        ("cifar", "there is no such file, and no built-in benchmark of that name; .* one of cifar10, cifar100, imag"),
        ("", "there is a folder"),
        ("binary.toml", r"no UTF-8 text \(byte 7\)"),
        ("large.toml", "larger than 1,000,000 bytes"),
    ):
        with pytest.raises(GroodError, match=message):
            read_spec(tmp_path / name)


def test_the_specs_in_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    small, large = (_read(tmp_path, text) for text in re.findall(r"```toml\n(.*?)```", page, re.DOTALL))
    assert [found.key for _, found in small.sets()] == ["train", "test", "weeds"]
    assert [found.key for _, found in large.sets()] == ["train", "val", "test", "val_ood", "weeds", "cars"]
    for name in spec_names():
        assert f"`{name}`" in page
        for archive in read_spec(name).archives:
            assert archive.key in page
