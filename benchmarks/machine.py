"""Where a benchmark ran."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Processor, cores and threads in use, and the versions that matter."""
    names = ("torch", "timm", "onnxruntime", "numpy")
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in names},
        "date": datetime.now(UTC).date().isoformat(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
