"""Images to patches and back, without overlap and without padding: views and one copy each way."""

from torch import Tensor, nn


class PatchFold(nn.Module):
    """Cuts an image into square patches, and puts the patches together again.

    A patch holds its values in the order (channel, row, column), as `torch.nn.functional.unfold` gives them.

    Args:
        channels: C of the image.
        img_size: (H, W).
        patch_size: side p of a patch.

    Raises:
        ValueError: `patch_size` does not divide the height or the width.
    """

    def __init__(self, channels: int, img_size: tuple[int, int], patch_size: int) -> None:
        super().__init__()
        height, width = img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"patch_size={patch_size} does not divide the image size {height}x{width}")
        self.channels, self.patch_size = channels, patch_size
        self.rows, self.columns = height // patch_size, width // patch_size
        self.num_patches, self.values = self.rows * self.columns, channels * patch_size * patch_size

    def unfold(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_patches, C * p * p)."""
        p = self.patch_size
        x = x.reshape(-1, self.channels, self.rows, p, self.columns, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.num_patches, self.values)

    def fold(self, x: Tensor) -> Tensor:
        """(B, num_patches, C * p * p) -> (B, C, H, W)."""
        p = self.patch_size
        x = x.reshape(-1, self.rows, self.columns, self.channels, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, self.channels, self.rows * p, self.columns * p)

    def extra_repr(self) -> str:
        return f"{self.rows}x{self.columns} patches of {self.patch_size}x{self.patch_size}, {self.channels} channels"
