"""`grood serve` in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Served", "served"]

# With torch, and one thread of it: as grood itself does.
GROOD = (sys.executable, "-c", "from torch_grood.cli import main; main()")


@dataclass(frozen=True)
class Served:
    """A service that listens."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def lines(self) -> list[dict[str, Any]]:
        """Of its log, whole ones."""
        whole = self.log.read_text().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def rss(self) -> int:
        """Bytes of memory that it has."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        assert found is not None
        return 1024 * int(found.group(1))

    def n_files(self) -> int:
        """Files and connections that it has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@contextmanager
def served(*arguments: object, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """A service, which is killed in the end unless it has ended."""
    command = [*GROOD, "serve", *map(str, arguments), "--port", "0"]
    variables = os.environ | (environment or {})
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr, env=variables) as process:
            try:
                yield Served(process, _port(process, log), log)
            finally:
                process.kill()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r'"url": "http://[^"]*:(\d+)/"}\n', log.read_text())
        if found is not None:
            return int(found.group(1))
        time.sleep(0.05)
    raise AssertionError(f"the service did not start: {log.read_text()}")
