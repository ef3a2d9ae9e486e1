"""Images to patches and back, without overlap and without padding: views and one copy each way."""

from itertools import pairwise
from math import prod

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
        pixels = self if span == 1 else PatchFold(channels, img_size, 1)
        self.cut, self.join = turn(pixels, self), turn(self, pixels)

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
        sizes, order = self.cut
        return x.reshape(sizes).permute(order).reshape(-1, self.num_patches, self.values)

    def fold_pixels(self, x: Tensor) -> Tensor:
        """(B, num_patches, p * p * C) -> (B, H, W, C)."""
        sizes, order = self.join
        span = self.patch_size * self.stride
        return x.reshape(sizes).permute(order).reshape(-1, self.rows * span, self.columns * span, self.channels)

    def extra_repr(self) -> str:
        return f"{self.rows}x{self.columns} patches of {self.patch_size}x{self.patch_size}, {self.channels} channels"


def nest(source: PatchFold, target: PatchFold) -> bool:
    """Whether `turn` can turn patches of one fold to those of the other, of the same image."""
    return all(b % a == 0 for side in _bounds(source, target) for a, b in pairwise(side))


def turn(source: PatchFold, target: PatchFold) -> tuple[list[int], list[int]]:
    """Patches of one fold to those of another of the same image, both (B, num_patches, p * p * C): whole pixels move.

    The sizes to reshape by, and the order to permute to; reshaped, the result is in the target's patches. Both folds
    cut the rows and the columns of pixels into axes, at the strides of either's pixels and patches. What lies between
    two of these is an axis of both, with another place among the axes; those that stay neighbours are one.
    """
    sizes = {(i, a): b // a for i, side in enumerate(_bounds(source, target)) for a, b in pairwise(side)}
    before, after = _axes(source, list(sizes)), _axes(target, list(sizes))
    runs: list[list[int]] = []
    for place in [*map(before.index, after), len(before)]:  # pixels end with their channels
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    numbers = [*map(sizes.__getitem__, before), source.channels]
    inorder = sorted(runs)
    view = [prod(numbers[place] for place in run) for run in inorder]
    return [-1, *view], [0, *[1 + inorder.index(run) for run in runs]]


def _bounds(source: PatchFold, target: PatchFold) -> list[list[int]]:
    """The strides, in pixels, at which the rows and the columns are cut, and how many there are of these, rising."""
    cuts = {1} | {fold.stride * size for fold in (source, target) for size in (1, fold.patch_size)}
    span = source.patch_size * source.stride
    return [sorted(cuts | {side * span}) for side in (source.rows, source.columns)]


def _axes(fold: PatchFold, axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where a patch lies, by rows and by columns, then which of its pixels, each with the longest stride first."""
    span = fold.stride * fold.patch_size
    return sorted(axes, key=lambda axis: (fold.stride <= axis[1] < span, axis[0], -axis[1]))
