"""Augmentation of a batch, every image with its own draws, on the device that holds the data.

All draws come from torch's global generator, which the loop seeds for each step.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Images
from .recipe import Augment

GRAY = (0.299, 0.587, 0.114)  # luma weights of ITU-R 601


class Batches:
    """A data set on `device`, padded for crops; gives normalised float batches in channels_last layout."""

    def __init__(
        self, images: Images, augment: Augment, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:
        pixels = torch.from_numpy(images.pixels).to(device)
        self.augment, self.size, self.names = augment, pixels.shape[1], images.names
        self.labels = torch.from_numpy(images.labels).to(device)
        self.mean, self.std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))
        self.padded = _pad(pixels, augment.crop, augment.crop_fill)

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) as they are, normalised, and labels (B,)."""
        crop = self.augment.crop
        pixels = self.padded[rows, crop : crop + self.size, crop : crop + self.size]
        return self._normalize(pixels.permute(0, 3, 1, 2).float()), self.labels[rows]

    def augmented(self, rows: Tensor, strong: bool = True) -> tuple[Tensor, Tensor]:
        """Augmented images (B, 3, H, W), and labels (B,) or, where images were mixed, probabilities (B, classes).

        Without `strong` only flip and crop.
        """
        a = self.augment
        x = self._crop_and_flip(rows).permute(0, 3, 1, 2).float()
        labels = self.labels[rows]
        if not strong:
            return self._normalize(x), labels
        if a.geometry:
            x = affine(x, a.geometry)
        if a.color:
            x = jitter(x, a.color)
        x = self._normalize(x)
        if a.cutout:
            x = cutout(x, a.cutout, a.cutout_probability)
        if a.mixup or a.cutmix:
            return mix(x, labels, a, len(self.names))
        return x, labels

    def _crop_and_flip(self, rows: Tensor) -> Tensor:
        """(B, H, W, 3) uint8, each image read at its own shift and direction in one gather."""
        device, side = rows.device, self.padded.shape[1]
        line = torch.arange(self.size, device=device)
        shift = torch.randint(side - self.size + 1, (2, len(rows), 1), device=device)
        columns = line.expand(len(rows), -1)
        if self.augment.flip:
            columns = torch.where(torch.rand(len(rows), 1, device=device) < 0.5, self.size - 1 - line, line)
        lines = rows[:, None] * side + shift[0] + line
        at = (lines * side)[:, :, None] + (shift[1] + columns)[:, None, :]
        return self.padded.view(-1, 3).index_select(0, at.view(-1)).view(*at.shape, 3)

    def _normalize(self, x: Tensor) -> Tensor:
        return x.sub_(self.mean).div_(self.std)


def _pad(pixels: Tensor, crop: int, fill: str) -> Tensor:
    """(N, H + 2 crop, W + 2 crop, 3); reflected by gathers, since the full set as float would not be small."""
    if not crop:
        return pixels.contiguous()
    h, w = pixels.shape[1:3]
    if fill == "zero":
        return F.pad(pixels, (0, 0, crop, crop, crop, crop))
    reflected = [F.pad(torch.arange(side).view(1, 1, -1).float(), (crop, crop), mode="reflect") for side in (h, w)]
    rows, columns = (index.flatten().long().to(pixels.device) for index in reflected)
    return pixels.index_select(1, rows).index_select(2, columns)


def affine(x: Tensor, magnitude: float) -> Tensor:
    """Rotation, two shears and scale of x (B, 3, H, W), each for about half of the images, in one grid_sample."""

    def draw(most: float) -> Tensor:
        return _draw(len(x), most * magnitude, x.device)

    angle, shear_x, shear_y, zoom = draw(math.pi / 6), draw(0.3), draw(0.3), torch.exp(draw(math.log(1.3)))
    cos, sin, zero = torch.cos(angle) * zoom, torch.sin(angle) * zoom, torch.zeros_like(angle)
    rows = (
        torch.stack([cos - shear_y * sin, shear_x * cos - sin, zero], 1),
        torch.stack([sin + shear_y * cos, cos + shear_x * sin, zero], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    sampled = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return sampled.contiguous(memory_format=torch.channels_last)


def jitter(x: Tensor, magnitude: float) -> Tensor:
    """Brightness, contrast and saturation of x (B, 3, H, W) in 0..255, each changed for about half of the images."""

    brightness, contrast, saturation = (1 + _draw(len(x), magnitude, x.device).view(-1, 1, 1, 1) for _ in range(3))
    gray = (x.permute(0, 2, 3, 1) @ x.new_tensor(GRAY)).unsqueeze(1)
    # Each step is linear: x to b x, then to gray + s (x - gray), then to mean + c (x - mean), where s keeps the gray.
    offset = gray * (1 - saturation) * contrast + gray.mean((2, 3), keepdim=True) * (1 - contrast)
    return (x * (brightness * contrast * saturation)).add_(offset * brightness).clamp_(0, 255)


def _draw(count: int, most: float, device: torch.device) -> Tensor:
    """(count,) uniform in -most..most, and 0 for about half of them."""
    return (torch.rand(count, device=device) * 2 - 1) * most * (torch.rand(count, device=device) < 0.5)


def _boxes(count: int, height: Tensor, width: Tensor, size: int, device: torch.device) -> Tensor:
    """(count, 1, size, size) bool, True inside boxes of given height and width (count, 1) with centres in the image."""
    line = torch.arange(size, device=device)
    center = torch.randint(size, (2, count, 1), device=device)

    def inside(at: Tensor, extent: Tensor) -> Tensor:
        start = at - extent // 2
        return (line >= start) & (line < start + extent)

    return (inside(center[0], height)[:, :, None] & inside(center[1], width)[:, None, :])[:, None]


def cutout(x: Tensor, side: int, probability: float) -> Tensor:
    """x (B, 3, H, W) with one square of `side` pixels set to 0, the mean, cut off where it passes the border."""
    extent = torch.full((len(x), 1), side, device=x.device)
    extent = extent * (torch.rand(len(x), 1, device=x.device) < probability)
    return x.masked_fill_(_boxes(len(x), extent, extent, x.shape[-1], x.device), 0)


def mix(x: Tensor, labels: Tensor, augment: Augment, classes: int) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix of each image with the one as far from the batch's other end; probabilities (B, classes)."""
    count, device = len(x), x.device
    mixed = torch.rand(count, 1, device=device) < augment.mix_probability
    keep = torch.ones(count, 1, device=device)
    partner = x.flip(0)
    cut = torch.zeros(count, 1, dtype=torch.bool, device=device)
    if augment.cutmix:
        share = 0.5 if augment.mixup else 1.0
        cut = mixed & (torch.rand(count, 1, device=device) < share)
        side = ((1 - _beta(augment.cutmix, count, device)).sqrt() * x.shape[-1]).long() * cut
        box = _boxes(count, side, side, x.shape[-1], device)
        keep = torch.where(cut, 1 - box.float().mean((2, 3)), keep)
        x = torch.where(box, partner, x)
    if augment.mixup:
        blend = torch.where(mixed & ~cut, _beta(augment.mixup, count, device), torch.ones_like(keep))
        keep = keep * blend
        x = torch.lerp(partner, x, blend.view(-1, 1, 1, 1))
    target = F.one_hot(labels, classes).float()
    return x, target.flip(0).lerp(target, keep)


def _beta(alpha: float, count: int, device: torch.device) -> Tensor:
    """(count, 1) draws from Beta(alpha, alpha)."""
    parameter = torch.tensor(alpha, device=device)
    return torch.distributions.Beta(parameter, parameter, validate_args=False).sample((count, 1))
