"""What a run says: progress on stderr, a JSONL log, and at the end the checkpoint with its card."""

import copy
import hashlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save
from torch import Tensor, nn

from dimmix.checkpoints import Card
from dimmix.checkpoints.card import NOT_MODEL_ARGS
from dimmix.datasets import Sample
from dimmix.evaluation import Evaluation
from dimmix.files import write_atomically
from dimmix.processor import processor
from dimmix.profile import count_macs

from .recipe import Recipe


class Reporter:
    """A bar on a terminal, one line an epoch elsewhere; every epoch's record is a line of `log`."""

    def __init__(self, log: Path, steps: int, done: int, quiet: bool = False) -> None:
        self.log, self.console = log, Console(stderr=True, quiet=quiet)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(
            *columns, TimeRemainingColumn(), console=self.console, disable=quiet or not sys.stderr.isatty()
        )
        self.task = self.bar.add_task("training", total=steps, completed=done)
        self.epoch = ""

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def step(self, done: int, loss: float, images_per_second: float) -> None:
        if not self.bar.disable:
            text = f"loss {loss:.3f} {self.epoch}{images_per_second:.0f} images/s"
            self.bar.update(self.task, completed=done, description=text)

    def record(self, record: dict[str, Any]) -> None:
        """One epoch: appended to the log and shown."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in record.items()}
        self.epoch = f"top-1 {record['top1']:.2f} " if "top1" in record else ""
        self.console.print(
            "  ".join(f"{key} {value}" for key, value in shown.items()), highlight=False, soft_wrap=True, markup=False
        )

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def trim_log(log: Path, epochs: int) -> None:
    """Keep the log's records of the first `epochs` epochs: a resumed run writes later ones, or half a line, again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomically(log, "".join(lines[:epochs]).encode())


def tells_of_more(log: Path) -> bool:
    """Whether a log has more than a first epoch, which is there before the first state is."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return len(lines) > 1 or (len(lines) == 1 and not lines[0].startswith('{"epoch": 1,'))


def measure(logits: Tensor, labels: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """The card's metrics of logits (N, classes) against labels (N,): what `dimmix eval` would say."""
    evaluation = Evaluation("", "", "", list(names))
    samples = [Sample(None, label, f"row {row}") for row, label in enumerate(labels.tolist())]
    evaluation.update(logits.double().numpy(), labels.numpy(), samples)
    return {
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "nll": evaluation.nll,
        "ece": evaluation.ece,
        "per_class_accuracy": evaluation.per_class_accuracy,
    }


def rounded_to_half(model: nn.Module) -> nn.Module:
    """A copy whose numbers are what float16 keeps of them."""
    rounded = copy.deepcopy(model)
    for tensor in rounded.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    return rounded


def write_checkpoint(
    path: Path, model: nn.Module, recipe: Recipe, labels: tuple[str, ...], dtype: torch.dtype, facts: dict[str, Any]
) -> Card:
    """Write the card to `path` and the weights, as `dtype`, beside it; `facts` are the card's measured fields."""
    state = {key: t.to(dtype) if t.is_floating_point() else t for key, t in model.state_dict().items()}
    weights = save({key: t.detach().cpu().contiguous() for key, t in state.items()})
    size = (3, recipe.data.image_size, recipe.data.image_size)
    card = Card(
        tag=recipe.tag,
        file=f"{path.stem}.safetensors",
        sha256=hashlib.sha256(weights).hexdigest(),
        size=len(weights),
        dtype=str(dtype).removeprefix("torch."),
        params=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, size),
        input_size=size,
        mean=recipe.data.mean,
        std=recipe.data.std,
        interpolation="bicubic",
        crop_pct=1.0,
        labels=labels,
        dataset=recipe.data.name,
        seed=recipe.train.seed,
        epochs=recipe.schedule.epochs,
        teacher=recipe.teacher.name if recipe.teacher else None,
        recipe=recipe.shown_path,
        hardware=_hardware(next(model.parameters()).device),
        versions={name: importlib.metadata.version(name) for name in ("torch", "timm")},
        licence="apache-2.0",
        papers=recipe.about.papers,
        notes=recipe.about.notes,
        model_args={key: value for key, value in recipe.model.args.items() if key not in NOT_MODEL_ARGS},
        started_from=recipe.started_from,
        **facts,
    )
    write_atomically(path.parent / card.file, weights)
    card.write(path)
    return card


def commit_of(folder: Path) -> str:
    """The commit of the recipe's repository, with `-dirty` where files differ from it; empty where there is none."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread" + "s" * (threads > 1)
