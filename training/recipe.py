"""Recipes: one TOML file a checkpoint, as frozen dataclasses; a mistake names file, key and what is allowed."""

import difflib
import json
import math
import tomllib
import types
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dimmix.data_cfg import CIFAR10_MEAN, CIFAR10_STD
from dimmix.errors import DimmixError


@dataclass(frozen=True)
class Model:
    name: str  # what timm.create_model knows: an architecture, or with `pretrained = true` in args a checkpoint
    args: dict[str, Any] = field(default_factory=dict)  # keyword arguments of timm.create_model


@dataclass(frozen=True)
class Data:
    name: str  # the folder of Parquet shards under --data
    label: str = ""  # the label column; needed only where the schema names several
    image_size: int = 32
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD
    held_back: int = 5000  # last training rows, which `--split val` evaluates on


@dataclass(frozen=True)
class Augment:
    flip: bool = True
    crop: int = 4  # pixels of padding on each side before a crop at a random place
    crop_fill: Literal["reflect", "zero"] = "reflect"
    geometry: float = 0.0  # 1.0: rotation to 30 degrees, shear to 0.3, scale to 1.3, each for half of the images
    color: float = 0.0  # 1.0: brightness, contrast, saturation from 0 to 2, each for half of the images
    cutout: int = 0  # side in pixels of one blank square an image
    cutout_probability: float = 1.0
    mixup: float = 0.0  # alpha of Beta(alpha, alpha)
    cutmix: float = 0.0  # with mixup too, each image gets one of the two
    mix_probability: float = 1.0
    plain_epochs: int = 0  # last epochs with flip and crop alone


@dataclass(frozen=True)
class Optimizer:
    name: Literal["sgd", "adamw", "muon"]
    lr: float
    weight_decay: float = 0.0  # of matrices and kernels; biases, norms and the model's no_weight_decay() have none
    momentum: float = 0.9  # SGD (Nesterov) and Muon
    betas: tuple[float, ...] = (0.9, 0.999)  # AdamW, and what Muon leaves to it
    adamw_lr: float = 1e-3  # of what Muon leaves to AdamW: vectors, first and last layer
    block_lr_mult: float | Literal["auto"] = (
        1.0  # of block factors and of convolutions in groups; "auto": d_in_dense / (d_in_block * n_factors)
    )
    clip_grad: float = 0.0  # largest norm of the gradient; 0: no clipping


@dataclass(frozen=True)
class Schedule:
    epochs: int
    name: Literal["cosine", "one-cycle"] = "cosine"  # fall after the linear warm-up: half a cosine, or a line
    warmup_epochs: float = 0.0
    final_lr: float = 0.0  # what the fall ends at, as a fraction of the peak


@dataclass(frozen=True)
class Loss:
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Teacher:
    name: str
    weights: str  # a .safetensors file, seen from the recipe's folder or the current one, or a checkpoint's name
    args: dict[str, Any] = field(default_factory=dict)
    alpha: float = 0.5  # share of the distillation term
    temperature: float = 2.0
    views: int = 0  # augmentations of each image, used in turn, whose logits are kept; 0: a new one every epoch


@dataclass(frozen=True)
class Train:
    batch_size: int = 128  # over all processes together
    micro_batch: int = 0  # images a forward and backward pass, whose gradients add up to the batch; 0: all at once
    seed: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    channels_last: bool = False
    compile: bool = False
    ema_decay: float = 0.999  # 0: no EMA
    needs: str = ""  # what hardware the recipe asks for, in words


@dataclass(frozen=True)
class About:
    """Words for the checkpoint's card."""

    papers: tuple[str, ...] = ()  # arXiv ids
    notes: str = ""


