"""Train, prune, retrain, measure: the whole run that a recipe describes, and the loop for those who train themselves.

Nothing is imported here: the recipe needs :mod:`secateur.pipeline.optim`, and the run needs the recipe.
"""
