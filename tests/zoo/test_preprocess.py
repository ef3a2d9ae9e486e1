"""The NumPy transform equals timm's, value for value."""

import numpy as np
import pytest
from PIL import Image

from dimmix.preprocess import Preprocess, TooThinError

timm_data = pytest.importorskip("timm.data")


@pytest.mark.parametrize("size", [(32, 32), (40, 61), (17, 20), (101, 33)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop_pct": 1.0},
        {"interpolation": "bilinear"},
        {"crop_mode": "squash"},
        {"crop_mode": "border"},
        {"input_size": (3, 24, 40)},
        {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.2,)},
    ],
)
def test_equals_timms_transform(size, changes):
    config = {"input_size": (3, 32, 32), "mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}
    config |= {"interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"} | changes
    if config["crop_mode"] == "border" and config["input_size"][0] == 1:
        pytest.skip("timm fills with three colours")
    preprocess = Preprocess.from_config(config)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(preprocess.mode)
    expected = timm_data.create_transform(**config)(image).numpy()
    found = preprocess(image)
    assert found.shape == tuple(config["input_size"])
    assert np.abs(found - expected).max() <= 1e-6


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1)])
def test_a_thin_image_within_a_border_keeps_a_pixel(size):
    crop = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3, crop_mode="border").crop(Image.new("RGB", size, "red"))
    assert crop.shape == (32, 32, 3)
    assert (crop == (255, 0, 0)).all(-1).sum() == 32


def test_an_image_too_thin_to_resize_is_refused():
    preprocess = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(TooThinError, match="200000x1 pixels"):
        preprocess.crop(Image.new("RGB", (200_000, 1)))
