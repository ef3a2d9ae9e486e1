"""One way to run what maps a batch to logits: a timm model, an ONNX file or a torch.export archive.

Torch is imported only where it is needed: an ONNX file runs with onnxruntime and NumPy alone.
"""

import contextlib
import difflib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import DimmixError, first_line
from .preprocess import Preprocess

if TYPE_CHECKING:
    import torch

METADATA_KEY = "dimmix"
"""The metadata entry of an exported file that holds its `Spec` as JSON."""


@dataclass(frozen=True)
class Spec:
    """What a model needs beside its weights: preprocessing, labels (one a class) and its card, if it has one."""

    name: str
    preprocess: Preprocess
    labels: tuple[str, ...]
    card: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text that an exported file carries in its metadata."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, path: Path) -> "Spec":
        """The inverse of `to_json`, of the text in `path`. Raises DimmixError where that is another one's."""
        try:
            values = json.loads(text)
            preprocess = Preprocess.from_config(values["preprocess"])
            return cls(values["name"], preprocess, tuple(values["labels"]), dict(values["card"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DimmixError(
                f"{path}: its metadata are not those of an export ({type(error).__name__}: {error})"
            ) from None


class Runtime(Protocol):
    """Maps batches, float32 (B, C, H, W) arrays as `spec.preprocess` makes them, to float32 arrays."""

    spec: Spec

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """(B, classes)."""
        ...

    def embed(self, batch: np.ndarray) -> np.ndarray:
        """Pooled features before the classifier, (B, num_features)."""
        ...

    def lanes(self, batch_size: int) -> int:
        """How many parts of a batch run side by side at best; 1 where the runtime spreads a batch well itself."""
        ...

    def lane(self, lanes: int) -> Callable[[], None]:
        """What each thread calls first that is one of so many lanes."""
        ...


class TorchRuntime:
    """A timm model on one device."""

    def __init__(self, model: "torch.nn.Module", spec: Spec, device: "torch.device", amp: bool = False) -> None:
        self.model, self.spec, self.device, self.amp = model.to(device), spec, device, amp

    def logits(self, batch: np.ndarray) -> np.ndarray:
        logits = self._run(self.model, batch)
        if logits.ndim != 2:
            raise DimmixError(f"{self.spec.name} gives {logits.shape[1:]} numbers for an image, not one for each class")
        return logits

    def embed(self, batch: np.ndarray) -> np.ndarray:
        model: Any = self.model
        return self._run(lambda x: model.forward_head(model.forward_features(x), pre_logits=True), batch)

    def lanes(self, batch_size: int) -> int:
        import torch

        if self.device.type != "cpu":
            return 1
        # With OMP_PROC_BIND this thread may have one core of torch's, and a lane started from it would have the same.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else torch.get_num_threads()
        # Eight images a lane: in smaller parts a core spends its time between the layers.
        return max(1, min(8, cores, torch.get_num_threads(), batch_size // 8))

    def lane(self, lanes: int) -> Callable[[], None]:
        import torch

        threads = torch.get_num_threads()

        def start() -> None:
            torch.set_num_threads(threads // lanes)
            torch.get_num_threads()  # a new thread's first question fixes what it was told: that is, now

        return start

    def _run(self, function: Any, batch: np.ndarray) -> np.ndarray:
        import torch

        autocast = torch.autocast(self.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext()
        with torch.inference_mode(), autocast:
            return function(torch.from_numpy(batch).to(self.device)).float().cpu().numpy()


class Pt2Runtime(TorchRuntime):
    """The module of a torch.export archive, whose outputs have names."""

    def logits(self, batch: np.ndarray) -> np.ndarray:
        return self._run(lambda x: self.model(x)["logits"], batch)

    def embed(self, batch: np.ndarray) -> np.ndarray:
        return self._run(lambda x: self.model(x)["features"], batch)


def load_runtime(
    name: str, *, device: str = "auto", checkpoint: str | Path | None = None, amp: bool = False
) -> Runtime:
    """What `name` names, ready to run.

    `name` is `architecture[.tag]`, `hf-hub:org/name`, `local-dir:PATH`, or an exported `.onnx` or `.pt2` file;
    `checkpoint` a `.safetensors` file of that architecture; `device` auto, cpu, cuda or mps; `amp` bfloat16 autocast.

    Raises:
        DimmixError: no such model, device or file, or weights that do not fit.
    """
    exported = Path(name)
    if exported.suffix in (".onnx", ".pt2"):
        if not exported.is_file():
            raise DimmixError(f"{name}: no such file")
        if checkpoint is not None:
            raise DimmixError(f"--checkpoint: {name} holds its own weights", exit_code=2)
    if exported.suffix == ".onnx":
        if amp:
            raise DimmixError(f"--amp: {name} keeps the types it was exported with", exit_code=2)
        from .onnx_runtime import OnnxRuntime

        return OnnxRuntime(exported, device)
    torch_device = resolve_device(device)
    if exported.suffix == ".pt2":
        return _load_pt2(exported, torch_device, amp)
    from .fuse import fuse

    model, spec = load_model(name, checkpoint=checkpoint)
    return TorchRuntime(fuse(model), spec, torch_device, amp)


def resolve_device(device: str) -> "torch.device":
    """The torch device that `auto`, `cpu`, `cuda` or `mps` means on this machine."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there.get(device.split(":")[0], False):
        there_now = ", ".join(kind for kind, yes in there.items() if yes)
        raise DimmixError(f"--device {device}: not on this machine, which has {there_now}", exit_code=2)
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise DimmixError(f"--device {device}: {first_line(error)}", exit_code=2) from None


def load_model(name: str, *, checkpoint: str | Path | None = None) -> "tuple[torch.nn.Module, Spec]":
    """A timm model with its pretrained weights, or those of a `.safetensors` file, in evaluation mode.

    Raises:
        DimmixError: no such model or file, or weights that do not fit.
    """
    if checkpoint is not None:
        return _load_checkpoint(name, Path(checkpoint))
    import timm

    from .checkpoints import cards
    from .checkpoints.lookup import card_beside
    from .pretrained import create_model

    architecture = name.partition(".")[0]
    if ":" not in name and not timm.is_model(architecture):
        raise _unknown_model(name)
    with _named_errors(name):
        model: Any = create_model(name).eval()
        cfg = model.pretrained_cfg
        if ":" in name:  # not the bundled card of the same name
            card = card_beside(name, Path(cfg["file"]))
        else:
            card = cards().get(f"{cfg.get('architecture')}.{cfg.get('tag')}")
        return model, model_spec(model, name, asdict(card) if card else {})


@contextlib.contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Whatever timm, the Hub's client or safetensors raise becomes one line about `name`."""
    try:
        yield
    except DimmixError:
        raise
    except Exception as error:
        if "Invalid pretrained tag" in str(error):
            raise _unknown_model(name) from None
        raise DimmixError(f"{name}: cannot be loaded ({first_line(error)})") from error


def describe_model(name: str, *, checkpoint: str | Path | None = None) -> "tuple[torch.nn.Module, Spec]":
    """As `load_model`, but an architecture that has no weights comes with random ones and no card."""
    import timm

    from .checkpoints import cards

    known = {card.architecture for card in cards().values()} | cards().keys()
    if checkpoint is not None or ":" in name or name in known or not timm.is_model(name):
        return load_model(name, checkpoint=checkpoint)
    with _named_errors(name):
        model = timm.create_model(name).eval()
        return model, model_spec(model, name, {})


def model_spec(model: Any, name: str, card: dict[str, Any]) -> Spec:
    """Preprocessing and labels of a timm model; classes without a name are called by their number."""
    import timm.data

    config = timm.data.resolve_model_data_config(model)
    names = _class_names(model.pretrained_cfg.get("label_names"), model.num_classes)
    if not names and model.num_classes == 1000:
        info = timm.data.ImageNetInfo()
        names = {str(index): info.index_to_description(index) for index in range(1000)}
    labels = tuple(names.get(str(index), str(index)) for index in range(model.num_classes))
    return Spec(name, Preprocess.from_config(config), labels, card)


def _class_names(label_names: Any, num_classes: int) -> dict[str, str]:
    """Names by the number of their class; none where they are of another head than the model's.

    timm's configs have a list or, where some have no name, a dict, whose numbers JSON has turned into strings.
    """
    if isinstance(label_names, list | tuple) and len(label_names) == num_classes:
        label_names = dict(enumerate(label_names))
    if not isinstance(label_names, dict):
        return {}
    return {str(index): str(name) for index, name in label_names.items()}


def _unknown_model(name: str) -> DimmixError:
    import timm

    from . import list_models
    from .checkpoints import cards

    ours = list_models()
    known = [*cards(), *ours, *timm.list_models()]
    close = list(dict.fromkeys(difflib.get_close_matches(name, known, n=3, cutoff=0.5)))
    hint = f"did you mean {' or '.join(close)}?" if close else "`dimmix list` shows the models"
    if name.endswith(".safetensors"):
        hint = "a file of weights is given as --checkpoint"
    if name.endswith((".onnx", ".pt2")):
        hint = "an exported file runs in predict, eval and benchmark alone, and has to be there"
    return DimmixError(f"unknown model {name!r}: {hint}", exit_code=2)


def _load_checkpoint(name: str, path: Path) -> "tuple[torch.nn.Module, Spec]":
    import safetensors.torch
    import timm
    import torch

    from .checkpoints import find
    from .checkpoints.card import NOT_MODEL_ARGS

    if not timm.is_model(name.partition(".")[0]):
        raise _unknown_model(name)
    path = find(path)
    cfg, card = _about_checkpoint(path)
    args = {key: value for key, value in card.get("model_args", {}).items() if key not in NOT_MODEL_ARGS}
    if card and card.get("architecture") != name.partition(".")[0]:
        raise DimmixError(f"{path}: weights of {card.get('architecture')}, not of {name}")  # their shapes may agree
    state = safetensors.torch.load_file(path)
    with _named_errors(name), torch.device("meta"):
        blank: Any = timm.create_model(name)
    classifier = blank.pretrained_cfg["classifier"]
    head = state.get(f"{classifier if isinstance(classifier, str) else classifier[0]}.weight")
    classes: dict[str, Any] = {} if head is None or head.ndim == 0 else {"num_classes": len(head)}
    with _named_errors(name):
        model = timm.create_model(name, pretrained_cfg_overlay=cfg or None, **args, **classes)
    expected = model.state_dict()
    wrong = [
        f"{key} is {_shape(state.get(key))}, expected {_shape(expected.get(key))}"
        for key in [*expected, *(key for key in state if key not in expected)]
        if _shape(state.get(key)) != _shape(expected.get(key))
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise DimmixError(f"{path}: the weights do not fit {name}: {wrong[0]}{more}")
    model.load_state_dict(state)
    with _named_errors(name):
        return model.eval(), model_spec(model, name, card)


def architecture_of(checkpoint: str | Path) -> str:
    """The architecture of a `.safetensors` file, by the card beside it or its own metadata.

    Raises:
        DimmixError: no such file, or nothing that names it.
    """
    from .checkpoints import find

    path = find(Path(checkpoint))
    _, card = _about_checkpoint(path)
    if "architecture" not in card:
        raise DimmixError(f"{path}: no card beside it names the architecture; name it as the model", exit_code=2)
    return str(card["architecture"])


def _about_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's pretrained cfg and the card, from the card beside a checkpoint or else from its own metadata."""
    import safetensors

    from .checkpoints import Card
    from .checkpoints.header import verify

    if card := Card.beside(path):
        verify(path, sha256=card.sha256)
        return card.pretrained_cfg(), asdict(card)
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        return {}, {}
    spec = Spec.from_json(metadata[METADATA_KEY], path)
    return {**asdict(spec.preprocess), "label_names": spec.labels, "num_classes": len(spec.labels)}, spec.card


def _shape(tensor: "torch.Tensor | None") -> str:
    return "missing" if tensor is None else "x".join(map(str, tensor.shape)) or "a scalar"


def _load_pt2(path: Path, device: "torch.device", amp: bool) -> Pt2Runtime:
    import torch

    from .pt2 import checked_archive

    archive = checked_archive(path)
    files = {METADATA_KEY: ""}
    try:
        program = torch.export.load(archive, extra_files=files)
    except Exception as error:
        raise DimmixError(f"{path}: not a torch.export archive ({first_line(error)})") from error
    if not files[METADATA_KEY] or len(program.graph_signature.user_outputs) != 2:
        raise DimmixError(f"{path}: no labels, preprocessing and features in it; make it with `dimmix export`")
    return Pt2Runtime(program.module(), Spec.from_json(files[METADATA_KEY], path), device, amp)
