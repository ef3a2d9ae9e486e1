"""The training loop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dimmix.checkpoints import Card, find
from dimmix.checkpoints.header import file_sha256
from dimmix.errors import DimmixError, Interrupted
from dimmix.files import alone_in

from .augment import Batches
from .data import Images, load_images
from .learner import Learner, check_teacher, predict, who_know_every_row
from .lessons import Lessons, lessons_folder
from .processes import Processes, join_processes
from .recipe import Recipe, parse_recipe
from .report import Reporter, commit_of, measure, rounded_to_half, tells_of_more, trim_log, write_checkpoint
from .state import read_state, write_state

STATE, LOG = "state.safetensors", "log.jsonl"
HALF_JUDGED_BY = 10_000  # training rows
HALF_MAY_COST_ONE_IN = 5_000  # of them: 0.02 points of top-1
MOST_PROCESSES = 4096


@dataclass(frozen=True)
class Options:
    """How to run a recipe, as against what it trains.

    `folder` keeps state, log and results, `data` holds the data sets, `cache` their decoded pixels.
    """

    folder: Path
    data: Path
    split: Literal["val", "full"] = "full"
    command: str = ""
    max_minutes: float = math.inf
    threads: int = 0
    device: str = "auto"
    restart: bool = False
    quiet: bool = False
    cache: Path | None = None


@dataclass
class Position:
    """Where a run stands: `step` updates done in `seconds`, `loss` summed over the epoch so far."""

    step: int = 0
    seconds: float = 0.0
    loss: float = 0.0


def train(recipe: Recipe, options: Options) -> Card | None:
    """Train `recipe` from where its folder says, else from the start, to the end or to `max_minutes`.

    Split "val" trains on all but the last `data.held_back` training rows and evaluates on those after each epoch.
    Split "full" trains on every row and evaluates once, at the end, on the test split. Both evaluate the EMA weights,
    and at the end write them as `<architecture>.<tag>.safetensors` with their card.

    Returns the card, or None when `max_minutes` stopped the run before its end and in processes other than the first.
    Raises Interrupted, a KeyboardInterrupt, when a signal stopped it; its state is saved then too.
    Raises DimmixError for unusable input, for a folder that holds another run, and for a loss that is not finite.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    with join_processes(options.device) as processes, alone_in(options.folder, first=not processes.rank):
        run = Run(recipe, options, processes)
        with run.reporter:
            finished = run.train()
            if processes.rank:
                return None
            if not finished:
                run.reporter.say(f"stopped at step {run.position.step}; the same command goes on from there")
                if run.stopped_by:
                    raise Interrupted(run.stopped_by)
                return None
            return run.finish()


