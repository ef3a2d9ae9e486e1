"""The options that several commands share, each written once."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dimmix.classifier import Classifier


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
        help="NAME[.tag], hf-hub:org/name, local-dir:PATH, or a .onnx or .pt2 file. Default: the best for CIFAR-100.",
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="A .safetensors file with weights for --model, or for what its card names."),
]
LARGEST_BATCH = 2**20

BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", "-b", min=1, max=LARGEST_BATCH, help="Images that go through at once.")
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-j",
        min=1,
        help="Threads that read images ahead of the model. Default: every core reads and runs its own part, at most 8.",
    ),
]
AmpOption = Annotated[bool, typer.Option("--amp", help="Run the model in bfloat16 where that is safe.")]
SplitOption = Annotated[str | None, typer.Option("--split", help="The split to use. Default: the held-out one.")]
ImageColumnOption = Annotated[
    str | None, typer.Option("--image-column", help="Default: by metadata or name, or the only one.")
]
LabelColumnOption = Annotated[
    str | None, typer.Option("--label-column", help="Default: by metadata or name, or the only one.")
]


@dataclasses.dataclass(frozen=True)
class Run:
    """The options of a command that runs a classifier over many images."""

    model: ModelOption = None
    checkpoint: CheckpointOption = None
    batch_size: BatchSizeOption = 64
    workers: WorkersOption = None
    amp: AmpOption = False
    device: DeviceOption = Device.auto
    format: FormatOption = Format.auto
    output: OutputOption = None
    quiet: QuietOption = False

    def classifier(self) -> "Classifier":
        """What the options name."""
        from dimmix.classifier import Classifier

        return Classifier(self.model, self.device, self.checkpoint, amp=self.amp)


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Stands the options of `Run` in the place of the command's parameter `run`, which they then make."""
    fields = dataclasses.fields(Run)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields
    ]
    parameters = list(inspect.signature(command).parameters.values())
    at = [parameter.name for parameter in parameters].index("run")
    parameters[at : at + 1] = shared

    @functools.wraps(command)
    def call(**options: Any) -> None:
        command(run=Run(**{f.name: options.pop(f.name) for f in fields}), **options)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
