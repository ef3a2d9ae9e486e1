"""What a run says of itself: its loss, its minutes, and how good its average is."""

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toy_data import toy_model

from dimmix.training import loop
from dimmix.training.data import load_images
from dimmix.training.learner import Learner
from dimmix.training.recipe import Data
from dimmix.training.report import measure
from dimmix.training.state import read_state, write_state

Train = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "run"


def logged(folder: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (folder / loop.LOG).read_text().splitlines()]


def test_the_log_has_the_mean_loss_of_each_epoch(
    train_toy: Train, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    update = Learner.update

    def noted(self: Learner, *args: Any) -> torch.Tensor:
        loss = update(self, *args)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(Learner, "update", noted)
    train_toy()
    assert logged(folder, "loss") == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5])


def test_the_log_of_split_val_measures_the_average_of_the_weights(train_toy: Train, toy: Path, folder: Path) -> None:
    card = train_toy("train.precision=fp32", split="val")
    held_back = load_images(toy, Data("toy", image_size=16), "train")[-8:]
    x = torch.from_numpy(held_back.pixels).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(card.mean).view(3, 1, 1)) / torch.tensor(card.std).view(3, 1, 1)
    tensors, _ = read_state(folder / loop.STATE)
    losses = {}
    for kind in ("ema.", "model."):
        model = toy_model().eval()
        model.load_state_dict({key.removeprefix(kind): t for key, t in tensors.items() if key.startswith(kind)})
        with torch.inference_mode():
            losses[kind] = F.cross_entropy(model(x), torch.from_numpy(held_back.labels)).item()
    assert logged(folder, "nll")[-1] == pytest.approx(losses["ema."], rel=1e-4)
    assert abs(losses["model."] - losses["ema."]) > 1e-2


def test_minutes_before_a_stop_count_among_those_of_the_training(train_toy: Train, folder: Path) -> None:
    train_toy(max_minutes=0.0)
    tensors, facts = read_state(folder / loop.STATE)
    write_state(folder / loop.STATE, tensors, facts | {"position": facts["position"] | {"seconds": 600.0}})
    assert 10 <= train_toy().train_minutes < 15


def test_max_minutes_are_minutes(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))  # a second passes at each look
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    assert train_toy(max_minutes=1.0) is not None
    assert train_toy("schedule.epochs=9", name="long", max_minutes=1.0) is None


def test_a_confidence_of_one_that_is_right_half_of_the_time_is_half_off() -> None:
    measured = measure(torch.tensor([[1000.0, 0], [1000.0, 0]]), torch.tensor([0, 1]), ("a", "b"))
    assert (measured["ece"], measured["top1"]) == (0.5, 50)