@dataclass(frozen=True)
class Recipe:
    """One training run. `path` is where it was read; `to_json` leaves that out, so that equal runs compare equal."""

    path: Path
    model: Model
    data: Data
    optimizer: Optimizer
    schedule: Schedule
    augment: Augment = Augment()
    loss: Loss = Loss()
    train: Train = Train()
    about: About = About()
    teacher: Teacher | None = None

    @property
    def stem(self) -> str:
        """The file's name without `.toml`, for instance `butterfly_resnet20_convmix_w32.cifar10`."""
        return self.path.name.removesuffix(".toml")

    @property
    def tag(self) -> str:
        return self.stem.partition(".")[2] or self.data.name

    @property
    def shown_path(self) -> str:
        """The file as a card names it: seen from the current folder, or by its name alone where it lies outside."""
        path = self.path.absolute()
        return (path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)).as_posix()

    @property
    def started_from(self) -> str:
        """The checkpoint that training begins with, a file or folder by its name alone; empty for random weights."""
        local = self.model.args.get("checkpoint_path")
        if self.model.name.startswith("local-dir:"):
            local = self.model.name.removeprefix("local-dir:")
        return Path(local).name if local else self.model.name * bool(self.model.args.get("pretrained"))

    @property
    def teacher_weights(self) -> str:
        """What `dimmix.checkpoints.find` takes for the teacher's weights."""
        assert self.teacher
        return self.beside(self.teacher.weights)

    @property
    def start(self) -> Model:
        """The model with the file that it starts from, if it does, as it lies here."""
        file = self.model.args.get("checkpoint_path")
        args = {"checkpoint_path": self.beside(str(file))} if file else {}
        return replace(self.model, args=self.model.args | args)

    def beside(self, file: str) -> str:
        """A file that the recipe names, which may lie beside it."""
        beside = self.path.parent / file
        return str(beside.absolute()) if beside.is_file() else file

    def to_json(self) -> dict[str, Any]:
        tables = asdict(self)
        del tables["path"]
        return json.loads(json.dumps(tables))


Allowed = tuple[Callable[[float], bool], str]
_AT_LEAST_1: Allowed = (lambda value: value >= 1, "at least 1")
_AT_MOST_1: Allowed = (lambda value: value <= 1, "at most 1")
_BELOW_1: Allowed = (lambda value: value < 1, "less than 1")
_ABOVE_0: Allowed = (lambda value: value > 0, "more than 0")

RANGES: dict[str, Allowed] = {
    **dict.fromkeys(("schedule.epochs", "train.batch_size", "data.image_size"), _AT_LEAST_1),
    **dict.fromkeys(("loss.label_smoothing", "teacher.alpha", "schedule.final_lr"), _AT_MOST_1),
    **dict.fromkeys(("augment.cutout_probability", "augment.mix_probability"), _AT_MOST_1),
    **dict.fromkeys(("optimizer.momentum", "optimizer.betas", "train.ema_decay"), _BELOW_1),
    **dict.fromkeys(("optimizer.block_lr_mult", "teacher.temperature", "data.std"), _ABOVE_0),
    **dict.fromkeys(("augment.crop", "augment.cutout"), (lambda value: value <= 4096, "at most 4096")),
    "train.seed": (lambda value: value < 2**40, "less than 2^40"),
}
"""What a number must be beside not negative, which all are."""


