from __future__ import annotations

import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("gdown")

from command import run

SPEC = """
name = "toy"
title = "Toys"
reference = "a shelf"
[id.train]
folder = "train"
[id.test]
folder = "test"
count = 2
[near.weeds]
list = "lists/weeds.txt"
root = "images"
count = 2
archives = ["lists", "images"]
[far.noise]
folder = "noise"
title = "[bold]Noise"
count = 1
archives = ["noise"]
[archives.lists]
folder = "lists"
url = "{url}/lists.zip"
size = 1_000_000
[archives.images]
title = "Weeds"
folder = "images"
url = "{url}/images.zip"
size = 2_000_000
[archives.noise]
folder = "noise"
manual = "ask for it"
"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with toy.toml and the ID sets; a server has the archives of the set weeds."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "GROOD_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    remote, here = tmp_path / "remote", tmp_path / "shelf"
    remote.mkdir()
    _zip(remote / "lists.zip", {"lists/weeds.txt": b"0.png -1\n1.png -1\n"})
    _zip(remote / "images.zip", {"0.png": b"0", "1.png": b"1"})
    for name in ("train/rose/0.png", "train/tulip/0.png", "test/rose/1.png", "test/tulip/1.png"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(remote)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    (here / "toy.toml").write_text(SPEC.format(url=f"http://127.0.0.1:{server.server_port}"))
    monkeypatch.chdir(tmp_path)
    yield here
    server.shutdown()
    server.server_close()
    thread.join()


def _zip(path: Path, members: dict[str, bytes]) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archived:
        for name, content in members.items():
            archived.writestr(name, content)
    path.write_bytes(file.getvalue())


def _status(shelf: Path, *options: str) -> dict[str, str]:
    found = run("data", shelf / "toy.toml", "--json", *options)
    return {one["name"]: one["status"] for one in json.loads(found.raw)["sets"]}


def test_a_table_and_what_to_do(shelf: Path) -> None:
    found = run("data", shelf / "toy.toml")
    assert (found.code, found.err) == (1, "")
    assert f"Toys, a shelf, under {shelf}" in found.out
    assert "│ train │ id │ train │ any │ 2 │ complete │ your own │" in found.out
    assert "│ test │ id │ test │ 2 │ 2 │ complete │" in found.out
    assert "│ weeds │ near │ weeds │ 2 │ – │ absent │" in found.out
    assert "[bold]Noise" in found.out, "a spec does not steer the terminal"
    assert f"weeds: absent (no list {shelf}/lists/weeds.txt)" in found.out
    assert f"To download lists, Weeds (about 3 MB): grood data {shelf}/toy.toml --root {shelf} --fetch" in found.out
    assert f"By hand, into {shelf}/noise: noise. ask for it" in found.out


def test_fetch_what_can_be_fetched(shelf: Path) -> None:
    found = run("data", shelf / "toy.toml", "--fetch")
    assert found.code == 1, "noise must be placed by hand"
    assert "fetching lists, about 1 MB" in found.err
    assert "fetching Weeds, about 2 MB" in found.err
    assert "│ weeds │ near │ weeds │ 2 │ 2 │ complete │" in found.out
    assert "To download" not in found.out
    (shelf / "noise").mkdir()
    (shelf / "noise/0.png").touch()
    found = run("data", shelf / "toy.toml", "--fetch")
    assert (found.code, found.err) == (0, "")
    assert "By hand" not in found.out


def test_some_sets(shelf: Path) -> None:
    assert run("data", shelf / "toy.toml", "--set", "train", "--set", "test").code == 0
    found = run("data", shelf / "toy.toml", "--set", "weeds")
    assert found.code == 1
    assert f"--root {shelf} --set weeds --fetch" in found.out
    assert "noise" not in found.out
    found = run("data", shelf / "toy.toml", "--set", "weed")
    assert (found.code, found.err) == (1, "error: toy has no set 'weed'; it has train, test, weeds, noise")


def test_json(shelf: Path) -> None:
    found = run("data", shelf / "toy.toml", "--json", "--set", "weeds", "--set", "test")
    assert (found.code, found.err) == (1, "")
    facts = json.loads(found.raw)
    digest = facts.pop("digest")
    assert len(digest) == 64
    assert facts == {
        "benchmark": "toy",
        "title": "Toys",
        "reference": "a shelf",
        "root": str(shelf),
        "complete": False,
        "sets": [
            {
                "name": "test",
                "group": "id",
                "title": "test",
                "needed": 2,
                "there": 2,
                "status": "complete",
                "reason": None,
                "archives": [],
            },
            {
                "name": "weeds",
                "group": "near",
                "title": "weeds",
                "needed": 2,
                "there": None,
                "status": "absent",
                "reason": f"no list {shelf}/lists/weeds.txt",
                "archives": ["lists", "images"],
            },
        ],
    }


def test_quiet(shelf: Path) -> None:
    found = run("data", shelf / "toy.toml", "--quiet", "--fetch")
    assert (found.code, found.out) == (1, "")
    assert found.err == f"warning: noise: absent (nothing in {shelf}/noise)"
    assert run("data", shelf / "toy.toml", "--quiet", "--set", "weeds").err == ""


def test_one_archive_that_fails_does_not_keep_the_others_away(shelf: Path) -> None:
    (shelf.parent / "remote/lists.zip").unlink()
    found = run("data", shelf / "toy.toml", "--fetch")
    assert found.code == 1
    assert "warning: lists: http" in found.err
    assert "could not be fetched: 404" in found.err
    assert (shelf / "images/1.png").is_file()
    assert "To download lists (about 1 MB): " in found.out


def test_what_is_there_is_not_written_over(shelf: Path) -> None:
    for folder, name in (("lists", "weeds.txt"), ("images", "0.png")):
        (shelf / folder).mkdir()
        (shelf / folder / name).write_text("0.png -1\n")
    found = run("data", shelf / "toy.toml", "--fetch", "--set", "weeds")
    assert found.code == 1
    assert "fetching" not in found.err
    assert "weeds: incomplete (1 of 2)" in found.out
    assert f"For weeds, what is in {shelf}/lists or {shelf}/images is not what the benchmark means" in found.out
    assert (shelf / "lists/weeds.txt").read_text() == "0.png -1\n"


def test_a_folder_of_lists_that_lacks_one_is_named(shelf: Path) -> None:
    (shelf / "lists").mkdir()
    (shelf / "lists/mine.txt").write_text("mine.png -1\n")
    found = run("data", shelf / "toy.toml", "--set", "weeds")
    assert f"For weeds, what is in {shelf}/lists is not what the benchmark means" in found.out
    assert "To download Weeds (about 2 MB)" in found.out


def test_where_the_images_lie(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _status(shelf)["train"] == "complete"
    assert _status(shelf, "--root", str(tmp_path))["train"] == "absent"
    assert json.loads(run("data", "cifar10", "--json").raw)["root"] == "data"
    monkeypatch.setenv("GROOD_DATA", str(tmp_path / "elsewhere"))
    assert json.loads(run("data", "cifar10", "--json").raw)["root"] == str(tmp_path / "elsewhere")


def test_built_in_benchmarks(tmp_path: Path) -> None:
    found = run("data", "imagenet", "--root", tmp_path / "no data")
    assert found.code == 1
    assert "│ 1,281,167 │" in found.out
    assert f"grood data imagenet --root '{tmp_path}/no data' --fetch" in found.out
    assert f"By hand, into {tmp_path}/no data/images_largescale/imagenet_1k: ImageNet-1k" in found.out
    assert not (tmp_path / "no data").exists()


def test_no_such_spec() -> None:
    found = run("data", "cifar")
    assert found.code == 1
    assert found.err.startswith("error: cifar: there is no such file, and no built-in benchmark of that name")
