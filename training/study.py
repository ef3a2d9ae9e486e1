"""The experiments on wide and sparse mixers: short trainings of one recipe over a sweep of shapes.

After Understanding MLP-Mixer as a Wide and Sparse MLP (arXiv 2306.01470), sections 4 and 5:

  * width: error against C / S at a fixed number of connections, for the mixer and the RP-Mixer;
  * depth: error of the mixer and of the SW-MLP with as many connections, at several depths;
  * similarity: CKA between the features of a mixer and those of another seed, an RP-Mixer and an SW-MLP;
  * spectrum: the largest singular value of the effective weights against the width, before and after training;
  * cost: bytes, multiply-adds and time of a training step; needs no data.

Errors are of training rows that were held back, never of the test split.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from dimmix.errors import DimmixError
from dimmix.layers import SparseLinear
from dimmix.profile import count_macs
from dimmix.wide import MaskedOperator, WideOperator, effective_mlp
from dimmix.wide_mixer import WideMixer
from dimmix.widths import designs, mean_connections, sweep, sweep_channels

from .augment import Batches
from .data import Images, load_images
from .learner import Learner, predict
from .processes import Processes, join_processes
from .recipe import Model, Recipe, parse_recipe

Kind = Literal["width", "depth", "similarity", "spectrum", "cost"]
Record = dict[str, Any]

NAMES = {"mixer": "MLP-Mixer", "rp": "RP-Mixer", "sparse": "SW-MLP"}
CONNECTIONS: dict[Kind, int] = {"width": 2**18, "depth": 2**15, "similarity": 2**15, "spectrum": 2**15}
DEPTHS = (1, 2, 4)
STEPS_TIMED = 3

SHORT = {
    "model": {"name": "wide_mixer_ssw_32"},
    "data": {"name": "cifar10"},
    "optimizer": {"name": "adamw", "lr": 1.5e-3, "weight_decay": 0.05},
    "schedule": {"epochs": 5, "warmup_epochs": 1.0},
    "train": {"batch_size": 64, "ema_decay": 0.99},
}
"""The recipe of a study that is given none; what it says of S, C, depth and mixing, the study replaces."""


def short_recipe(dataset: str) -> Recipe:
    """The short setting: minutes on two cores."""
    return parse_recipe(SHORT | {"data": {"name": dataset}}, Path("the short study"))


@dataclass(frozen=True)
class Study:
    """What to run. `connections` 0 is the kind's own; `images` 0 trains on all rows but the recipe's `held_back`."""

    kind: Kind
    recipe: Recipe
    data: Path
    folder: Path
    connections: int = 0
    gamma: float = 1.0
    images: int = 0
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"
    cache: Path | None = None

    @property
    def omega(self) -> int:
        """Connections of a Linear."""
        return self.connections or CONNECTIONS[self.kind]

    def settings(self) -> Record:
        """All that a result depends on, besides its shape and seed."""
        recipe = self.recipe.to_json()
        del recipe["about"]
        return {"gamma": self.gamma, "images": self.images, "recipe": recipe}


@dataclass(frozen=True)
class Shape:
    """A model of a sweep; `depth` counts pairs of a token and a channel mixing."""

    mixing: str
    channels: int
    tokens: int
    depth: int
    gamma: float
    seed: int

    @property
    def connections(self) -> int:
        """Of a Linear in the mean, the first layer apart, which comes from the patches."""
        return round(mean_connections(self.tokens, self.channels, self.gamma, self.gamma))

    def model(self, base: Model) -> Model:
        """With the base's patch and head."""
        ratios = {"token_ratio": self.gamma, "channel_ratio": self.gamma}
        shape = {key: value for key, value in asdict(self).items() if key != "gamma"}
        return Model(base.name, base.args | shape | ratios)


def run_study(study: Study) -> Iterator[Record]:
    """Results one by one, kept as they come in `study.folder/<kind>.jsonl`: what is there already is not run again.

    Raises:
        DimmixError: no data, no such shapes, a loss that is not finite, results that cannot be read or written.
    """
    if not study.seeds:
        raise DimmixError("a study needs at least one seed", exit_code=2)
    if study.recipe.teacher:
        raise DimmixError(f"{study.recipe.path}: a study trains without a teacher; take [teacher] out", exit_code=2)
    given = study.recipe.model.args
    if given.get("order", "mlp_mixer") != "mlp_mixer" or "connections" in given:
        raise DimmixError(
            f"{study.recipe.path}: a study makes MLP-Mixers of --connections; take model.args.order and "
            "model.args.connections out",
            exit_code=2,
        )
    if study.kind == "cost":
        if study.connections or study.gamma != 1:
            raise DimmixError("cost is of the paper's shapes: leave --connections and --gamma out", exit_code=2)
        yield from _costs()
        return
    points = list(_points(study))
    with join_processes(study.device) as processes:
        bench = _Bench(study, processes)
        store = _Store(study.folder / f"{study.kind}.jsonl")
        for shapes in points:
            asked = {"shapes": [asdict(shape) for shape in shapes], **study.settings()}
            yield from store.get(asked) or store.put(asked, list(_measure(study.kind, bench, shapes)))


