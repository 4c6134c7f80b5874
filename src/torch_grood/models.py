"""A classifier from one line of text, with the preprocessing that belongs to it.

    torchvision:resnet50        torchvision's networks; without `weights`, their default pretrained weights
    timm:convnext_tiny.in12k    timm's networks, likewise
    package.module:factory      your function or class that returns the network; the current folder is importable
    path/to/file.py:factory     the same from a file

Weights are safetensors or a state dict; both are data, neither can run code (``torch.load(…, weights_only=True)``). A
spec, on the other hand, can: `package.module:factory` imports the module. Therefore a spec that comes out of a *file*
must pass `is_builtin_spec` first; what it admits runs only code that is installed as torchvision, timm or torch_grood.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_grood._optional import require
from torch_grood.errors import GroodError

if TYPE_CHECKING:
    from torch_grood.data.transforms import ImageTransform

__all__ = ["LoadedModel", "is_builtin_spec", "load_model"]

PathLike = str | os.PathLike[str]

_FORMS = "torchvision:NAME, timm:NAME, package.module:factory or path/to/file.py:factory"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
# No part may begin with an underscore: torch_grood.__main__ would start the command line. "torch_grood.py:…" is a file.
_OWN_FACTORY = re.compile(r"torch_grood(\.(?!py:)[A-Za-z][A-Za-z0-9_]*)+:[A-Za-z][A-Za-z0-9_]*")
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
# Checkpoints older than PyTorch 0.4.1 lack the counter; only training needs it.
_OPTIONAL = "num_batches_tracked"
_SAVE = "save one with torch.save(model.state_dict(), …) or safetensors"
_SHOWN = 5


@dataclass(frozen=True)
class LoadedModel:
    """A classifier, in eval mode on the CPU.

    Attributes:
        model: the network.
        transform: its own preprocessing; None where only the user knows it (factories).
        spec: the text it came from.
        classes: names of its outputs, or None if they are not known.
    """

    model: nn.Module
    transform: ImageTransform | None
    spec: str
    classes: tuple[str, ...] | None = None


def is_builtin_spec(spec: str) -> bool:
    """Whether a spec may be loaded because a file names it: it runs nothing but torchvision, timm or torch_grood."""
    kind, _, name = spec.partition(":")
    return bool(_OWN_FACTORY.fullmatch(spec) or (kind in ("torchvision", "timm") and _NAME.fullmatch(name)))


def load_model(spec: str, weights: PathLike | None = None, num_classes: int | None = None) -> LoadedModel:
    """Build a classifier and load its weights.

    Args:
        spec: one of the forms above.
        weights: a .safetensors file, or a state dict saved with torch.save, bare or under "state_dict" or "model".
            Without it, torchvision's and timm's networks load their default pretrained weights, and a factory's network
            stays as the factory made it.
        num_classes: outputs of the network. By default taken from the weights where the factory has such a parameter.

    Returns:
        The network; its transform is the default one of torchvision or timm even if `weights` are your own.

    Raises:
        GroodError: if the spec cannot be resolved, the factory fails, or the weights are absent, unsafe or do not fit.
    """
    if num_classes is not None and num_classes < 1:
        raise GroodError(f"num_classes must be at least 1, not {num_classes}")
    state = None if weights is None else _read_weights(Path(weights))
    kind, _, name = spec.partition(":")
    if kind not in ("torchvision", "timm"):
        # A path may contain a colon itself.
        kind, _, name = spec.rpartition(":")
    if not kind or not name:
        raise GroodError(f"unknown model {spec!r}; expected {_FORMS}")
    if kind in ("torchvision", "timm"):
        if state is None and num_classes is not None:
            raise GroodError(
                f"{spec}: the pretrained weights have their own number of classes; leave num_classes (--num-classes) "
                "out, or pass your own weights (--weights)"
            )
        build = _torchvision if kind == "torchvision" else _timm
        loaded = build(spec, name, state, num_classes, weights)
    else:
        # A spec of ours may come from a file, and the current folder is not ours.
        with nullcontext() if is_builtin_spec(spec) else _importable(_folder_of(kind)):
            factory = _find_factory(spec, kind, name)
            model = _build(spec, factory, state, num_classes, weights)
        loaded = LoadedModel(model, None, spec)
    loaded.model.eval()
    return loaded


def _torchvision(
    spec: str, name: str, state: Mapping[str, Tensor] | None, num_classes: int | None, weights: PathLike | None
) -> LoadedModel:
    from torch_grood.data.transforms import ImageTransform

    models = require("torchvision.models", extra="vision")
    # module=models leaves out detection, segmentation and video.
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown_name(spec, name, known, "torchvision's classifiers")
    default = models.get_model_weights(name).DEFAULT
    transform = ImageTransform.from_torchvision(default.transforms())
    if state is not None:

        def factory(num_classes: int = len(default.meta["categories"])) -> nn.Module:
            with warnings.catch_warnings():
                # Two of the networks announce a change of their random initial weights, which are replaced here.
                warnings.simplefilter("ignore", FutureWarning)
                model: nn.Module = models.get_model(name, weights=None, num_classes=num_classes)
            return model

        return LoadedModel(_build(spec, factory, state, num_classes, weights), transform, spec)
    try:
        # get_model reads the file as a pickle; that it can be read as mere weights shows that it holds no code.
        default.get_state_dict(progress=False, check_hash=True, weights_only=True)
        model = models.get_model(name, weights=default)
    except Exception as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / default.url.rpartition("/")[2]
        raise GroodError(
            f"{spec}: the pretrained weights could not be loaded ({_one_line(error)}); "
            f"download {default.url} to {file}, or pass weights of your own (--weights)"
        ) from error
    return LoadedModel(model, transform, spec, tuple(default.meta["categories"]))


def _timm(
    spec: str, name: str, state: Mapping[str, Tensor] | None, num_classes: int | None, weights: PathLike | None
) -> LoadedModel:
    from torch_grood.data.transforms import ImageTransform

    timm = require("timm", extra="vision")
    # The hub's own forms (hf-hub:…, local-dir:…) name files of anybody, timm's names only those of its makers.
    if not _NAME.fullmatch(name) or not timm.is_model(name):
        raise _unknown_name(spec, name, [*timm.list_models(), *timm.list_pretrained()], "timm's models")
    if state is not None:

        def factory(num_classes: int = 1000) -> nn.Module:
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
            return model

        model = _build(spec, factory, state, num_classes, weights)
    else:
        try:
            model = timm.create_model(name, pretrained=True)
        except Exception as error:
            config = timm.get_pretrained_cfg(name)
            hub = getattr(config, "hf_hub_id", None)
            source = f"https://huggingface.co/{hub}" if hub else getattr(config, "url", None)
            remedy = f"download its weights from {source} and" if source else "timm has no weights for it;"
            raise GroodError(
                f"{spec}: the pretrained weights could not be loaded ({_one_line(error)}); {remedy} pass them "
                "as a file (--weights)"
            ) from error
    config = timm.data.resolve_model_data_config(model)
    return LoadedModel(model, ImageTransform.from_timm(config), spec)


def _unknown_name(spec: str, name: str, known: Sequence[str], where: str) -> GroodError:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return GroodError(f"{spec}: {name!r} is not one of {where}{hint}")


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
            f"{spec}: {name} is {_a(found)}, not a function or class; expected a factory that returns the network"
        )
    if _OWN_FACTORY.fullmatch(spec) and not _is_own_network(found):
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
        raise GroodError(f"unknown model {spec!r}; expected {_FORMS}")
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
    return GroodError(f"{spec}: importing {what} raised {_one_line(error)}")


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


def _build(
    spec: str,
    factory: Callable[..., object],
    state: Mapping[str, Tensor] | None,
    num_classes: int | None,
    weights: PathLike | None,
) -> nn.Module:
    """Call the factory, with the number of classes where it takes one, and load the weights."""
    parameters = _parameters(factory)
    takes_classes = "num_classes" in parameters
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name != "num_classes"
    ]
    if needed:
        raise GroodError(
            f"{spec}: the factory needs {', '.join(needed)}; give these parameters defaults, or write a factory without"
        )
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if num_classes is not None and not (takes_classes or takes_any):
        raise GroodError(f"{spec}: the factory has no parameter num_classes; leave num_classes (--num-classes) out")

    first = num_classes
    if first is None and takes_classes and parameters["num_classes"].default is inspect.Parameter.empty:
        if state is None:
            raise GroodError(f"{spec}: the factory needs a number of classes; pass num_classes (--num-classes)")
        # The head is usually last; if not, the comparison below corrects it.
        first = next((t.shape[0] for t in reversed(state.values()) if t.ndim > 1), 1)  # type: ignore[call-overload]
    model = _call(spec, factory, first)
    if state is None:
        return model
    if num_classes is None and takes_classes:
        inferred = _classes_in(state, model)
        if inferred is not None:
            model = _call(spec, factory, inferred)
    _load_state(spec, model, state, weights)
    return model


def _parameters(factory: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return {}


def _call(spec: str, factory: Callable[..., object], num_classes: int | None) -> nn.Module:
    try:
        model = factory() if num_classes is None else factory(num_classes=num_classes)
    except Exception as error:
        raise GroodError(f"{spec}: the factory raised {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise GroodError(f"{spec}: the factory returned {_a(model)}, not a torch.nn.Module")
    return model


def _classes_in(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """The number of classes in the weights, if it is all that differs: one change of the first dimension."""
    changes = {
        (tuple(tensor.shape[:1]), tuple(state[name].shape[:1]))
        for name, tensor in model.state_dict().items()
        if name in state and tensor.shape != state[name].shape
    }
    if len(changes) != 1:
        return None
    _, theirs = changes.pop()
    return theirs[0] if theirs else None


def _load_state(spec: str, model: nn.Module, state: Mapping[str, Tensor], weights: PathLike | None) -> None:
    ours = model.state_dict()
    missing = [name for name in ours if name not in state and not name.endswith(_OPTIONAL)]
    unexpected = [name for name in state if name not in ours]
    changed = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in ours.items()
        if name in state and tensor.shape != state[name].shape
    ]
    if not (missing or unexpected or changed):
        model.load_state_dict(dict(state), strict=False)
        return
    problems = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (changed, "of another shape"))
        if names
    ]
    inferred = None if missing or unexpected else _classes_in(state, model)
    hint = (
        f"the file seems to have {inferred} classes; make the network so, with num_classes={inferred} "
        f"(--num-classes {inferred}) if its factory takes it"
        if inferred is not None
        else "pass the weights of this very network"
    )
    raise GroodError(f"{weights} does not fit {spec}: tensors {'; '.join(problems)}; {hint}")


def _read_weights(file: Path) -> Mapping[str, Tensor]:
    if not file.is_file():
        raise GroodError(f"{file}: no such weights file")
    data = _read_safetensors(file) if file.suffix == ".safetensors" else _read_torch(file)
    for key in _WRAPPERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping):
        raise GroodError(f"{file} holds {_a(data)}, not a state dict; {_SAVE}")
    other = [str(key) for key, value in data.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if other or not data:
        what = f"non-tensors under {', '.join(other[:_SHOWN])}" if other else "no tensors"
        raise GroodError(f"{file} is not a state dict: it has {what}; {_SAVE}")
    state = dict(data)
    # DataParallel and torch.compile wrap a network, one within the other as it happens.
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read_safetensors(file: Path) -> Mapping[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:
        raise GroodError(
            f"{file} cannot be read as safetensors ({_one_line(error)}); it may be truncated, copy it again"
        ) from None


def _read_torch(file: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        message = str(error)
        if "TorchScript" in message:
            raise GroodError(f"{file} is a TorchScript archive, not a state dict; {_SAVE}") from None
        # torch's own words for an instruction that would run code.
        if any(word in message for word in ("GLOBAL", "call reduce", "instantiate")):
            raise GroodError(
                f"{file} contains pickled objects, which could run code, so it is not read; {_SAVE}"
            ) from None
        raise GroodError(
            f"{file} cannot be read as PyTorch weights ({type(error).__name__}); it may be truncated, "
            f"or no weights file; {_SAVE}"
        ) from None


def _folder_of(kind: str) -> Path:
    return Path(kind).parent if kind.endswith(".py") else Path.cwd()


def _a(value: object) -> str:
    return f"an object of type {type(value).__name__}"


def _one_line(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
