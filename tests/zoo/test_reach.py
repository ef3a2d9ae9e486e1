"""What each mixing reaches: its last level connects every input to every output, and one level fewer does not."""

import pytest
import torch
from torch import nn

from dimmix.butterfly import ButterflySchedule
from dimmix.butterfly_resnet import ButterflyResNet
from dimmix.layers import ButterflyAttention, ButterflyLinear, ButterflyMlp, gather_groups, scatter_groups

pytestmark = pytest.mark.usefixtures("float64")


def _jacobian(layer, n):
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x.view(1, n))[0], torch.randn(n))
    return jacobian != 0


@pytest.mark.parametrize(("n", "radix"), [(16, 4), (8, 2), (12, 2)])
def test_mlp_levels_reach_everything_and_one_fewer_does_not(n, radix):
    layer = ButterflyMlp(n, radix)
    assert _jacobian(layer, n).all()
    layer.levels = layer.levels[:-1]
    assert not _jacobian(layer, n).all()


@pytest.mark.parametrize(("n", "radix"), [(16, 4), (8, 2), (12, 2)])
def test_linear_levels_reach_everything_and_one_fewer_does_not(n, radix):
    layer = ButterflyLinear(n, n, radix)
    assert _jacobian(layer, n).all()
    layer.factors = layer.factors[:-1]
    assert not _jacobian(layer, n).all()


def test_attention_levels_reach_every_token_and_one_fewer_does_not():
    levels = [ButterflyAttention(4, level, num_heads=1) for level in ButterflySchedule(9, 3).levels]

    def reach(layers):
        model = nn.Sequential(*layers)
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x.view(1, 9, 4))[0].sum(-1), torch.randn(9, 4))
        return (jacobian.abs().sum(-1) != 0).all()

    assert reach(levels)
    assert not reach(levels[:-1])


def _channel_reach(model, channels):
    """(out, in): whether any position of an output channel depends on any position of an input channel."""
    x = torch.randn(1, channels, 4, 4, requires_grad=True)
    out = model(x)
    rows = [torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)[0].abs().sum((0, 2, 3)) for i in range(channels)]
    return torch.stack(rows) != 0


@pytest.mark.parametrize(("channels", "radix"), [(32, 8), (64, 8), (24, 6), (20, 4), (48, 3), (12, 2)])
def test_conv_mix_reaches_every_channel_with_its_second_convolution_and_not_before(channels, radix):
    block = ButterflyResNet(depths=(1,), width=channels, radix=(radix,)).blocks[0][0]
    first, shuffle, second = block.conv1.conv, block.shuffle, block.conv2.conv
    assert (first.groups, second.groups) == (radix, channels // radix)  # groups of channels / radix, as in the paper
    assert _channel_reach(nn.Sequential(first, shuffle, second), channels).all()
    assert not _channel_reach(nn.Sequential(first, shuffle), channels).all()
    assert not _channel_reach(nn.Sequential(first, second), channels).all()


@pytest.mark.parametrize(("channels", "radix"), [(16, 4), (32, 4), (12, 2)])
def test_block_mix_reaches_every_channel_after_its_last_level_and_not_before(channels, radix):
    blocks = [
        nn.Sequential(
            gather_groups(level),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels // radix),
            scatter_groups(level),
        )
        for level in ButterflySchedule(channels, radix).levels
    ]
    assert _channel_reach(nn.Sequential(*blocks), channels).all()
    assert not _channel_reach(nn.Sequential(*blocks[:-1]), channels).all()
