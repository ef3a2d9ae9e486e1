"""Checkpoints: one JSON card and one safetensors file each; found, verified, fetched and published.

Every weight file this package loads comes through `find`. Nothing here imports torch or timm, no pickle is ever
read, and nothing from a repository is executed.
"""

from .card import Card, cards
from .errors import CheckpointError
from .hub import status
from .lookup import find

__all__ = ["Card", "CheckpointError", "cards", "find", "status"]
