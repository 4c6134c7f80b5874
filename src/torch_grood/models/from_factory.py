"""Networks by a user's function or class: `package.module:factory`, `path/to/file.py:factory`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from torch_grood.errors import GroodError
from torch_grood.models.maker import ModelMaker
from torch_grood.models.spec import OWN_FACTORY, described, is_builtin_spec, one_line, unknown_spec

__all__ = ["FactoryMaker"]

_SHOWN = 5


class FactoryMaker(ModelMaker):
    """Networks of one factory.

    Args:
        spec: the whole text.
        kind: the module, or the file.
        name: of the factory in it.

    Raises:
        GroodError: if there is no such factory, it cannot be imported, or it needs arguments that nobody knows.
    """

    def __init__(self, spec: str, kind: str, name: str) -> None:
        super().__init__(spec)
        self._folder = Path(kind).parent if kind.endswith(".py") else Path.cwd()
        with self._importing():
            self._factory = _find_factory(spec, kind, name)
        parameters = _parameters(self._factory)
        needed = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and name != "num_classes"
        ]
        if needed:
            raise GroodError(
                f"{spec}: the factory needs {', '.join(needed)}; give these parameters defaults, or write a factory "
                "without"
            )
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self.names_classes = "num_classes" in parameters
        self.takes_classes = self.names_classes or takes_any
        self.needs_classes = self.names_classes and parameters["num_classes"].default is inspect.Parameter.empty

    def make(self, num_classes: int | None = None) -> nn.Module:
        """See `ModelMaker.make`."""
        if num_classes is not None and not self.takes_classes:
            raise GroodError(
                f"{self.spec}: the factory has no parameter num_classes; leave num_classes (--num-classes) out"
            )
        if num_classes is None and self.needs_classes:
            raise GroodError(f"{self.spec}: the factory needs a number of classes; pass num_classes (--num-classes)")
        try:
            # A factory may import its neighbours when it is called.
            with self._importing():
                model = self._factory() if num_classes is None else self._factory(num_classes=num_classes)
        except Exception as error:
            raise GroodError(f"{self.spec}: the factory raised {one_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise GroodError(f"{self.spec}: the factory returned {described(model)}, not a torch.nn.Module")
        return model

    def published(self, num_classes: int | None = None) -> tuple[nn.Module, None]:
        """See `ModelMaker.published`; a factory is its own publisher."""
        return self.make(num_classes), None

    def adapted(self, num_classes: int) -> tuple[nn.Module, tuple[str, ...]]:
        """See `ModelMaker.adapted`."""
        raise GroodError(
            f"{self.spec}: a factory has no published weights to start from; leave pretrained (--pretrained) out, or "
            "pass a file of weights (--weights)"
        )

    def transform_of(self, model: nn.Module) -> None:
        """See `ModelMaker.transform_of`; only the user knows it."""

    @contextmanager
    def _importing(self) -> Iterator[None]:
        # A spec of ours may come from a file, and the current folder is not ours.
        with nullcontext() if is_builtin_spec(self.spec) else _importable(self._folder):
            yield


def _find_factory(spec: str, kind: str, name: str) -> Callable[..., object]:
    module = _import_file(spec, Path(kind)) if kind.endswith(".py") else _import_module(spec, kind)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, own, n=_SHOWN, cutoff=0.3)
        hint = f"; it has {', '.join(near)}" if near else ""
        raise GroodError(f"{spec}: {kind} has no {name!r}{hint}")
    found = getattr(module, name)
    if isinstance(found, nn.Module):
        return lambda: found
    if not callable(found):
        raise GroodError(
            f"{spec}: {name} is {described(found)}, not a function or class; expected a factory that returns the "
            "network"
        )
    if OWN_FACTORY.fullmatch(spec) and not _is_own_network(found):
        raise GroodError(f"{spec}: {name} is not a network of torch_grood")
    factory: Callable[..., object] = found
    return factory


def _is_own_network(found: Any) -> bool:
    """Whether a callable is ours and declared to return a network: a file may name one, but not call what it likes."""
    if not str(getattr(found, "__module__", "")).startswith("torch_grood."):
        return False
    if isinstance(found, type):
        return issubclass(found, nn.Module)
    try:
        result = typing.get_type_hints(found).get("return")
    except (NameError, TypeError):
        return False
    return isinstance(result, type) and issubclass(result, nn.Module)


def _import_module(spec: str, name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise unknown_spec(spec)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there but imports another, absent one, is reported like any failing import.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise GroodError(
                f"{spec}: no module {error.name!r} in {Path.cwd()} or among the installed packages; "
                "go to its folder, or give the file: path/to/file.py:factory"
            ) from None
        raise _failed_import(spec, name, error) from error
    except (Exception, SystemExit) as error:
        raise _failed_import(spec, name, error) from error


def _import_file(spec: str, file: Path) -> ModuleType:
    if not file.is_file():
        raise GroodError(f"{spec}: no such file: {file}")
    # A name of its own, so that model.py does not become, or shadow, the module "model".
    name = f"grood_model_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    found = importlib.util.spec_from_file_location(name, file)
    if found is None or found.loader is None:
        raise GroodError(f"{spec}: {file} is no Python file")
    module = importlib.util.module_from_spec(found)
    # Dataclasses look their module up while it is executed.
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failed_import(spec, str(file), error) from error
    return module


def _failed_import(spec: str, what: str, error: BaseException) -> GroodError:
    return GroodError(f"{spec}: importing {what} raised {one_line(error)}")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Put a folder first on the import path, as Python does with that of a script."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    # The file may be newer than the import system's list of the folder.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _parameters(factory: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return {}
