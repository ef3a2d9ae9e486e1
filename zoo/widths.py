"""The arithmetic of wide and sparse MLPs: from connections to tokens, channels and width. No torch in here.

Understanding MLP-Mixer as a Wide and Sparse MLP (arXiv 2306.01470), sections 4 and 5. S tokens and C channels are one
vector of m = S * C features. A Linear of the MLP-Mixer has, as a Linear of the wide MLP, on average

    Omega = gamma (C S^2 + C^2 S) / 2

connections (non-zero weights), where gamma is the expansion of its MLPs; one of the SW-MLP has p gamma m^2. At a fixed
Omega the width m is largest where C = S.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from .errors import DimmixError

BYTES, INDEX_BYTES, ORDER_BYTES = 4, 4, 8  # of a float32 weight, an int32 place, an int64 entry of a permutation
LARGEST = 1e15


def mean_connections(tokens: float, channels: float, token_ratio: float, channel_ratio: float) -> float:
    """Omega: connections of a Linear of the wide MLP, the mean of token and channel mixing."""
    return (token_ratio * channels * tokens**2 + channel_ratio * channels**2 * tokens) / 2


def square_width(connections: float, gamma: float) -> float:
    """C* = S*, where the width C S is largest at a fixed number of connections."""
    return (connections / gamma) ** (1 / 3)


def matching(connections: float, gamma: float, other: float) -> float:
    """The S that goes with C, or the C that goes with S: Omega is symmetric in the two."""
    return (math.sqrt(other**2 + 8 * connections / (gamma * other)) - other) / 2


@dataclass(frozen=True)
class Design:
    """One block of a wide MLP, a token and a channel mixing or their like.

    `width` is m = S * C, `connections` of a Linear and `density` the share that they are of a dense one; `macs` for
    one image; `params` are weights without biases and norms, and `memory` the bytes of all that is stored for them.
    """

    model: str
    tokens: int
    channels: int
    gamma: float
    width: int
    connections: int
    density: float
    macs: int
    params: int
    memory: int

    def record(self) -> dict[str, Any]:
        """For output."""
        return asdict(self)


def designs(connections: float, gamma: float, channels: int | None = None, tokens: int | None = None) -> list[Design]:
    """The four models, and the SW-MLP with its mask stored dense, at (about) `connections` for a Linear.

    With `channels` the tokens follow and the other way round; with neither C = S. The S-Mixer has no expansion, so
    that at the same number of connections it is wider.

    Raises:
        DimmixError: no tokens and channels of at least 1 have so many connections, or both are given.
    """
    if channels is not None and tokens is not None:
        raise DimmixError("--channels and --tokens: give one, the other follows from the connections", exit_code=2)
    S, C = _solve(connections, gamma, channels, tokens)
    simple_S, simple_C = _solve(connections, 1.0, channels, tokens)
    shared = 2 * gamma * (S**2 + C**2)
    omega = mean_connections(S, C, gamma, gamma)
    squares = simple_S**2 + simple_C**2
    simple = mean_connections(simple_S, simple_C, 1.0, 1.0)
    width, hidden = S * C, round(gamma * S * C)
    rows = 2 * (hidden + width) + 4  # of the four masks, and where the last one ends
    places = 4 * hidden * width
    return [
        _design("mixer", S, C, gamma, omega, 4, shared, BYTES * shared),
        _design("s_mixer", simple_S, simple_C, 1.0, simple, 2, squares, BYTES * squares),
        _design("rp_mixer", S, C, gamma, omega, 4, shared, BYTES * shared + 4 * 2 * ORDER_BYTES * width),
        _design("sw_mlp", S, C, gamma, omega, 4, 4 * omega, 4 * omega * (BYTES + INDEX_BYTES) + INDEX_BYTES * rows),
        _design("sw_mlp, dense mask", S, C, gamma, omega, 4, places, places * (BYTES + 1), macs=places),
    ]


def sweep(connections: float, gamma: float, channels: tuple[int, ...]) -> list[tuple[int, int]]:
    """(C, S) at a fixed number of connections as in the paper's Figure 5: `channels` with their S, C = S, and swapped.

    Raises:
        DimmixError: as `designs`.
    """
    pairs = [_solve(connections, gamma, C, None)[::-1] for C in channels]
    square = _solve(connections, gamma, None, None)
    return sorted({*pairs, square, *((S, C) for C, S in pairs)})


def sweep_channels(connections: float, gamma: float) -> tuple[int, ...]:
    """Channels below C* = S* for `sweep`: the paper's 16, 32, 48 at Omega 2^18 and 16, 32, 64 at 2^21."""
    square = square_width(connections, gamma)
    return tuple(C for C in (16, 32, 64 if square > 100 else 48) if C < square)


def figure_5(connections: float, gamma: float) -> list[Design]:
    """The mixers of `sweep`, narrowest first in channels.

    Raises:
        DimmixError: as `designs`.
    """
    _solve(connections, gamma, None, None)  # refuses numbers that make no sweep
    pairs = sweep(connections, gamma, sweep_channels(connections, gamma))
    return [designs(connections, gamma, channels=C)[0] for C, _ in pairs]


def _solve(connections: float, gamma: float, channels: int | None, tokens: int | None) -> tuple[int, int]:
    """(S, C), rounded."""
    wanted = f"--connections {connections:g} --gamma {gamma:g}"
    if not (1 / LARGEST <= gamma <= LARGEST and 1 <= connections <= LARGEST):
        bounds = f"need at least 1 connection and gamma above 0 ({1 / LARGEST:g} at least), below {LARGEST:g}"
        raise DimmixError(f"{wanted}: {bounds}", exit_code=2)
    given = channels if channels is not None else tokens
    name = "--channels" if channels is not None else "--tokens"
    if given is None:
        square = round(square_width(connections, gamma))
        S, C = square, square
    elif given < 1:
        raise DimmixError(f"{name} {given}: must be at least 1", exit_code=2)
    else:
        other = round(matching(connections, gamma, given))
        S, C = (other, given) if channels is not None else (given, other)
    if min(S, C) < 1:
        least = mean_connections(given or 1, 1, gamma, gamma)
        where = f" {name} {given}" if given is not None else ""
        raise DimmixError(f"{wanted}{where}: too few connections; that needs at least {least:g}", exit_code=2)
    return S, C


def _design(
    model: str,
    S: int,
    C: int,
    gamma: float,
    omega: float,
    linears: int,
    params: float,
    memory: float,
    macs: float | None = None,
) -> Design:
    density = omega / (gamma * (S * C) ** 2)
    macs = linears * omega if macs is None else macs
    return Design(model, S, C, gamma, S * C, round(omega), density, round(macs), round(params), round(memory))
