"""Training that starts from a checkpoint, on other classes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dimmix import Classifier
from dimmix.checkpoints import Card, cards
from dimmix.checkpoints.publish import write_folder
from dimmix.training.learner import who_know_every_row
from dimmix.training.loop import Options, train
from dimmix.training.recipe import read_recipe

ROOT = Path(__file__).parents[2]
FINE_TUNED = "butterfly_resnet_fast_32.cifar10"
Train = Callable[..., Any]


@pytest.mark.skipif(FINE_TUNED not in cards(), reason="the checkpoint is not in this installation")
def test_it_starts_from_the_checkpoint_and_gives_one_of_the_same_architecture(train_toy: Train, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    start = ("model.name=" + FINE_TUNED, "model.args={pretrained = true}")
    unmoved = train_toy(*start, "optimizer.lr=0", name="unmoved")
    learnt, given = load_file(runs / "unmoved" / unmoved.file), load_file(cards()[FINE_TUNED].path)
    kept = [key for key, value in given.items() if key.endswith(".weight") and "head" not in key]
    assert len(kept) > 10
    assert all(torch.equal(learnt[key].float(), given[key].float()) for key in kept)
    card = train_toy(*start, "schedule.epochs=8", name="tuned")
    assert (card.started_from, Card.read(runs / "tuned" / f"{card.name}.json")) == (FINE_TUNED, card)
    assert (card.name, card.labels) == ("butterfly_resnet_fast_32.toy", ("dark", "light", "red"))
    assert card.top1 > 90
    classifier = Classifier(checkpoint=runs / "tuned" / "butterfly_resnet_fast_32.toy.safetensors")
    assert (classifier.name, classifier.predict(np.full((16, 16, 3), (200, 40, 40), np.uint8))[0].label) == (
        "butterfly_resnet_fast_32",
        "red",
    )


@pytest.mark.skipif(FINE_TUNED not in cards(), reason="the checkpoint is not in this installation")
@pytest.mark.parametrize(
    ("name", "data", "warned"),
    [(FINE_TUNED, "cifar10", True), (FINE_TUNED, "toy", False), (FINE_TUNED.partition(".")[0], "cifar10", True)],
)
def test_validation_knows_of_a_checkpoint_that_has_learnt_the_rows_held_back(
    recipe_file: Callable[..., Path], name: str, data: str, warned: bool
) -> None:
    said = {}
    for pretrained in ("true", "false"):
        changes = (f"model.name={name}", f"model.args={{pretrained = {pretrained}}}", f"data.name={data}")
        said[pretrained] = who_know_every_row(read_recipe(recipe_file(), changes))
    assert said == {"true": ["the checkpoint to start from"] * warned, "false": []}


def test_a_design_of_ones_own_is_loaded_and_published_by_its_card(train_toy: Train, tmp_path: Path) -> None:
    card = train_toy()
    args = {"depths": [1, 1, 1], "width": 8, "radix": [4, 4, 4], "first_radix": [4, 4, 4], "drop_rate": 0.1}
    assert card.model_args == args
    path = tmp_path / "runs" / "run" / card.file
    classifier = Classifier(checkpoint=path)
    assert sum(p.numel() for p in classifier.runtime.model.parameters()) < 20_000
    files = write_folder(card, path, tmp_path / "published", "me/toy")
    assert json.loads((tmp_path / "published" / "config.json").read_text())["model_args"] == args
    assert "config.json" in [file.name for file in files]


@pytest.mark.skipif("butterfly_resnet_fast_32.cifar100" not in cards(), reason="the checkpoint is not there")
def test_the_recipe_of_the_guide_trains(toy: Path, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "fine_tuning.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", guide, re.S)
    (tmp_path / "mine.toml").write_text(text)
    small = ("data.name=toy", "train.batch_size=8", "schedule.epochs=2")
    card = train(read_recipe(tmp_path / "mine.toml", small), Options(folder=tmp_path / "runs" / "mine", data=toy))
    assert card
    assert (card.name, card.epochs) == ("butterfly_resnet_fast_32.toy", 2)
    for name in re.findall(r"runs/mine/(\S+)\.safetensors", guide):
        assert (tmp_path / "runs" / "mine" / f"{name.replace('photos', 'toy')}.safetensors").is_file()


def test_a_held_out_folder_may_lack_a_class(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    levels = {"dark": 20, "grey": 120, "light": 220}
    for split, names in (("train", levels), ("test", ("grey", "light"))):
        for name in names:
            (folder := tmp_path / "photos" / split / name).mkdir(parents=True)
            for row in range(8):
                Image.new("RGB", (16, 16), (levels[name] + row,) * 3).save(folder / f"{row}.png")
    recipe = read_recipe(recipe_file(), ("schedule.epochs=20", "augment.cutout=0"))
    card = train(recipe, Options(folder=tmp_path / "run", data=tmp_path / "photos"))
    assert card
    assert (card.labels, card.images, card.top1) == (("dark", "grey", "light"), 16, 100)
    assert card.per_class_accuracy == (None, 100.0, 100.0)
