"""Checkpoint cards: one JSON file beside each weight file, the single source of what is said about it.

README, MODEL_CARD.md, `dimmix list`, `dimmix info` and timm's `default_cfgs` are all made from these cards.
"""

import dataclasses
import functools
import json
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, Self

from dimmix.files import write_atomically

from .errors import CheckpointError

FOLDER = Path(__file__).parent
# Arguments of timm.create_model that say where weights come from, or what the card says elsewhere.
NOT_MODEL_ARGS = frozenset(
    ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "num_classes")
)


@dataclasses.dataclass(frozen=True)
class Card:
    """What a checkpoint is, how it was trained and what it reached on the held-out split.

    `size` is in bytes, `dtype` a torch name (`"float32"`), `macs` multiply-accumulates for one image, `input_size`
    `(C, H, W)`; `top1`, `top5` and `per_class_accuracy` are in percent, the last None for a class without images, `nll`
    in nats, `ece` a fraction; `papers` are arXiv ids. `model_args` are the keyword arguments in which the model differs
    from its architecture's own; the bundled ones have none. `started_from` is the checkpoint that training began with,
    so that `epochs` and `train_minutes` come on top of its own; empty for random weights.
    """

    architecture: str
    tag: str
    file: str
    sha256: str
    size: int
    dtype: str
    params: int
    macs: int
    input_size: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    labels: tuple[str, ...]
    dataset: str
    split: str
    images: int
    top1: float
    top5: float
    nll: float
    ece: float
    per_class_accuracy: tuple[float | None, ...]
    seed: int
    epochs: int
    teacher: str | None
    recipe: str
    command: str
    commit: str
    hardware: str
    versions: dict[str, str]
    train_minutes: float
    images_per_second: float
    licence: str
    papers: tuple[str, ...]
    notes: str
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    started_from: str = dataclasses.field(default_factory=str)

    @property
    def name(self) -> str:
        """`architecture.tag`, the name timm knows the checkpoint by."""
        return f"{self.architecture}.{self.tag}"

    @property
    def path(self) -> Path:
        """Where the weights of a bundled card lie, if this installation has them."""
        return FOLDER / self.file

    @property
    def hub_id(self) -> str:
        """The checkpoint's repository on the Hub; `DIMMIX_HUB_NAMESPACE` replaces `dimmix`."""
        return hub_id(self.name)

    def pretrained_cfg(self) -> dict[str, Any]:
        """Keyword arguments for timm's `PretrainedCfg`."""
        return {
            "hf_hub_id": self.hub_id,
            "input_size": self.input_size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "num_classes": len(self.labels),
            "label_names": self.labels,
            "license": self.licence.lower(),  # as the Hub has them
            "paper_ids": tuple(f"arXiv:{paper}" for paper in self.papers),
        }

    def to_json(self) -> str:
        """The card as the text of its file."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Write the card to `path`, which holds either the old or the whole new card at any moment."""
        write_atomically(path, self.to_json().encode())

    @classmethod
    def beside(cls, weights: Path) -> Self | None:
        """The card beside a file of weights, `NAME.json`, if there is one. Raises CheckpointError as `read` does."""
        path = weights.with_suffix(".json")
        return cls.read(path) if path.is_file() else None

    @classmethod
    def read(cls, path: Path) -> Self:
        """The card in `path`.

        Raises:
            CheckpointError: the file cannot be read, or a key is missing, unknown or of the wrong type.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read the card {path}: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"the card {path} is not a JSON object")
        kinds = typing.get_type_hints(cls)
        optional = {field.name for field in dataclasses.fields(cls) if field.default_factory is not dataclasses.MISSING}
        if wrong := sorted((kinds.keys() - optional) - values.keys() | values.keys() - kinds.keys()):
            state = "lacks" if wrong[0] in kinds else "has the unknown key"
            raise CheckpointError(f"the card {path} {state} {wrong[0]!r}")
        for key, kind in kinds.items():
            if key not in values:
                continue
            try:
                values[key] = _convert(values[key], kind)
            except TypeError:
                raise CheckpointError(f"the card {path}: {key!r} is {values[key]!r}, which is not {kind}") from None
        card = cls(**values)
        if not re.fullmatch(r"[0-9a-f]{64}", card.sha256):
            raise CheckpointError(f"the card {path}: sha256 {card.sha256!r} is not 64 lower-case hexadecimal digits")
        if Path(card.file).name != card.file or not card.file.endswith(".safetensors"):
            raise CheckpointError(f"the card {path}: file {card.file!r} must be a .safetensors file beside the card")
        if held := NOT_MODEL_ARGS & card.model_args.keys():
            raise CheckpointError(f"the card {path}: model_args must not hold {min(held)!r}")
        return card


def _convert(value: Any, kind: Any) -> Any:
    """`value` as read from JSON turned into a field's type; TypeError when it is something else."""
    if kind is Any:
        return value
    arguments = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return None if value is None else _convert(value, arguments[0])
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_convert(item, arguments[0]) for item in value)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {key: _convert(item, arguments[1]) for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def namespace() -> str:
    """The user or organisation on the Hub whose checkpoints are meant: `DIMMIX_HUB_NAMESPACE`, else `dimmix`."""
    return os.environ.get("DIMMIX_HUB_NAMESPACE") or "dimmix"


def hub_id(name: str) -> str:
    """The Hub repository that holds the checkpoint `name` (`architecture.tag`)."""
    return f"{namespace()}/{name}"


def cards() -> dict[str, Card]:
    """The cards that come with the package by name, ordered by architecture and tag."""
    return dict(_read_folder(FOLDER))


@functools.cache
def _read_folder(folder: Path) -> dict[str, Card]:
    found = [Card.read(path) for path in folder.glob("*.json")]
    return {card.name: card for card in sorted(found, key=lambda card: (card.architecture, card.tag))}
