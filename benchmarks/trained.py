"""What was trained with our recipes, bundled or not."""

from pathlib import Path

from dimmix.checkpoints import Card, cards

CARDS = Path(__file__).parents[1] / "docs" / "cards"
CPU_CARDS = CARDS / "cpu"


def unbundled() -> list[Card]:
    """Cards of trained models whose weights are not bundled, timm's among them, by name."""
    return [Card.read(path) for path in sorted(CARDS.glob("*.json"))]


def by_cpu_recipes() -> list[Card]:
    """Cards by the recipes for CPU cores of models that a longer recipe, mostly a GPU's, has trained since; by name."""
    return [Card.read(path) for path in sorted(CPU_CARDS.glob("*.json"))]


def last_trained() -> list[Card]:
    """Cards of the last training of each model from random weights, bundled or not: twins are compared by these."""
    return [card for card in [*cards().values(), *unbundled()] if not card.started_from]


def trained_alike() -> list[Card]:
    """Cards of models that the small teacher has taught, by the recipes for CPU cores: timm's have had no other."""
    return [card for card in [*last_trained(), *by_cpu_recipes()] if card.teacher == "teacher_cnn"]
