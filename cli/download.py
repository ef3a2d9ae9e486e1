"""`dimmix download`: checkpoints onto this machine, verified, for use without a network."""

from pathlib import Path
from typing import Annotated

import typer

from dimmix.errors import DimmixError

from .options import Format, FormatOption, OutputOption, QuietOption
from .sink import Sink, note


def download(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="architecture[.tag] or hf-hub:org/name[@revision].")
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Every checkpoint of this release.")] = False,
    to: Annotated[Path | None, typer.Option("--to", help="Copy the files to this folder as well.")] = None,
    format: FormatOption = Format.auto,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Fetch checkpoints and say where they lie.

    What is bundled or in the Hub's cache is not fetched again. One that fails does not stop the others; the exit
    code is then 1.

    \b
    Examples:
      dimmix download butterfly_resnet20_convmix_w32.cifar10
      dimmix download hf-hub:timm/resnet18.a1_in1k
      dimmix download --all --to weights
    """
    if bool(names) == all:
        raise DimmixError("name the checkpoints, or ask for --all of them", exit_code=2)
    from dimmix.checkpoints import cards
    from dimmix.checkpoints.download import download as fetch

    failed = 0
    with Sink(format, output) as sink:
        for name in names or cards():
            try:
                path = fetch(name, to)
            except DimmixError as error:
                failed += 1
                note(str(error))
            else:
                sink.write({"name": name, "path": str(path), "bytes": path.stat().st_size})
    if failed:
        raise typer.Exit(1)
