"""The options that several commands share, each written once."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    """How results are written."""

    auto = "auto"
    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


class Device(StrEnum):
    """Where a model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


FormatOption = Annotated[Format, typer.Option("--format", "-f", help="auto: a table on a terminal, else JSON lines.")]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the results to this file; auto follows its suffix.")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the model runs; auto takes a GPU if it can.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes on stderr.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="NAME[.tag], hf-hub:org/name, local-dir:PATH, or a .onnx or .pt2 file. Default: the best bundled one.",
    ),
]
CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="A .safetensors file with weights for the architecture --model.")
]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images that go through at once.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", "-j", min=1, help="Threads that read images. Default: one a core, at most 8.")
]
AmpOption = Annotated[bool, typer.Option("--amp", help="Run the model in bfloat16 where that is safe.")]
SplitOption = Annotated[str | None, typer.Option("--split", help="The split to use. Default: the held-out one.")]
ImageColumnOption = Annotated[str | None, typer.Option("--image-column", help="Default: the first with images.")]
LabelColumnOption = Annotated[str | None, typer.Option("--label-column", help="Default: the first with classes.")]
