"""The folder that a job writes: what it is about, a part for each span that is done, and a summary at the end.

    job.json                                      what is scored, and by what; another job is refused
    scores/part-000000000000-000000001024.parquet  a row for each image that has a score
    bad/part-000000000000-000000001024.parquet     a row for each input that has none, with the reason
    done.json                                     when all is done

A part of `scores` is there only when that of `bad` is, and neither is ever there in part.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_grood._files import replacing
from torch_grood._optional import require
from torch_grood.errors import GroodError
from torch_grood.scale.inputs import Span

__all__ = ["BAD", "SCORES", "Folder", "missing"]

SCORES, BAD = "scores", "bad"
_PART = re.compile(r"part-(\d{12})-(\d{12})\.parquet")


class Folder:
    """A folder here, or wherever fsspec leads; it can be sent to a worker.

    Args:
        url: of it; made if it is not there.
    """

    def __init__(self, url: str) -> None:
        self.url = url if "://" in url else str(Path(url).absolute())

    def read(self, name: str) -> Any:
        """The JSON of a file, or None if it is not there.

        Raises:
            GroodError: if it is no JSON.
        """
        try:
            content = self._path(name).read_bytes() if self._is_local else self._system().cat_file(self._remote(name))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise GroodError(f"{self.url} cannot be read: {error}") from None
        try:
            return json.loads(content)
        except ValueError:
            raise GroodError(f"{self.url}/{name} is no JSON; it is no folder of a scoring job") from None

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole or not at all.

        Raises:
            GroodError: if it cannot be written.
        """
        try:
            if self._is_local:
                path = self._path(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_bytes(content)
                return
            # What is put into an object store is there when all of it is.
            system = self._system()
            system.makedirs(self._remote(name).rpartition("/")[0], exist_ok=True)
            system.pipe_file(self._remote(name), content)
        except OSError as error:
            raise GroodError(f"{self.url}/{name} cannot be written: {error}") from None

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """As `write`."""
        self.write(name, (json.dumps(data, indent=1) + "\n").encode())

    def write_part(self, kind: str, span: Span, rows: Sequence[Mapping[str, Any]], schema: Any) -> None:
        """Write rows as Parquet; errors as `write`."""
        arrow, parquet = require("pyarrow", extra="cli"), require("pyarrow.parquet", extra="cli")
        content = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(list(rows), schema=schema), content)
        self.write(f"{kind}/part-{span[0]:012}-{span[1]:012}.parquet", content.getvalue())

    def done(self) -> list[Span]:
        """Spans whose scores are there, in order."""
        if self._is_local:
            folder = self._path(SCORES)
            names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        else:
            system, remote = self._system(), self._remote(SCORES)
            system.invalidate_cache()
            names = [path.rpartition("/")[2] for path in system.find(remote)] if system.exists(remote) else []
        found = [_PART.fullmatch(name) for name in names]
        return sorted((int(match[1]), int(match[2])) for match in found if match)

    @property
    def _is_local(self) -> bool:
        return "://" not in self.url

    def _path(self, name: str) -> Path:
        return Path(self.url) / name

    def _system(self) -> Any:
        system, _ = require("fsspec", extra="scale").core.url_to_fs(self.url)
        return system

    def _remote(self, name: str) -> str:
        _, path = require("fsspec", extra="scale").core.url_to_fs(self.url)
        return f"{path}/{name}"


def missing(spans: Sequence[Span], done: Sequence[Span]) -> list[Span]:
    """What of some spans, in order and side by side, is not done."""
    found: list[Span] = []
    at = 0
    for start, stop in spans:
        while start < stop:
            while at < len(done) and done[at][1] <= start:
                at += 1
            if at == len(done) or done[at][0] >= stop:
                found.append((start, stop))
                break
            if done[at][0] > start:
                found.append((start, done[at][0]))
            start = done[at][1]
    return found
