"""`dimmix benchmark`: models side by side on this machine."""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from dimmix.errors import DimmixError

from .options import LARGEST_BATCH, Device, DeviceOption, Format, FormatOption, OutputOption, QuietOption
from .progress import ProgressBar
from .sink import Sink, note


class Backend(StrEnum):
    """What runs a model."""

    eager = "eager"
    compiled = "compiled"
    onnxruntime = "onnxruntime"


def benchmark(
    models: Annotated[list[str], typer.Argument(metavar="MODEL", help="Architectures, with weights or without.")],
    backend: Annotated[
        list[Backend] | None, typer.Option("--backend", help="Repeat for several. Default: all three.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, max=LARGEST_BATCH, help="1 measures latency.")
    ] = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed runs of each, after three to warm up.")] = 30,
    device: DeviceOption = Device.auto,
    format: FormatOption = Format.auto,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure latency, throughput, MACs and peak memory; the models take turns, so that they meet the same machine.

    \b
    Examples:
      dimmix benchmark butterfly_resnet20_convmix_w32 resnet18 --backend eager --rounds 5
      dimmix benchmark vit_butterfly_tiny_patch4_32 vit_butterfly_tiny_patch4_32_dense --backend eager --rounds 5
    """
    from dataclasses import asdict

    from dimmix.benchmark import benchmark as measure
    from dimmix.runtime import resolve_device

    def track(label: str, items: Sequence[Any]) -> Iterable[Any]:
        return ProgressBar(label, len(items), quiet=quiet).track(items)

    backends, on = backend or list(Backend), resolve_device(device)
    failed = False
    with Sink(format, output) as sink:
        for timing in measure(models, backends, batch_size=batch_size, rounds=rounds, device=on, track=track):
            if isinstance(timing, DimmixError):
                failed = True
                note(str(timing))
            else:
                sink.write(asdict(timing))
    if failed:
        raise typer.Exit(1)
