"""The curves of a run, drawn from its log."""

import json
from pathlib import Path

from dimmix.errors import DimmixError
from dimmix.files import replacing
from dimmix.report import new_figure


def plot_curves(log: Path) -> Path:
    """Draw the loss, the learning rate and, where it was measured, top-1 over the epochs; the picture beside `log`.

    Raises DimmixError when there is no log or no whole epoch in it.
    """
    try:
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        epochs = [record["epoch"] for record in records]
        series = {key: [record[key] for record in records] for key in ("loss", "lr", "top1") if key in records[0]}
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        raise DimmixError(f"{log}: no epochs to draw; train the recipe for an epoch first") from None
    names = {"loss": "training loss", "lr": "learning rate", "top1": "top-1 of held-back rows, %"}
    figure = new_figure((4 * len(series), 3.2), "drawing curves", "train")
    for axes, (key, values) in zip(figure.subplots(1, len(series), squeeze=False)[0], series.items(), strict=True):
        axes.plot(epochs, values)
        axes.set(xlabel="epoch", title=names[key])
        axes.grid(alpha=0.3)
    path = log.with_name("curves.png")
    with replacing(path) as file:
        figure.savefig(file)
    return path
