"""Paired timings: every contender runs once a round, so that a slow moment of the machine slows them all.

Rounds are in an order drawn anew: what ran before leaves its own data in the cache, to whoever is next.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call: the median of `rounds`, with the quartiles as its spread."""

    median: float
    low: float
    high: float
    rounds: int


def settle_cpu() -> None:
    """A CPU has done what was called."""


def compare(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 5,
    settle: Callable[[], object] = settle_cpu,
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, for about `seconds` in all and at least `least` rounds.

    `settle` returns when the device has done what was called, which a GPU does later.
    """
    for call in calls.values():
        call()
        call()
    settle()
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    end = time.perf_counter() + seconds
    rounds, order, generator = 0, list(calls.items()), random.Random(0)
    while rounds < least or time.perf_counter() < end:
        generator.shuffle(order)
        for name, call in order:
            start = time.perf_counter()
            call()
            settle()
            times[name].append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return times


def summary(times: list[float]) -> Timing:
    """Median and quartiles of at least two times."""
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(_short(median), _short(low), _short(high), len(times))


def speedup(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median of the ratio in each round."""
    return _short(statistics.median(s / f for s, f in zip(slow, fast, strict=True)))


def _short(value: float) -> float:
    return float(f"{value:.4g}")
