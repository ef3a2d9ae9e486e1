"""Stems: from an image to the feature map or the tokens that the blocks mix."""

import torch
from torch import Tensor, nn

from . import native_stage
from .conv_norm import ConvNorm


class ConvStem(nn.Sequential):
    """3x3 convolutions with BatchNorm and ReLU, each of stride 2, widening by 2 up to `width`; one of stride 1 for 1.

    Args:
        in_chans: channels of the image.
        width: channels of the result.
        stride: pixels per position of the result, a power of two.
        full_res: start with one more convolution, of stride 1, so that no pixel is dropped before it was mixed.
        dim: channels that a last 1x1 convolution widens to, where a 3x3 one would cost too much.

    Raises:
        ValueError: `stride` is not a power of two.
    """

    def __init__(
        self,
        in_chans: int,
        width: int,
        stride: int,
        full_res: bool = False,
        dim: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        if stride < 1 or stride & (stride - 1):
            raise ValueError(f"stride={stride} of a convolution stem is not a power of two")
        layers: list[nn.Module] = []
        steps = stride.bit_length() - 1
        strides = [1] * (full_res or not steps) + [2] * steps
        for i, step in enumerate(strides, start=1):
            left = len(strides) - i
            chs = max(width >> left, 8) if left else width
            layers += [ConvNorm(in_chans, chs, 3, step, device=device, dtype=dtype), nn.ReLU(inplace=True)]
            in_chans = chs
        if dim is not None:
            layers.append(nn.Conv2d(width, dim, 1, device=device, dtype=dtype))
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, width or dim, H / stride, W / stride)."""
        if not torch.jit.is_scripting():
            blocks = native_stage.blocks_for(x, self)
            if blocks:
                x = native_stage.stage(x, blocks)
                return x if len(self) == 2 * len(blocks) else self[-1](x)
        for layer in self:
            x = layer(x)
        return x

    @torch.jit.unused
    def kernel_blocks(self) -> list[native_stage.Block]:
        """The 3x3 convolutions for `native_stage.stage`, none where a part has to be called."""
        layers, blocks = list(self._modules.values()), []
        for layer, relu in zip(layers[::2], layers[1::2], strict=False):
            block = native_stage.plain_block(layer, relu)
            if block is None:
                return []
            blocks.append(block)
        return blocks


class TokenStem(nn.Module):
    """An image cut into patches, one token each.

    Args:
        in_chans: channels of the image.
        dim: channels C of a token.
        img_size: (H, W).
        patch_size: side of a patch in pixels.
        convs: embed with a ConvStem; otherwise with one linear map of the patch's values, as the papers do.
        full_res: of the ConvStem.
        width: of the ConvStem, which then widens to `dim` by a 1x1 convolution; None for `dim` itself.

    Raises:
        ValueError: `patch_size` does not divide the image.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        img_size: tuple[int, int],
        patch_size: int,
        convs: bool = False,
        full_res: bool = False,
        width: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.patch_size = patch_size
        self.set_input_size(img_size)
        if not convs:
            self.proj: nn.Module = nn.Conv2d(in_chans, dim, patch_size, patch_size, **dd)
        elif width is None:
            self.proj = ConvStem(in_chans, dim, patch_size, full_res, **dd)
        else:
            self.proj = ConvStem(in_chans, width, patch_size, full_res, dim, **dd)

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Expect images of another size (H, W). No weight depends on it."""
        self.grid = self.grid_of(img_size)
        self.img_size = (img_size[0], img_size[1])

    @torch.jit.unused
    def grid_of(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens of an image of (H, W). Raises ValueError if patches do not divide it."""
        height, width = img_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} does not divide the image size {height}x{width}")
        return height // self.patch_size, width // self.patch_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, N, C)."""
        height, width = self.img_size
        torch._assert(x.shape[2] == height, f"image height {x.shape[2]} does not match the model's, {height}")
        torch._assert(x.shape[3] == width, f"image width {x.shape[3]} does not match the model's, {width}")
        return self.proj(x).flatten(2).transpose(1, 2)
