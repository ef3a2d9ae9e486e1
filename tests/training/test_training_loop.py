import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_data import teacher_of, toy_model

from dimmix.errors import DimmixError, Interrupted
from dimmix.training import loop
from dimmix.training.data import load_images
from dimmix.training.learner import Learner, predict
from dimmix.training.recipe import Data
from dimmix.training.report import commit_of, rounded_to_half
from dimmix.training.state import read_state

Train = Callable[..., Any]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGTERM) -> None:
    """A signal to this process in step `steps` of the training to come."""
    update, count = Learner.update, [0]

    def counted(self: Learner, *args: Any) -> torch.Tensor:
        count[0] += 1
        if count[0] == steps:
            os.kill(os.getpid(), number)
        return update(self, *args)

    monkeypatch.setattr(Learner, "update", counted)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_weights(
    train_toy: Train, runs: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    recipe = (f"optimizer.name={optimizer}", "train.channels_last=true", "augment.mixup=0.8", "augment.cutmix=1.0")
    assert train_toy(*recipe, name="whole").epochs == 2
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # five steps an epoch
        with pytest.raises(Interrupted) as stopped:
            train_toy(*recipe, name="parts")
        assert stopped.value.exit_code == 143
    assert read_state(runs / "parts" / loop.STATE)[1]["position"]["step"] == 3
    with monkeypatch.context() as patch:
        stop_after(patch, 4, signal.SIGINT)
        with pytest.raises(Interrupted) as stopped:
            train_toy(*recipe, name="parts")
        assert stopped.value.exit_code == 130
    assert train_toy(*recipe, name="parts").epochs == 2
    whole, parts = (read_state(runs / name / loop.STATE) for name in ("whole", "parts"))
    assert whole[0].keys() == parts[0].keys()
    for key, value in whole[0].items():
        assert torch.equal(value, parts[0][key]), key
    logs = [(runs / name / loop.LOG).read_text() for name in ("whole", "parts")]
    assert len({re.sub(r'"(images_per_second|minutes)": [^,}]*', "", log) for log in logs}) == 1


def test_max_minutes_stops_after_a_step(train_toy: Train, runs: Path) -> None:
    assert train_toy(max_minutes=0.0) is None
    assert read_state(runs / "run" / loop.STATE)[1]["position"]["step"] == 1


def test_the_checkpoint_is_the_ema_and_reaches_what_the_card_says(train_toy: Train, runs: Path, toy: Path) -> None:
    card = train_toy("schedule.epochs=8")
    model = toy_model().eval()
    model.load_state_dict(load_file(runs / "run" / "butterfly_resnet_nano_32.toy.safetensors"))
    ema = read_state(runs / "run" / loop.STATE)[0]
    assert card.dtype == "float16"
    for key, value in model.state_dict().items():
        kept = ema[f"ema.{key}"]
        assert torch.equal(value, kept.half().float() if kept.is_floating_point() else kept)
    images = load_images(toy, Data("toy", image_size=16), None)
    x = torch.from_numpy(images.pixels).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(card.mean).view(3, 1, 1)) / torch.tensor(card.std).view(3, 1, 1)
    with torch.inference_mode():
        right = model(x).argmax(1) == torch.from_numpy(images.labels)
    assert card.top1 == pytest.approx(100 * right.float().mean().item())
    assert card.top1 > 60
    assert (card.split, card.images, card.dataset, card.labels) == ("test", 12, "toy", ("dark", "light", "red"))
    assert (card.params, card.input_size) == (sum(p.numel() for p in model.parameters()), (3, 16, 16))
    assert (card.recipe, card.teacher, card.top5) == ("toy_resnet.toy.toml", None, 100)


