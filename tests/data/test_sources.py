from __future__ import annotations

from pathlib import Path

import pytest

from torch_grood.data import read_source
from torch_grood.errors import GroodError


def _touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def _relative(paths: tuple[str, ...], root: Path) -> list[str]:
    return [Path(path).relative_to(root).as_posix() for path in paths]


def test_class_folder_has_image_folders_order(tmp_path: Path) -> None:
    _touch(tmp_path, "b/2.png", "b/10.JPG", "b/sub/x.jpeg", "b/sub-a/y.png", "a/1.webp", "C/z.bmp")
    source = read_source(tmp_path)
    assert source.classes == ("C", "a", "b")
    assert _relative(source.paths, tmp_path) == [
        "C/z.bmp", "a/1.webp", "b/10.JPG", "b/2.png", "b/sub/x.jpeg", "b/sub-a/y.png",
    ]  # fmt: skip
    assert source.labels == (0, 1, 2, 2, 2, 2)
    datasets = pytest.importorskip("torchvision.datasets")
    theirs = datasets.ImageFolder(tmp_path)
    assert tuple(theirs.classes) == source.classes
    assert list(zip(source.paths, source.labels, strict=True)) == theirs.samples


def test_hidden_files_are_left_out_and_others_counted(tmp_path: Path) -> None:
    _touch(tmp_path, "a/1.png", "a/._1.png", "a/.DS_Store", "a/Thumbs.db", "a/notes.txt", ".cache/x.png", "README")
    source = read_source(tmp_path)
    assert (_relative(source.paths, tmp_path), source.classes, source.ignored) == (["a/1.png"], ("a",), 3)


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    _touch(tmp_path, "2.png", "1.png", "x.txt")
    source = read_source(tmp_path)
    assert _relative(source.paths, tmp_path) == ["1.png", "2.png"]
    assert (source.labels, source.classes, source.ignored) == (None, None, 1)


def test_without_labels_folders_of_any_shape_do(tmp_path: Path) -> None:
    _touch(tmp_path, "2.png", "deep/er/1.png", "empty/notes.txt")
    source = read_source(tmp_path, labels="none")
    assert _relative(source.paths, tmp_path) == ["2.png", "deep/er/1.png"]
    assert source.labels is None


def test_loops_of_links_end(tmp_path: Path) -> None:
    _touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a", target_is_directory=True)
    source = read_source(tmp_path)
    assert sorted(_relative(source.paths, tmp_path)) == ["a/1.png", "a/loop/b/2.png", "b/2.png"]
    assert len(read_source(tmp_path, labels="none")) == 2


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        ([], "auto", "holds no image"),
        (["a.txt", "b.txt"], "auto", "holds no image .* its 2 other files are left out"),
        (["a/x.txt"], "auto", "holds no image"),
        ([], "none", "holds no image"),
        (["a/1.png", "b/x.txt", "c/y.txt"], "auto", r"no image in 2 of 3 class folders \(b, c\)"),
        (["1.png", "a/1.png"], "auto", "both images .* and folders"),
        (["1.png"], "required", "flat folder of images, without labels"),
        (["train/a/1.png", "val/a/1.png"], "required", "look like splits, not classes; pass one of them: .*train"),
    ],
)
def test_bad_folders(tmp_path: Path, files: list[str], labels: str, message: str) -> None:
    _touch(tmp_path, *files)
    with pytest.raises(GroodError, match=message):
        read_source(tmp_path, labels=labels)  # type: ignore[arg-type]


