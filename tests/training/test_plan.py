"""Every image is seen once an epoch, however many processes share the batches and wherever a run goes on."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_grood import GroodError
from torch_grood.training import Recipe, read_recipe
from torch_grood.training.plan import Plan, learning_rate

RECIPE = Recipe("mine", "nets.py:net", epochs=10, lr=0.5, final_lr=0.01)

plans = st.builds(
    lambda processes, n_images, batch_size, epochs, seed: (processes, n_images, batch_size, epochs, seed),
    st.integers(1, 4),
    st.integers(8, 90),
    st.integers(8, 30),
    st.integers(1, 3),
    st.integers(0, 2**63 - 1),
)


@given(plans)
def test_processes_share_whole_batches_of_a_permutation(drawn: tuple[int, int, int, int, int]) -> None:
    processes, n_images, batch_size, epochs, seed = drawn
    whole = list(Plan(n_images, batch_size, epochs, seed).steps())
    each = [list(Plan(n_images, batch_size, epochs, seed, rank, processes).steps()) for rank in range(processes)]
    n_steps = Plan(n_images, batch_size, epochs, seed, 0, processes).n_steps
    assert all(len(steps) == n_steps for steps in each)
    rest = n_images % batch_size
    left_out = rest if rest < 2 * processes else 0
    seen: dict[int, list[int]] = {epoch: [] for epoch in range(epochs)}
    for number, own in enumerate(zip(*each, strict=True)):
        joined = tuple(position for step in own for position in step.positions)
        sizes = [len(step.positions) for step in own]
        # Batch normalisation takes two images, and nobody should wait for another.
        assert min(sizes) >= 2
        assert max(sizes) - min(sizes) <= 1
        assert {(step.number, step.epoch, step.n_images, step.ends_epoch) for step in own} == {
            (number, own[0].epoch, len(joined), (number + 1) % (n_steps // epochs) == 0)
        }
        seen[own[0].epoch] += joined
    for positions in seen.values():
        assert len(set(positions)) == len(positions) == n_images - left_out
        assert set(positions) <= set(range(n_images))
    # What one process does is what all of them do together, but for a last batch that is too small for them.
    by_epoch = {epoch: [s.positions for s in whole if s.epoch == epoch] for epoch in range(epochs)}
    for epoch, positions in seen.items():
        assert [p for batch in by_epoch[epoch] for p in batch][: len(positions)] == positions


@given(plans, st.data())
def test_going_on_is_the_tail_of_the_whole(drawn: tuple[int, int, int, int, int], data: st.DataObject) -> None:
    processes, n_images, batch_size, epochs, seed = drawn
    plan = Plan(n_images, batch_size, epochs, seed, data.draw(st.integers(0, processes - 1)), processes)
    whole = list(plan.steps())
    assert [step.number for step in whole] == list(range(plan.n_steps))
    for first in range(plan.n_steps + 1):
        assert list(plan.steps(first)) == whole[first:]


@pytest.mark.parametrize(
    ("n_images", "processes", "sizes"),
    [
        (12, 1, [4, 4, 4]),
        (11, 1, [4, 4, 3]),
        (10, 1, [4, 4, 2]),
        (9, 1, [4, 4]),
        (11, 2, [4, 4]),
        (4, 2, [4]),
        (2, 1, [2]),
    ],
)
def test_the_last_batch_is_short_or_left_out(n_images: int, processes: int, sizes: list[int]) -> None:
    plan = Plan(n_images, min(4, n_images), 2, 0, 0, processes)
    assert [step.n_images for step in plan.steps()] == 2 * sizes
    assert [step.ends_epoch for step in plan.steps()] == 2 * ([False] * (len(sizes) - 1) + [True])
    assert plan.steps_per_epoch == len(sizes)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        steps = Plan(64, 64, 3, seed).steps()
        return next(step.positions for step in steps if step.epoch == epoch)

    assert len({order(seed, epoch) for seed in (0, 1, 2**63 - 1) for epoch in range(3)}) == 9
    # Places are uniform: no image has a habit of coming first.
    first = [next(Plan(10, 10, 1, seed).steps()).positions[0] for seed in range(3000)]
    assert np.bincount(first, minlength=10).min() > 220
    assert np.bincount(first, minlength=10).max() < 380


@pytest.mark.parametrize(("n_images", "batch_size", "processes"), [(1, 1, 1), (9, 1, 1), (9, 3, 2), (3, 4, 2)])
def test_too_few_images_are_refused(n_images: int, batch_size: int, processes: int) -> None:
    with pytest.raises(GroodError, match=rf"{n_images} training images in batches of {batch_size} do not give each of"):
        Plan(n_images, batch_size, 1, 0, 0, processes)


@pytest.mark.parametrize("name", ["cifar10-resnet18", "imagenet200-resnet18", "imagenet-resnet50"])
def test_the_rate_is_that_of_openood_step_by_step(name: str) -> None:
    """OpenOOD's own scheduler (openood/trainers/base_trainer.py), which counts a step after every optimiser step."""
    recipe = replace(read_recipe(name), epochs=7)
    steps_per_epoch = 23

    def cosine_annealing(step: int, total_steps: int, lr_max: float, lr_min: float) -> float:
        return float(lr_min + (lr_max - lr_min) * 0.5 * (1 + np.cos(step / total_steps * np.pi)))

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], recipe.lr)
    total = recipe.epochs * steps_per_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_annealing(step, total, 1, 1e-6 / recipe.lr)
    )
    for step in range(total):
        assert learning_rate(recipe, step, steps_per_epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        with warnings.catch_warnings():
            # The optimiser has nothing to step for here.
            warnings.simplefilter("ignore", UserWarning)
            scheduler.step()


@given(st.integers(1, 20), st.integers(0, 20), st.integers(1, 30))
def test_the_rate_rises_and_then_falls(epochs: int, warmup: int, steps_per_epoch: int) -> None:
    warmup = min(warmup, epochs)
    recipe = replace(RECIPE, epochs=epochs, warmup_epochs=warmup)
    rates = np.array([learning_rate(recipe, step, steps_per_epoch) for step in range(epochs * steps_per_epoch)])
    peak = warmup * steps_per_epoch
    assert (rates > 0).all()
    assert rates.max() == recipe.lr
    if warmup:
        # Linear from lr / n to lr.
        assert rates[:peak] == pytest.approx(recipe.lr * np.arange(1, peak + 1) / peak)
    if peak < len(rates):
        falling = rates[peak:]
        assert falling[0] == recipe.lr
        assert (np.diff(falling) < 0).all()
        n = len(falling)
        last = recipe.final_lr + (recipe.lr - recipe.final_lr) * 0.5 * (1 + math.cos(math.pi * (n - 1) / n))
        assert falling[-1] == pytest.approx(last)
        # Half-way it is half-way.
        if n % 2 == 0:
            assert falling[n // 2] == pytest.approx((recipe.lr + recipe.final_lr) / 2)
