"""A picture of what a prediction rests on: for each layer which patches reach it, and a heat map over the image."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .classifier import Classifier, Prediction, softmax
from .errors import DimmixError
from .files import replacing
from .report import new_figure
from .trunk import Trunk


@dataclass(frozen=True)
class LayerReach:
    """How much the score moves with each position of a layer's output.

    `sensitivity` is the norm over channels of the score's gradient, float32 (rows, columns); `reaching` the share of
    positions for which it is not zero.
    """

    layer: str
    sensitivity: np.ndarray
    reaching: float


@dataclass(frozen=True)
class Explanation:
    """Of one image: `image` is uint8 (H, W, C), the input as the model sees it, `heat` a Grad-CAM of it.

    The heat is float32 (H, W) in 0..1.
    """

    prediction: Prediction
    image: np.ndarray
    layers: list[LayerReach]
    heat: np.ndarray


def explain(classifier: Classifier, image: Any, index: int | None = None) -> Explanation:
    """Explains the class `index`, by default the likeliest one (Grad-CAM: arXiv 1610.02391).

    Raises:
        DimmixError: an image that cannot be read, a model that is not one of ours, no such class, or logits that are
            not finite.
    """
    model = getattr(classifier.runtime, "model", None)
    if not isinstance(model, Trunk):
        raise DimmixError(f"{classifier.name}: only a model of dimmix, not a file, can be explained", exit_code=2)
    if index is not None and not 0 <= index < len(classifier.labels):
        raise DimmixError(f"{classifier.name} has {len(classifier.labels)} classes, and no class {index}", exit_code=2)
    if not classifier.labels:
        raise DimmixError(f"{classifier.name} has no classifier, and so nothing to explain", exit_code=2)
    crop = classifier.prepare(image)
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in model.blocks]
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has set
        pixels = torch.from_numpy(classifier.to_batch([crop]))
        try:
            logits = model(pixels.to(next(model.parameters()).device).requires_grad_())
        finally:
            for hook in hooks:
                hook.remove()
        index = int(logits.argmax()) if index is None else index
        gradients = torch.autograd.grad(logits[0, index], outputs)
    maps = [_to_map(model, gradient) for gradient in gradients]
    layers = [
        LayerReach(f"blocks.{i}", gradient.norm(dim=0).cpu().numpy(), float((gradient != 0).any(0).float().mean()))
        for i, gradient in enumerate(maps)
    ]
    heat = _grad_cam(_to_map(model, outputs[-1].detach()), maps[-1], pixels.shape[-2:])
    score = float(softmax(logits[0].detach().cpu().numpy(), classifier.name)[index])
    prediction = Prediction(classifier.labels[index], index, score)
    return Explanation(prediction, _shown(crop), layers, heat)


def _shown(crop: np.ndarray) -> np.ndarray:
    """What `prepare` returned as (H, W, C); of an image that came transformed each channel's range is spread."""
    if crop.dtype == np.uint8:
        return crop
    crop = np.moveaxis(crop, 0, -1)
    low, high = crop.min((0, 1)), crop.max((0, 1))
    return (255 * (crop - low) / np.maximum(high - low, 1e-12)).astype(np.uint8)


def _to_map(model: Trunk, features: torch.Tensor) -> torch.Tensor:
    """A block's output or its gradient as (C, rows, columns)."""
    return model.to_map(model.leave(features))[0]


def _grad_cam(features: torch.Tensor, gradient: torch.Tensor, size: torch.Size) -> np.ndarray:
    heat = (gradient.mean((1, 2), keepdim=True) * features).sum(0).relu()
    heat = F.interpolate(heat[None, None], size, mode="bilinear")[0, 0]
    return (heat / heat.max().clamp_min(1e-12)).cpu().numpy()


def draw(explanation: Explanation, path: Path) -> None:
    """Writes the picture: the image, the heat map over it, and each layer's sensitivity.

    Raises:
        DimmixError: matplotlib is not installed, or the file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".webp"):
        raise DimmixError(f"{path}: the picture is a .png, .jpg, .webp, .pdf or .svg file", exit_code=2)
    columns = 6
    panels = 2 + len(explanation.layers)
    figure = new_figure((2.1 * columns, 2.3 * -(-panels // columns)), "the picture", "eval")
    grid = figure.subplots(-(-panels // columns), columns, squeeze=False).flat
    for axes in grid:
        axes.axis("off")
    image = explanation.image.squeeze()
    grid[0].imshow(image, cmap="gray")
    grid[0].set_title("input", fontsize=9)
    grid[1].imshow(image, cmap="gray")
    grid[1].imshow(explanation.heat, cmap="jet", alpha=0.45)
    grid[1].set_title(f"{explanation.prediction.label} {explanation.prediction.score:.0%}", fontsize=9)
    for axes, layer in zip(grid[2:panels], explanation.layers, strict=True):
        axes.imshow(layer.sensitivity, cmap="magma", vmin=0)
        axes.set_title(f"{layer.layer}: {layer.reaching:.0%} reach", fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary)
