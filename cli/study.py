"""`dimmix study`: the experiments on wide and sparse mixers."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import Format, FormatOption, OutputOption, QuietOption
from .progress import ProgressBar
from .sink import Record, Sink, note
from .widths import CONNECTIONS_HELP, parse_connections


class Kind(StrEnum):
    """What is studied."""

    width = "width"
    depth = "depth"
    similarity = "similarity"
    spectrum = "spectrum"
    cost = "cost"


def study(
    kind: Annotated[Kind, typer.Argument(help="What to study.")],
    data: Annotated[Path, typer.Option(help="Folder of the data sets, or of this one.")] = Path("data"),
    dataset: Annotated[
        str | None, typer.Option(help="Its name in that folder. Default: the recipe's, or cifar10.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for results and figure; what is there is kept.")] = Path(
        "runs/study"
    ),
    recipe: Annotated[Path | None, typer.Option(help="Recipe to train by. Default: a short one.")] = None,
    connections: Annotated[
        int | None, typer.Option("--connections", help=CONNECTIONS_HELP, parser=parse_connections, metavar="OMEGA")
    ] = None,
    gamma: Annotated[float, typer.Option("--gamma", help="Expansion of the MLPs.")] = 1.0,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Instead of the recipe's.")] = None,
    images: Annotated[int | None, typer.Option("--images", min=1, help="Train on so many. Default: all.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Repeat with so many seeds, from 0.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=0, max=1024, help="CPU threads; 0: torch's choice.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
    format: FormatOption = Format.auto,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Train a sweep of wide mixers, RP-Mixers and SW-MLPs, and draw what comes of it.

    width: error against C / S at a fixed number of connections. depth: mixer against SW-MLP. similarity: CKA of
    features. spectrum: largest singular values against width. cost: memory, work and time; needs no data.
    Errors are of training images that were held back. Interrupted, the same command goes on.

    \b
    Examples:
      dimmix study width --data datasets --images 10000 --epochs 4
      dimmix study width --data datasets --dataset cifar100 --recipe recipes/wide_mixer_study.cifar10.toml
      dimmix study cost --threads 1
    """
    from dataclasses import replace

    import torch

    from dimmix.training.recipe import parse_recipe, read_recipe
    from dimmix.training.study import Study, run_study, short_recipe
    from dimmix.training.study_plot import plot_study

    if threads:
        torch.set_num_threads(threads)
    base = read_recipe(recipe) if recipe else short_recipe(dataset or "cifar10")
    dataset = dataset or base.data.name
    tables = base.to_json()
    base = parse_recipe(tables | {"data": tables["data"] | {"name": dataset}}, base.path)
    if epochs:
        warmup = min(base.schedule.warmup_epochs, epochs / 2)
        base = replace(base, schedule=replace(base.schedule, epochs=epochs, warmup_epochs=warmup))
    options = Study(
        kind=kind.value,
        recipe=base,
        data=data,
        folder=out / dataset,
        connections=connections or 0,
        gamma=gamma,
        images=images or 0,
        seeds=tuple(range(seeds)),
        device=device,
        cache=out / "cache",
    )
    records: list[Record] = []
    progress = ProgressBar("measured", quiet=quiet)
    with Sink(format, output, title=f"{kind} on {dataset}", paused=progress.paused) as sink:
        for record in progress.track(run_study(options)):
            records.append(record)
            sink.write(record)
    if kind is not Kind.cost:
        figure = out / dataset / f"{kind}.png"
        plot_study(kind, records, figure)
        note(f"wrote {figure}", quiet)
