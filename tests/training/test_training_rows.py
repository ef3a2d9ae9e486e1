"""Which rows a run reads, holds back and has learnt from, and that nothing of a run changes unnoticed on its way."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from toy_data import encode, toy_pixels, write_shard

from dimmix.errors import DimmixError, Interrupted
from dimmix.files import alone_in
from dimmix.training.data import load_images
from dimmix.training.learner import Learner
from dimmix.training.optim import build_optimizers
from dimmix.training.recipe import Data, Optimizer, read_recipe

Train = Callable[..., Any]
TOY = Data("toy", image_size=16)


@pytest.mark.parametrize("labels", [[2] * 20 + [1] * 20 + [0] * 20, ([0] * 10 + [1] * 10 + [2] * 10) * 2])
def test_rows_in_runs_of_a_class_are_mixed(tmp_path: Path, labels: list[int]) -> None:
    pixels, _ = toy_pixels(60, 0)
    write_shard(tmp_path / "toy" / "train-00000-of-1.parquet", [encode(image) for image in pixels], labels)
    images = load_images(tmp_path, TOY, "train")
    assert sorted(images.labels.tolist()) == sorted(labels)
    assert set(images.labels[-20:].tolist()) == {0, 1, 2}
    for image, label in zip(images.pixels[:5], images.labels[:5], strict=True):
        (row,) = (row for row, known in enumerate(pixels) if np.array_equal(known, image))
        assert labels[row] == label


def test_rows_that_are_mixed_stay_where_they_are(toy: Path) -> None:
    expected = toy_pixels(25, 0)[1] + toy_pixels(15, 1)[1]
    assert load_images(toy, TOY, "train").labels.tolist() == expected


def _picture(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level, level, level)).save(path)


def test_the_cache_sees_what_lies_behind_a_link(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(4):
            _picture(tmp_path / "store" / split / "cat" / f"{number}.png", 40 * number)
            _picture(tmp_path / "data" / "toy" / split / "dog" / f"{number}.png", 255)
        (tmp_path / "data" / "toy" / split / "cat").symlink_to(tmp_path / "store" / split / "cat")
        (tmp_path / "store" / split / "cat" / "up").symlink_to(tmp_path / "data")
    cache = tmp_path / "cache"
    before = load_images(tmp_path / "data", TOY, "train", cache)
    (tmp_path / "store" / "train" / "cat" / "0.png").unlink()
    after = load_images(tmp_path / "data", TOY, "train", cache)
    assert len(before) - len(after) == 1


def test_a_broken_image_of_a_folder_is_named_by_its_file(tmp_path: Path) -> None:
    _picture(tmp_path / "toy" / "train" / "cat" / "0.png", 0)
    (tmp_path / "toy" / "train" / "cat" / "1.png").write_bytes(b"no image")
    (tmp_path / "toy" / "train" / "dog").mkdir()
    with pytest.raises(DimmixError, match=r"2 images are missing or broken: row 1 \(.*1\.png\), row 2 \(.*dog\) \(not"):
        load_images(tmp_path, TOY, "train")


def test_a_folder_of_several_data_sets_is_none(toy: Path, recipe_file: Callable[..., Path]) -> None:
    pixels, labels = toy_pixels(10, 0)
    write_shard(toy / "other" / "train-00000-of-1.parquet", [encode(image) for image in pixels], labels)
    with pytest.raises(DimmixError, match=r"2 data sets lie in it; name one of .*other, .*toy"):
        load_images(toy, replace(TOY, name="tyo"), "train")
    with pytest.raises(DimmixError, match=r"data\.name = '\.\./toy' must be the name of a folder"):
        read_recipe(recipe_file(), ("data.name=../toy",))


def test_a_key_that_is_gone_from_the_arguments_is_a_change(train_toy: Train) -> None:
    assert train_toy(max_minutes=0.0) is None
    fewer = "model.args={depths = [1, 1, 1], width = 8, radix = [4, 4, 4], first_radix = [4, 4, 4]}"
    with pytest.raises(DimmixError, match=r"model\.args\.drop_rate was 0\.1, is None; put that back"):
        train_toy(fewer)


def test_another_teacher_of_the_same_name_is_a_change(train_toy: Train, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    card = train_toy(name="teacher")
    weights = tmp_path / "runs" / "teacher" / card.file
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(weights.read_bytes())
    args = "teacher.args={depths = [1, 1, 1], width = 8, radix = [4, 4, 4], first_radix = [4, 4, 4]}"
    taught = ("teacher.name=butterfly_resnet_nano_32", f"teacher.weights={kept}", args)
    assert train_toy(*taught, name="student", max_minutes=0.0) is None
    tensors = load_file(kept)
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, kept)
    with pytest.raises(DimmixError, match="is of another teacher's weights"):
        train_toy(*taught, name="student")


def test_a_teacher_of_classes_in_another_order_is_refused(train_toy: Train, tmp_path: Path) -> None:
    card = train_toy(name="teacher")
    weights = tmp_path / "runs" / "teacher" / card.file
    args = "teacher.args={depths = [1, 1, 1], width = 8, radix = [4, 4, 4], first_radix = [4, 4, 4]}"
    taught = ("teacher.name=butterfly_resnet_nano_32", f"teacher.weights={weights}", args)
    assert train_toy(*taught, name="student") is not None
    beside = weights.with_suffix(".json")
    facts = json.loads(beside.read_text())
    facts["labels"] = [*facts["labels"][:1], *facts["labels"][:0:-1]]
    beside.write_text(json.dumps(facts))
    with pytest.raises(DimmixError, match="know other classes than the images: 'red', not 'light'"):
        train_toy(*taught, name="another")
    for n, labels in enumerate((["0", "1", "2"], ["Dark", "LIGHT", "red"])):
        beside.write_text(json.dumps(facts | {"labels": labels}))
        assert train_toy(*taught, name=f"taught{n}") is not None


def test_validation_says_when_the_start_has_learnt_the_rows_held_back(
    train_toy: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = "the checkpoint to start from has learnt the held-back rows too"
    for name, options, known in (
        ("full", {"split": "full"}, True),
        ("val", {"split": "val"}, False),
        ("fewer", {"split": "val", "changes": ["data.held_back=4"]}, True),
    ):
        card = train_toy(*options.pop("changes", ()), name=name, **options)
        start = tmp_path / "runs" / name / card.file
        args = "depths = [1, 1, 1], width = 8, radix = [4, 4, 4], first_radix = [4, 4, 4]"
        capfd.readouterr()
        train_toy(f'model.args={{{args}, checkpoint_path = "{start}"}}', name=f"on-{name}", split="val")
        assert (said in capfd.readouterr().err) == known


def test_two_runs_do_not_share_a_folder(train_toy: Train, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with alone_in(tmp_path / "runs" / "run"), pytest.raises(DimmixError, match="another run is at work in it"):
        train_toy()
    assert train_toy() is not None


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal here")
def test_a_closed_terminal_saves_the_run(train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Learner.update

    def hang_up(self: Learner, *args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return update(self, *args)

    monkeypatch.setattr(Learner, "update", hang_up)
    with pytest.raises(Interrupted) as stopped:
        train_toy()
    assert stopped.value.exit_code == 128 + signal.SIGHUP
    assert (tmp_path / "runs" / "run" / "state.safetensors").exists()


def test_pickles_are_not_trained_from(train_toy: Train, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "lcnet_050", "num_classes": 3}))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DimmixError, match=r"toy_resnet\.toy\.toml: model .*pickle"):
        train_toy(f"model.name=local-dir:{folder}", "model.args={pretrained = true}")
    with pytest.raises(DimmixError, match=r"there is no file .*none\.safetensors"):
        train_toy('model.args={checkpoint_path = "none.safetensors"}')


def test_images_of_another_size_than_the_model_s_are_refused(train_toy: Train) -> None:
    with pytest.raises(DimmixError, match=r"takes images of 32 pixels, and data\.image_size is 16; model\.args\.img_"):
        train_toy("model.name=butterfly_mixer_nano_32", "model.args={}")
    assert train_toy("model.name=butterfly_mixer_nano_32", "model.args={img_size = 16}", max_minutes=0.0) is None


def test_muon_leaves_a_model_without_matrices_to_adamw() -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    optimizers = build_optimizers(model, Optimizer("muon", 0.01))
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW]
