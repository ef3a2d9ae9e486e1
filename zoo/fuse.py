"""BatchNorm folded into the convolution before it, for inference."""

import copy

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .layers import ConvNorm


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode whose every ConvNorm is one convolution with a bias; the same function to 1e-5.

    It has other parameters than `model`: fuse after the weights are loaded, and do not train what comes back.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, ConvNorm) and isinstance(module.bn, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.register_module("bn", nn.Identity())
    return model
