"""Training and fine-tuning of classifiers: recipes, the networks that no package brings, the loop on accelerate."""

from __future__ import annotations

from torch_grood.training.computation import Computation
from torch_grood.training.loop import TrainingRun, train
from torch_grood.training.recipe import Recipe, read_recipe, recipe_names

__all__ = ["Computation", "Recipe", "TrainingRun", "read_recipe", "recipe_names", "train"]
