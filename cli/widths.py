"""`dimmix widths`: how wide and how sparse a mixer of so many connections is."""

import re
from typing import Annotated

import typer

from .options import Format, FormatOption, OutputOption
from .sink import Sink

CONNECTIONS_HELP = "Omega: non-zero weights of each Linear of the wide MLP; 2^18 may be written so."


MOST = 10**30
"""More than any design has, and what a float still holds."""


def parse_connections(text: str) -> int:
    """A whole number such as 262144, or a power such as 2^18.

    Raises:
        typer.BadParameter: anything else.
    """
    found = re.fullmatch(r"([0-9]{1,30})(?:\^([0-9]{1,2}))?", re.sub(r"[\s_]", "", text))
    exponent = int(found[2] or 1) if found else 0
    value = min(int(found[1]) ** exponent, MOST) if found and exponent < 64 else 0
    if value < 1:
        raise typer.BadParameter(f"{text!r} is not a positive whole number such as 262144 or 2^18")
    return value


def widths(
    connections: Annotated[
        int, typer.Option("--connections", help=CONNECTIONS_HELP, parser=parse_connections, metavar="OMEGA")
    ],
    gamma: Annotated[float, typer.Option("--gamma", help="Expansion of the MLPs.")] = 1.0,
    channels: Annotated[int | None, typer.Option("--channels", help="C; S follows. Default: C = S.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="S; C follows.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Mixers from narrow to C = S and back, as Figure 5.")] = False,
    format: FormatOption = Format.auto,
    output: OutputOption = None,
) -> None:
    """Design a mixer, S-Mixer, RP-Mixer or SW-MLP: tokens, channels, width, density, work and memory of one block.

    Bytes and multiply-adds (for one image) are of the weights, without biases and norms.

    \b
    Examples:
      dimmix widths --connections 2^18
      dimmix widths --connections 344064 --gamma 2 --channels 48
      dimmix widths --connections 2^21 --sweep
    """
    from dimmix.errors import DimmixError
    from dimmix.widths import designs, figure_5

    if sweep and (channels is not None or tokens is not None):
        raise DimmixError("--sweep makes its own channels and tokens: leave out --channels and --tokens", exit_code=2)
    rows = figure_5(connections, gamma) if sweep else designs(connections, gamma, channels, tokens)
    with Sink(format, output) as sink:
        for row in rows:
            sink.write(row.record())
