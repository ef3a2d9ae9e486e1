"""`dimmix train`: the command of `python -m dimmix.training`."""

from dimmix.training.__main__ import train

__all__ = ["train"]
