"""Recipes: what to learn from graded rollouts. A recipe is a class with a pure ``select``; name it in ``data.recipe``."""

from pause_lightning.recipes.recipe import Example, Recipe
from pause_lightning.recipes.star import STaR

__all__ = ["Example", "Recipe", "STaR"]
