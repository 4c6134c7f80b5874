"""Archives from a server on this machine: `gdown` takes any address."""

from __future__ import annotations

import hashlib
import http.server
import io
import random
import re
import shutil
import stat
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gdown")

from torch_grood.errors import GroodError, MissingDependencyError
from torch_grood.evaluation import download
from torch_grood.evaluation.download import archives_of, fetch, is_there
from torch_grood.evaluation.image_sets import survey
from torch_grood.evaluation.spec import Archive, read_spec


class Server:
    """Files by address; `cut` ends each answer after so many bytes, as a broken line does, or halts if it `stalls`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.stalls = False
        self.released = threading.Event()
        self.requests: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.requests.append(wanted)
                body = outer.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                start = int(re.findall(r"\d+", wanted)[0]) if wanted else 0
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                self.wfile.write(body[start : None if outer.cut is None else start + outer.cut])
                if outer.stalls:
                    self.wfile.flush()
                    outer.released.wait()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def archive(self, content: bytes, key: str = "a", folder: str = "images/a", **more: Any) -> Archive:
        """An archive of the server's."""
        self.files[f"/{key}.zip"] = content
        return Archive(key, key.upper(), folder, f"http://127.0.0.1:{self._server.server_port}/{key}.zip", **more)

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # gdown reads cookies from the home folder.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = Server()
    yield found
    found.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def _zip(*members: str | zipfile.ZipInfo, content: bytes = b"content of ") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archived:
        for member in members:
            name = member if isinstance(member, str) else member.filename
            archived.writestr(member, b"" if name.endswith("/") else content + name.encode())
    return file.getvalue()


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _only_lock_left(root: Path) -> bool:
    return _files(root / ".downloads") == ["lock"] and not list(root.rglob("*.unpacking-*"))


@pytest.mark.parametrize("prefix", ["", "a/"])
def test_an_archive_is_fetched_once(server: Server, root: Path, prefix: str) -> None:
    archive = server.archive(_zip(f"{prefix}one/1.png", f"{prefix}two/2.png", f"{prefix}empty/", "__MACOSX/._1.png"))
    assert not is_there(archive, root)
    assert fetch(archive, root, progress=False)
    assert _files(root / "images/a") == ["one/1.png", "two/2.png"]
    assert (root / "images/a/one/1.png").read_bytes() == f"content of {prefix}one/1.png".encode()
    assert (root / "images/a").stat().st_mode & 0o777 == root.stat().st_mode & 0o777
    assert _only_lock_left(root)
    assert is_there(archive, root)
    asked = len(server.requests)
    assert not fetch(archive, root, progress=False)
    assert len(server.requests) == asked


def test_a_folder_that_is_there_is_left_alone(server: Server, root: Path) -> None:
    archive = server.archive(_zip("1.png"))
    (root / "images/a").mkdir(parents=True)
    assert not is_there(archive, root), "an empty folder holds nothing"
    assert fetch(archive, root, progress=False)
    shutil.rmtree(root / "images/a")
    (root / "images/a").mkdir()
    (root / "images/a/mine.txt").write_text("mine")
    assert not fetch(archive, root, progress=False)
    assert _files(root / "images/a") == ["mine.txt"]