def read_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """The recipe in the TOML file `path`, with `overrides` such as `"optimizer.lr=0.2"` applied.

    Raises DimmixError for a file that cannot be read, an unknown or missing key, a wrong type and a value not allowed.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DimmixError(f"{path}: cannot read the recipe ({error.strerror})", exit_code=2) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DimmixError(f"{path}: not a TOML file: {error}", exit_code=2) from None
    for override in overrides:
        _override(tables, override)
    return parse_recipe(tables, path)


def parse_recipe(tables: dict[str, Any], path: Path) -> Recipe:
    """As `read_recipe`, from tables already parsed; `path` is named in errors."""
    if "path" in tables:
        raise DimmixError(f"{path}: unknown key path", exit_code=2)
    recipe = _table(Recipe, tables | {"path": path}, path, "")
    for key, (allowed, words) in RANGES.items():
        table, name = key.split(".")
        value = getattr(getattr(recipe, table), name, None)
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(allowed(number) for number in numbers if isinstance(number, int | float)):
            raise DimmixError(f"{path}: {key} = {value!r} is not allowed; it must be {words}", exit_code=2)
    for key, count in (("data.mean", 3), ("data.std", 3), ("optimizer.betas", 2)):
        table, name = key.split(".")
        if len(getattr(getattr(recipe, table), name)) != count:
            raise DimmixError(f"{path}: {key} must have {count} numbers", exit_code=2)
    if Path(recipe.data.name).name != recipe.data.name or recipe.data.name in ("", ".."):
        raise DimmixError(
            f"{path}: data.name = {recipe.data.name!r} must be the name of a folder in --data, and no path", exit_code=2
        )
    if max(recipe.schedule.warmup_epochs, recipe.augment.plain_epochs) > recipe.schedule.epochs:
        raise DimmixError(
            f"{path}: schedule.warmup_epochs and augment.plain_epochs must be at most schedule.epochs, "
            f"{recipe.schedule.epochs}",
            exit_code=2,
        )
    if recipe.augment.crop_fill == "reflect" and recipe.augment.crop >= recipe.data.image_size:
        raise DimmixError(f'{path}: augment.crop must be less than data.image_size, or crop_fill = "zero"', exit_code=2)
    return recipe


def _override(tables: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2:
        raise DimmixError(f"--set {override}: write table.key=value, for instance optimizer.lr=0.2", exit_code=2)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for part in parts[:-1]:
        tables = tables.setdefault(part, {})
        if not isinstance(tables, dict):
            raise DimmixError(f"--set {override}: {part} is not a table", exit_code=2)
    tables[parts[-1]] = value


def _table(cls: Any, values: Any, path: Path, prefix: str) -> Any:
    """An instance of dataclass `cls` from a TOML table, checked key by key."""
    if not isinstance(values, dict):
        raise DimmixError(f"{path}: [{prefix.rstrip('.')}] must be a table, got {values!r}", exit_code=2)
    hints = get_type_hints(cls)
    known = [key for key in hints if key != "path"]
    for key in values.keys() - hints.keys():
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {prefix}{close[0]}? " if close else ""
        raise DimmixError(f"{path}: unknown key {prefix}{key}; {hint}allowed: {', '.join(known)}", exit_code=2)
    for spec in fields(cls):
        if spec.name not in values and spec.default is MISSING and spec.default_factory is MISSING:
            raise DimmixError(f"{path}: {prefix}{spec.name} is missing", exit_code=2)
    return cls(**{key: _value(hints[key], value, path, prefix + key) for key, value in values.items()})


def _value(hint: Any, value: Any, path: Path, key: str) -> Any:
    """`value` as the type `hint`; an integer may stand for a float, a list for a tuple, and null for None."""
    if hint is Path:
        return value
    options = get_args(hint) if isinstance(hint, types.UnionType) or get_origin(hint) is Union else (hint,)
    for option in options:
        if is_dataclass(option) and value is not None:
            return _table(option, value, path, f"{key}.")
        if get_origin(option) is Literal and value in get_args(option) and isinstance(value, str):
            return value
        if option is type(None) and value is None:
            return None
        if option is float and isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
            return float(value)
        if option is int and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if option in (bool, str) and isinstance(value, option):
            return value
        if get_origin(option) is dict and isinstance(value, dict):
            return dict(value)
        if get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(_value(get_args(option)[0], item, path, key) for item in value)
    raise DimmixError(f"{path}: {key} = {value!r} is not allowed; allowed: {_allowed(options)}", exit_code=2)


def _allowed(options: tuple[Any, ...]) -> str:
    words = {bool: "true or false", int: "a whole number >= 0", float: "a number >= 0", str: "a string"}
    listed = []
    for option in options:
        if get_origin(option) is Literal:
            listed += [f'"{choice}"' for choice in get_args(option)]
        elif get_origin(option) is tuple:
            listed.append("a list of strings" if get_args(option)[0] is str else "a list of numbers")
        elif option is not type(None):
            listed.append(words.get(option, "a table"))
    return ", ".join(listed)
