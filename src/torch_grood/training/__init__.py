"""Training and fine-tuning of classifiers: recipes, the networks that no package brings, the loop on accelerate."""

from __future__ import annotations

from torch_grood.training.computation import Computation
from torch_grood.training.recipe import Recipe, read_recipe, recipe_names
from torch_grood.training.run import TrainingRun, train

__all__ = ["Computation", "Recipe", "TrainingRun", "read_recipe", "recipe_names", "train"]
