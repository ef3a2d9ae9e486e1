"""`dimmix benchmark`: models side by side on this machine."""

from enum import StrEnum
from typing import Annotated

import typer

from .options import Device, DeviceOption, Format, FormatOption, OutputOption
from .sink import Sink


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
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="1 measures latency.")] = 1,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed runs of each, after three to warm up.")] = 30,
    device: DeviceOption = Device.auto,
    format: FormatOption = Format.auto,
    output: OutputOption = None,
) -> None:
    """Measure latency, throughput, MACs and peak memory; the models take turns, so that they meet the same machine.

    \b
    Examples:
      dimmix benchmark butterfly_resnet20_convmix_w32 resnet18 --backend eager --rounds 5
      dimmix benchmark vit_butterfly_tiny_patch4_32 vit_butterfly_tiny_patch4_32_dense --backend eager --rounds 5
    """
    from dataclasses import asdict

    from dimmix.benchmark import benchmark as run
    from dimmix.runtime import resolve_device

    timings = run(models, backend or list(Backend), batch_size=batch_size, rounds=rounds, device=resolve_device(device))
    with Sink(format, output) as sink:
        for timing in timings:
            sink.write(asdict(timing))
