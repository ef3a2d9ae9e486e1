"""Images to patches and back, without overlap and without padding: views and one copy each way."""

from torch import Tensor, nn


class PatchFold(nn.Module):
    """Cuts an image into square patches, and puts the patches together again.

    A patch holds its values in the order (channel, row, column), as `torch.nn.functional.unfold` gives them. Of images
    whose channels come last it may be had in the order (row, column, channel): whole pixels move several times as fast.

    Args:
        channels: C of the image.
        img_size: (H, W).
        patch_size: side p of a patch.
        stride: pixels from one of a patch's rows or columns to the next; beyond 1 patches lie within each other.

    Raises:
        ValueError: `patch_size * stride` does not divide the height or the width.
    """

    def __init__(self, channels: int, img_size: tuple[int, int], patch_size: int, stride: int = 1) -> None:
        super().__init__()
        height, width = img_size
        span = patch_size * stride
        if height % span or width % span:
            patch = f"patch_size={patch_size}" + (f" at stride {stride}" if stride > 1 else "")
            raise ValueError(f"{patch} does not divide the image size {height}x{width}")
        self.channels, self.patch_size, self.stride = channels, patch_size, stride
        self.rows, self.columns = height // span, width // span
        self.num_patches, self.values = self.rows * self.columns * stride**2, channels * patch_size * patch_size

    def unfold(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_patches, C * p * p)."""
        p, s = self.patch_size, self.stride
        x = x.reshape(-1, self.channels, self.rows, p, s, self.columns, p, s)
        return x.permute(0, 2, 4, 5, 7, 1, 3, 6).reshape(-1, self.num_patches, self.values)

    def fold(self, x: Tensor) -> Tensor:
        """(B, num_patches, C * p * p) -> (B, C, H, W)."""
        p, s = self.patch_size, self.stride
        x = x.reshape(-1, self.rows, s, self.columns, s, self.channels, p, p)
        x = x.permute(0, 5, 1, 6, 2, 3, 7, 4)
        return x.reshape(-1, self.channels, self.rows * p * s, self.columns * p * s)

    def turned(self, weight: Tensor, dim: int = 0) -> Tensor:
        """A weight whose axis `dim` are the values of a patch, for patches in the order of `unfold_pixels`."""
        return weight.unflatten(dim, [self.channels, -1]).transpose(dim, dim + 1).flatten(dim, dim + 1)

    def unfold_pixels(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, num_patches, p * p * C)."""
        p, s = self.patch_size, self.stride
        x = x.reshape(-1, self.rows, p, s, self.columns, p, s, self.channels)
        return x.permute(0, 1, 3, 4, 6, 2, 5, 7).reshape(-1, self.num_patches, self.values)

    def fold_pixels(self, x: Tensor) -> Tensor:
        """(B, num_patches, p * p * C) -> (B, H, W, C)."""
        p, s = self.patch_size, self.stride
        x = x.reshape(-1, self.rows, s, self.columns, s, p, p, self.channels)
        x = x.permute(0, 1, 5, 2, 3, 6, 4, 7)
        return x.reshape(-1, self.rows * p * s, self.columns * p * s, self.channels)

    def extra_repr(self) -> str:
        return f"{self.rows}x{self.columns} patches of {self.patch_size}x{self.patch_size}, {self.channels} channels"
