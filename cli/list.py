"""`dimmix list`: the checkpoints of this release, or every architecture."""

from typing import Annotated

import typer

from dimmix import FAMILIES, family_of
from dimmix.errors import DimmixError

from .options import Format, FormatOption, OutputOption, QuietOption
from .progress import ProgressBar
from .sink import Record, Sink, note


def list_models(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="Only names like this: '*resnet*'.")] = "*",
    dataset: Annotated[str | None, typer.Option("--dataset", help="Only checkpoints trained on this.")] = None,
    family: Annotated[str | None, typer.Option("--family", help=f"{', '.join(FAMILIES)}.")] = None,
    max_params: Annotated[
        float | None, typer.Option("--max-params", min=0, help="At most so many million parameters.")
    ] = None,
    sort: Annotated[str, typer.Option("--sort", help="A column; prefix - for the largest first.")] = "name",
    architectures: Annotated[
        bool, typer.Option("--architectures", help="Every architecture, with weights or without.")
    ] = False,
    remote: Annotated[
        bool, typer.Option("--remote", help="Ask the Hub: what is bundled, cached and published, and does it agree.")
    ] = False,
    format: FormatOption = Format.auto,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """List the models with what they reached and cost.

    \b
    Examples:
      dimmix list
      dimmix list --dataset cifar10 --sort=-top1
      dimmix list "vit*" --architectures
    """
    if remote and (architectures or dataset or max_params is not None):
        raise DimmixError("--remote compares checkpoints by name: it goes with PATTERN and --family only", exit_code=2)
    if architectures and dataset:
        raise DimmixError("--dataset is of checkpoints: leave --architectures out", exit_code=2)
    if family and family not in FAMILIES:
        raise DimmixError(f"--family {family}: the families are {', '.join(FAMILIES)}", exit_code=2)
    records = _remote(pattern) if remote else _architectures(pattern, quiet) if architectures else _checkpoints(pattern)
    column = sort.removeprefix("-")
    chosen = [
        record
        for record in records
        if (family is None or record["family"] == family)
        and (dataset is None or record.get("dataset") == dataset)
        and (max_params is None or record["params"] <= max_params * 1e6)
    ]
    if chosen and column not in chosen[0]:
        raise DimmixError(f"--sort {sort}: the columns are {', '.join(chosen[0])}", exit_code=2)
    chosen.sort(key=lambda record: record[column], reverse=sort.startswith("-"))
    with Sink(format, output) as sink:
        for record in chosen:
            sink.write(record)
    if not chosen:
        note("no model is like this; --architectures lists those without weights too", quiet)


def _remote(pattern: str) -> list[Record]:
    import fnmatch

    from dimmix.checkpoints import status

    found = [record for record in status() if fnmatch.fnmatch(str(record["name"]), pattern)]
    return [record | {"family": family_of(str(record["name"]))} for record in found]


def _checkpoints(pattern: str) -> list[Record]:
    import fnmatch

    from dimmix.checkpoints import cards

    return [
        {
            "name": card.name,
            "family": family_of(card.architecture),
            "dataset": card.dataset,
            "top1": card.top1,
            "top5": card.top5,
            "params": card.params,
            "macs": card.macs,
            "bytes": card.size,
            "input": list(card.input_size),
        }
        for card in cards().values()
        if fnmatch.fnmatch(card.name, pattern)
    ]


def _architectures(pattern: str, quiet: bool) -> list[Record]:
    import timm
    import torch

    import dimmix

    with_weights = {name.partition(".")[0] for name in dimmix.list_models(pretrained=True)}
    names = dimmix.list_models(pattern)
    records = []
    for name in ProgressBar("architectures", len(names), quiet=quiet).track(names):
        with torch.device("meta"):
            model = timm.create_model(name)
        params = sum(parameter.numel() for parameter in model.parameters())
        weights = "yes" if name in with_weights else "no"
        records.append({"name": name, "family": family_of(name), "params": params, "weights": weights})
    return records
