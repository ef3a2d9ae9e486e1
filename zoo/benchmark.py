"""Latency, throughput and memory of models side by side on this machine."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import DimmixError, first_line
from .onnx_runtime import OnnxRuntime
from .profile import count_macs, peak_bytes
from .runtime import describe_model

BACKENDS = ("eager", "compiled", "onnxruntime")

GRAPHS = 256
"""Of one function, that `torch.compile` may keep: all our models share `Trunk.forward`, and 8 would be the end."""


def compiled(model: torch.nn.Module, **kwargs: Any) -> Any:
    """`torch.compile(model, **kwargs)`, however many models were compiled before."""
    torch._dynamo.config.recompile_limit = GRAPHS
    return torch.compile(model, **kwargs)


@dataclass(frozen=True)
class Timing:
    """Milliseconds a batch: the median over the rounds, and the quarter and three-quarter points.

    `peak_mib` is the most memory that tensors took at once while it ran, beyond what they took before; None for
    onnxruntime, whose memory torch does not see.
    """

    model: str
    backend: str
    batch_size: int
    median_ms: float
    quarter_ms: float
    three_quarter_ms: float
    images_per_second: float
    macs: int
    peak_mib: float | None


def benchmark(
    names: Sequence[str],
    backends: Sequence[str],
    *,
    batch_size: int,
    rounds: int,
    device: torch.device,
    track: Callable[[str, Sequence[Any]], Iterable[Any]] = lambda label, items: items,
) -> Iterator[Timing | DimmixError]:
    """Times every model under every backend; rounds go in turn, so that what slows the machine slows all alike.

    Architectures are measured with the weights they have, or else random ones, which take the same time. A backend
    that cannot run a model is an error in its place. `track` counts the preparations and then the rounds.

    Raises:
        DimmixError: no such model or backend, or no image or round to time.
    """
    if unknown := [backend for backend in backends if backend not in BACKENDS]:
        raise DimmixError(f"no backend {', '.join(unknown)}: they are {', '.join(BACKENDS)}", exit_code=2)
    if rounds < 1 or batch_size < 1:
        raise DimmixError(f"{rounds} rounds of {batch_size} images: at least one of each", exit_code=2)
    models = {name: describe_model(name) for name in names}
    runs: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, backend in track("prepared", [(name, backend) for name in names for backend in backends]):
            model, spec = models[name]
            macs = count_macs(model, spec.preprocess.input_size)
            try:
                batch = _images(batch_size, spec.preprocess.input_size, device)
                call = _prepare(model.to(device), backend, batch, spec, Path(folder))
            except DimmixError as error:
                yield error
                continue
            runs.append((name, backend, macs, _peak_mib(call, backend, device), call, []))
        for _ in track("rounds", range(rounds)):
            for *_, call, times in runs:
                times.append(_time(call, device))
    for name, backend, macs, peak, _, times in runs:
        quarter, median, three_quarter = (
            statistics.quantiles(times, method="inclusive") if len(times) > 1 else times * 3
        )
        yield Timing(
            name,
            backend,
            batch_size,
            1000 * median,
            1000 * quarter,
            1000 * three_quarter,
            batch_size / median,
            macs,
            peak,
        )


def _images(count: int, size: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    try:
        return torch.randn(count, *size, device=device)
    except RuntimeError as error:  # torch's word for too little memory
        raise DimmixError(f"--batch-size {count}: {first_line(error)}", exit_code=2) from error


def _prepare(model: Any, backend: str, batch: torch.Tensor, spec: Any, folder: Path) -> Callable[[], object]:
    """A warm call of the model on the batch."""
    if backend == "onnxruntime":
        from .export import export_model

        path = folder / f"{len(list(folder.iterdir()))}.onnx"
        images = np.random.default_rng(0).standard_normal((7, *batch.shape[1:]), np.float32)
        export_model(copy.deepcopy(model).cpu(), spec, "onnx", path, images, atol=1e-2)
        session = OnnxRuntime(path, "cuda" if batch.is_cuda else "cpu")
        array = batch.cpu().numpy()
        call: Callable[[], object] = lambda: session.logits(array)  # noqa: E731
    else:
        run = compiled(model) if backend == "compiled" else model

        def call() -> object:
            with torch.inference_mode():
                return run(batch)

    try:
        for _ in range(3):
            call()
    except Exception as error:  # a compiler that is not there, a kernel that does not build
        raise DimmixError(f"{spec.name} does not run {backend}: {first_line(error)}") from error
    return call


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak_mib(call: Callable[[], object], backend: str, device: torch.device) -> float | None:
    if backend == "onnxruntime":
        return None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return peak_bytes(call) / 2**20 if device.type == "cpu" else None
