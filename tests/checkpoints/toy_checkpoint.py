"""Tiny checkpoints for the tests."""

import hashlib
import struct
from typing import Any

from dimmix.checkpoints import Card


def weights(seed: int = 0, size: int = 20_000) -> bytes:
    """A well-formed safetensors file with one float32 vector."""
    header = b'{"w":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (size, size * 4)
    return struct.pack("<Q", len(header)) + header + bytes((seed + i) % 251 for i in range(size * 4))


def make_card(content: bytes, **changes: Any) -> Card:
    """A card for `content`, by default `toy_net.cifar10`."""
    values: dict[str, Any] = {
        "architecture": "toy_net",
        "tag": "cifar10",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "dtype": "float32",
        "params": 20_000,
        "macs": 20_000,
        "input_size": (3, 32, 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "labels": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "dataset": "cifar10",
        "split": "test",
        "images": 10_000,
        "top1": 91.5,
        "top5": 99.5,
        "nll": 0.3,
        "ece": 0.02,
        "per_class_accuracy": (91.5,) * 10,
        "seed": 0,
        "epochs": 1,
        "teacher": None,
        "recipe": "recipes/toy_net.toml",
        "command": "dimmix train recipes/toy_net.toml",
        "commit": "0" * 40,
        "hardware": "1 CPU core",
        "versions": {"torch": "2.11"},
        "train_minutes": 1.0,
        "images_per_second": 1000.0,
        "licence": "apache-2.0",
        "papers": ("2311.18735",),
        "notes": "",
    }
    values.update(changes)
    values.setdefault("file", f"{values['architecture']}.{values['tag']}.safetensors")
    return Card(**values)
