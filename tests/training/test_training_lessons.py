"""What a teacher says of a view is asked for once, kept, and never taken for what it says of another."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_data import teacher_of

from dimmix.training.data import Images
from dimmix.training.learner import Learner
from dimmix.training.lessons import Lessons, lessons_folder
from dimmix.training.processes import Processes
from dimmix.training.recipe import read_recipe

Train = Callable[..., Any]


@pytest.mark.parametrize("views", [1, 2])
def test_a_teacher_is_asked_once_for_each_view(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: int
) -> None:
    teach, asked = Learner.teach, []

    def counted(self: Learner, x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return teach(self, x)

    monkeypatch.setattr(Learner, "teach", counted)
    recipe = (*teacher_of(tmp_path), f"teacher.views={views}", "schedule.epochs=4")
    first = train_toy(*recipe, name="first", cache=tmp_path / "cache")
    assert len(asked) == 5 * views  # five steps an epoch
    again = train_toy(*recipe, "schedule.epochs=4", name="again", cache=tmp_path / "cache")
    assert len(asked) == 5 * views
    assert (first.top1, first.nll) == (again.top1, again.nll)


def test_kept_logits_that_are_not_whole_are_computed_again(train_toy: Train, tmp_path: Path) -> None:
    recipe = (*teacher_of(tmp_path), "teacher.views=1")
    first = train_toy(*recipe, name="first", cache=tmp_path / "cache")
    (kept,) = (tmp_path / "cache").glob("teacher-*/0.npy")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-7])
    assert train_toy(*recipe, name="again", cache=tmp_path / "cache").nll == first.nll
    assert kept.read_bytes() == whole


@pytest.fixture
def folder_of(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The folder of a run with these overrides, weights of the teacher, images and rank."""
    images = Images(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64), ("a",))

    def find(*overrides: str, weights: str = "w", pixel: int = 0, rank: int = 0) -> Path:
        recipe = read_recipe(recipe_file(), ("teacher.name=teacher_cnn", "teacher.weights=t.safetensors", *overrides))
        training = replace(images, pixels=images.pixels + np.uint8(pixel))
        return lessons_folder(tmp_path, recipe, weights, training, Processes(rank, 2, torch.device("cpu")))

    return find


@pytest.mark.parametrize(
    ("overrides", "others"),
    [
        (["train.seed=1"], {}),
        (["train.batch_size=4"], {}),
        (["train.precision=fp32"], {}),
        (["augment.crop=1"], {}),
        (["data.mean=[0, 0, 0]"], {}),
        (["teacher.name=teacher_cnn_wide"], {}),
        ([], {"weights": "v"}),
        ([], {"pixel": 1}),
        ([], {"rank": 1}),
    ],
)
def test_runs_share_lessons_only_if_their_teacher_sees_the_same_batches(
    folder_of: Callable[..., Path], overrides: list[str], others: dict[str, Any]
) -> None:
    assert folder_of(*overrides, **others) != folder_of() == folder_of("optimizer.lr=9", "schedule.epochs=9")


def test_a_view_that_a_run_was_resumed_in_is_kept_when_it_comes_again_from_its_start(tmp_path: Path) -> None:
    lessons = Lessons(lambda x: x, 3, tmp_path)
    batches = [torch.full((1, 2), float(at)) for at in range(3)]
    for at in (1, 2, 0, 1, 2, 0, 1, 2):
        assert torch.equal(lessons.logits("0", at, batches[at]), batches[at])
    assert np.load(tmp_path / "0.npy")[:, 0, 0].tolist() == [0, 1, 2]


def test_plain_views_have_lessons_of_their_own(train_toy: Train, tmp_path: Path) -> None:
    train_toy(*teacher_of(tmp_path), "teacher.views=1", "augment.plain_epochs=1", cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").glob("teacher-*")
    assert sorted(path.name for path in folder.iterdir()) == ["0-plain.npy", "0.npy"]
