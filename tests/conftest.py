"""Shared by the tests: sixty real images, a tiny checkpoint of random weights, and a Hub on loopback."""

import dataclasses
import hashlib
import io
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from .hub_server import TOKEN, Hub

DATA = Path(__file__).parent / "data"
CIFAR10 = DATA / "cifar10_test_60.parquet"
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Tiny(NamedTuple):
    """An architecture and a .safetensors file for it, with its card beside it."""

    architecture: str
    checkpoint: Path


@pytest.fixture(scope="session")
def cifar_rows() -> list[tuple[Image.Image, int]]:
    """The committed images of CIFAR-10's test split with their labels, six a class."""
    pq = pytest.importorskip("pyarrow.parquet")
    rows = pq.read_table(CIFAR10).to_pylist()
    return [(Image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB"), row["label"]) for row in rows]


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory, cifar_rows: list[tuple[Image.Image, int]]) -> Path:
    """The same as PNG files in a folder for each class."""
    root = tmp_path_factory.mktemp("classes")
    for number, (image, label) in enumerate(cifar_rows):
        folder = root / LABELS[label]
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A small architecture with seeded random weights and a card with CIFAR-10's labels."""
    import safetensors.torch
    import timm
    import torch

    from dimmix.checkpoints import Card

    architecture = "butterfly_resnet20_convmix_w32"
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=10)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    values = {field.name: 0 for field in dataclasses.fields(Card)}
    values |= {"architecture": architecture, "tag": "random", "file": path.name, "dtype": "float32", "labels": LABELS}
    values |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
    values |= {"input_size": (3, 32, 32), "mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26), "crop_pct": 1.0}
    values |= {"interpolation": "bicubic", "dataset": "cifar10", "split": "test", "images": 60, "top1": 10.0}
    values |= {"top5": 50.0, "nll": 2.3, "ece": 0.1, "per_class_accuracy": (10.0,) * 10}
    values |= {"params": sum(p.numel() for p in model.parameters()), "teacher": None, "versions": {}, "papers": ()}
    values["model_args"] = {}
    texts = ("recipe", "command", "commit", "hardware", "licence", "notes", "started_from")
    Card(**values | dict.fromkeys(texts, "")).write(path.with_suffix(".json"))  # type: ignore[arg-type]
    return Tiny(architecture, path)


@pytest.fixture(scope="session")
def tiny_onnx(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as an ONNX file; the exporter takes seconds, so once for all tests."""
    from dimmix.export import export_model
    from dimmix.images import sample_images
    from dimmix.runtime import load_model

    model, spec = load_model(tiny.architecture, checkpoint=tiny.checkpoint)
    images = np.stack([spec.preprocess(image) for image in sample_images()])
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    assert export_model(model, spec, "onnx", path, images, atol=1e-5).difference <= 1e-5
    return path


@pytest.fixture(scope="session")
def brightest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported file that answers with the brightest of three channels: small, quick, no torch needed."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    from dimmix.preprocess import Preprocess
    from dimmix.runtime import METADATA_KEY, Spec

    spec = Spec("brightest", Preprocess((3, 8, 8), (0.5,) * 3, (0.25,) * 3, crop_pct=1.0), ("red", "green", "blue"))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    pool = helper.make_node("GlobalAveragePool", ["images"], ["means"])
    graph = helper.make_graph([pool, helper.make_node("Flatten", ["means"], ["logits"])], "g", [images], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    path = tmp_path_factory.mktemp("onnx") / "brightest.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def waits() -> list[float]:
    """The seconds the client would have slept between attempts."""
    return []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> Iterator[Hub]:
    """A running Hub that huggingface_hub talks to, with an empty cache, no token and no real waiting."""
    import huggingface_hub.constants
    from huggingface_hub.utils import close_session

    clock = types.SimpleNamespace(**{**vars(time), "sleep": waits.append})
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", clock)
    with Hub() as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.25,
            "DOWNLOAD_CHUNK_SIZE": 1024,
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "DIMMIX_HUB_NAMESPACE"):
            monkeypatch.delenv(name, raising=False)
        close_session()
        yield server
        close_session()


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> str:
    """Logs in."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN
