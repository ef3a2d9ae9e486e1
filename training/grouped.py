"""Grouped convolutions in training on a GPU: as dense ones, which take less time there (docs/performance.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_GROUPS = 4  # measured on 2 and 4 groups of 32 and 64 channels; a dense product does as many times the work


class DenseGroups(nn.Conv2d):
    """An nn.Conv2d in groups that trains as a dense convolution with zeros between its groups.

    Weights and results are those of nn.Conv2d. It is one in evaluation, where its work is counted.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not self.training:
            return super().forward(x)
        weight = dense_weight(self.weight, self.groups)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


def dense_weight(weight: Tensor, groups: int) -> Tensor:
    """(out, in / groups, ...) of a convolution in groups -> (out, in, ...) with zeros between them."""
    out, width, *kernel = weight.shape
    same = torch.eye(groups, dtype=weight.dtype, device=weight.device).view(groups, 1, groups, 1, *[1] * len(kernel))
    return (weight.view(groups, out // groups, 1, width, *kernel) * same).reshape(out, groups * width, *kernel)


def train_groups_densely(model: nn.Module, device: torch.device) -> None:
    """Make convolutions of up to MOST_GROUPS groups in `model` DenseGroups, in place, where `device` is a GPU."""
    if device.type != "cuda":
        return
    for module in model.modules():
        if type(module) is nn.Conv2d and 1 < module.groups <= MOST_GROUPS and module.padding_mode == "zeros":
            module.__class__ = DenseGroups