def _list(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_list_with_spaces_tabs_and_blank_lines(tmp_path: Path) -> None:
    _touch(tmp_path, "a b/my cat 7.png", "ü.png", "c.png", "d.png")
    path = _list(tmp_path / "x.txt", "\ufeffa b/my cat 7.png 3\n\nü.png\t-1\r\nc.png   0  \nd.png +2")
    source = read_source(path)
    assert _relative(source.paths, tmp_path) == ["a b/my cat 7.png", "ü.png", "c.png", "d.png"]
    assert source.labels == (3, -1, 0, 2)
    assert source.classes is None
    assert read_source(path, labels="none").labels is None


def test_list_of_paths(tmp_path: Path) -> None:
    _touch(tmp_path, "my cat 7.png", "b.png")
    path = _list(tmp_path / "x.lst", f"my cat 7.png\n{tmp_path / 'b.png'}\n")
    source = read_source(path)
    assert (_relative(source.paths, tmp_path), source.labels) == (["my cat 7.png", "b.png"], None)


def test_root_is_found_in_openoods_layout(tmp_path: Path) -> None:
    _touch(tmp_path, "images_classic/cifar10/a.png", "images_largescale/inet/b.png")
    small = _list(tmp_path / "benchmark_imglist/cifar10/test.txt", "cifar10/a.png 0\n")
    large = _list(tmp_path / "benchmark_imglist/inet/test.txt", "inet/b.png 0\n")
    assert read_source(small).paths == (str(tmp_path / "images_classic/cifar10/a.png"),)
    assert read_source(large).paths == (str(tmp_path / "images_largescale/inet/b.png"),)


def test_nearest_root_wins_and_an_explicit_one_beats_all(tmp_path: Path) -> None:
    _touch(tmp_path, "a.png", "lists/a.png", "elsewhere/a.png")
    path = _list(tmp_path / "lists/x.txt", "a.png 0\n")
    assert read_source(path).paths == (str(tmp_path / "lists/a.png"),)
    assert read_source(path, root=tmp_path / "elsewhere").paths == (str(tmp_path / "elsewhere/a.png"),)
    with pytest.raises(GroodError, match="1 of 1 listed files are missing"):
        read_source(path, root=tmp_path / "nowhere")


def test_a_missing_first_file_does_not_mislead_the_search(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"images_classic/{i}.png" for i in range(1, 10)))
    path = _list(tmp_path / "benchmark_imglist/x/l.txt", "".join(f"{i}.png 0\n" for i in range(10)))
    with pytest.raises(
        GroodError, match=r"1 of 10 listed files are missing under .*images_classic \(line 1: .*/0\.png\)"
    ):
        read_source(path)


def test_missing_files_are_counted_and_five_shown(tmp_path: Path) -> None:
    path = _list(tmp_path / "x.txt", "".join(f"{i}.png 0\n" for i in range(9)))
    with pytest.raises(
        GroodError, match=r"9 of 9 .*line 1: .*line 5: [^;]*; …\); pass the folder .* \(--root\)"
    ) as caught:
        read_source(path)
    assert "line 6" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "labels", "message"),
    [
        ("", "auto", "lists no image"),
        ("\n \n", "auto", "lists no image"),
        ("a.png 0\nb.png\n", "auto", r"line 2: no label at the end of 'b\.png', unlike line 1"),
        ("a.png\nb.png 0\n", "auto", r"line 1: no label at the end of 'a\.png', unlike line 2"),
        ("a.png\n", "required", "line 1: no label"),
        ("a.png 0\nb.png -1\n", "required", "line 2: label −1 stands for OOD"),
        ("a.png 0\n7\n", "auto", "line 2: a label but no path"),
        ("a.png -2\n", "auto", "line 1: -2 is no class"),
        ("a.png 99999999999999999999999\n", "auto", "line 1: 9+ is no class"),
        ("a.png 0.5\nb.png 1\n", "auto", "line 1: no label"),
        (b"a.png 0\n\xff\xfe.png 1\n", "auto", r"no UTF-8 text \(byte 8\)"),
        (b"a" * 5000 + b"\0 1\n", "auto", "line 1: a NUL character"),
    ],
)
def test_broken_lists(tmp_path: Path, text: str | bytes, labels: str, message: str) -> None:
    _touch(tmp_path, "a.png", "b.png")
    with pytest.raises(GroodError, match=message):
        read_source(_list(tmp_path / "x.txt", text), labels=labels)  # type: ignore[arg-type]


def test_single_and_several_images(tmp_path: Path) -> None:
    _touch(tmp_path, "a.png", "b.jpg", "c/d.png")
    a, b, c = (tmp_path / name for name in ("a.png", "b.jpg", "c"))
    assert read_source(a).paths == (str(a),)
    assert read_source([a]).paths == (str(a),)
    assert read_source([b, a, c]).paths == (str(b), str(a), str(c / "d.png"))
    binary = tmp_path / "photo.gif"
    binary.write_bytes(b"GIF89a\0\0")
    assert read_source(binary).paths == (str(binary),)


def test_sources_that_cannot_be(tmp_path: Path) -> None:
    _touch(tmp_path, "a.png")
    for path, options, message in (
        (tmp_path / "absent", {}, "no such file or folder"),
        ([], {}, "no images given"),
        (tmp_path / "a.png", {"labels": "required"}, "single image, without a label"),
        ([tmp_path, tmp_path], {"labels": "required"}, "labels cannot be joined from 2 sources"),
        (tmp_path, {"root": tmp_path}, "a root is only meant for image lists"),
    ):
        with pytest.raises(GroodError, match=message):
            read_source(path, **options)
