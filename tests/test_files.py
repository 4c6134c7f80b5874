"""Files of somebody else's: never more of one in memory than is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from torch_grood._files import read_at_most
from torch_grood.errors import GroodError


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_bytes(b"x" * (1 << 20))
    assert read_at_most(file, 1 << 20, "a short file") == file.read_bytes()
    with file.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(GroodError, match=r"some\.toml is larger than 1 MiB; expected a short file$"):
        read_at_most(str(file), 1 << 20, "a short file")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(GroodError, match=r"absent cannot be read: No such file"):
        read_at_most(tmp_path / "absent", 1 << 20, "a file")
    with pytest.raises(GroodError, match="cannot be read"):
        read_at_most(tmp_path, 1 << 20, "a file")
