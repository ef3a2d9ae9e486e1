"""`dimmix predict`: the likeliest classes of each image, or its embedding."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dimmix.errors import DimmixError
from dimmix.files import refuse_same

from .options import Run, with_run_options
from .progress import ProgressBar
from .sink import Record, Sink, note

if TYPE_CHECKING:
    import numpy as np

    from dimmix.classifier import Result
    from dimmix.images import ImageError

TOPK = 5


@with_run_options
def predict(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Image files, folders (with those below), globs, @list.txt, or - for one image on stdin.",
        ),
    ],
    *,
    run: Run,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="Classes to show for each image.")] = TOPK,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, max=1, help="Leave out classes with less than this probability.")
    ] = 0.0,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Class names to use instead of the model's, one a line.")
    ] = None,
    embeddings: Annotated[
        Path | None, typer.Option("--embeddings", help="Write pooled features to this .npy or .parquet file instead.")
    ] = None,
) -> None:
    """Name what is on images.

    A broken image is a row with its error and a line on stderr; the others are answered, and the exit code is 1.

    \b
    Examples:
      dimmix predict photo.png
      dimmix predict photos/ --topk 1 --format csv --output answers.csv
      dimmix predict "photos/**/*.png" --threshold 0.5
      cat photo.png | dimmix predict - --format json
    """
    if embeddings is not None and (labels or threshold or topk != TOPK):
        raise DimmixError("--embeddings has no classes: leave --topk, --threshold and --labels out", exit_code=2)
    listed = [source.removeprefix("@") for source in sources]
    outputs = {"--output": run.output, "--embeddings": embeddings}
    refuse_same(outputs, [*sources, *listed, labels, run.checkpoint, run.model])
    classifier = run.classifier()
    if labels is not None:
        classifier.labels = _read_labels(labels, len(classifier.labels))
    progress = ProgressBar("images", quiet=run.quiet)
    if progress.enabled:
        import threading

        threading.Thread(target=_count, args=(sources, progress), daemon=True).start()
    images = _images(sources, {os.path.realpath(path) for path in outputs.values() if path is not None})
    options: dict[str, Any] = {"batch_size": run.batch_size, "workers": run.workers}
    failed = 0
    with ExitStack() as stack:
        if embeddings is not None:
            from dimmix.embeddings import embedding_writer

            write = stack.enter_context(embedding_writer(embeddings))
            records = _embed(classifier.stream_embeddings(images, **options), write)
        else:
            records = _classify(classifier.stream(images, topk, **options), threshold)
        sink = stack.enter_context(Sink(run.format, run.output, flatten=_rows, paused=progress.paused))
        stack.enter_context(progress.shown())
        for record in progress.count(records):
            sink.write(record)
            if record["error"] is not None:
                failed += 1
                with progress.paused():
                    note(f"{record['source']}: {record['error']}")
    if failed:
        raise typer.Exit(1)


def _classify(results: "Iterable[Result]", threshold: float) -> Iterator[Record]:
    from dataclasses import asdict

    for result in results:
        predictions = [asdict(p) for p in result.predictions if p.score >= threshold]
        yield {"source": result.source, "predictions": predictions, "error": result.error}


def _embed(
    results: "Iterable[tuple[str, np.ndarray | ImageError]]", write: "Callable[[str, np.ndarray], None]"
) -> Iterator[Record]:
    """Writes the embeddings, and yields which row of the file is whose."""
    from dimmix.images import ImageError

    row = 0
    for source, embedding in results:
        if isinstance(embedding, ImageError):
            yield {"source": source, "row": None, "error": embedding.reason}
        else:
            write(source, embedding)
            yield {"source": source, "row": row, "error": None}
            row += 1


def _rows(record: Record) -> list[Record]:
    """A row for each class; one without a class for an image that has none."""
    if "row" in record:
        return [record]
    source, error = record["source"], record["error"]
    empty = {"rank": None, "label": None, "index": None, "score": None}
    rows = [{"rank": rank, **prediction} for rank, prediction in enumerate(record["predictions"], start=1)] or [empty]
    return [{"source": source, **row, "error": error} for row in rows]


class _Stdin(bytes):
    """An image's bytes that came through the pipe."""

    filename = "-"


def _images(sources: list[str], outputs: set[str]) -> Iterator[Any]:
    """The images in turn. Raises DimmixError when a folder or a list brings one that is to be written over."""
    from dimmix.images import find_images

    for source in sources:
        if source == "-":
            yield _Stdin(sys.stdin.buffer.read())
            continue
        for image in find_images([source]):
            if isinstance(image, str) and outputs and os.path.realpath(image) in outputs:
                raise DimmixError(f"{image}: is read, and would be written over; name another output", exit_code=2)
            yield image


def _count(sources: list[str], progress: ProgressBar) -> None:
    from dimmix.images import find_images

    if any(source.startswith("@") and not Path(source[1:]).is_file() for source in sources):
        return  # a list from a pipe can be read once
    progress.total = sum(1 for _ in find_images(source for source in sources if source != "-")) + sources.count("-")


def _read_labels(path: Path, classes: int) -> list[str]:
    try:
        labels = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DimmixError(f"--labels {path}: {error.strerror}", exit_code=2) from error
    except UnicodeDecodeError as error:
        raise DimmixError(f"--labels {path}: not UTF-8 text", exit_code=2) from error
    if len(labels) != classes:
        raise DimmixError(f"--labels {path}: {len(labels)} names for a model of {classes} classes", exit_code=2)
    return labels
