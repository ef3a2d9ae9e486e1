"""What one step changes: the model, its EMA and the optimisers, with the loss and the teacher that drive them."""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from dimmix.checkpoints import Card, find
from dimmix.checkpoints.lookup import find_card
from dimmix.datasets import normalized
from dimmix.errors import DimmixError, first_line
from dimmix.pretrained import create_model as create_pretrained

from . import teacher as _registers_the_teacher  # noqa: F401
from .augment import Batches
from .grouped import train_groups_densely
from .optim import build_optimizers, build_schedulers
from .processes import Processes
from .recipe import Model, Recipe
from .state import load_optimizer_tensors, optimizer_tensors

EMA_WARMUP_POWER = 0.75  # decay at step t is at most 1 - t ** -0.75, so that the start is forgotten quickly


class Learner:
    """A model in training; the same recipe and seed give the same learner."""

    def __init__(self, recipe: Recipe, classes: int, steps_per_epoch: int, processes: Processes) -> None:
        self.recipe, self.device = recipe, processes.device
        torch.manual_seed(recipe.train.seed)
        self.model = self._place(build_model(recipe.start, classes, recipe.path))
        check_size(self.model, recipe)
        check_output(self.model, classes, recipe, self.device)
        self.ema = ModelEmaV3(self.model, decay=recipe.train.ema_decay, use_warmup=True, warmup_power=EMA_WARMUP_POWER)
        self.optimizers = build_optimizers(self.model, recipe.optimizer)
        self.schedulers = build_schedulers(self.optimizers, recipe.schedule, steps_per_epoch)
        self.teacher = self._place(load_teacher(recipe, classes)) if recipe.teacher else None
        train_groups_densely(self.model, self.device)
        wrapped = processes.wrap(self.model)
        self.forward = torch.compile(wrapped) if recipe.train.compile else wrapped
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    @property
    def best(self) -> nn.Module:
        """The model that is evaluated and kept: the EMA."""
        return self.ema.module

    @property
    def architecture(self) -> str:
        """What timm calls the model without a tag: a recipe may name a checkpoint to start from, or one on the Hub."""
        return getattr(self.model, "pretrained_cfg", {}).get("architecture") or self.recipe.model.name

    @property
    def lr(self) -> float:
        """The recipe's learning rate at the last step, without the factor of block weights."""
        group = self.optimizers[0].param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    def update(self, x: Tensor, target: Tensor, step: int, taught: Tensor | None = None) -> Tensor:
        """One step on images x (B, 3, H, W) and labels (B,) or probabilities (B, classes); the loss, a scalar.

        `taught`, logits (B, classes), are the teacher's, for a recipe with one.
        """
        for scheduler in self.schedulers:
            scheduler.step_update(step)
        loss = self._backward(x, target, taught)
        if self.recipe.optimizer.clip_grad:
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimizer.clip_grad)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.model, step=step + 1)
        return loss

    @torch.inference_mode()
    def teach(self, x: Tensor) -> Tensor:
        """The teacher's logits of x."""
        assert self.teacher is not None
        with self.autocast():
            return self.teacher(x).float()

    def _backward(self, x: Tensor, target: Tensor, taught: Tensor | None) -> Tensor:
        """Gradients of the mean loss over the batch, in parts of `micro_batch` images that a CPU's cache can hold."""
        size = self.recipe.train.micro_batch or len(x)
        total = torch.zeros((), device=x.device)
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            with self.autocast():
                logits = self.forward(x[part])
            loss = self._loss(logits.float(), target[part], None if taught is None else taught[part])
            loss = loss * (len(logits) / len(x))
            loss.backward()
            total += loss.detach()
        return total

    def _loss(self, logits: Tensor, target: Tensor, taught: Tensor | None) -> Tensor:
        loss = F.cross_entropy(logits, target, label_smoothing=self.recipe.loss.label_smoothing)
        teacher = self.recipe.teacher
        if teacher is None or taught is None:
            return loss
        t = teacher.temperature
        divergence = F.kl_div(
            F.log_softmax(logits / t, 1), F.log_softmax(taught / t, 1), reduction="batchmean", log_target=True
        )
        return (1 - teacher.alpha) * loss + teacher.alpha * t * t * divergence

    @contextmanager
    def autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.train.precision == "bf16"):
            yield

    def tensors(self) -> dict[str, Tensor]:
        """Everything that steps change, for `state.write_state`."""
        model = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        ema = {f"ema.{key}": value for key, value in self.best.state_dict().items()}
        return model | ema | optimizer_tensors(self.optimizers)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name, module in (("model.", self.model), ("ema.", self.best)):
            module.load_state_dict({k.removeprefix(name): t for k, t in tensors.items() if k.startswith(name)})
        load_optimizer_tensors(self.optimizers, tensors)

    def _place(self, model: nn.Module) -> nn.Module:
        model = model.to(self.device)
        return model.to(memory_format=torch.channels_last) if self.recipe.train.channels_last else model


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Batches, batch_size: int = 500, images: int | None = None
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) in float32 and labels (N,) of a whole set, on the CPU, under the caller's autocast.

    With `images`, of the first so many, if there are.
    """
    model.eval()
    logits, labels = [], []
    count = min(len(batches), images or len(batches))
    for rows in torch.arange(count, device=batches.labels.device).split(batch_size):
        x, target = batches.plain(rows)
        logits.append(model(x).float().cpu())
        labels.append(target.cpu())
    return torch.cat(logits), torch.cat(labels)


def build_model(model: Model, classes: int, path: object) -> nn.Module:
    """The model with its weights, if it is to start from some: they come through `dimmix.checkpoints.find`."""
    args = dict(model.args)
    if not str(args.get("checkpoint_path", ".safetensors")).endswith(".safetensors"):
        raise DimmixError(f"{path}: model.args.checkpoint_path must be a .safetensors file", exit_code=2)
    create = create_pretrained if args.pop("pretrained", False) else timm.create_model
    try:
        if args.get("checkpoint_path"):
            args["checkpoint_path"] = str(find(Path(args["checkpoint_path"])))
        return create(model.name, num_classes=classes, **args)
    except DimmixError as error:
        raise DimmixError(f"{path}: model {model.name!r} with args {model.args}: {error}") from None
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise DimmixError(f"{path}: cannot make model {model.name!r} with args {model.args}: {reason}") from None


def check_size(model: nn.Module, recipe: Recipe) -> None:
    """Raises DimmixError where the model is made for images of another size than the recipe's."""
    cfg = getattr(model, "pretrained_cfg", {})
    size = recipe.model.args.get("img_size") or cfg.get("input_size", (0,))[-1]
    sides = set(size) if isinstance(size, list | tuple) else {size}
    if cfg.get("fixed_input_size") and sides != {recipe.data.image_size}:
        raise DimmixError(
            f"{recipe.path}: {recipe.model.name} takes images of {size} pixels, and data.image_size is "
            f"{recipe.data.image_size}; model.args.img_size makes it for others",
            exit_code=2,
        )


