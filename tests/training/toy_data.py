"""A tiny data set in the layout of the Hub, and a recipe that trains on it in a second."""

import io
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = ["dark", "light", "red"]
RECIPE = """
[model]
name = "butterfly_resnet_nano_32"
args = { depths = [1, 1, 1], width = 8, radix = [4, 4, 4], first_radix = [4, 4, 4], drop_rate = 0.1 }

[data]
name = "toy"
image_size = 16
held_back = 8

[augment]
crop = 2
cutout = 4

[optimizer]
name = "sgd"
lr = 0.05
weight_decay = 5e-4

[schedule]
epochs = 2
warmup_epochs = 0.5

[train]
batch_size = 8
ema_decay = 0.9
"""


def write_shard(path: Path, images: list[bytes | None], labels: list[int]) -> None:
    """One shard with an `img` column of encoded images and a `label` column."""
    features = {"img": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": image, "path": None} for image in images]
    table = pa.table({"img": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path)


def toy_pixels(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """(count, 16, 16, 3) uint8 whose class shows in the colour, and labels."""
    noise = np.random.default_rng(seed)
    labels = noise.integers(len(CLASSES), size=count).tolist()
    base = np.array([[40, 40, 40], [200, 200, 200], [200, 40, 40]])[labels]
    return (base[:, None, None] + noise.integers(-40, 40, (count, 16, 16, 3))).astype(np.uint8), labels


def encode(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def toy_model() -> torch.nn.Module:
    """The model of the recipe."""
    model = tomllib.loads(RECIPE)["model"]
    return timm.create_model(model["name"], num_classes=3, **model["args"])


def teacher_of(folder: Path) -> tuple[str, ...]:
    """Overrides that make such a model of random weights, written into `folder`, the teacher."""
    torch.manual_seed(1)
    save_file(toy_model().state_dict(), folder / "teacher.safetensors")
    model = tomllib.loads(RECIPE)["model"]
    args = tuple(f"teacher.args.{key}={value}" for key, value in model["args"].items())
    return (f"teacher.name={model['name']}", f"teacher.weights={folder / 'teacher.safetensors'}", *args)
