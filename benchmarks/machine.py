"""Where a benchmark ran."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from dimmix.layers import native
from dimmix.processor import processor


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Processor, cores and threads in use, and the versions that matter."""
    names = ("torch", "timm", "onnxruntime", "numpy")
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": native.INSTRUCTIONS,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in names},
        "date": datetime.now(UTC).date().isoformat(),
    }