@torch.no_grad()
def check_output(model: nn.Module, classes: int, recipe: Recipe, device: torch.device) -> None:
    """Raises DimmixError where the model does not turn the recipe's images into a number for each class."""
    size = recipe.data.image_size
    try:
        shape = tuple(model.eval()(torch.zeros(2, 3, size, size, device=device)).shape)
    except Exception as error:  # timm's models raise whatever their layers do
        raise DimmixError(
            f"{recipe.path}: {recipe.model.name} does not run: {first_line(error)}", exit_code=2
        ) from None
    if shape != (2, classes):
        raise DimmixError(
            f"{recipe.path}: {recipe.model.name} gives {shape[1:]} for an image of {classes} classes", exit_code=2
        )
    model.train()


def load_teacher(recipe: Recipe, classes: int) -> nn.Module:
    """The recipe's teacher, frozen in evaluation mode, with its weights."""
    assert recipe.teacher
    teacher = recipe.teacher
    try:
        path = find(recipe.teacher_weights)
    except DimmixError as error:
        raise DimmixError(f"{recipe.path}: teacher.weights: {error}") from None
    model = build_model(Model(teacher.name, teacher.args), classes, f"{recipe.path}, [teacher]")
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise DimmixError(f"{path}: not weights of the teacher {teacher.name}: {str(error).splitlines()[1]}") from None
    return model.eval().requires_grad_(False)


def check_teacher(recipe: Recipe, names: Sequence[str]) -> None:
    """Raises DimmixError where the teacher's card says that its logits are of other classes, or in another order."""
    card = Card.beside(find(recipe.teacher_weights)) if recipe.teacher else None
    if card is None or any(all(name.isdecimal() for name in known) for known in (names, card.labels)):
        return  # where classes have no names
    others = [f"{a!r}, not {b!r}" for a, b in zip(card.labels, names, strict=False) if normalized(a) != normalized(b)]
    if others or len(card.labels) != len(names):
        what = next(iter(others), f"{len(card.labels)}, not {len(names)}")
        raise DimmixError(f"{recipe.path}: teacher.weights know other classes than the images: {what}", exit_code=2)


def who_know_every_row(recipe: Recipe) -> list[str]:
    """Those whose cards say that they have learnt from the rows which `--split val` holds back."""
    known = {}
    if recipe.teacher:
        known["the teacher"] = Card.beside(find(recipe.teacher_weights))
    start = recipe.start.args.get("checkpoint_path")
    known["the checkpoint to start from"] = Card.beside(Path(start)) if start else find_card(recipe.started_from)
    return [
        who
        for who, card in known.items()
        if card and card.dataset == recipe.data.name and (card.split != "val" or card.images < recipe.data.held_back)
    ]
