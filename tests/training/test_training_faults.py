"""What a run refuses: weights that are not finite, data that changed, images to test on that it learnt from."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from toy_data import encode, teacher_of, toy_pixels, write_shard

from dimmix.errors import DimmixError
from dimmix.training import loop
from dimmix.training.learner import Learner
from dimmix.training.processes import join_processes
from dimmix.training.report import measure
from dimmix.training.state import read_state

Train = Callable[..., Any]


def break_weights(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The update of `step` has a finite loss and leaves a weight that is not a number."""
    update = Learner.update

    def broken(self: Learner, x: torch.Tensor, target: torch.Tensor, at: int, taught: None) -> torch.Tensor:
        loss = update(self, x, target, at)
        if at == step:
            self.parameters[0].data.view(-1)[0] = float("nan")
        return loss

    monkeypatch.setattr(Learner, "update", broken)


@pytest.mark.parametrize("split", ["val", "full"])
def test_weights_that_are_not_finite_never_replace_the_last_good_state(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    steps = {"val": 4, "full": 5}[split]
    break_weights(monkeypatch, 2 * steps - 1)
    with pytest.raises(DimmixError, match=rf"not finite at epoch 2, step {steps} of it; .*state\.safetensors keeps"):
        train_toy(split=split)
    tensors, facts = read_state(tmp_path / "runs" / "run" / loop.STATE)
    assert facts["position"]["step"] == steps
    assert all(value.isfinite().all() for value in tensors.values())
    assert not list((tmp_path / "runs" / "run").glob("*.json"))


def test_without_a_state_none_is_promised(train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_weights(monkeypatch, 4)
    with pytest.raises(DimmixError, match=r"not finite at epoch 1, step 5 of it; no state was saved yet; lower"):
        train_toy()
    assert not (tmp_path / "runs" / "run" / loop.STATE).exists()


def test_a_run_does_not_go_on_with_other_training_images(train_toy: Train, toy: Path) -> None:
    assert train_toy(max_minutes=0.0) is None
    pixels, labels = toy_pixels(15, 7)
    write_shard(toy / "toy" / "train-00001-of-2.parquet", [encode(image) for image in pixels], labels)
    with pytest.raises(DimmixError, match=r"state\.safetensors is of other training images; .* --restart"):
        train_toy()
    assert train_toy(restart=True).epochs == 2


def test_a_log_of_a_run_whose_state_is_gone_is_not_emptied(train_toy: Train, tmp_path: Path) -> None:
    log = tmp_path / "runs" / "run" / loop.LOG
    log.parent.mkdir(parents=True)
    log.write_text("mine\n")
    with pytest.raises(DimmixError, match=r"log\.jsonl is of a run whose state is gone; .* --restart"):
        train_toy()
    assert log.read_text() == "mine\n"
    assert train_toy(restart=True).epochs == 2


def test_a_file_of_no_named_split_is_not_learnt_from_and_tested_on(train_toy: Train, toy: Path) -> None:
    (toy / "toy" / "train-00000-of-2.parquet").rename(toy / "images.parquet")
    with pytest.raises(DimmixError, match="no split is held out"):
        train_toy(data=toy / "images.parquet")


def test_the_card_names_the_split_that_was_measured(train_toy: Train, toy: Path) -> None:
    (shard,) = (toy / "toy").glob("test-*")
    shard.rename(shard.with_name(shard.name.replace("test", "validation")))
    assert train_toy().split == "validation"


def test_a_view_that_comes_again_is_seen_through_other_dropout(
    train_toy: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws, seen, update = [], [], Learner.update

    def recorded(self: Learner, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(x.sum().item())
        draws.append(torch.rand(()).item())
        return update(self, x, *rest)

    monkeypatch.setattr(Learner, "update", recorded)
    train_toy(*teacher_of(tmp_path), "teacher.views=1", "schedule.epochs=3")
    assert len(set(draws)) == len(draws) == 15
    assert len(set(seen)) == 5


def test_accuracy_of_classes_is_by_number_and_none_without_images() -> None:
    logits, labels = torch.eye(4)[[0, 2, 0, 1]], torch.tensor([0, 2, 2, 1])
    measured = measure(logits, labels, ("crane", "other", "crane", "absent"))
    assert measured["per_class_accuracy"] == (100.0, 100.0, 50.0, None)


def test_weights_to_start_from_may_lie_beside_the_recipe(train_toy: Train, tmp_path: Path) -> None:
    card = train_toy(name="first")
    (tmp_path / "mine").mkdir()
    (tmp_path / "runs" / "first" / card.file).rename(tmp_path / "mine" / "start.safetensors")
    args = "depths = [1, 1, 1], width = 8, radix = [4, 4, 4], first_radix = [4, 4, 4]"
    on = train_toy(f'model.args={{{args}, checkpoint_path = "mine/start.safetensors"}}', "optimizer.lr=0.0")
    assert on.started_from == "start.safetensors"
    assert on.top1 == card.top1


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("butterfly_resnet_nano_32", "in_chans = 1", "toy.toml: butterfly_resnet_nano_32 does not run: "),
        ("butterfly_resnet_nano_32", "features_only = true", "toy.toml: butterfly_resnet_nano_32 does not run: "),
        ("test_vit", 'img_size = 16, global_pool = ""', r"test_vit gives \(2, 3\) for an image of 3 classes"),
    ],
)
def test_a_model_that_does_not_take_the_images_or_give_classes_is_refused(
    train_toy: Train, name: str, args: str, said: str
) -> None:
    with pytest.raises(DimmixError, match=said) as raised:
        train_toy(f"model.name={name}", f"model.args={{{args}}}")
    assert raised.value.exit_code == 2


def test_weights_to_start_from_are_safetensors(train_toy: Train, tmp_path: Path) -> None:
    for name in ("start.pth", "start.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DimmixError, match=r"checkpoint_path must be a \.safetensors file"):
        train_toy(f"model.args.checkpoint_path={tmp_path / 'start.pth'}")
    save_file({"other": torch.zeros(1)}, tmp_path / "start.safetensors")
    with pytest.raises(DimmixError, match="cannot make model"):
        train_toy(f"model.args.checkpoint_path={tmp_path / 'start.safetensors'}")


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    taken: list[str] = []
    nothing = torch.zeros(0, device="meta")
    monkeypatch.setattr("torch.empty", lambda size, device: taken.append(device) or nothing)
    for device in ("cuda", "auto"):
        with pytest.raises(DimmixError, match="holds no numbers"), join_processes(device):
            pass
    assert taken == ["cuda:1", "cuda:1"]
    with pytest.raises(DimmixError, match="--device cuda:1: 2 processes need a GPU each"), join_processes("cuda:1"):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(DimmixError, match="--device cuda: 3 processes, and 2 GPUs"), join_processes("auto"):
        pass


def test_all_processes_learn_of_a_signal_to_one(tmp_path: Path) -> None:
    code = """
import sys, torch, torch.distributed as dist
from dimmix.training.processes import Processes
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
agreed = Processes(rank, 2, torch.device("cpu")).agree(0.5 + rank, False, 15 * rank)
print(*agreed, Processes(rank, 2, torch.device("cpu")).agree(float("nan") * rank, rank == 0, 0))
"""
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen([*command, str(rank), tmp_path / "store"], stdout=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert said == ["1.0 False 15 (nan, True, 0)\n"] * 2
