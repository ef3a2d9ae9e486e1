"""The evaluation transform in Pillow and NumPy alone: equal to timm's, and usable where torch is not installed."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .images import MAX_PIXELS, ImageError, describe, open_image


class TooThinError(ValueError):
    """An image whose sides differ so much that resizing the shorter one makes the other enormous."""


@dataclass(frozen=True)
class Preprocess:
    """Resize, centre crop and normalise, as `timm.data.create_transform(**resolve_model_data_config(model))` does.

    The two halves are apart so that a batch is kept as bytes until it is whole: `crop` on each image, `normalize` once.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Preprocess":
        """From timm's data config, or the same keys out of an exported file's metadata.

        Raises:
            KeyError, ValueError: a key is missing, or an interpolation is meant that Pillow does not have.
        """
        if config["interpolation"].upper() not in Image.Resampling.__members__:
            raise ValueError(f"interpolation {config['interpolation']!r} is not one of Pillow's")
        return cls(
            input_size=tuple(config["input_size"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    @property
    def mode(self) -> str:
        """The Pillow mode of the model's images."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def crop(self, image: Image.Image) -> np.ndarray:
        """An image in `mode` to uint8 (H, W, C)."""
        image = self._resize(image)
        target_height, target_width = self.input_size[1:]
        left = _margin(image.width, target_width)
        top = _margin(image.height, target_height)
        box = (left, top, left + target_width, top + target_height)
        if box != (0, 0, *image.size):
            image = self._pad_and_crop(image, box)
        return np.asarray(image).reshape(target_height, target_width, -1)

    def normalize(self, crops: np.ndarray) -> np.ndarray:
        """uint8 (..., H, W, C) to float32 (..., C, H, W)."""
        mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (self.mean, self.std))
        planes = np.ascontiguousarray(np.moveaxis(crops, -1, -3))  # first: NumPy is slow along an axis of three
        scaled = planes * (1 / (255 * std))
        scaled -= mean / std
        return scaled

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An image in any mode to float32 (C, H, W)."""
        return self.normalize(self.crop(image.convert(self.mode)))

    def _resize(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        target_height, target_width = (math.floor(edge / self.crop_pct) for edge in self.input_size[1:])
        if self.crop_mode == "squash":
            size = (target_width, target_height)
        elif self.crop_mode == "border" or target_height != target_width:
            fit = max if self.crop_mode == "border" else min
            ratio = fit(height / target_height, width / target_width)
            size = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        else:
            short = min(width, height)
            size = (int(target_width * width / short), int(target_width * height / short))
        if size == image.size:
            return image
        if size[0] * size[1] > MAX_PIXELS:
            raise TooThinError(f"{width}x{height} pixels are too long and thin to resize")
        return image.resize(size, Image.Resampling[self.interpolation.upper()])

    def _pad_and_crop(self, image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        if self.crop_mode != "border":
            return image.crop(box)
        fill = tuple(round(255 * value) for value in self.mean)
        canvas = Image.new(image.mode, (box[2] - box[0], box[3] - box[1]), fill if len(fill) > 1 else fill[0])
        canvas.paste(image, (-box[0], -box[1]))
        return canvas


def crop_image(source: Any, preprocess: Preprocess) -> np.ndarray:
    """A source of an image, as `open_image` takes them, to uint8 (H, W, C). Raises ImageError, also one that came."""
    if isinstance(source, ImageError):
        raise source
    if (channels := preprocess.input_size[0]) not in (1, 3):
        raise ImageError(describe(source), f"the model takes {channels} channels, and so float arrays of its own input")
    try:
        return preprocess.crop(open_image(source, preprocess.mode))
    except TooThinError as error:
        raise ImageError(describe(source), error) from None


def _margin(edge: int, target: int) -> int:
    """Pixels cut off before the crop (negative: padding), rounded as torchvision does."""
    return -((target - edge) // 2) if target > edge else round((edge - target) / 2)
