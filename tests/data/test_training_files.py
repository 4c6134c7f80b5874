"""Where the training images of a detector are now, whatever its file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from torch_grood.data.training_files import training_file


def test_where_training_images_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "moved" / "train"
    (here / "cat").mkdir(parents=True)
    (here / "cat" / "1.png").touch()
    (here / "1.png").touch()
    (tmp_path / "secret.png").touch()
    find = training_file
    root = Path("moved/train")
    assert find("/elsewhere/data/train/cat/1.png", root) == root / "cat" / "1.png"
    assert find("train/cat/1.png", Path("moved")) == root / "cat" / "1.png"
    assert find("cat/1.png", root) == root / "cat" / "1.png"
    assert find("dog/1.png", root) == root / "1.png"
    assert find("dog/2.png", root) is None
    assert find(str(here / "cat" / "1.png"), here) == here / "cat" / "1.png"
    # A folder that the user names is not left.
    assert find("../../secret.png", root) is None
    assert find(str(tmp_path / "secret.png"), root) is None
    # Without one, names are followed as they were stored.
    assert find("secret.png", None) == Path("secret.png")
    assert find("moved/train", None) is None
    assert find(None, root) is None
    for name in (
        "",
        "a\0b",
        "x" * 5000,
        "x" * 3000,
        "a/" * 1000,
        "a/" * 10**6,
        "\udcff",
        "\ud800",
        "/",
        "~/secret.png",
    ):
        assert find(name, None) is None
        assert find(name, root) is None


def test_a_long_path_is_not_looked_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for: list[Path] = []
    monkeypatch.setattr(Path, "is_file", lambda path: looked_for.append(path) is not None)
    assert training_file("a/" * 2000, tmp_path) is None
    assert 0 < len(looked_for) <= 32
    looked_for.clear()
    assert training_file("a/" * 10**6, tmp_path) is None
    assert training_file("a/" * 10**6, None) is None
    assert looked_for == []
