"""The butterfly schedule: which dimensions are mixed together at each level. The one place that knows a stride.

Dimension Mixer (arXiv 2311.18735), section 3: over `n` dimensions with radix (block size) `a` there are
`L = ceil(log_a n)` levels; level `i` mixes groups of `a` dimensions that lie `stride` apart. After all levels every
output depends on every input; after one fewer it cannot, because `a**(L-1) < n`.

    n = 8, a = 2          level 0          level 1          level 2
                          stride 1         stride 2         stride 4
        0 1 2 3 4 5 6 7   01 23 45 67      02 13 46 57      04 15 26 37

Seen as an array of shape (groups, radix, stride), a level mixes along the middle axis. No torch in here.
"""

import math
from functools import lru_cache
from typing import NamedTuple


class Level(NamedTuple):
    """One level: `n = groups * radix * stride` dimensions seen as (groups, radix, stride), mixed along `radix`.

    `order` is None where that view is all there is to it. Otherwise the dimensions are gathered first: position `j`
    of the view holds dimension `order[j]`.
    """

    groups: int
    radix: int
    stride: int
    order: tuple[int, ...] | None = None

    @property
    def blocks(self) -> int:
        """How many groups of `radix` dimensions are mixed."""
        return self.groups * self.stride

    def members(self) -> list[list[int]]:
        """The dimensions of each block, (blocks, radix), blocks in the order of the weights: group, then offset."""
        order = self.order or range(self.groups * self.radix * self.stride)
        return [
            [order[(g * self.radix + i) * self.stride + s] for i in range(self.radix)]
            for g in range(self.groups)
            for s in range(self.stride)
        ]


class ButterflySchedule:
    """The levels of a butterfly over `n` dimensions with block size `radix`; `radix = n` is the dense case, one level.

    Strides grow by factors of at most `radix` and each divides the next, from 1 to `n / radix`, so that every level is
    a view. Where `n` is a power of the radix, or its powers divide `n` as the paper assumes, these are the paper's
    strides 1, a, a**2, ..., n / a. Some `n` have no such chain (n = 12, radix 2: 6 = 2 * 3 and 3 > 2); there level i
    works in the order that i perfect shuffles give, which reaches everything in the same number of levels: mixing
    `a` neighbours and then shuffling maps the inputs that reach an interval of `l` positions to an interval of `a * l`.

    Raises:
        ValueError: `radix` is not in 2..n or does not divide `n`; names the nearest radices that do.
    """

    def __init__(self, n: int, radix: int) -> None:
        if not 2 <= radix <= n or n % radix:
            raise ValueError(f"radix {radix} does not divide n={n}; nearest radices that do: {_nearest(n, radix)}")
        self.n, self.radix = n, radix
        self.levels: tuple[Level, ...] = _levels(n, radix)

    def level(self, index: int) -> Level:
        """Level `index` modulo the number of levels: how levels alternate over the depth of a network."""
        return self.levels[index % len(self.levels)]

    def __len__(self) -> int:
        return len(self.levels)

    def __repr__(self) -> str:
        strides = [level.stride if level.order is None else "shuffled" for level in self.levels]
        return f"ButterflySchedule(n={self.n}, radix={self.radix}, strides={strides})"


def square_radix(n: int) -> int:
    """The smallest divisor of `n` that is at least sqrt(n): two levels, and the least work that two levels can do.

    A prime has one level, of all of it.

    Raises:
        ValueError: `n` is less than 2, and has no radix.
    """
    if n < 2:
        raise ValueError(f"n={n} is nothing to mix: there must be at least 2 tokens or features")
    return next(radix for radix in range(max(2, math.isqrt(n - 1) + 1), n + 1) if n % radix == 0)


@lru_cache
def _levels(n: int, radix: int) -> tuple[Level, ...]:
    depth = 1  # ceil(log_radix n) in integers: floats put log(125, 5) above 3
    while radix**depth < n:
        depth += 1
    steps = _chain(n // radix, radix, depth - 1)
    if steps is None:
        return tuple(_shuffled(n, radix, i) for i in range(depth))
    strides = [math.prod(steps[:i]) for i in range(depth)]
    return tuple(Level(n // (radix * stride), radix, stride) for stride in strides)


def _chain(product: int, largest: int, length: int) -> tuple[int, ...] | None:
    """`length` factors of at most `largest` whose product is `product`, larger ones first; None if there are none."""
    if product > largest**length:
        return None
    if length == 0:
        return ()
    for factor in range(min(product, largest), 0, -1):
        if product % factor == 0 and (rest := _chain(product // factor, largest, length - 1)) is not None:
            return (factor, *rest)
    return None


def _shuffled(n: int, radix: int, times: int) -> Level:
    """Blocks of neighbours after `times` perfect shuffles, each sending position p to (p % a) * (n / a) + p // a."""
    order = list(range(n))
    for _ in range(times):
        order = [order[p] for offset in range(radix) for p in range(offset, n, radix)]
    return Level(n // radix, radix, 1, tuple(order) if times else None)


def _nearest(n: int, radix: int) -> str:
    divisors = [d for d in range(2, n + 1) if n % d == 0]
    below = [d for d in divisors if d < radix][-1:]
    above = [d for d in divisors if d > radix][:1]
    return " and ".join(str(d) for d in below + above) or "none"