def test_folders_may_lie_elsewhere_through_a_link(server: Server, root: Path, tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    root.mkdir()
    (root / "images").symlink_to(tmp_path / "big disk", target_is_directory=True)
    assert fetch(server.archive(_zip("1.png")), root, progress=False)
    assert _files(tmp_path / "big disk") == ["a/1.png"]


def test_an_interrupted_download_goes_on(server: Server, root: Path) -> None:
    content = _zip("1.png", content=random.Random(0).randbytes(2_000_000))
    archive = server.archive(content, sha256=hashlib.sha256(content).hexdigest())
    server.cut = 1_500_000
    with pytest.raises(GroodError, match=r"A: http.*a\.zip could not be fetched: .*What has come so far is kept"):
        fetch(archive, root, progress=False)
    assert not (root / "images/a").exists()
    parts = [path for path in (root / ".downloads").iterdir() if path.name != "lock"]
    assert len(parts) == 1
    size = parts[0].stat().st_size
    assert 0 < size <= server.cut
    server.cut = None
    server.requests.clear()
    assert fetch(archive, root, progress=False)
    assert f"bytes={size}-" in server.requests
    assert _files(root / "images/a") == ["1.png"]
    assert _only_lock_left(root)


def test_an_address_that_gives_nothing(server: Server, root: Path) -> None:
    archive = server.archive(b"")
    server.files.clear()
    with pytest.raises(GroodError, match=r"could not be fetched: 404 .* unpack it to .*/data/images/a$"):
        fetch(archive, root, progress=False)
    assert _only_lock_left(root)


def test_no_server_at_all(server: Server, root: Path) -> None:
    archive = replace(server.archive(b""), url="http://127.0.0.1:1/a.zip")
    with pytest.raises(GroodError, match="could not be fetched: "):
        fetch(archive, root, progress=False)


def test_a_checksum_is_checked(server: Server, root: Path) -> None:
    content = _zip("1.png")
    good = hashlib.sha256(content).hexdigest()
    with pytest.raises(GroodError, match=f"has the SHA-256 {good}, expected 0{{64}}; it was deleted"):
        fetch(server.archive(content, sha256="0" * 64), root, progress=False)
    assert _only_lock_left(root)
    assert not (root / "images/a").exists()
    assert fetch(server.archive(content, sha256=good), root, progress=False)


def test_a_server_that_falls_silent_is_left(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_grood.evaluation.download._TIMEOUT", 0.2)
    archive = server.archive(_zip("1.png"))
    server.cut, server.stalls = 50, True
    with pytest.raises(GroodError, match="could not be fetched"):
        fetch(archive, root, progress=False)
    server.cut, server.stalls = None, False
    assert fetch(archive, root, progress=False)
    assert _files(root / "images/a") == ["1.png"]


def _member(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


def _encrypted() -> bytes:
    content = bytearray(_zip("1.png"))
    # Bit 0 of the flags, in the central directory, which is what a reader goes by.
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def _damaged() -> bytes:
    content = bytearray(_zip("1.png", content=bytes(range(256)) * 4))
    content[60] ^= 0xFF
    return bytes(content)


def _twice() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return _zip("1.png", "1.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"<html>quota exceeded</html>", "it is no ZIP file that can be read"),
        (lambda: _zip("1.png")[:-30], "it is no ZIP file that can be read"),
        (_damaged, "it is no ZIP file that can be read"),
        (_zip, "it is empty"),
        (lambda: _zip("empty/"), "it is empty"),
        (lambda: _zip("1.png", "../2.png"), "'../2.png' would lie outside"),
        (lambda: _zip("a/../../2.png"), "would lie outside"),
        (lambda: _zip("/etc/2.png"), "'/etc/2.png' would lie outside"),
        (lambda: _zip("C:/2.png"), "would lie outside"),
        (lambda: _zip("..\\2.png"), "would lie outside"),
        (lambda: _zip(_member("link", stat.S_IFLNK | 0o777)), "'link' is a link or a device"),
        (lambda: _zip(_member("pipe", stat.S_IFIFO | 0o666)), "'pipe' is a link or a device"),
        (_encrypted, "'1.png' is encrypted"),
        (_twice, "holds '1.png' twice"),
        (lambda: _zip("a", "a/1.png"), "'a' is a file and a folder"),
        (lambda: _zip("ä" * 128), "has a name of more than 255 bytes"),
        (lambda: _zip("bomb.png", content=bytes(3_000_000)), r"its [\d,]+ bytes would unpack to 3,000,008"),
    ],
)
def test_what_nobody_should_unpack_leaves_nothing(server: Server, root: Path, make: Any, message: str) -> None:
    archive = server.archive(make())
    with pytest.raises(GroodError, match=rf"A: what http.* is not to be used: .*{message}.*; it was deleted"):
        fetch(archive, root, progress=False)
    assert not (root / "images/a").exists()
    assert _only_lock_left(root)
    assert not list(root.parent.rglob("2.png"))


def test_too_many_members(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MAX_MEMBERS", 2)
    with pytest.raises(GroodError, match="it has 3 members, more than 2"):
        fetch(server.archive(_zip("1.png", "2.png", "3.png")), root, progress=False)


def test_files_keep_no_special_rights(server: Server, root: Path) -> None:
    assert fetch(server.archive(_zip(_member("1.png", stat.S_IFREG | 0o4777))), root, progress=False)
    assert (root / "images/a/1.png").stat().st_mode & 0o7111 == 0


def test_an_interrupted_unpacking_leaves_nothing_and_keeps_the_download(server: Server, root: Path) -> None:
    archive = server.archive(_zip("1.png", "2.png", "3.png"))

    def stop(members: Any) -> Any:
        yield next(iter(members))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(archive, root, progress=stop)
    assert list((root / "images").iterdir()) == []
    assert _files(root / ".downloads") == ["a.zip", "lock"]
    assert fetch(archive, root, progress=False)
    assert _files(root / "images/a") == ["1.png", "2.png", "3.png"]
    assert _only_lock_left(root)


def test_what_a_killed_process_left_is_cleared_away(server: Server, root: Path) -> None:
    for name in (".a.unpacking-0123", ".b.unpacking-0123"):
        (root / "images" / name).mkdir(parents=True)
        (root / "images" / name / "half.png").touch()
    assert fetch(server.archive(_zip("1.png")), root, progress=False)
    assert sorted(path.name for path in (root / "images").iterdir()) == [".b.unpacking-0123", "a"]


def test_room_on_the_disk_is_asked_for(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = server.archive(_zip("1.png", content=bytes(range(256)) * 100), size=3_000)
    usage = shutil.disk_usage(root.parent)
    free = 5_999
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(GroodError, match=r"A needs about 0\.0 GB under .*make room, or choose another --root"):
        fetch(archive, root, progress=False)
    assert server.requests == []
    free = 20_000
    with pytest.raises(GroodError, match="A needs about"):
        fetch(archive, root, progress=False)
    assert _files(root / ".downloads") == ["a.zip", "lock"], "the download is not lost"
    free = 40_000
    assert fetch(archive, root, progress=False)


def test_two_processes_do_not_fetch_at_once(server: Server, root: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    archive = server.archive(_zip("1.png"))
    (root / ".downloads").mkdir(parents=True)
    with (root / ".downloads/lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(GroodError, match=r"another process is fetching into .*data; wait until it is done"):
            fetch(archive, root, progress=False)
    assert fetch(archive, root, progress=False)


def test_what_may_not_be_fetched_says_how_to_place_it(root: Path) -> None:
    archive = Archive("a", "A", "images/a", manual="register first")
    with pytest.raises(GroodError, match=r"A cannot be fetched: register first; it belongs to .*images/a"):
        fetch(archive, root)
    assert not root.exists()


def test_a_root_that_cannot_be_written_to(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GroodError, match=r"A cannot be stored under .*file: "):
        fetch(server.archive(_zip("1.png")), tmp_path / "file", progress=False)


def test_the_extra_is_named(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gdown", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'torch-grood\[data\]'"):
        fetch(server.archive(_zip("1.png")), root, progress=False)


def test_only_archives_of_sets_that_are_not_complete_are_needed(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(
        'name = "x"\n[id.train]\nfolder = "train"\narchives = ["id"]\n[id.test]\nfolder = "test"\n'
        '[near.a]\nfolder = "a"\narchives = ["b", "a"]\n[far.b]\nfolder = "b"\narchives = ["b"]\n'
        + "".join(f'[archives.{key}]\nfolder = "{key}"\nmanual = "ask"\n' for key in ("a", "b", "id"))
    )
    spec = read_spec(tmp_path / "x.toml")
    (tmp_path / "train/rose").mkdir(parents=True)
    (tmp_path / "train/rose/1.png").touch()
    assert [archive.key for archive in archives_of(spec, survey(spec, tmp_path))] == ["a", "b"]
    assert [archive.key for archive in archives_of(spec, survey(spec, tmp_path, ["b", "test"]))] == ["b"]
