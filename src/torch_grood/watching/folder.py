"""A folder of any depth that grows, as a source: found by looking again and again, which works on network drives too.

An image is its path below the folder, its size and its time of change: a file that another replaces is a new image. It
is handed out once it has stood still for `settle` seconds, as observed here: a time of change tells nothing where the
clocks of two machines differ. Hidden files, other suffixes and links are left out: whoever may write here must not
choose what else of the machine is read.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch_grood.data.images import IMAGE_SUFFIXES
from torch_grood.errors import GroodError
from torch_grood.watching.files import read_found
from torch_grood.watching.seen import Seen, key_of
from torch_grood.watching.source import Item

__all__ = ["Folder"]

# Files that are held at a time, of those that are not done; the others are found again when these are.
_WINDOW = 100_000


@dataclass(slots=True)
class _Found:
    """A file that is not done: since when it is as it is, in which look it was last there, and whether it waits."""

    path: str
    size: int
    mtime_ns: int
    since: float
    look: int
    waits: bool = True


class Folder:
    """See `Source`.

    Args:
        folder: to watch.
        seen: keys of what is done.
        settle: seconds that size and time of change must stand still; 0: files are complete as soon as they are there.
        interval: seconds between two looks at the folder; more where a look takes longer.
        once: only what is there at the first look.
        stop: whether to stop.
        warn: takes what could not be read, or is left out.
        window: files that are held in memory at a time.

    Attributes:
        left: files that were still changing when the last look was over, or came later; with `once`.

    Raises:
        GroodError: if there is no such folder.
    """

    durable = True

    def __init__(
        self,
        folder: Path,
        seen: Seen,
        *,
        settle: float = 1.0,
        interval: float = 1.0,
        once: bool = False,
        stop: Callable[[], bool] = lambda: False,
        warn: Callable[[str], None] = lambda message: None,
        window: int = _WINDOW,
    ) -> None:
        if not folder.is_dir():
            raise GroodError(f"{folder} is no folder")
        self._folder = folder
        self._seen = seen
        self._settle, self._interval, self._once = settle, interval, once
        self._stop, self._warn, self._window = stop, warn, window
        self._open: dict[bytes, _Found] = {}
        self._ready: deque[bytes] = deque()
        self._looks = 0
        self._next_look = 0.0
        # With `once`: no more files are taken in.
        self._closed = False
        self._warned: set[str] = set()
        self._others = self._links = 0
        self.left = 0

    @property
    def ended(self) -> bool:
        """See `Source`."""
        return self._closed and not self._open

    def take(self, most: int, wait: float) -> list[Item]:
        """See `Source.take`."""
        if self._stop():
            return []
        if not self._ready and wait > 0:
            now = time.monotonic()
            if now < self._next_look:
                time.sleep(min(wait, self._next_look - now))
            if time.monotonic() >= self._next_look:
                self._look()
        return [self._item(self._ready.popleft()) for _ in range(min(most, len(self._ready)))]

    def done(self, items: Sequence[Item]) -> None:
        """See `Source.done`."""
        for item in items:
            assert item.key is not None
            self._seen.add(item.key)
            self._open.pop(item.key, None)

    def release(self, item: Item) -> None:
        """See `Source.release`."""
        assert item.key is not None
        self._open.pop(item.key, None)

    def _item(self, key: bytes) -> Item:
        found = self._open[key]
        path = os.path.join(self._folder, *found.path.split("/"))  # noqa: PTH118 - a Path for each image is slow
        return Item(path, key, partial(read_found, path, found.size, found.mtime_ns))

    def _look(self) -> None:
        began = time.monotonic()
        self._looks += 1
        full, self.left = False, 0
        for keys, files in self._fresh():
            for key, (path, size, mtime_ns) in zip(keys, files, strict=True):
                found = self._open.get(key)
                if found is not None:
                    found.look = self._looks
                elif self._closed:
                    self.left += 1
                elif len(self._open) >= self._window:
                    full = True
                else:
                    self._open[key] = _Found(path, size, mtime_ns, began, self._looks)
        if self._stop():
            # What was not looked at is not gone.
            return
        gone = [key for key, found in self._open.items() if found.waits and found.look != self._looks]
        for key in gone:
            del self._open[key]
        ready = [key for key, found in self._open.items() if found.waits and began - found.since >= self._settle]
        # The oldest first: those that came while others were scored must not wait for those that come now.
        ready.sort(key=lambda key: self._open[key].mtime_ns)
        for key in ready:
            self._open[key].waits = False
        self._ready.extend(ready)
        if self._looks == 1:
            self._report()
        self._closed = self._once and not full
        pause = self._settle if self._once else self._interval
        # A look at millions of files over and over again would leave the machine no time for them.
        self._next_look = time.monotonic() + max(pause, 0 if self._once else time.monotonic() - began)

    def _fresh(self) -> Iterator[tuple[list[bytes], list[tuple[str, int, int]]]]:
        """Keys and files (path below the folder, size, time of change) that are not done, folder by folder."""
        pending = [""]
        while pending and not self._stop():
            below = pending.pop()
            files: list[tuple[str, int, int]] = []
            for chunk in self._list(below, pending):
                files += chunk
            keys = [key_of(os.fsencode(path), size, mtime_ns) for path, size, mtime_ns in files]
            known = self._seen.among(keys)
            fresh = [i for i, done in enumerate(known) if not done]
            yield [keys[i] for i in fresh], [files[i] for i in fresh]

    def _list(self, below: str, pending: list[str]) -> Iterator[list[tuple[str, int, int]]]:
        """The images in one folder; its folders go to `pending`."""
        here = os.path.join(self._folder, *below.split("/"))  # noqa: PTH118 - as above
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = f"{below}/{entry.name}" if below else entry.name
                    if entry.is_symlink():
                        self._links += self._looks == 1
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                    elif os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:  # noqa: PTH122 - as above
                        self._others += self._looks == 1
                    elif (status := _status(entry)) is not None:
                        yield [(path, status.st_size, status.st_mtime_ns)]
        except OSError as error:
            if not below:
                raise GroodError(
                    f"{self._folder} cannot be read any more: {error.strerror or error}; what is decided is written, "
                    "start again when it is back"
                ) from None
            if not isinstance(error, FileNotFoundError) and below not in self._warned:
                # Once for each folder, and not without end where folders come and go.
                if len(self._warned) < self._window:
                    self._warned.add(below)
                self._warn(f"{here} cannot be read: {error.strerror or error}; images in it wait")

    def _report(self) -> None:
        parts = [(self._links, "symbolic links"), (self._others, "files without an image's ending")]
        found = [f"{count:,} {what}" for count, what in parts if count]
        if found:
            self._warn(f"{self._folder}: {' and '.join(found)} are left out")


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat(follow_symlinks=False)
    except OSError:
        # Deleted since, or not to be seen: in the next look it is there, or it is not.
        return None
