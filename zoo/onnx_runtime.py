"""An exported ONNX file under onnxruntime; no torch is imported."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DimmixError, first_line
from .runtime import METADATA_KEY, Spec


class OnnxRuntime:
    """An exported ONNX file under onnxruntime."""

    def __init__(self, path: Path, device: str = "auto") -> None:
        try:
            import onnxruntime
        except ImportError:
            raise DimmixError(f"{path} needs onnxruntime: pip install 'dimmix[export]'") from None

        if device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise DimmixError(f"--device {device}: {path} runs on cpu or cuda", exit_code=2)
        providers: list[Any] = ["CPUExecutionProvider"]
        if device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.partition(":")[2] or "0"}))
        elif device.startswith("cuda"):
            raise DimmixError(f"--device {device}: this onnxruntime has no CUDA provider", exit_code=2)
        options = onnxruntime.SessionOptions()
        # Else its threads wait actively for a while after each run, and hold up decoding, or another session.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # On a CPU a sum and the LayerNorm behind it, fused to one, take four times as long.
        slow = ["SkipLayerNormFusion"] if len(providers) == 1 else []
        try:
            self.session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=providers, disabled_optimizers=slow
            )
        except Exception as error:
            raise DimmixError(f"{path}: not an ONNX file that onnxruntime can run ({first_line(error)})") from error
        metadata = self.session.get_modelmeta().custom_metadata_map
        if METADATA_KEY not in metadata:
            raise DimmixError(f"{path}: no labels and preprocessing in it; make it with `dimmix export`")
        self.spec = Spec.from_json(metadata[METADATA_KEY], path)
        images = self.session.get_inputs()[0]
        self._input = images.name
        classes = {output.name: output.shape[-1] for output in self.session.get_outputs()}.get("logits")
        too_few = isinstance(classes, int) and classes < len(self.spec.labels)
        if tuple(images.shape[1:]) != self.spec.preprocess.input_size or too_few:
            raise DimmixError(f"{path}: takes and gives other numbers than it says; make it with `dimmix export`")

    def logits(self, batch: np.ndarray) -> np.ndarray:
        return self._run("logits", batch)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        if "features" not in [output.name for output in self.session.get_outputs()]:
            raise DimmixError(f"{self.spec.name}: this file gives no features; export the model again", exit_code=2)
        return self._run("features", batch)

    def lanes(self, batch_size: int) -> int:
        return 1

    def lane(self, lanes: int) -> Callable[[], None]:
        return lambda: None

    def _run(self, output: str, batch: np.ndarray) -> np.ndarray:
        return np.asarray(self.session.run([output], {self._input: batch})[0], np.float32)
