"""Laws of leaving things alone: the classifier, and what the whole process shares."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_grood.testing import world
from torch_grood.testing.clause import clause, require, require_same, same_bits
from torch_grood.testing.uses import Use

Facts = dict[str, Any]


def _steps(use: Use, detector: Any) -> list[tuple[str, Callable[[], object]]]:
    """All that a detector is asked to do, step by step, a mistake included."""
    steps: list[tuple[str, Callable[[], object]]] = [
        ("fit", lambda: use.fit(detector, use.train)),
        ("score", lambda: use.score(detector, use.queries)),
    ]
    if use.decides(detector):
        steps += [
            ("calibrate", lambda: use.calibrate(detector, use.held_out)),
            ("predict", lambda: use.predict(detector, use.queries)),
        ]
    return [*steps, ("a fit that failed", lambda: _failing(lambda: use.fit_raw(detector, *use.failing_arguments())))]


def _failing(act: Callable[[], object]) -> None:
    # Whether it fails as it should is the matter of another clause.
    with contextlib.suppress(Exception):
        act()


def _require_equal(after: Facts, before: Facts, step: str) -> None:
    for what in {**before, **after}:
        was, now = before.get(what), after.get(what)
        both = isinstance(was, Tensor) and isinstance(now, Tensor)
        equal = same_bits(was, now) if isinstance(was, Tensor) and isinstance(now, Tensor) else was == now
        require(equal, f"{step} changed {what}" + ("" if both else f" from {was!r} to {now!r}"))


def _model_facts(model: nn.Module) -> Facts:
    """All of a model that its owner could find changed."""
    facts: Facts = {f"the weights {name!r}": value.clone() for name, value in model.state_dict().items()}
    for name, module in model.named_modules():
        facts[f"the training mode of module {name!r}"] = module.training
        facts[f"the attributes of module {name!r}"] = sorted(vars(module))
        for table, hooks in vars(module).items():
            if table.endswith("_hooks"):
                facts[f"{table} of module {name!r}"] = len(hooks)
    for name, parameter in model.named_parameters():
        facts[f"requires_grad of {name!r}"] = parameter.requires_grad
        facts[f"the gradient of {name!r}"] = None if parameter.grad is None else parameter.grad.clone()
    return facts


@clause(uses=("images",))
def model_is_left_alone(use: Use) -> None:
    """The classifier is afterwards what it was: weights, buffers, training modes, hooks, requires_grad and gradients.

    It is in service elsewhere, perhaps in training. That holds after an error too.
    """
    model = use.model
    assert model is not None
    # Partly frozen, as in fine-tuning: no single flag says how to restore it.
    model.train()
    model.get_submodule("norm").eval()
    model.get_parameter("stem.weight").requires_grad_(False)
    before = _model_facts(model)
    detector = use.new()
    _require_equal(_model_facts(model), before, "the constructor")
    for step, act in _steps(use, detector):
        act()
        _require_equal(_model_facts(model), before, step)


@clause(uses=("images",))
def model_is_run_in_eval_mode(use: Use) -> None:
    """Scores are those of the classifier in eval mode, in whatever mode it is handed over.

    In training mode dropout makes every score random, and BatchNorm makes it depend on the batch.
    """
    model = use.model
    assert model is not None
    expected = use.outcome(use.ready())
    model.train()
    require_same(use.outcome(use.ready()), expected, "with the classifier handed over in training mode")


def _process_facts() -> Facts:
    """State that all the code of a process shares."""
    numpy_state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 (the global state is what is tested)
    return {
        "the random state of torch": torch.get_rng_state(),
        "the random state of numpy": torch.from_numpy(numpy_state["key"].astype(np.int64)),
        "the position in the random state of numpy": numpy_state["pos"],
        "the random state of Python": torch.tensor(random.getstate()[1]),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
    }


@clause()
def process_is_left_alone(use: Use) -> None:
    """The random states of torch, numpy and Python are not used, and no global setting is changed.

    A training run beside the detector, with its own seed, must go on as if the detector were not there.
    """
    world.seed_process(718281828)
    before = _process_facts()
    detector = use.new()
    _require_equal(_process_facts(), before, "the constructor")
    for step, act in _steps(use, detector):
        act()
        _require_equal(_process_facts(), before, step)
