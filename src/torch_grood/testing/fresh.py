"""What a fresh process does for the clause `fresh_process_loads_the_same`: load a file, and say what comes out."""

from __future__ import annotations

import importlib
import json
import operator
import sys
from pathlib import Path
from typing import Any

import torch

from torch_grood.testing.uses import use_named

__all__ = ["main"]


def main() -> None:
    """Read the arguments, of which the first was the path of imports, load the detector and write its outcome."""
    _, use_name, module, qualname, path, output, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    try:
        kind = operator.attrgetter(qualname)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        Path(output).write_text(json.dumps({"not_importable": str(error)}))
        return
    use = use_named(use_name)(lambda _: None)
    unpickled: list[str] = []
    listening = True

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "pickle.find_class":
            unpickled.append(".".join(map(str, arguments)))

    # An audit hook sees every unpickler of the interpreter; it stays, so it is told when to stop listening.
    sys.addaudithook(listen)
    detector = kind.load(Path(path), use.model)
    listening = False
    outcome = {name: value.numpy().tobytes().hex() for name, value in use.outcome(detector).items()}
    Path(output).write_text(json.dumps({"outcome": outcome, "unpickled": sorted(set(unpickled))}))