def _points(study: Study) -> Iterator[list[Shape]]:
    """What is measured together: one shape, or for similarity the models that are compared."""
    omega, gamma = study.omega, study.gamma
    square = designs(omega, gamma)[0].tokens
    for seed in study.seeds:
        if study.kind == "width":
            for C, S in sweep(omega, gamma, sweep_channels(omega, gamma)):
                for mixing in ("mixer", "rp"):
                    yield [Shape(mixing, C, S, 8, gamma, seed)]
        elif study.kind == "depth":
            for depth in DEPTHS:
                for mixing in ("mixer", "sparse"):
                    yield [Shape(mixing, square, square, depth, gamma, seed)]
        elif study.kind == "spectrum":
            for smaller in (64, 8, 1):
                side = designs(omega / smaller, gamma)[0].tokens
                for mixing in ("mixer", "sparse"):
                    yield [Shape(mixing, side, side, 2, gamma, seed)]
        else:
            # Of other seeds, or the patch embedding would begin alike.
            others = [Shape(mixing, square, square, 4, gamma, seed + 1000) for mixing in NAMES]
            yield [Shape("mixer", square, square, 4, gamma, seed), *others]


def _measure(kind: Kind, bench: "_Bench", shapes: list[Shape]) -> Iterator[Record]:
    """The records of one point."""
    if kind == "similarity":
        yield from _similarities(bench, shapes)
        return
    (shape,) = shapes
    model, facts = bench.fit(shape)
    width = shape.channels * shape.tokens
    record = {"model": NAMES[shape.mixing], "channels": shape.channels, "tokens": shape.tokens, "width": width}
    record |= {"depth": shape.depth, "connections": shape.connections, "seed": shape.seed, **facts}
    if kind == "spectrum":
        start = bench.untrained(shape)
        record |= {"norm_at_start": _largest_norm(start), "norm_after": _largest_norm(model)}
    yield record


def _similarities(bench: "_Bench", shapes: list[Shape]) -> Iterator[Record]:
    first, *others = shapes
    model, facts = bench.fit(first)
    reference = bench.features(model)
    compared = [(f"another {NAMES[first.mixing]}", *bench.fit(others[0]))]
    compared += [(NAMES[shape.mixing], *bench.fit(shape)) for shape in others[1:]]
    compared += [("MLP-Mixer, untrained", bench.untrained(first), {"error": None})]
    for name, other, other_facts in compared:
        for layer, (x, y) in enumerate(zip(reference, bench.features(other), strict=True), start=1):
            errors = {"error": facts["error"], "other_error": other_facts["error"]}
            yield {"against": name, "layer": layer, "cka": cka(x, y), "seed": first.seed, **errors}


