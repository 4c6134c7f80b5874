"""Runs the command line in this process."""

from __future__ import annotations

import re
from dataclasses import dataclass

from typer.testing import CliRunner

PREPARED = ("--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")


@dataclass(frozen=True)
class Result:
    """What a command did; the texts without colours, and with every run of white space as one blank."""

    code: int
    out: str
    err: str
    raw: str
    raw_err: str = ""


def run(*arguments: object) -> Result:
    """Run a command in this process."""
    from torch_grood.cli._app import app

    found = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    out, err = (" ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split()) for text in (found.stdout, found.stderr))
    return Result(found.exit_code, out, err, found.stdout, found.stderr)
