"""`dimmix eval`: accuracy and calibration on a data set."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dimmix.errors import DimmixError
from dimmix.files import refuse_same

from .options import Format, ImageColumnOption, LabelColumnOption, Run, SplitOption, with_run_options
from .progress import ProgressBar
from .sink import Sink, note

if TYPE_CHECKING:
    from dimmix.classifier import Classifier
    from dimmix.evaluation import Answer, Evaluation

CHECK_TOLERANCE = 0.1
"""Points of top-1 that the measurement may differ from the card."""


RESULTS = (".json", ".jsonl", ".csv", ".html")
"""Suffixes of what this command writes beside Parquet files, and of nothing that it reads."""


@with_run_options
def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder of class folders, a .parquet file or folder of them, hf://org/dataset[/config][@revision], "
            "a CIFAR archive.",
        ),
    ],
    *,
    run: Run,
    split: SplitOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Write each image's answer to this .csv or .parquet file.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write report.html, with curves and mistakes, into this folder.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help=f"Fail if top-1 is more than {CHECK_TOLERANCE} points off the model's card.")
    ] = False,
) -> None:
    """Measure a model on labelled images: top-1, top-5, NLL, ECE, each class, and speed.

    Classes are matched by name where both the data and the model have names, else by number.

    \b
    Examples:
      dimmix eval photos/ --model butterfly_resnet_fast_32.cifar10
      dimmix eval test.parquet --model butterfly_resnet_fast_32.cifar10 --format json
      dimmix eval photos/ --model butterfly_resnet_fast_32.cifar10 --predictions answers.csv --report report/
    """
    from dimmix.datasets import open_dataset
    from dimmix.evaluation import evaluate as measure

    if report is not None:
        from dimmix.report import make_folder, write_report

        make_folder(report)
    shards = Path(data).glob("**/*.parquet") if Path(data).is_dir() else ()
    page = report and report / "report.html"
    outputs = {"--output": run.output, "--predictions": predictions, "--report": page}
    refuse_same(outputs, [data, *shards, run.checkpoint, run.model])
    _refuse_inside(outputs, Path(data))
    dataset = open_dataset(data, split=split, image_column=image_column, label_column=label_column)
    classifier = run.classifier()
    if check and not classifier.runtime.spec.card:
        raise DimmixError(f"--check: {classifier.name} has no card to check against", exit_code=2)
    progress = ProgressBar("images", dataset.length, quiet=run.quiet)
    with ExitStack() as stack:
        sink = stack.enter_context(Sink(run.format, run.output, single=True))
        write = _answer_writer(stack, predictions, classifier)
        result = measure(
            classifier,
            dataset,
            batch_size=run.batch_size,
            workers=run.workers,
            on_answer=write,
            track=progress.track,
        )
        for error in result.errors:
            note(str(error))
        sink.title = f"{result.model} on {result.data}"
        sink.write(result.record() | (_class_rows(result) if sink.format is Format.table else {}))
    if report is not None:
        note(f"wrote {write_report(result, report)}", run.quiet)
    if check:
        _check(result, classifier)
    if result.errors:
        raise typer.Exit(1)


def _refuse_inside(outputs: dict[str, Path | None], folder: Path) -> None:
    """Raise DimmixError where an output would replace one of the folder's own files, which may be an image.

    An earlier result that lies in the folder itself, and in none of its classes or splits, may be replaced. A Parquet
    file in it would be taken for data from then on.
    """
    folder = folder.resolve()
    for option, output in outputs.items():
        path = output.resolve() if output else folder
        if path.suffix == ".parquet" and folder in path.parents:
            raise DimmixError(f"{option} {output}: would be one of the data; name another folder", exit_code=2)
        result = path.parent == folder and path.suffix in RESULTS
        if path.is_file() and folder in path.parents and not result:
            raise DimmixError(f"{option} {output}: is among the data; name another file", exit_code=2)


def _class_rows(result: "Evaluation") -> dict[str, float]:
    """A row of the table for each class; one whose name an earlier class has too gets a number."""
    rows: dict[str, float] = {}
    for name, accuracy in result.class_accuracies:
        row = f"accuracy of {name}"
        rows[row if row not in rows else f"{row} ({len(rows) + 1})"] = accuracy
    return rows


def _answer_writer(stack: ExitStack, path: Path | None, classifier: "Classifier") -> "Callable[[Answer], None]":
    if path is None:
        return lambda answer: None
    from dimmix.tables import table_writer

    columns = {"source": "string", "label": "string", "prediction": "string", "score": "float32", "correct": "bool"}
    write = stack.enter_context(table_writer(path, columns))
    names = classifier.labels
    return lambda answer: write(
        {
            "source": answer.sample.source,
            "label": names[answer.label],
            "prediction": names[answer.prediction],
            "score": answer.score,
            "correct": answer.label == answer.prediction,
        }
    )


def _check(result: "Evaluation", classifier: "Classifier") -> None:
    card = classifier.runtime.spec.card
    if abs(result.top1 - card["top1"]) > CHECK_TOLERANCE:
        raise DimmixError(
            f"--check: top-1 is {result.top1:.2f} on {result.images} images, "
            f"the card says {card['top1']:.2f} on {card['images']}"
        )
