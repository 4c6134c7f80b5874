"""A small file of published figures."""

from __future__ import annotations

from pathlib import Path

from torch_grood.evaluation.published import Published, read_published

HEAD = """\
name = "theirs"
benchmark = "cifar10"
source = "their paper"
checkpoints = "their ResNet-18"
"""


def read(tmp_path: Path, text: str, head: str = HEAD) -> Published:
    path = tmp_path / "theirs.toml"
    path.write_text(head + text, encoding="utf-8")
    return read_published(path)
