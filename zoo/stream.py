"""Many images through a model: in order, in bounded memory, on every core."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from .images import ImageError
from .runtime import Runtime

T = TypeVar("T")
S = TypeVar("S")

Loaded = list[tuple[T, Any]]
"""Items, each with what was made of it, or with the ImageError that stands in its place."""


def run_batches(
    items: Iterable[T],
    load: Callable[[T], np.ndarray],
    run: Callable[[list[np.ndarray]], Iterable[Any]],
    runtime: Runtime,
    batch_size: int,
    workers: int | None = None,
) -> Iterator[Loaded[T]]:
    """Batches of items, each with its row of what `run` made of those that `load` could read, or with the error.

    Where the runtime has lanes, a batch is cut into one part a lane, and a lane reads its part and runs it, on its
    share of the cores. Decoding small images holds the interpreter's lock, and a model that runs beside it waits for
    the lock at each layer: lanes wait less, and a core that works alone waits for no other at the end of a layer.
    `workers`, or one part alone, means threads that read ahead and a model that has all cores.
    """

    def finish(batch: Loaded[T]) -> Loaded[T]:
        good = [item for _, item in batch if not isinstance(item, ImageError)]
        rows = iter(run(good)) if good else iter(())
        return [(item, made if isinstance(made, ImageError) else next(rows)) for item, made in batch]

    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} holds no image")
    lanes = 1 if workers else runtime.lanes(batch_size)
    parts = _parts(items, batch_size // lanes)
    first = list(itertools.islice(parts, 2)) if lanes > 1 else []
    parts = itertools.chain(first, parts)
    if len(first) < 2:
        for batch in load_batches(itertools.chain.from_iterable(parts), load, batch_size, workers):
            yield finish(batch)
        return
    try:
        with _pool(lanes, runtime.lane(lanes)) as pool:
            yield from _in_order(pool, lambda part: finish(_load_part(load, part)), parts, ahead=2 * lanes)
    finally:
        runtime.lane(1)()  # a thread that starts from now on has all cores again


def load_batches(
    items: Iterable[T], load: Callable[[T], np.ndarray], batch_size: int, workers: int | None = None
) -> Iterator[Loaded[T]]:
    """Batches of items with what `load` made of each, in order; threads work ahead by two batches, no further.

    An `ImageError` that `load` raises stands in the place of its result.
    """
    workers = workers or min(8, os.cpu_count() or 1)
    size = max(1, min(16, batch_size // workers))
    ahead = max(2 * batch_size // size, workers)
    batch: Loaded[T] = []
    with _pool(workers) as pool:
        for part in _in_order(pool, lambda part: _load_part(load, part), _parts(items, size), ahead):
            batch += part
            while len(batch) >= batch_size:
                yield batch[:batch_size]
                batch = batch[batch_size:]
        if batch:
            yield batch


@contextmanager
def _pool(threads: int, initializer: Callable[[], Any] | None = None) -> Iterator[Executor]:
    pool = ThreadPoolExecutor(threads, initializer=initializer)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    remaining = iter(items)
    return iter(lambda: list(itertools.islice(remaining, size)), [])


def _in_order(pool: Executor, function: Callable[[T], S], items: Iterator[T], ahead: int) -> Iterator[S]:
    """What `function` makes of each item, in order, `ahead` of them begun or done before they are asked for."""
    pending = deque(pool.submit(function, item) for item in itertools.islice(items, ahead))
    while pending:
        done = pending.popleft().result()
        pending.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
        yield done


def _load_part(load: Callable[[T], np.ndarray], items: Sequence[T]) -> Loaded[T]:
    return [(item, _load_one(load, item)) for item in items]


def _load_one(load: Callable[[T], np.ndarray], item: T) -> np.ndarray | ImageError:
    try:
        return load(item)
    except ImageError as error:
        return error