class Run:
    """A recipe on its data, with a learner at its position."""

    def __init__(self, recipe: Recipe, options: Options, processes: Processes) -> None:
        self.recipe, self.options, self.processes = recipe, options, processes
        training, held_out = _load(recipe, options)
        batch_size, data = recipe.train.batch_size, recipe.data
        if batch_size > len(training) or batch_size % processes.count:
            raise DimmixError(
                f"{recipe.path}: train.batch_size = {batch_size} must be a multiple of the {processes.count} processes "
                f"and at most the {len(training)} training images"
            )
        self.held_out_split = held_out.split if options.split == "full" else "val"
        self.digest = training.digest
        self.steps_per_epoch = len(training) // batch_size
        self.steps = recipe.schedule.epochs * self.steps_per_epoch
        self.batches = Batches(training, recipe.augment, data.mean, data.std, processes.device)
        self.held_out = Batches(held_out, recipe.augment, data.mean, data.std, processes.device)
        self.learner = Learner(recipe, len(training.names), self.steps_per_epoch, processes)
        check_teacher(recipe, training.names)
        self.teacher_digest = file_sha256(find(recipe.teacher_weights)) if recipe.teacher else ""
        self.lessons = self._lessons(training)
        self.commit = commit_of(recipe.path.parent)
        self.stopped_by = 0  # the number of the signal that did
        self.position = self._resume()
        quiet = options.quiet or processes.rank > 0
        self.reporter = Reporter(options.folder / LOG, self.steps, self.position.step, quiet)
        for who in who_know_every_row(recipe) if options.split == "val" else ():
            self.reporter.say(f"{who} has learnt the held-back rows too: compare these figures with their like only")

    def train(self) -> bool:
        """Steps to the end of the recipe (True), or until the user or the clock stops it (False)."""
        position, learner, size = self.position, self.learner, self.recipe.train.batch_size
        strong_epochs = self.recipe.schedule.epochs - self.recipe.augment.plain_epochs
        order = self._order(position.step // self.steps_per_epoch % self.views)
        started = time.monotonic()
        learner.model.train()
        with _stop_signals() as signals:
            while position.step < self.steps:
                begun = time.monotonic()
                epoch, at = divmod(position.step, self.steps_per_epoch)
                view = epoch % self.views
                if at == 0:
                    order = self._order(view)
                rows = order[at * size : (at + 1) * size][self.processes.rank :: self.processes.count]
                self._seed(view * self.steps_per_epoch + at)
                strong = epoch < strong_epochs
                x, target = self.batches.augmented(rows.to(learner.device), strong)
                taught = self.lessons.logits(f"{view}" + "-plain" * (not strong), at, x) if self.lessons else None
                if self.lessons:
                    self._seed(self.steps + position.step)  # a view comes again, but not what dropout leaves out of it
                loss = learner.update(x, target, position.step, taught).item()
                late = time.monotonic() - started > 60 * self.options.max_minutes
                loss, late, self.stopped_by = self.processes.agree(loss, late, signals[0] if signals else 0)
                stop = late or bool(self.stopped_by)
                if not math.isfinite(loss):
                    raise self._diverged(f"the loss is {loss}")
                position.step += 1
                position.loss += loss
                position.seconds += time.monotonic() - begun
                self.reporter.step(position.step, position.loss / (at + 1), self.images_per_second)
                if at + 1 == self.steps_per_epoch:
                    self._end_epoch(epoch + 1)
                elif stop:
                    self._save()
                if stop:
                    return position.step == self.steps
        return True

    def finish(self) -> Card:
        """Evaluate on the held-out images and write the checkpoint; a run that has done so is not evaluated again.

        The weights are stored as float16 if that changes top-1 on training rows by under 0.02 points.
        """
        if self.card.exists() and self.card.with_suffix(".safetensors").exists():
            self.reporter.say(f"finished before; --restart trains anew. {self.card}")
            return Card.read(self.card)
        facts = {
            "architecture": self.learner.architecture,
            "split": self.held_out_split,
            "images": len(self.held_out),
            "command": self.options.command,
            "commit": self.commit,
            "train_minutes": round(self.position.seconds / 60, 2),
            "images_per_second": round(self.images_per_second, 1),
        }
        model, dtype = self.learner.best, torch.float32
        rounded = rounded_to_half(model)
        if self._half_is_as_good(rounded, model):
            model, dtype = rounded, torch.float16
        return write_checkpoint(
            self.card, model, self.recipe, self.held_out.names, dtype, self._evaluate(model) | facts
        )

    @property
    def card(self) -> Path:
        """Where the card goes; one that is there already says that the run has ended."""
        return self.options.folder / f"{self.learner.architecture}.{self.recipe.tag}.json"

    @property
    def images_per_second(self) -> float:
        return self.position.step * self.recipe.train.batch_size / max(self.position.seconds, 1e-9)

    def _diverged(self, what: str) -> DimmixError:
        epoch, at = divmod(self.position.step, self.steps_per_epoch)
        state = self.options.folder / STATE
        kept = f"{state} keeps the last good state" if state.exists() else "no state was saved yet"
        return DimmixError(
            f"{self.recipe.path}: {what} at epoch {epoch + 1}, step {at + 1} of it; {kept}; "
            "lower optimizer.lr, or set optimizer.clip_grad"
        )

    def _tensors(self) -> dict[str, Tensor]:
        """What the last step left, to be saved. Raises DimmixError where that is not finite: a loss shows it late."""
        tensors = self.learner.tensors()
        if not all(t.isfinite().all() for t in tensors.values() if t.is_floating_point()):
            self.position.step -= 1  # the step that did it
            raise self._diverged("weights are not finite")
        return tensors

    def _end_epoch(self, epochs: int) -> None:
        if not self.processes.rank:
            self._tensors()
            record: dict[str, Any] = {
                "epoch": epochs,
                "loss": self.position.loss / self.steps_per_epoch,
                "lr": self.learner.lr,
                "images_per_second": self.images_per_second,
                "minutes": self.position.seconds / 60,
            }
            if self.options.split == "val":
                with self.learner.autocast():
                    measured = self._evaluate(self.learner.best)
                record |= {key: measured[key] for key in ("top1", "nll")}
                self.learner.model.train()
            self.reporter.record(record)
        self.position.loss = 0.0
        self._save()

    def _evaluate(self, model: nn.Module) -> dict[str, Any]:
        return measure(*predict(model, self.held_out), self.held_out.names)

    def _half_is_as_good(self, half: nn.Module, full: nn.Module) -> bool:
        """On the first training rows, as they are: the held-out ones are for one look at the end."""
        if not all(tensor.isfinite().all() for tensor in half.state_dict().values()):
            return False  # a weight beyond 65,504, which these images need not have met
        right = []
        for model in (half, full):
            logits, labels = predict(model, self.batches, images=HALF_JUDGED_BY)
            right.append(int((logits.argmax(1) == labels).sum()))
        return abs(right[0] - right[1]) * HALF_MAY_COST_ONE_IN < len(labels)  # whole numbers: 0.02 has no exact float

    def _order(self, epoch: int) -> Tensor:
        """The rows of an epoch in the order that they are visited."""
        generator = torch.Generator().manual_seed(self.recipe.train.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.batches), generator=generator)

    @property
    def views(self) -> int:
        """After so many epochs their batches come again, with the same augmentation."""
        teacher = self.recipe.teacher
        return teacher.views if teacher and teacher.views else self.recipe.schedule.epochs

    def _lessons(self, training: Images) -> Lessons | None:
        recipe = self.recipe
        if not recipe.teacher:
            return None
        cache = self.options.cache if recipe.teacher.views else None
        folder = lessons_folder(cache, recipe, self.teacher_digest, training, self.processes) if cache else None
        return Lessons(self.learner.teach, self.steps_per_epoch, folder)

    def _seed(self, step: int) -> None:
        """Make every draw a function of (seed, step, rank), so that a resumed run repeats none and skips none."""
        # The CPU's generator reads 32 bits; odd multiples keep the steps of one seed and rank apart from another's.
        stream = self.recipe.train.seed * MOST_PROCESSES + self.processes.rank
        torch.manual_seed((step + 0x9E3779B1 * stream) % 2**32)

    def _save(self) -> None:
        if not self.processes.rank:
            facts = {
                "recipe": self.recipe.to_json(),
                "split": self.options.split,
                "commit": self.commit,
                "data": self.digest,
                "teacher": self.teacher_digest,
                "position": vars(self.position),
            }
            write_state(self.options.folder / STATE, self._tensors(), facts)

    def _resume(self) -> Position:
        """The position that the folder's state holds, loaded into the learner; the start when there is none."""
        folder, path = self.options.folder, self.options.folder / STATE
        if self.options.restart and not self.processes.rank:
            for old in (path, self.card):
                old.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if self.options.restart or not path.exists():
            for left, counts in ((self.card, self.card.exists()), (folder / LOG, tells_of_more(folder / LOG))):
                if counts and not self.options.restart:
                    raise DimmixError(f"{left} is of a run whose state is gone; choose another --name, or --restart")
            trim_log(folder / LOG, 0)
            return Position()
        tensors, facts = read_state(path)
        saved = _what_counts(parse_recipe(facts["recipe"], self.recipe.path), facts["split"])
        if changed := _differences(saved, _what_counts(self.recipe, self.options.split)):
            raise DimmixError(
                f"{path} is of another recipe: {'; '.join(changed)}; put that back, choose another --name, or --restart"
            )
        if facts.get("data", self.digest) != self.digest:
            raise DimmixError(
                f"{path} is of other training images; put those back, choose another --name, or --restart"
            )
        if facts.get("teacher", self.teacher_digest) != self.teacher_digest:
            raise DimmixError(
                f"{path} is of another teacher's weights; put those back, choose another --name, or --restart"
            )
        self.learner.load_tensors(tensors)
        self.commit = facts.get("commit", self.commit)  # what the run began with
        position = Position(**facts["position"])
        trim_log(folder / LOG, position.step // self.steps_per_epoch)
        return position


def _load(recipe: Recipe, options: Options) -> tuple[Images, Images]:
    """Training images and those to evaluate on."""
    training = load_images(options.data, recipe.data, "train", options.cache)
    if options.split == "full":
        held_out = load_images(options.data, recipe.data, None, options.cache)
        return training, held_out.relabelled(training.names)
    held_back = recipe.data.held_back
    if not 0 < held_back < len(training):
        raise DimmixError(f"{recipe.path}: data.held_back must leave some of the {len(training)} training rows")
    return training[:-held_back], training[-held_back:]


def _what_counts(recipe: Recipe, split: str) -> dict[str, Any]:
    """What a run may not change on its way: all but the recipe's words."""
    facts = recipe.to_json() | {"split": split}
    del facts["about"], facts["train"]["needs"]
    return facts


def _differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in saved | wanted:
        old, new = saved.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old!r}, is {new!r}")
    return found


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that Ctrl-C, SIGTERM or a closed terminal fills, so that the loop stops after a whole step.

    A second one of a kind interrupts.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous: dict[int, Any] = {
        number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)
    }
    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
