"""Stores what the bundled checkpoints answer on the committed images, for test_bundled.py to hold them to.

python tests/checkpoints/store_logits.py
"""

import io
from pathlib import Path

import pyarrow.parquet as pq
import safetensors.torch
import timm
import torch
from PIL import Image

from dimmix.checkpoints import cards

DATA = Path(__file__).parents[1] / "data"
STORED = DATA / "logits.safetensors"


def logits(name: str) -> torch.Tensor:
    """(60, classes): logits of the checkpoint `name` on the committed images."""
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rows = pq.read_table(DATA / "cifar10_test_60.parquet").to_pylist()
    images = [transform(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows]
    with torch.inference_mode():
        return model(torch.stack(images))


if __name__ == "__main__":
    safetensors.torch.save_file({name: logits(name) for name in cards()}, STORED)
