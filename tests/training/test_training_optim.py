import math

import pytest
import timm
import torch
from torch import nn

from dimmix.layers import BlockLinear, ButterflyLinear, ButterflyMlp
from dimmix.training.optim import Muon, build_optimizers, build_schedulers, parameter_groups
from dimmix.training.recipe import Optimizer, Schedule


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4, 8))
        self.mix = ButterflyLinear(64, 64, 8)
        self.conv = nn.Conv2d(8, 16, 3, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.hidden = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)
        self.pretrained_cfg = {"first_conv": "none", "classifier": "head"}

    def no_weight_decay(self) -> set[str]:
        return {"token"}


def groups_by_name(model: nn.Module, recipe: Optimizer) -> dict[str, dict[str, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, recipe)
    found = {names[id(p)]: {k: v for k, v in g.items() if k != "params"} for g in groups for p in g["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    return found


def test_vectors_and_what_the_model_names_are_not_decayed() -> None:
    groups = groups_by_name(Toy(), Optimizer("adamw", 0.1, weight_decay=0.05))
    undecayed = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert undecayed == {"token", "norm.weight"} | {name for name in groups if name.endswith("bias")}
    assert {group["weight_decay"] for name, group in groups.items() if name not in undecayed} == {0.05}


def test_block_factors_take_larger_steps_and_are_decayed_as_much() -> None:
    groups = groups_by_name(Toy(), Optimizer("adamw", 0.1, weight_decay=0.08, block_lr_mult="auto"))
    for factor in ("mix.factors.0.linear.weight", "mix.factors.1.linear.weight"):
        assert groups[factor]["lr_scale"] == 64 / (8 * 2)
        assert groups[factor]["lr_scale"] * groups[factor]["weight_decay"] == pytest.approx(0.08)
    scales = {name: groups[name]["lr_scale"] for name in ("conv.weight", "depthwise.weight", "hidden.weight")}
    assert scales == {"conv.weight": 2, "depthwise.weight": 1, "hidden.weight": 1}
    wide = groups_by_name(ButterflyLinear(64, 128, 8), Optimizer("adamw", 0.1, block_lr_mult="auto"))
    assert [wide[f"factors.{i}.linear.weight"]["lr_scale"] for i in (0, 1)] == [8 / 2, 16 / 2]
    mlp = groups_by_name(ButterflyMlp(256, 4, 2), Optimizer("adamw", 0.1, block_lr_mult="auto"))
    assert {group["lr_scale"] for name, group in mlp.items() if "weight" in name} == {64 / 4}
    groups = groups_by_name(Toy(), Optimizer("adamw", 0.1, block_lr_mult=3.0))
    assert groups["mix.factors.0.linear.weight"]["lr_scale"] == groups["conv.weight"]["lr_scale"] == 3


def test_muon_takes_hidden_matrices_and_each_block_is_one() -> None:
    factors = {f"mix.factors.{i}.linear.weight": 8 for i in (0, 1)}
    for first, others in (("none", {"conv.weight": 2, "hidden.weight": 1}), ("conv", {"hidden.weight": 1})):
        model = Toy()
        model.pretrained_cfg["first_conv"] = first
        groups = groups_by_name(model, Optimizer("muon", 0.1))
        assert {name: group["blocks"] for name, group in groups.items() if group["blocks"]} == factors | others


def test_optimizers_have_the_rates_of_the_recipe() -> None:
    rates = {"momentum": 0.7, "betas": (0.8, 0.95), "adamw_lr": 0.003}
    (sgd,) = build_optimizers(Toy(), Optimizer("sgd", 0.02, **rates))
    (adamw,) = build_optimizers(Toy(), Optimizer("adamw", 0.02, **rates))
    muon, others = build_optimizers(Toy(), Optimizer("muon", 0.02, **rates))
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.02, 0.7, True)
    assert (adamw.defaults["lr"], adamw.defaults["betas"]) == (0.02, (0.8, 0.95))
    assert (muon.defaults["lr"], muon.defaults["momentum"]) == (0.02, 0.7)
    assert (others.defaults["lr"], others.defaults["betas"]) == (0.003, (0.8, 0.95))


def test_muon_of_a_matrix_is_torchs_muon() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(16, 24)) for _ in range(2))
    muon = Muon([{"params": [ours], "weight_decay": 0.1}], 0.05, 0.9)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([theirs], **options)
    for _ in range(3):
        ours.grad = torch.randn(16, 24)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=0)


def test_muon_of_blocks_is_muon_of_each_block() -> None:
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.zeros(4, 8, 8))
    single = [nn.Parameter(torch.zeros(8, 8)) for _ in range(4)]
    stacked.grad = torch.randn(4, 8, 8) * torch.tensor([1.0, 10.0, 0.1, 3.0]).view(4, 1, 1)
    for parameter, grad in zip(single, stacked.grad, strict=True):
        parameter.grad = grad.clone()
    Muon([{"params": [stacked], "blocks": 4}], 1.0, 0.9).step()
    Muon([{"params": single}], 1.0, 0.9).step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in single]), atol=1e-2, rtol=0)
    values = torch.linalg.svdvals(stacked.detach()) / (0.2 * math.sqrt(8))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_of_a_grouped_convolution_orthogonalises_each_group() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, 3, groups=2)
    before = conv.weight.detach().clone()
    conv.weight.grad = torch.randn_like(conv.weight)
    Muon([{"params": [conv.weight], "blocks": 2}], 1.0, 0.9).step()
    step = (conv.weight.detach() - before).reshape(2, 8, 36) / (0.2 * 6)
    values = torch.linalg.svdvals(step)
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize(("name", "lr"), [("sgd", 0.02), ("adamw", 0.002), ("muon", 0.005)])
def test_each_optimizer_lowers_a_loss(name: str, lr: float) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, img_size=16, patch_size=4)
    optimizers = build_optimizers(model, Optimizer(name, lr, weight_decay=0.01))  # type: ignore[arg-type]
    x, labels, losses = torch.randn(6, 3, 16, 16), torch.arange(6) % 3, []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(("name", "middle"), [("cosine", 0.5), ("one-cycle", 0.5)])
def test_schedules_rise_to_the_peak_and_fall(name: str, middle: float) -> None:
    layer = BlockLinear(8, 8, 8)
    recipe = Optimizer("sgd", 0.4, block_lr_mult=2.0)
    optimizers = build_optimizers(layer, recipe)
    schedule = Schedule(epochs=10, name=name, warmup_epochs=2.0)  # type: ignore[arg-type]
    [scheduler] = build_schedulers(optimizers, schedule, steps_per_epoch=10)
    rates = []
    for step in range(100):
        scheduler.step_update(step)
        rates.append([group["lr"] / group["lr_scale"] for group in optimizers[0].param_groups])
    assert [len(set(rate)) for rate in rates] == [1] * 100
    factors = [rate[0] / 0.4 for rate in rates]
    assert factors[0] == 0
    assert factors[10] == pytest.approx(0.5)
    assert factors[20] == pytest.approx(1)
    assert factors[60] == pytest.approx(middle)
    assert factors[40] == pytest.approx(0.75 if name == "one-cycle" else 0.5 + 0.5 * math.cos(math.pi / 4))
    assert 0 < factors[99] < 0.02


def test_a_schedule_may_end_above_zero() -> None:
    optimizers = build_optimizers(nn.Linear(2, 2), Optimizer("sgd", 0.4))
    [scheduler] = build_schedulers(optimizers, Schedule(epochs=10, final_lr=0.1), steps_per_epoch=100)
    scheduler.step_update(999)
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(0.04, rel=1e-2)
