"""Optimisers and learning-rate schedules of a recipe: parameter groups, Muon for block matrices, timm's schedulers."""

from typing import Any, TypeGuard

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from dimmix.layers import BlockLinear, ButterflyLinear, ButterflyMlp

from .recipe import Optimizer, Schedule

NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)] * 5  # Jordan et al., Muon, 2024


class Muon(torch.optim.Optimizer):
    """Muon for any weight that is a stack of matrices; each matrix is orthogonalised by itself.

    torch.optim.Muon takes 2-D weights only, and timm's reads (blocks, out, in) as one (blocks, out * in) matrix. Here
    each group names the `blocks` of its weights: a dense weight or kernel is one matrix (out, in * kh * kw), a
    block-diagonal (blocks, out, in) or a grouped convolution is `blocks` of them. All weights of a group have one
    shape, so that one batched Newton-Schulz iteration serves the whole group.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "blocks": 1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
            matrices = torch.cat([matrices_of(u, group["blocks"]) for u in updates])
            matrices = zeropower_via_newtonschulz(matrices, len(NEWTON_SCHULZ), NEWTON_SCHULZ)
            scale = 0.2 * max(matrices.shape[-2:]) ** 0.5  # as large a step as AdamW's (arXiv 2502.16982)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, matrices.chunk(len(params)), strict=True):
                p.add_(update.reshape(p.shape).to(p.dtype), alpha=-group["lr"] * scale)


def matrices_of(weight: Tensor, blocks: int) -> Tensor:
    """`weight` as (blocks, out, in): the matrices that Muon orthogonalises."""
    if weight.ndim == 3:
        return weight
    return weight.reshape(blocks, weight.shape[0] // blocks, -1)


def build_optimizers(model: nn.Module, recipe: Optimizer) -> list[torch.optim.Optimizer]:
    """The recipe's optimiser; for Muon two of them, the second one AdamW for all that is not a hidden matrix.

    One alone where the model has no hidden matrix.
    """
    groups = parameter_groups(model, recipe)
    beta1, beta2 = recipe.betas
    if recipe.name == "sgd":
        momentum = recipe.momentum
        return [torch.optim.SGD(groups, lr=recipe.lr, momentum=momentum, nesterov=momentum > 0, fused=True)]
    if recipe.name == "adamw":
        return [torch.optim.AdamW(groups, lr=recipe.lr, betas=(beta1, beta2), fused=True)]
    hidden = [group for group in groups if group["blocks"]]
    others = [group for group in groups if not group["blocks"]]
    optimizers: list[torch.optim.Optimizer] = [Muon(hidden, recipe.lr, recipe.momentum)] if hidden else []
    if others:
        optimizers.append(torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(beta1, beta2), fused=True))
    return optimizers


def parameter_groups(model: nn.Module, recipe: Optimizer) -> list[dict[str, Any]]:
    """Parameters that share weight decay, `lr_scale` (which timm's schedulers apply) and, for Muon, shape and `blocks`.

    `blocks` is how many matrices Muon sees in a weight, 0 where it leaves the parameter to AdamW.
    """
    undecayed = set(getattr(model, "no_weight_decay", set)())
    matrices = _hidden_matrices(model) if recipe.name == "muon" else {}
    scales = _block_lr_scales(model, recipe)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        vector = parameter.ndim < 2 or name.endswith(".bias") or name in undecayed
        blocks = matrices.get(id(parameter), 0)
        scale = scales.get(id(parameter), 1.0)
        # A larger step on a factor is not meant to pull it harder to zero.
        decay = 0.0 if vector else recipe.weight_decay / scale
        key = (decay, scale, blocks, tuple(parameter.shape) if blocks else ())
        group = groups.setdefault(key, {"params": [], "weight_decay": decay, "lr_scale": scale, "blocks": blocks})
        group["params"].append(parameter)
    return list(groups.values())


def _is_block_linear(module: nn.Module) -> TypeGuard[BlockLinear]:
    return isinstance(module, BlockLinear)


def _is_grouped(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether a convolution mixes channels in groups; a depthwise one mixes none."""
    return isinstance(module, nn.Conv2d) and 1 < module.groups < module.in_channels


def _block_lr_scales(model: nn.Module, recipe: Optimizer) -> dict[int, float]:
    """The factor on the learning rate of each block-diagonal weight, convolutions in groups among them."""
    blocks = {id(layer.weight): layer.weight.shape[0] for layer in model.modules() if _is_block_linear(layer)}
    blocks |= {id(layer.weight): layer.groups for layer in model.modules() if _is_grouped(layer)}
    if recipe.block_lr_mult != "auto":
        return dict.fromkeys(blocks, recipe.block_lr_mult)
    factors = dict.fromkeys(blocks, 1)
    for whole in model.modules():
        if isinstance(whole, ButterflyLinear | ButterflyMlp):
            levels = whole.factors if isinstance(whole, ButterflyLinear) else whole.levels
            factors |= {id(layer.weight): len(levels) for layer in levels.modules() if _is_block_linear(layer)}
    # d_in_dense / (d_in_block * n_factors), where d_in_dense = blocks * d_in_block
    return {weight: count / factors[weight] for weight, count in blocks.items()}


def _hidden_matrices(model: nn.Module) -> dict[int, int]:
    """Matrices in each weight that Muon takes: all but those of the first and last layer and of depthwise kernels.

    First and last are those that timm's `pretrained_cfg` names; a model without one, as the teacher, has all taken.
    """
    config = getattr(model, "pretrained_cfg", {})
    edges = tuple(name for key in ("first_conv", "classifier") for name in _names(config.get(key)))
    blocks = {}
    for name, layer in model.named_modules():
        if any(name == edge or name.startswith(f"{edge}.") for edge in edges):
            continue
        if _is_block_linear(layer):
            blocks[id(layer.weight)] = layer.weight.shape[0]
        elif isinstance(layer, nn.Linear):
            blocks[id(layer.weight)] = 1
        elif isinstance(layer, nn.Conv2d) and layer.groups < layer.out_channels:
            blocks[id(layer.weight)] = layer.groups
    return blocks


def _names(value: Any) -> tuple[str, ...]:
    return () if not value else (value,) if isinstance(value, str) else tuple(value)


def build_schedulers(
    optimizers: list[torch.optim.Optimizer], schedule: Schedule, steps_per_epoch: int
) -> list[Scheduler]:
    """Schedules in steps, a function of the step alone: `step_update(step)` before each update."""
    total, warmup = schedule.epochs * steps_per_epoch, schedule.warmup_epochs * steps_per_epoch
    schedulers: list[Scheduler] = []
    for optimizer in optimizers:
        common: dict[str, Any] = {
            "t_initial": max(total - warmup, 2),  # timm warns of 1, and the first step of one fall is that of another
            "lr_min": schedule.final_lr * optimizer.defaults["lr"],
            "warmup_t": warmup,
            "warmup_prefix": True,
            "t_in_epochs": False,
        }
        falling = CosineLRScheduler(optimizer, **common)
        schedulers.append(falling if schedule.name == "cosine" else PolyLRScheduler(optimizer, power=1.0, **common))
    return schedulers
