"""`python -m dimmix.training RECIPE`: the command that `dimmix train` also is. No torch is imported before it runs."""

import enum
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dimmix.allocator import keep_freed_memory
from dimmix.errors import DimmixError, system_error


class Split(enum.StrEnum):
    val = "val"
    full = "full"


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a TOML file.", show_default=False)],
    data: Annotated[Path, typer.Option(help="Folder of the data sets, or of this one.")] = Path("data"),
    runs: Annotated[Path, typer.Option(help="Folder that keeps the runs.")] = Path("runs"),
    name: Annotated[
        str, typer.Option(help="The run's folder in RUNS; if not given the recipe's name (for val NAME-val).")
    ] = "",
    split: Annotated[Split, typer.Option(help="val: hold back training rows; full: test once.")] = Split.full,
    max_minutes: Annotated[float, typer.Option(min=0, help="Stop after so long; the same command goes on.")] = math.inf,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0: torch's choice.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto.")] = "auto",
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a key: table.key=value.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the run's saved state and begin anew.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the run's curves so far, and do not train.")] = False,
) -> None:
    """Train a recipe; interrupted, it goes on where it stopped when called again.

    \b
    Examples:
      dimmix train recipes/cpu/butterfly_resnet20_convmix_w32.cifar10.toml --data datasets --split val
      dimmix train recipes/cpu/butterfly_resnet20_convmix_w32.cifar10.toml --data datasets --set train.seed=1 --name s1
      torchrun --nproc-per-node 2 -m dimmix.training recipes/cpu/butterfly_resnet20_convmix_w32.cifar10.toml
    """
    from .plot import plot_curves
    from .recipe import read_recipe

    parsed = read_recipe(recipe, tuple(set_ or ()))
    folder = runs / (name or (parsed.stem if split is Split.full else f"{parsed.stem}-val"))
    if plot:
        print(plot_curves(folder / "log.jsonl"))
        return

    from .loop import Options
    from .loop import train as run
    from .processes import started_by

    changes = "".join(f" --set {shlex.quote(change)}" for change in set_ or ())
    changes += f" --threads {threads}" if threads else ""
    options = Options(
        folder=folder,
        data=data,
        split=split.value,
        command=f"{started_by()} {shlex.quote(parsed.shown_path)} --split {split.value}{changes}",
        max_minutes=max_minutes,
        threads=threads,
        device=device,
        restart=restart,
        quiet=quiet,
        cache=runs / "cache",
    )
    card = run(parsed, options)
    if card:
        print(card.to_json(), end="")


def main() -> None:
    """What `python -m` and torchrun start."""
    keep_freed_memory()
    try:
        typer.run(train)
    except DimmixError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:  # a folder that cannot be made, a full disk
        print(f"error: {system_error(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "exit_code", 130))


if __name__ == "__main__":
    main()