class _Bench:
    """The data of a study in memory, and the training of one shape on it."""

    def __init__(self, study: Study, processes: Processes) -> None:
        self.study, self.processes = study, processes
        rows = load_images(study.data, study.recipe.data, "train", study.cache)
        held_back, batch_size = study.recipe.data.held_back, study.recipe.train.batch_size
        images = study.images or len(rows) - held_back
        if held_back < 1 or not batch_size <= images <= len(rows) - held_back:
            asked = f"--images {study.images}" if study.images else f"data.held_back = {held_back}"
            raise DimmixError(
                f"{asked}: {len(rows)} training rows, {held_back} of them held back, must leave so many, "
                f"and a batch takes {batch_size}",
                exit_code=2,
            )
        self.classes = len(rows.names)
        self.training, self.held_out = self._batches(rows[:images]), self._batches(rows[-held_back:])

    def fit(self, shape: Shape) -> tuple[WideMixer, Record]:
        """The shape trained by the study's recipe (its EMA), with its error on the held-back rows, in percent."""
        learner, started = self._learner(shape), time.monotonic()
        recipe, loss = learner.recipe, torch.tensor(0.0)
        size, steps = recipe.train.batch_size, len(self.training) // recipe.train.batch_size
        torch.manual_seed(shape.seed)
        for epoch in range(recipe.schedule.epochs):
            strong = epoch < recipe.schedule.epochs - recipe.augment.plain_epochs
            order = torch.randperm(len(self.training)).to(learner.device)
            for at in range(steps):
                rows = order[at * size : (at + 1) * size]
                loss = learner.update(*self.training.augmented(rows, strong), epoch * steps + at)
            if not math.isfinite(loss.item()):
                raise DimmixError(f"{recipe.path}: the loss of {shape} is {loss.item()}; lower optimizer.lr")
        with learner.autocast():
            logits, labels = predict(learner.best, self.held_out)
        error = 100 * (logits.argmax(1) != labels).float().mean().item()
        seconds = time.monotonic() - started
        facts = {"error": error, "loss": loss.item(), "epochs": recipe.schedule.epochs, "images": len(self.training)}
        return cast(WideMixer, learner.best), facts | {"seconds": round(seconds, 1)}

    def untrained(self, shape: Shape) -> WideMixer:
        """The shape as `fit` begins with it."""
        return cast(WideMixer, self._learner(shape).best)

    @torch.inference_mode()
    def features(self, model: WideMixer, images: int = 512) -> list[Tensor]:
        """What each block gives for the first held-back rows, (images, S * C)."""
        rows = torch.arange(min(images, len(self.held_out)), device=self.held_out.labels.device)
        x, _ = self.held_out.plain(rows)
        taps = cast(list[Tensor], model.eval().forward_intermediates(x, intermediates_only=True))
        return [tap.flatten(1).float() for tap in taps]

    def _learner(self, shape: Shape) -> Learner:
        recipe = self.study.recipe
        recipe = replace(recipe, model=shape.model(recipe.model), train=replace(recipe.train, seed=shape.seed))
        return Learner(recipe, self.classes, len(self.training) // recipe.train.batch_size, self.processes)

    def _batches(self, images: Images) -> Batches:
        recipe = self.study.recipe
        return Batches(images, recipe.augment, recipe.data.mean, recipe.data.std, self.processes.device)


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same images, (N, p) and (N, q); 1 when alike.

    Kornblith et al., arXiv 1905.00414, section 3.
    """
    grams = []
    for features in (x, y):
        centred = features.double() - features.double().mean(0)
        grams.append(centred @ centred.T)
    a, b = grams
    return ((a * b).sum() / (a.norm() * b.norm())).item()


def _operators(model: WideMixer) -> Iterator[WideOperator]:
    for block in model.blocks:
        yield from (layer.operator for layer in effective_mlp(block).layers)


def _largest_norm(model: WideMixer) -> float:
    """The mean over the Linears of the largest singular value of their effective weight."""
    norms = [operator.spectral_norm() for operator in _operators(model)]
    return sum(norms) / len(norms)


class _Store:
    """Records on disk, each with what was asked for."""

    BEGINNING = '{"asked": '

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()  # so that a folder that cannot be written to is known before the training
            entries = list(self._entries(path.read_text(encoding="utf-8").splitlines()))
            self.found = {json.dumps(entry["asked"], sort_keys=True): entry["records"] for entry in entries}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DimmixError(
                f"{path}: cannot keep a study's results ({error}); name another folder with --out"
            ) from None

    def get(self, asked: Record) -> list[Record]:
        return self.found.get(json.dumps(asked, sort_keys=True), [])

    def put(self, asked: Record, records: list[Record]) -> list[Record]:
        self._append(f"{json.dumps({'asked': asked, 'records': records})}\n")
        return records

    def _entries(self, lines: list[str]) -> Iterator[Any]:
        """What lines hold, without those that a stop has torn."""
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                if not line.startswith(self.BEGINNING[: len(line)]):
                    raise

    def _append(self, line: str) -> None:
        """To what is there by then, in a line of its own: studies may run side by side."""
        with self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else f"\n{line}"
            file.write(line.encode())


def _costs() -> Iterator[Record]:
    """The paper's table for S 64, C 48, 3 layers, gamma 2: stored bytes, multiply-adds, time of a step of 64 images."""
    import timm

    for name, mask in (("sw_mlp_mixer", True), ("sw_mlp_mixer", False), ("rp_mixer", False), ("wide_mixer", False)):
        model = timm.create_model(f"{name}_c48_32", num_classes=10)
        if mask:
            densify(model)
        stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        label = {"sw_mlp_mixer": "SW-MLP", "rp_mixer": "RP-Mixer", "wide_mixer": "MLP-Mixer"}[name]
        yield {
            "model": f"{label}, dense mask" if mask else label,
            "megabytes": stored / 1e6,
            "mmacs": count_macs(model, (3, 32, 32)) / 1e6,
            "step_ms": 1e3 * _step_seconds(model),
            "threads": torch.get_num_threads(),
        }


class _FeaturesFirst(nn.Linear):
    """A Linear in the layout of a SparseLinear."""

    def forward(self, x: Tensor) -> Tensor:
        """(in_features, rows) -> (out_features, rows)."""
        return super().forward(x.t()).t()


def densify(model: nn.Module) -> None:
    """Store every SparseLinear of `model` as the paper does: a dense weight and a mask of its size."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, SparseLinear):
                with torch.no_grad():
                    weight = MaskedOperator(layer).matvec(torch.eye(layer.in_features)).T.contiguous()
                linear = _FeaturesFirst(layer.in_features, layer.out_features, device="meta")
                linear.weight, linear.bias = nn.Parameter(weight), layer.bias
                parent.add_module(name, prune.custom_from_mask(linear, "weight", weight != 0))


def _step_seconds(model: nn.Module, batch: int = 64) -> float:
    """Of forward, backward and an SGD step, the fastest of a few."""
    x, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % 10
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    seconds = []
    for _ in range(STEPS_TIMED):
        started = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
