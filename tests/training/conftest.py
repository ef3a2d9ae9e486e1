"""A run on toy data: the folder, the recipe and the call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_data import RECIPE, encode, toy_pixels, write_shard


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """The folder that holds the data set `toy`: 40 training images in two shards, 12 to test on."""
    for name, count, seed in (("train-00000", 25, 0), ("train-00001", 15, 1), ("test-00000", 12, 2)):
        pixels, labels = toy_pixels(count, seed)
        write_shard(tmp_path / "data" / "toy" / f"{name}-of-2.parquet", [encode(image) for image in pixels], labels)
    return tmp_path / "data"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the recipe, with text replaced."""

    def write(*changes: tuple[str, str]) -> Path:
        text = RECIPE
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "toy_resnet.toy.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def train_toy(tmp_path: Path, toy: Path, recipe_file: Callable[..., Path]) -> Callable[..., Any]:
    """Trains the recipe with overrides in the folder `runs/<name>`; the card or None."""
    from dimmix.training.loop import Options, train
    from dimmix.training.recipe import read_recipe

    def run(*overrides: str, name: str = "run", **options: Any) -> Any:
        recipe = read_recipe(recipe_file(), overrides)
        return train(recipe, Options(**{"folder": tmp_path / "runs" / name, "data": toy} | options))

    return run
