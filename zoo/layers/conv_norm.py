"""A convolution with its BatchNorm, which `fuse` makes one."""

from torch import nn


class ConvNorm(nn.Sequential):
    """Convolution without bias, "same" padding, then BatchNorm."""

    def __init__(
        self, in_chs: int, out_chs: int, kernel: int, stride: int = 1, groups: int = 1, device=None, dtype=None
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, kernel, stride, kernel // 2, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)
