"""What was trained with our recipes and is not bundled."""

from pathlib import Path

from dimmix.checkpoints import Card

CARDS = Path(__file__).parents[1] / "docs" / "cards"
CPU_CARDS = CARDS / "cpu"


def unbundled() -> list[Card]:
    """Cards of trained models whose weights are not bundled, timm's among them, by name."""
    return [Card.read(path) for path in sorted(CARDS.glob("*.json"))]


def by_cpu_recipes() -> list[Card]:
    """Cards by the recipes for CPU cores of models that a GPU has trained since, or whose twins it has; by name."""
    return [Card.read(path) for path in sorted(CPU_CARDS.glob("*.json"))]