def test_weights_that_float16_would_change_for_the_worse_stay_float32(
    train_toy: Train, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "rounded_to_half", lambda model: torch.nn.Sequential(model, torch.nn.Softmin(1)))
    assert train_toy("schedule.epochs=8").dtype == "float32"
    weights = load_file(runs / "run" / "butterfly_resnet_nano_32.toy.safetensors")
    ema = read_state(runs / "run" / loop.STATE)[0]
    assert all(torch.equal(value, ema[f"ema.{key}"]) for key, value in weights.items())


@pytest.mark.parametrize(("differ", "dtype"), [(1, "float16"), (2, "float32")])
def test_two_rows_in_ten_thousand_are_too_many_for_float16(
    differ: int, dtype: str, train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves: list[torch.nn.Module] = []

    def rounded(model: torch.nn.Module) -> torch.nn.Module:
        halves.append(rounded_to_half(model))
        return halves[-1]

    def answers(model: torch.nn.Module, batches: Any, images: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if images is None:
            return predict(model, batches)
        wrong = 1_500 + (differ if model in halves else 0)
        right = torch.arange(images) >= wrong
        return torch.stack([~right, right], 1).float(), torch.ones(images, dtype=torch.long)

    monkeypatch.setattr(loop, "predict", answers)
    monkeypatch.setattr(loop, "rounded_to_half", rounded)
    assert train_toy("schedule.epochs=1").dtype == dtype


def test_the_card_names_the_commit_that_the_run_began_with(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "commit_of", lambda folder: "first")
    assert train_toy(max_minutes=0.0) is None
    monkeypatch.setattr(loop, "commit_of", lambda folder: "second")
    assert train_toy().commit == "first"


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    assert commit_of(tmp_path) == ""
    (tmp_path / "file").write_text("one")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"], ["tag", "-m", "t", "v1"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch("[0-9a-f]{40}", clean := commit_of(tmp_path))
    (tmp_path / "file").write_text("two")
    assert commit_of(tmp_path) == f"{clean}-dirty"


def test_seeds_and_processes_draw_differently_and_a_step_repeats_its_own(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[tuple[int, int], list[float]] = {}

    def note(run: Any) -> bool:
        for rank in (0, 1):
            run.processes = replace(run.processes, rank=rank)
            draws = drawn[run.recipe.train.seed, rank] = []
            for step in (0, 1, 0):
                run._seed(step)
                draws.append(torch.rand(()).item())
        run.processes = replace(run.processes, rank=0)
        return False

    monkeypatch.setattr(loop.Run, "train", note)
    for seed in (0, 1, 1000):
        train_toy(f"train.seed={seed}", name=f"seed{seed}")
    assert len({tuple(draws) for draws in drawn.values()}) == 6
    assert len({draw for draws in drawn.values() for draw in draws}) == 12
    assert all(draws[0] == draws[2] for draws in drawn.values())
    torch.manual_seed(0)
    assert drawn[0, 0][0] == torch.rand(()).item()


def test_each_epoch_visits_every_row_in_an_order_of_its_own_and_each_step_has_its_own_draws(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: list[torch.Tensor] = []
    seeds: list[int] = []
    augmented, update = loop.Batches.augmented, Learner.update

    def watched(self: Any, rows: torch.Tensor, strong: bool = True) -> Any:
        visited.append(rows)
        return augmented(self, rows, strong)

    def noted(self: Learner, *args: Any) -> torch.Tensor:
        seeds.append(torch.initial_seed())
        return update(self, *args)

    monkeypatch.setattr(loop.Batches, "augmented", watched)
    monkeypatch.setattr(Learner, "update", noted)
    train_toy()
    first, second = torch.cat(visited[:5]).tolist(), torch.cat(visited[5:]).tolist()
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert len(set(seeds)) == len(seeds) == 10


def test_a_finished_run_whose_state_is_gone_is_not_trained_anew_unasked(train_toy: Train, runs: Path) -> None:
    train_toy()
    (runs / "run" / loop.STATE).unlink()
    with pytest.raises(DimmixError, match=r"toy\.json is of a run whose state is gone; .* --restart"):
        train_toy()
    assert train_toy("schedule.epochs=1", restart=True).epochs == 1


def test_training_rows_decide_what_is_stored_and_the_test_rows_are_seen_once(
    train_toy: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(model: torch.nn.Module, batches: Any, **options: Any) -> Any:
        seen.append(len(batches))
        return predict(model, batches, **options)

    monkeypatch.setattr(loop, "predict", counted)
    train_toy()
    assert seen == [40, 40, 12]


def test_a_finished_run_is_not_evaluated_again(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    card = train_toy()
    monkeypatch.delattr(loop, "predict")
    assert train_toy() == card


def test_a_finished_run_whose_weights_are_gone_writes_them_again(train_toy: Train, runs: Path) -> None:
    card = train_toy()
    weights = runs / "run" / card.file
    content = weights.read_bytes()
    weights.unlink()
    assert train_toy().sha256 == card.sha256
    assert weights.read_bytes() == content


def test_a_run_that_ended_before_its_first_state_begins_again(
    train_toy: Train, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_state", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            train_toy()
    assert (runs / "run" / loop.LOG).read_text().count("\n") == 1
    assert train_toy().epochs == 2
    assert (runs / "run" / loop.LOG).read_text().count("\n") == 2


def test_a_weight_beyond_float16_is_stored_in_float32(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def enlarged(model: torch.nn.Module) -> torch.nn.Module:
        rounded = rounded_to_half(model)
        next(rounded.parameters()).data.flatten()[0] = torch.inf
        return rounded

    def unmoved(model: torch.nn.Module, batches: Any, images: int | None = None, **options: Any) -> Any:
        return predict(model, batches, **options) if images is None else (torch.eye(3), torch.arange(3))

    monkeypatch.setattr(loop, "rounded_to_half", enlarged)
    monkeypatch.setattr(loop, "predict", unmoved)
    assert train_toy().dtype == "float32"


def test_split_val_evaluates_each_epoch_and_never_opens_the_test_split(train_toy: Train, toy: Path, runs: Path) -> None:
    next((toy / "toy").glob("test-*")).write_bytes(b"not to be read")
    card = train_toy(split="val")
    assert (card.split, card.images) == ("val", 8)
    assert (runs / "run" / loop.LOG).read_text().count('"top1"') == 2


def test_split_full_measures_nothing_before_the_end(train_toy: Train, runs: Path) -> None:
    train_toy()
    assert "top1" not in (runs / "run" / loop.LOG).read_text()


def test_state_of_another_recipe_is_refused_unless_restarted(train_toy: Train) -> None:
    assert train_toy(max_minutes=0.0) is None
    with pytest.raises(DimmixError, match=r"optimizer\.lr was 0\.05, is 0\.1.*--restart"):
        train_toy("optimizer.lr=0.1")
    with pytest.raises(DimmixError, match="split was 'full', is 'val'"):
        train_toy(split="val")
    assert train_toy("optimizer.lr=0.1", restart=True).epochs == 2


def test_the_words_of_a_recipe_may_change_on_the_way(train_toy: Train) -> None:
    assert train_toy(max_minutes=0.0) is None
    assert train_toy("about.notes=better words", "train.needs=a core").notes == "better words"


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    train_toy: Train, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Learner.update

    def broken(self: Learner, x: torch.Tensor, target: torch.Tensor, step: int, taught: None) -> torch.Tensor:
        return update(self, x * float("nan") if step == 7 else x, target, step)

    monkeypatch.setattr(Learner, "update", broken)
    with pytest.raises(DimmixError, match=r"the loss is nan at epoch 2, step 3 of it; .*state\.safetensors keeps"):
        train_toy()
    tensors, facts = read_state(runs / "run" / loop.STATE)
    assert facts["position"]["step"] == 5
    assert all(value.isfinite().all() for value in tensors.values())


def test_a_batch_above_the_data_is_refused(train_toy: Train) -> None:
    with pytest.raises(DimmixError, match=r"train\.batch_size = 64 must be .* at most the 40 training images"):
        train_toy("train.batch_size=64")


def test_an_unknown_model_or_argument_is_refused(train_toy: Train) -> None:
    with pytest.raises(DimmixError, match="cannot make model 'no_such_model'"):
        train_toy("model.name=no_such_model")
    with pytest.raises(DimmixError, match=r"cannot make model 'butterfly_resnet_nano_32' with args .*no_such_arg"):
        train_toy("model.args.no_such_arg=1")


def test_the_last_epochs_may_be_plain(train_toy: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    strengths: list[bool] = []
    augmented = loop.Batches.augmented

    def watched(self: Any, rows: torch.Tensor, strong: bool = True) -> Any:
        strengths.append(strong)
        return augmented(self, rows, strong)

    monkeypatch.setattr(loop.Batches, "augmented", watched)
    train_toy("augment.plain_epochs=1")
    assert strengths == [True] * 5 + [False] * 5


def test_clipping_bounds_the_step(train_toy: Train, runs: Path) -> None:
    recipe = ("optimizer.momentum=0.0", "optimizer.weight_decay=0.0", "schedule.warmup_epochs=0.0")
    for name, clip in (("free", 0.0), ("clipped", 0.001)):
        train_toy(*recipe, f"optimizer.clip_grad={clip}", name=name, max_minutes=0.0)
    train_toy(*recipe, "optimizer.lr=0.0", name="start", max_minutes=0.0)
    keys = dict(toy_model().named_parameters())
    start, free, clipped = (read_state(runs / name / loop.STATE)[0] for name in ("start", "free", "clipped"))

    def moved(end: dict[str, torch.Tensor]) -> float:
        return torch.cat([(end[f"model.{key}"] - start[f"model.{key}"]).flatten() for key in keys]).norm().item()

    assert moved(clipped) == pytest.approx(0.05 * 0.001, rel=1e-2)
    assert moved(free) > 100 * moved(clipped)


def test_two_processes_train_as_one(train_toy: Train, runs: Path, toy: Path, recipe_file: Callable[..., Path]) -> None:
    # A model without BatchNorm, for which the mean of two halves' gradients is the gradient of the whole.
    recipe = ("model.name=test_vit", "model.args={img_size=16, patch_size=4}", "train.precision=fp32")
    recipe += ("augment.flip=false", "augment.crop=0", "augment.cutout=0", "schedule.epochs=1")
    train_toy(*recipe, name="one")
    sets = [argument for change in recipe for argument in ("--set", change)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "dimmix.training", recipe_file(), "--data", toy, "--runs", runs, "--name", "two", *sets]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    one, two = (read_state(runs / name / loop.STATE) for name in ("one", "two"))
    assert two[1]["position"]["loss"] == one[1]["position"]["loss"] == 0
    for key, value in one[0].items():
        torch.testing.assert_close(two[0][key], value, atol=1e-5, rtol=1e-4, msg=key)


def test_weights_of_a_teacher_that_are_not_there_are_named_with_the_recipe(train_toy: Train) -> None:
    with pytest.raises(
        DimmixError, match=r"toy_resnet\.toy\.toml: teacher\.weights: there is no file none\.safetensors"
    ):
        train_toy("teacher.name=test_vit", "teacher.weights=none.safetensors")


def test_validation_says_when_the_teacher_has_learnt_the_rows_held_back(
    train_toy: Train, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for split, said in (("val", False), ("full", True)):
        train_toy(name=split, split=split)
        (tmp_path / "teacher.json").write_bytes((runs / split / "butterfly_resnet_nano_32.toy.json").read_bytes())
        capfd.readouterr()
        train_toy(*teacher_of(tmp_path), name=f"student-{split}", split="val")
        assert ("the teacher has learnt the held-back rows too" in capfd.readouterr().err) == said
