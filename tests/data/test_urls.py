"""Sources at URLs: the same images, labels and complaints as of a folder here."""

from __future__ import annotations

import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fsspec")

import fsspec

from grey import png
from torch_grood.data import BadImageError, ImageSource, ImageTransform, image_loader, read_source
from torch_grood.data import urls as urls_module
from torch_grood.data.pixels import PixelLoader
from torch_grood.data.training_files import training_file
from torch_grood.data.urls import content_of, joined, parent_of, stamp_of_file, stamps_of
from torch_grood.errors import GroodError

AS_IT_IS = ImageTransform(None, 4, "bilinear", (0.5,) * 3, (0.5,) * 3)
Mirror = Callable[[Path], str]


def write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir()
        else:
            (root / name).write_bytes(png(number))
    return root


@pytest.fixture(params=["file", "memory"])
def mirror(request: pytest.FixtureRequest) -> Iterator[Mirror]:
    """Gives a folder's URL, at which the same files lie."""
    system = fsspec.filesystem("memory")
    made: list[str] = []

    def at(folder: Path) -> str:
        if request.param == "file":
            return f"file://{folder}"
        made.append(f"/bucket-{random.randrange(10**9)}")
        system.mkdir(made[-1])
        for path in sorted(folder.rglob("*")):
            there = f"{made[-1]}/{path.relative_to(folder).as_posix()}"
            if path.is_dir():
                system.makedirs(there, exist_ok=True)
            else:
                system.pipe_file(there, path.read_bytes())
        return f"memory://{made[-1]}"

    yield at
    for root in made:
        system.rm(root, recursive=True)


def below(source: ImageSource, base: str) -> list[str]:
    return [path.removeprefix(base).lstrip("/") for path in source.paths]


FILES = (
    *("b/2.png", "b/10.PNG", "b/sub/x.png", "b/sub-a/y.png", "b/Thumbs.db", "a/1.png", "C/z.png"),
    *("a/._1.png", ".cache/a.png", "notes.txt"),
)


@pytest.mark.parametrize("labels", ["required", "auto", "none"])
def test_a_folder_at_a_url_is_that_folder(labels: Any, mirror: Mirror, tmp_path: Path) -> None:
    here = read_source(write(tmp_path / "here", *FILES), labels=labels)
    url = mirror(tmp_path / "here")
    there = read_source(url, labels=labels)
    assert below(there, url) == below(here, str(tmp_path / "here"))
    assert (there.labels, there.classes, there.ignored) == (here.labels, here.classes, here.ignored)
    assert here.classes == (None if labels == "none" else ("C", "a", "b"))
    assert there.stamps is not None
    assert len(there.stamps) == len(set(there.paths)) == len(there)
    assert all(there.image(i).tobytes() == here.image(i).tobytes() for i in range(len(here)))
    assert pickle.loads(pickle.dumps(there)) == there
    assert there.absolute() == there
    assert list(there.places()) == list(there.paths)


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        (["a.txt", "b.txt"], "auto", "holds no image .* its 2 other files are left out"),
        (["a/1.png", "b/x.txt", "c/y.txt"], "auto", r"no image in 2 of 3 class folders \(b, c\)"),
        (["a/1.png", "b/"], "auto", r"no image in 1 of 2 class folders \(b\)"),
        (["1.png", "a/1.png"], "auto", "both images .* and folders"),
        (["1.png"], "required", "flat folder of images, without labels"),
        (
            ["train/a/1.png", "val/a/1.png"],
            "required",
            "look like splits, not classes; pass one of them: .*://.*/train",
        ),
    ],
)
def test_bad_folders(files: list[str], labels: Any, message: str, mirror: Mirror, tmp_path: Path) -> None:
    write(tmp_path / "here", *files)
    with pytest.raises(GroodError, match=message):
        read_source(mirror(tmp_path / "here"), labels=labels)


def test_a_list_here_names_urls_and_paths_below_a_url(mirror: Mirror, tmp_path: Path) -> None:
    url = mirror(write(tmp_path / "images", "a.png", "c d/b.png"))
    path = tmp_path / "list.txt"
    path.write_text(f"{url}/a.png 3\nc d/b.png 1\n")
    source = read_source(path, root=url)
    assert (below(source, url), source.labels) == (["a.png", "c d/b.png"], (3, 1))
    assert source.image(1).getpixel((0, 0)) == (1, 1, 1)
    path.write_text(f"{url}/a.png 3\n{url}/gone.png 3\nc d/gone.png 1\n")
    with pytest.raises(GroodError, match=r"2 of 3 listed files are missing .*line 2: .*line 3: "):
        read_source(path, root=url)
    # Somebody else's list does not choose what is asked.
    with pytest.raises(GroodError, match="line 1: a URL; this list may name files of its folder only"):
        read_source(path, root="", follow_urls=False)
    # What only has a URL in it is none.
    path.write_text("a/http://127.0.0.1/b.png 0\n")
    with pytest.raises(GroodError, match="1 of 1 listed files are missing"):
        read_source(path, root=tmp_path)


def test_a_list_at_a_url(mirror: Mirror, tmp_path: Path) -> None:
    write(tmp_path / "here", *(f"images_classic/set/{i}.png" for i in range(30)))
    (tmp_path / "here" / "imglist" / "set").mkdir(parents=True)
    lines = "".join(f"set/{i}.png {i % 3}\n" for i in range(30))
    (tmp_path / "here" / "imglist" / "set" / "train.txt").write_text(lines)
    url = mirror(tmp_path / "here")
    source = read_source(f"{url}/imglist/set/train.txt", labels="required")
    assert below(source, url) == [f"images_classic/set/{i}.png" for i in range(30)]
    assert source.labels == tuple(i % 3 for i in range(30))
    assert read_source([f"{url}/imglist/set/train.txt", f"{url}/images_classic/set/7.png"]).paths[-1] == source.paths[7]
    with pytest.raises(GroodError, match="30 of 30 listed files are missing"):
        read_source(f"{url}/imglist/set/train.txt", root=f"{url}/imglist")


