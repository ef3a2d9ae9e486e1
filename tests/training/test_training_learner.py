from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from dimmix.errors import DimmixError
from dimmix.training.learner import Learner
from dimmix.training.processes import Processes
from dimmix.training.recipe import read_recipe

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def build(recipe_file: Callable[..., Path]) -> Callable[..., Learner]:
    def make(*overrides: str) -> Learner:
        recipe = read_recipe(recipe_file(), ("model.args.drop_rate=0.0", "train.precision=fp32", *overrides))
        return Learner(recipe, 3, 10, ALONE)

    return make


@pytest.fixture
def teacher(tmp_path: Path) -> tuple[Any, tuple[str, ...]]:
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=3).eval()
    save_file(model.state_dict(), tmp_path / "teacher.safetensors")
    return model, ("teacher.name=test_resnet", f"teacher.weights={tmp_path / 'teacher.safetensors'}")


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(6, 3, 32, 32), torch.arange(6) % 3


def test_the_loss_is_smoothed_cross_entropy(build: Callable[..., Learner]) -> None:
    learner, (x, labels) = build("loss.label_smoothing=0.1"), batch()
    learner.model.train()
    expected = F.cross_entropy(learner.model(x), labels, label_smoothing=0.1).item()
    assert learner.update(x, labels, 0).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(build: Callable[..., Learner]) -> None:
    x, labels = batch()
    weights, losses = [], []
    # Even parts: of odd ones torch 2.14 on two threads writes beyond a 1x1 convolution of 8 channels.
    for size in (0, 2, 4):  # the last in parts of 4 and 2
        learner = build(f"train.micro_batch={size}", "optimizer.name=sgd")
        learner.model.eval()  # BatchNorm would see other batches
        losses.append(learner.update(x, labels, 1).item())
        weights.append(torch.cat([p.detach().flatten() for p in learner.model.parameters()]))
    assert losses == pytest.approx([F.cross_entropy(build().model.eval()(x), labels).item()] * 3, rel=1e-5)
    assert all(torch.allclose(weights[0], others, atol=1e-6) for others in weights[1:])


def test_distillation_mixes_in_the_divergence_from_the_teacher(
    build: Callable[..., Learner], teacher: tuple[Any, tuple[str, ...]]
) -> None:
    model, overrides = teacher
    learner, (x, labels) = build(*overrides, "teacher.alpha=0.7", "teacher.temperature=3.0"), batch()
    logits = learner.model.train()(x)
    taught = (model(x) / 3).softmax(1)
    divergence = (taught * (taught.log() - (logits / 3).log_softmax(1))).sum(1).mean()
    expected = 0.3 * F.cross_entropy(logits, labels) + 0.7 * 9 * divergence
    assert learner.update(x, labels, 0, learner.teach(x)).item() == pytest.approx(expected.item(), rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), learner.teacher.parameters(), strict=True))  # type: ignore[union-attr]


def test_the_teacher_is_looked_for_beside_the_recipe_first(
    build: Callable[..., Learner], teacher: tuple[Any, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, overrides = teacher  # whose weights and the recipe lie in one folder
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    learner = build(overrides[0], "teacher.weights=teacher.safetensors")
    assert torch.equal(learner.teach(torch.ones(1, 3, 32, 32)), model(torch.ones(1, 3, 32, 32)))
    with pytest.raises(DimmixError, match=r"there is no file other\.safetensors"):
        build(overrides[0], "teacher.weights=other.safetensors")


def test_weights_that_do_not_fit_the_teacher_are_refused(
    build: Callable[..., Learner], teacher: tuple[Any, tuple[str, ...]]
) -> None:
    with pytest.raises(DimmixError, match=r"teacher\.safetensors: not weights of the teacher test_vit"):
        build("teacher.name=test_vit", teacher[1][1])


def test_the_ema_follows_the_model_and_nothing_else_does(build: Callable[..., Learner]) -> None:
    learner, (x, labels) = build("train.ema_decay=0.5", "schedule.warmup_epochs=0.0"), batch()
    learner.model.train()
    averages: list[torch.Tensor] = []
    for step in range(4):
        learner.update(x, labels, step)
        weight = next(learner.model.parameters()).detach().clone()
        decay = learner.ema.get_decay(step + 1)
        averages.append(weight if step == 0 else decay * averages[-1] + (1 - decay) * weight)
    assert decay == pytest.approx(0.5)
    torch.testing.assert_close(next(learner.best.parameters()), averages[-1])
    assert not learner.best.training


def test_bfloat16_computes_the_same_to_its_precision(build: Callable[..., Learner]) -> None:
    x, labels = batch()
    losses = {}
    for precision in ("fp32", "bf16"):
        learner = build(f"train.precision={precision}", "train.channels_last=true")
        learner.model.train()
        losses[precision] = learner.update(x, labels, 0).item()
        assert all(p.dtype == torch.float32 for p in learner.model.parameters())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
