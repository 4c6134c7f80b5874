"""The `grood` command: parsing and printing only. Exit codes: 0 done, 1 the user's mistake, 2 usage, 130 Ctrl-C.

``grood --help`` must come at once, so nothing here imports torch until a command runs.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; the entry point of the `grood` script."""
    from torch_grood._optional import require
    from torch_grood.errors import MissingDependencyError

    try:
        require("typer", extra="cli")
        require("rich", extra="cli")
        from torch_grood.cli._app import app

        app(prog_name="grood")
    except MissingDependencyError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