def test_files_here_and_there_together(mirror: Mirror, tmp_path: Path) -> None:
    url = mirror(write(tmp_path / "images", "a.png"))
    source = read_source([str(write(tmp_path / "more", "b.png")), f"{url}/a.png"])
    assert source.stamps is not None
    assert [stamp is None for stamp in source.stamps] == [True, False]
    with pytest.raises(GroodError, match="single image, without a label"):
        read_source(f"{url}/a.png", labels="required")


def test_what_is_no_url(tmp_path: Path) -> None:
    for path, message in (
        ("memory://nowhere/images", "memory://nowhere/images: no such file or folder"),
        ("nosuchprotocol://bucket", "nosuchprotocol://bucket cannot be looked at .*nosuchprotocol.*check the URL"),
        # A Path is one of this machine.
        (Path("memory://nowhere/images"), "memory:/nowhere/images: no such file or folder"),
    ):
        with pytest.raises(GroodError, match=message):
            read_source(path)


def test_chains_are_refused(tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("reference://x.png::http://127.0.0.1/evil.json 0\n")
    chains = ("zip://::file:///a.zip", "simplecache::s3://b/a", "reference://x.png::http://127.0.0.1/a.json")
    for path in (*chains, listed):
        with pytest.raises(GroodError, match=r"is a chain of URLs \(::\); name the file or folder itself"):
            read_source(path)


def test_a_stamp_tells_of_a_change(mirror: Mirror, tmp_path: Path) -> None:
    url = mirror(write(tmp_path / "here", *(f"{i}.png" for i in range(8))))
    system, path = fsspec.core.url_to_fs(f"{url}/3.png")
    listed = stamps_of([f"{url}/{i}.png" for i in range(9)])
    assert listed[8] is None
    assert listed == [*stamps_of([f"{url}/0.png"]), *(stamp_of_file(f"{url}/{i}.png") for i in range(1, 8)), None]
    assert tuple(listed[:8]) == read_source(url).stamps
    time.sleep(0.01)
    system.pipe_file(path, png(77))
    again = read_source(url).stamps
    assert again is not None
    assert [i for i in range(8) if again[i] != listed[i]] == [3]
    assert stamp_of_file(f"{url}/none.png") == "absent"


def test_bytes_are_bounded_and_what_is_not_there_is_a_bad_image(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = mirror(write(tmp_path / "here", "a/1.png", "a/2.png", "a/3.png"))
    source = read_source(url)
    system, path = fsspec.core.url_to_fs(source.paths[1])
    system.pipe_file(path, png(1) + bytes(1000))
    monkeypatch.setattr(urls_module, "MAX_BYTES", 1000)
    with pytest.raises(BadImageError, match="larger than"):
        source.image(1)
    system.rm(fsspec.core.url_to_fs(source.paths[0])[1])
    with pytest.raises(BadImageError, match=r"1\.png: no such file"):
        source.image(0)
    loader = image_loader(source, AS_IT_IS, workers=0, on_bad="skip")
    assert [positions.tolist() for _, _, positions in loader] == [[2]]
    assert [path for path, _ in loader.bad] == list(source.paths[:2])
    pixels = PixelLoader(source, AS_IT_IS, on_bad="skip")
    assert [batch.shape for batch in pixels] == [(1, 4, 4, 3)]
    assert pixels.names() == [source.paths[2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_system_that_fails_says_nothing_of_the_image(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "1.png", "2.png")
    source = read_source(f"file://{tmp_path}")
    loader = image_loader(source, AS_IT_IS, batch_size=1, workers=workers, on_bad="skip")

    def fail(*arguments: object, **more: object) -> None:
        raise TimeoutError("the bucket does not answer")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "_open", fail)
    with pytest.raises(GroodError, match=r"1\.png cannot be looked at .*the bucket does not answer") as caught:
        list(loader)
    assert not isinstance(caught.value, BadImageError)
    assert "Traceback" not in str(caught.value)
    assert loader.bad == []
    with pytest.raises(GroodError, match="does not answer"):
        loader.images([1])


def test_parents_and_names_of_urls() -> None:
    assert parent_of("s3://b/a/x.png") == "s3://b/a"
    assert parent_of("s3://b/a/") == "s3://b"
    assert parent_of("memory://x.png") == parent_of("memory://") == "memory://"
    assert joined("memory://", "a.png") == "memory://a.png"
    assert content_of(os.fspath(Path(__file__))).startswith(b'"""Sources at URLs')


def test_names_of_training_images_are_never_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    fsspec.filesystem("memory").pipe_file("/training/a.png", png(1))

    def fail(*arguments: object, **more: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    monkeypatch.chdir(tmp_path)
    for name in (f"file://{tmp_path}/a.png", "memory://training/a.png", "t.parquet#3", "http://127.0.0.1/a.png"):
        assert training_file(name, None) is None
        assert training_file(name, tmp_path / "elsewhere") is None
    # Below a folder that the user names, a copy of the bucket is found.
    assert training_file("s3://bucket/train/a.png", tmp_path) == tmp_path / "a.png"
