"""Questions about a network that take many evaluations to answer."""

from secateur.bench.of_recipe import recipe_sensitivity
from secateur.bench.plot import plot_sensitivity
from secateur.bench.sensitivity import Curve, Figure, Point, SensitivityResult, sensitivity

__all__ = ["Curve", "Figure", "Point", "SensitivityResult", "plot_sensitivity", "recipe_sensitivity", "sensitivity"]
