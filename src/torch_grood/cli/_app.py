"""The commands together, and what becomes of an error in any of them."""

from __future__ import annotations

import importlib
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from torch_grood._text import plain
from torch_grood.errors import GroodError

__all__ = ["app"]

# In the order of the help; module and function have the command's name.
COMMANDS = (
    *("demo", "train", "fit", "calibrate", "score", "report", "watch", "serve"),
    *("add", "remove", "info", "export", "data", "benchmark"),
)


class _Group(TyperGroup):
    """Turns a user's mistake into one line and exit status 1; GROOD_DEBUG=1 shows where it came from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GroodError as error:
            if os.environ.get("GROOD_DEBUG", "") not in ("", "0"):
                raise
            typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
            # Lists of what is wrong are ours to break into lines; whatever else is no line of ours stays in its line.
            typer.echo("\n  ".join(plain(part) for part in str(error).split("\n  ")), err=True)
            raise typer.Exit(1) from None
        except OSError as error:
            # Reading and writing of files is caught where it happens; what is left is a stdout that takes no more.
            if isinstance(error, BrokenPipeError) or os.environ.get("GROOD_DEBUG", "") not in ("", "0"):
                raise
            typer.echo(f"error: {plain(str(error))}", err=True)
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            # A machine that only runs exported detectors has none.
            if error.name != "torch":
                raise
            typer.echo("error: this needs PyTorch, which is not installed; only .onnx files do without it", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="grood",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"torch-grood {version('torch-grood')}")
        raise typer.Exit


@app.callback()
def grood(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Tells which images a classifier was not trained for.

    Start with [bold]grood demo[/bold]; then [bold]grood fit[/bold] a detector on
    the training images of your classifier and let it [bold]grood score[/bold] new ones.
    """


for _command in COMMANDS:
    app.command(_command)(getattr(importlib.import_module(f"{__package__}.{_command}"), _command))
