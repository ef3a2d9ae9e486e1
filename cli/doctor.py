"""`dimmix doctor`: is everything here that predictions need?"""

import os
import sys

import typer

from dimmix.errors import DimmixError

from .options import Format, FormatOption, OutputOption
from .sink import Record, Sink

PACKAGES = ("torch", "timm", "numpy", "pillow", "safetensors", "huggingface-hub", "onnxruntime", "onnx", "pyarrow")


def doctor(format: FormatOption = Format.auto, output: OutputOption = None) -> None:
    """Check the installation: versions, devices, cache, bundled weights, and a prediction on one image.

    Exits with 1 if a check fails.

    \b
    Examples:
      dimmix doctor
      dimmix doctor --format json
    """
    records = [*_versions(), *_devices(), _cache(), *_weights(), *_self_test()]
    with Sink(format, output) as sink:
        for record in records:
            sink.write(record)
    if not all(record["ok"] for record in records):
        raise typer.Exit(1)


def _check(name: str, value: object, ok: bool = True) -> Record:
    return {"check": name, "value": str(value), "ok": ok}


def _versions() -> list[Record]:
    import importlib.metadata
    import platform

    from dimmix import __version__

    found = [_check("dimmix", __version__), _check("python", f"{platform.python_version()} {sys.platform}")]
    for package in PACKAGES:
        try:
            found.append(_check(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append(_check(package, "not installed"))
    return found


def _devices() -> list[Record]:
    import torch

    from dimmix.layers.native import INSTRUCTIONS
    from dimmix.processor import processor

    found = [_check("cpu", f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    found.append(_check("kernels", INSTRUCTIONS or "none: no compiler at installation, or no AVX2; torch does it all"))
    if torch.cuda.is_available():
        found += [_check(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(_check("mps", "available"))
    return found


def _cache() -> Record:
    from huggingface_hub.constants import HF_HUB_CACHE

    return _check("cache", HF_HUB_CACHE)


def _weights() -> list[Record]:
    from dimmix.checkpoints import cards
    from dimmix.checkpoints.header import verify

    found = []
    for card in cards().values():
        if not card.path.is_file():
            found.append(_check(card.name, "not bundled; `dimmix download` fetches it"))
            continue
        try:
            verify(card.path, sha256=card.sha256, dtype=card.dtype)
            found.append(_check(card.name, f"{card.size:,} bytes, sha256 as on its card"))
        except DimmixError as error:
            found.append(_check(card.name, error, ok=False))
    return found


def _self_test() -> list[Record]:
    import time

    from dimmix import Classifier
    from dimmix.images import sample_images

    try:
        classifier = Classifier(device="cpu")
        start = time.perf_counter()
        best = classifier.predict(sample_images()[0], topk=1)[0]
    except DimmixError as error:
        return [_check("self test", error, ok=False)]
    milliseconds = 1000 * (time.perf_counter() - start)
    return [_check("self test", f"{classifier.name}: {best.label} ({best.score:.0%}) in {milliseconds:.0f} ms")]
