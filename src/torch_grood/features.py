"""Penultimate features h(x), logits z(x) and early activations e(x) of any PyTorch classifier.

Nothing is assumed of the model but that one of its modules, the head, takes the penultimate feature in, and that
another, the early layer, lets everything through that the rest of the network needs. Both are found by running a few
samples:

- the head is the last `nn.Linear` whose output orders the classes as the model's output does: it is the logits, or
  they follow from it by a softmax, a temperature or the like;
- an early layer must be a *cut*: with its outputs of several samples exchanged, the penultimate features are too.
  A layer inside a residual branch is none, since the rest of the network still sees the old sample past it. Of the
  cuts, the first whole block past a tenth of the network's layers is taken: `layer1` of a ResNet, as in the paper;
  the first stage of a Swin or ConvNeXt, the second block of a ViT, the first hidden layer of an MLP.

Activations are read and replaced by forward hooks, so that the rest of the network runs by the model's own code.
The model is left as it was: modes, hooks and tensors, after an exception or Ctrl-C as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from torch_grood.errors import GroodError

__all__ = ["Extraction", "FeatureExtractor", "ModelFingerprint", "model_fingerprint", "unwrap"]

AtEarlyLayer = Callable[[Tensor], Tensor | None]

# Of the network's parametrised layers, the share that an early layer has behind it.
_EARLY_SHARE = (0.1, 0.6)
# Exchanged early outputs must explain the exchanged features up to this relative error (half precision: 2^-8).
_CUT_TOLERANCE = 1e-2
_PROBES = 4
# A network whose first layers are all bypassed would otherwise be probed module by module.
_MOST_CANDIDATES = 40

# Hooks and modes belong to the module, so that two threads must not use one model at the same time.
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


class Extraction(NamedTuple):
    """What one batch, or a whole data set, looks like from inside the classifier.

    Attributes:
        features: penultimate features h, (n, d).
        logits: outputs of the head z, (n, C).
        labels: int64 (n,), or None where the batches have none.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class ModelFingerprint:
    """Hashes that tell whether two models are the same.

    Attributes:
        architecture: of the names, shapes and dtypes of all tensors in the state dict.
        weights: of their values too.
    """

    architecture: str
    weights: str


@dataclass
class _Call:
    """What one module did in a probing run."""

    count: int = 0
    order: int = 0
    layers_before: int = 0
    is_tensor: bool = False


class FeatureExtractor:
    """Reads h, z and e from a model, and resumes it from replaced early activations.

    Args:
        model: any classifier; wrappers (`DataParallel`, `torch.compile`) are looked through, as hooks need the module.
        head: name of the module whose input is the penultimate feature, as in `model.named_modules()`; found if None.
        early_layer: name of the module whose output is e(x); found if None.

    Attributes:
        head, early_layer: the names in use; None until `resolve` or the first batch found them.

    Raises:
        GroodError: if `model` is no module, or has no module of the given name.
    """

    def __init__(self, model: nn.Module, head: str | None = None, early_layer: str | None = None) -> None:
        self.model = unwrap(model)
        self.head = head
        self.early_layer = early_layer
        self._head_is_logits = False
        self._resolved_head = False
        self._resolved_early = False
        for argument, name in (("head", head), ("early_layer", early_layer)):
            if name is not None and name not in dict(self.model.named_modules()):
                raise GroodError(
                    f"{argument}={name!r} is no module of {type(self.model).__name__}; "
                    f"its modules are {_listing([name for name, _ in self.model.named_modules() if name])}"
                )

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Run the body in eval mode, without gradients and eagerly; restore every module's own mode afterwards.

        Flags are set directly: `model.eval()` may be overridden to do more (merge adapters, fold weights). Other
        threads that want the same model wait.
        """
        with _locks_guard:
            lock = _locks.setdefault(self.model, threading.RLock())
        with contextlib.ExitStack() as stack:
            stack.enter_context(lock)
            modules = list(self.model.modules())
            modes = [module.training for module in modules]
            if any(_is_compiled(module) for module in modules):
                # Hooks inside a compiled graph are ignored or recompile it; the eager module computes the same.
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.no_grad())
            try:
                for module in modules:
                    module.training = False
                yield
            finally:
                for module, mode in zip(modules, modes, strict=True):
                    module.training = mode

    def resolve(self, inputs: Tensor, *, early: bool = False) -> None:
        """Find or check the head, and on request the early layer, by running a few samples.

        Args:
            inputs: a batch of inputs (n, ...), n ≥ 1.
            early: the early layer will be used.

        Raises:
            GroodError: if they cannot be found; the message says what to pass.
        """
        if self._resolved_head and (self._resolved_early or not early):
            return
        with self.evaluation():
            probe = _probe(self._to_model(inputs[:1]))
            if not self._resolved_head:
                self._resolve_head(probe)
            if early and not self._resolved_early:
                self._resolve_early_layer(probe)

    def __call__(self, inputs: Tensor, at_early: AtEarlyLayer | None = None) -> Extraction:
        """Run one batch.

        Args:
            inputs: (n, ...), moved to the model's device and float dtype.
            at_early: called with e(x) (n, ...), the output of the early layer; what it returns, if anything, replaces
                e(x), and the rest of the network runs on that.

        Returns:
            features (n, d) and logits (n, C), on the model's device. A head input with positions (tokens or a feature
            map) is averaged over them.

        Raises:
            GroodError: if the model cannot run on the batch; the message gives the shape and the model's own error.
        """
        self.resolve(inputs, early=at_early is not None)
        with self.evaluation():
            return self._run(self._to_model(inputs), at_early)

    def _run(self, inputs: Tensor, at_early: AtEarlyLayer | None = None) -> Extraction:
        features: list[Tensor] = []
        head_outputs: list[Tensor] = []

        def before_head(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Cloned: what runs after the head may overwrite its input.
            features.append(_first_tensor((*args, *kwargs.values())).clone())

        def after_head(_: nn.Module, __: Any, output: Any) -> None:
            head_outputs.append(output)

        def after_early(_: nn.Module, __: Any, output: Any) -> Any:
            assert at_early is not None
            replacement = at_early(_first_tensor(output))
            return None if replacement is None else _with_first_tensor(output, replacement)

        with contextlib.ExitStack() as hooks:
            assert self.head is not None
            head = self.model.get_submodule(self.head)
            hooks.callback(head.register_forward_pre_hook(before_head, with_kwargs=True).remove)
            if self._head_is_logits:
                hooks.callback(head.register_forward_hook(after_head).remove)
            if at_early is not None:
                assert self.early_layer is not None
                early_layer = self.model.get_submodule(self.early_layer)
                hooks.callback(early_layer.register_forward_hook(after_early).remove)
            output = _logits(self._forward(inputs))
        if not features:
            raise GroodError(
                f"the head {self.head!r} did not run on this batch; pass head='…', a module that always runs"
            )
        # A head that is called several times is read at its last call, whose output became the logits.
        logits = head_outputs[-1] if self._head_is_logits else output
        # Not len(), which would make a constant of it where the model is traced.
        return Extraction(_pooled(features[-1], inputs.shape[0], head), logits)

    def _forward(self, inputs: Tensor) -> Any:
        try:
            return self.model(inputs)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            if isinstance(error, GroodError):
                raise
            reason = str(error).strip().splitlines()
            raise GroodError(
                f"the model cannot run on a batch of shape {tuple(inputs.shape)} ({inputs.dtype}): "
                f"{reason[0] if reason else type(error).__name__}. "
                "Check the size and the number of channels of the images, and the transform."
            ) from error

    def _to_model(self, inputs: Tensor) -> Tensor:
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        if parameter is None:
            return inputs
        dtype = parameter.dtype if inputs.is_floating_point() else None
        return inputs.to(parameter.device, dtype, non_blocking=True)

    def _resolve_head(self, probe: Tensor) -> None:
        if self.head is not None:
            module = self.model.get_submodule(self.head)
            self._head_is_logits = False
            if isinstance(module, nn.Linear):
                self._head_is_logits = self.head in self._heads(probe)
            self._run(probe)
        else:
            found = self._heads(probe)
            if not found and not bool(self._run_logits(probe).isfinite().all()):
                raise GroodError(
                    "the model's outputs are NaN or infinite; check its weights (half precision may overflow)"
                )
            if not found:
                linear = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
                others = [name for name, module in self.model.named_modules() if name and not list(module.children())]
                raise GroodError(
                    f"found no linear layer of {type(self.model).__name__} whose output is the logits (linear layers: "
                    f"{_listing(linear)}). Pass head='…', the module whose input is the penultimate feature; the "
                    f"last modules are {_listing(others[-5:])}"
                )
            self.head = found[-1]
            self._head_is_logits = True
        self._resolved_head = True

    def _run_logits(self, probe: Tensor) -> Tensor:
        return _logits(self._forward(probe))

    def _heads(self, probe: Tensor) -> list[str]:
        """Names of the linear layers whose last output is the logits, in the order of their calls."""
        outputs: dict[str, Tensor] = {}

        def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                outputs.pop(name, None)
                outputs[name] = output

            return hook

        with contextlib.ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if isinstance(module, nn.Linear):
                    hooks.callback(module.register_forward_hook(record(name)).remove)
            logits = self._run_logits(probe)
        alike = [name for name, output in outputs.items() if _orders_classes_alike(output, logits)]
        # An auxiliary head may order a few samples alike by chance; equality is no chance.
        return [name for name in alike if torch.equal(outputs[name], logits)] or alike

    def _resolve_early_layer(self, probe: Tensor) -> None:
        if self.early_layer is not None:
            if not self._is_cut(self.early_layer, probe):
                able = [name for name in self._early_candidates(probe) if self._is_cut(name, probe)]
                raise GroodError(
                    f"early_layer={self.early_layer!r} does not carry the whole sample: part of the network bypasses "
                    "it (a residual branch?), it gives no tensor, or it runs more than once. "
                    f"Layers that do: {_listing(able)}"
                )
        else:
            for name in self._early_candidates(probe):
                if self._is_cut(name, probe):
                    self.early_layer = name
                    break
            else:
                raise GroodError(
                    f"found no early layer of {type(self.model).__name__} to mix at. Pass early_layer='…', a module "
                    "whose output carries the whole sample, or a source that mixes nothing: outliers=PrototypeMean()"
                )
        self._resolved_early = True

    def _early_candidates(self, probe: Tensor) -> list[str]:
        """Modules that may be early layers, the most sensible first: whole blocks, shallow names, little depth.

        Those with too few or too many of the network's layers behind them come last.
        """
        calls: dict[str, _Call] = {}
        parents = {
            name
            for name, module in self.model.named_modules()
            if any(child != "parametrizations" for child, _ in module.named_children())
        }
        layers_run = order = 0
        head_order = 0

        def hook_for(name: str, is_layer: bool) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                nonlocal layers_run, order, head_order
                layers_run += is_layer
                order += 1
                call = calls.setdefault(name, _Call())
                call.count, call.order, call.layers_before = call.count + 1, order, layers_run
                tensor = output[0] if isinstance(output, tuple) and output else output
                call.is_tensor = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim >= 2
                call.is_tensor = call.is_tensor and len(tensor) == len(probe)
                if name == self.head:
                    head_order = order

            return hook

        with contextlib.ExitStack() as hooks:
            for name, module in self.model.named_modules():
                own_parameters = next(module.parameters(recurse=False), None) is not None
                is_layer = name not in parents and (own_parameters or is_parametrized(module))
                hooks.callback(module.register_forward_hook(hook_for(name, is_layer)).remove)
            self._run(probe)

        low, high = _EARLY_SHARE
        able = [
            name
            for name, call in calls.items()
            if name and call.count == 1 and call.is_tensor and call.order < head_order
        ]

        def preference(name: str) -> tuple[bool, bool, int, int, int]:
            call = calls[name]
            sensible = low * layers_run <= call.layers_before <= high * layers_run
            return not sensible, name not in parents, name.count("."), call.layers_before, -call.order

        return sorted(able, key=preference)[:_MOST_CANDIDATES]

    def _is_cut(self, name: str, probe: Tensor) -> bool:
        """Exchange the early outputs of different samples: are the penultimate features exchanged?"""
        seen: list[Tensor] = []

        def exchange(early: Tensor) -> Tensor:
            seen.append(early)
            return early.roll(1, 0)

        before, self.early_layer = self.early_layer, name
        try:
            plain = self._run(probe).features.double()
            exchanged = self._run(probe, exchange).features.double()
        except (GroodError, _NoTensorError):
            return False
        finally:
            self.early_layer = before
        expected = plain.roll(1, 0)
        difference = (plain - expected).norm()
        error = (exchanged - expected).norm()
        # Samples with equal features (a dead network) would agree with anything.
        return len(seen) == 1 and bool(difference > 0) and bool(error <= _CUT_TOLERANCE * difference)


class _NoTensorError(TypeError):
    """A module's output holds no tensor where one is needed."""


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `DataParallel`, `DistributedDataParallel` and `torch.compile`.

    Raises:
        GroodError: if `model` is not a module that hooks work on.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise GroodError("a TorchScript module takes no hooks; pass the eager module that it was made from")
    if not isinstance(model, nn.Module):
        raise GroodError(
            f"expected a torch.nn.Module that maps images to logits, got {type(model).__name__}; "
            "without a module use GROOD(None) and fit_features"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    inner = model._modules.get("_orig_mod")
    return unwrap(inner) if inner is not None else model


def model_fingerprint(model: nn.Module) -> ModelFingerprint:
    """Hash the state dict of `model`; wrappers are looked through."""
    architecture, weights = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(unwrap(model).state_dict().items()):
        if not isinstance(tensor, Tensor):
            continue
        # A submodule that was compiled later is the same submodule.
        name = name.replace("_orig_mod.", "")
        architecture.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    weights.update(architecture.digest())
    return ModelFingerprint(architecture.hexdigest(), weights.hexdigest())


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _probe(first: Tensor) -> Tensor:
    """Samples that certainly differ: the given one, and noise on top of it (whole numbers: other orders of it)."""
    generator = torch.Generator().manual_seed(0)
    samples = [first.nan_to_num(0, 0, 0) if first.is_floating_point() else first]
    for _ in range(_PROBES - 1):
        if first.is_floating_point():
            noise = torch.randn(first.shape, generator=generator, dtype=torch.float32).to(first.device, first.dtype)
            spread = samples[0].float().std(correction=0).clamp(min=0.5).to(first.dtype)
            samples.append(0.5 * samples[0] + spread * noise)
        else:
            order = torch.randperm(first.numel(), generator=generator).to(first.device)
            samples.append(first.flatten()[order].view_as(first))
    return torch.cat(samples)


def _logits(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, `.logits` or ["logits"] of a dict-like output, or a tuple's first."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        return _logits(output[0])
    if not isinstance(output, Tensor):
        raise GroodError(f"expected logits (n, C) as the model's output, got {type(output).__name__}; wrap the model")
    if output.ndim != 2 or output.shape[1] < 2:
        raise GroodError(
            f"expected logits (n, C) with C ≥ 2 classes as the model's output, got shape {tuple(output.shape)}; "
            "wrap the model so that it gives one number a class"
        )
    return output


def _orders_classes_alike(output: Any, logits: Tensor) -> bool:
    """Does `output` rank the classes of every sample as `logits` does (equal, softmax, temperature, …)?"""
    if not isinstance(output, Tensor) or output.shape != logits.shape:
        return False
    if torch.equal(output, logits):
        return True
    sorted_logits = logits.gather(1, output.argsort(1))
    return bool((sorted_logits.diff(dim=1) >= 0).all()) and bool((logits.amax(1) > logits.amin(1)).all())


def _pooled(feature: Tensor, n: int, head: nn.Module) -> Tensor:
    """(n, d) from a head's input; the positions of a map or of tokens are averaged.

    For a linear head that is followed by an average, this is the feature whose logits are the model's. A linear layer
    has the features on the last axis, a convolution on the second, and so have maps in general.
    """
    if feature.ndim < 2 or feature.shape[0] != n:
        raise GroodError(
            f"the head's input has shape {tuple(feature.shape)} for a batch of {n}; expected one feature a sample. "
            "Pass head='…', the module that classifies each sample"
        )
    if feature.ndim == 2:
        return feature
    is_convolution = isinstance(head, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if isinstance(head, nn.Linear) or (feature.ndim == 3 and not is_convolution):
        return feature.flatten(1, -2).mean(1)
    return feature.flatten(2).mean(2)


def _first_tensor(output: Any) -> Tensor:
    tensor = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(tensor, Tensor):
        raise _NoTensorError(f"expected a tensor, got {type(tensor).__name__}")
    return tensor


def _with_first_tensor(output: Any, replacement: Tensor) -> Any:
    return (replacement, *output[1:]) if isinstance(output, tuple) else replacement


def _listing(names: list[str], most: int = 12) -> str:
    shown = ", ".join(names[:most]) or "none"
    return shown + (f", … ({len(names) - most} more)" if len(names) > most else "")
