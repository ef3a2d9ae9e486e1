"""Training of a recipe: data in memory, augmentation on the batch, one loop, resumable to the step.

`python -m dimmix.training RECIPE` and `dimmix train RECIPE` run the same function, `dimmix.training.loop.train`.
Importing this package imports neither torch nor timm.
"""
