"""Grouped convolutions in training on a GPU: as dense ones, which take less time there (docs/performance.md)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimmix.fuse import merged_weight

MOST_GROUPS = 4  # measured on 2 and 4 groups of 32 and 64 channels; a dense product does as many times the work


class DenseGroups(nn.Conv2d):
    """An nn.Conv2d in groups that trains as a dense convolution with zeros between its groups.

    Weights and results are those of nn.Conv2d. It is one in evaluation, where its work is counted.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not self.training:
            return super().forward(x)
        weight = merged_weight(self.weight, self.groups, self.groups)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation)


def train_groups_densely(model: nn.Module, device: torch.device) -> None:
    """Make convolutions of up to MOST_GROUPS groups in `model` DenseGroups, in place, where `device` is a GPU."""
    if device.type != "cuda":
        return
    for module in model.modules():
        if type(module) is nn.Conv2d and 1 < module.groups <= MOST_GROUPS and module.padding_mode == "zeros":
            module.__class__ = DenseGroups
