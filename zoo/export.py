"""A model to a file that runs elsewhere: ONNX, torch.export, safetensors or a folder for timm.

Each file carries its preprocessing, labels and card in its metadata, and gets its name only after what was written has
been run against the model on real images.
"""

import copy
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .classifier import Classifier
from .datasets import LabelledImages, Sample
from .errors import DimmixError, first_line
from .evaluation import Track, evaluate
from .files import new_folder, replacing
from .fuse import convolve_levels, fuse, in_patches, merge_groups
from .images import ImageError
from .layers import ButterflyAttention
from .preprocess import Preprocess, crop_image
from .runtime import METADATA_KEY, Runtime, Spec, TorchRuntime, load_runtime

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "safetensors": ".safetensors", "timm-dir": ""}
"""The kinds of export with the suffix of their files."""

BATCHES = (1, 2, 7)
"""Every export is run at these batch sizes."""

ONNX_GROUP = 16
"""onnxruntime's fast convolutions take groups of whole vectors of 16 channels, smaller ones go by a slow way."""

ONNX_OPSET = 23
"""The first with an operator for attention; models without any keep to the exporter's, which older runtimes know."""

CALIBRATION_IMAGES = 128
"""At most so many images set the ranges of int8, and no more than a quarter of those given."""


@dataclass(frozen=True)
class Exported:
    """A written export: its size in bytes, and the largest difference of any logit or feature from the model's."""

    path: Path
    size: int
    difference: float


def export_model(
    model: torch.nn.Module,
    spec: Spec,
    kind: str,
    path: Path,
    images: np.ndarray,
    *,
    atol: float,
    calibration: Iterable[np.ndarray] | None = None,
) -> Exported:
    """Writes `model` as `kind` (`onnx`, `pt2`, `safetensors` or `timm-dir`) to `path` and verifies it.

    `images` are at least seven preprocessed ones, float32 (B, C, H, W), to compare on; with `calibration` batches an
    ONNX file becomes int8.

    Raises:
        DimmixError: the export failed, or a logit or feature is further than `atol` from the model's. `path` is then
            as it was.
    """
    model = copy.deepcopy(model).eval()  # the caller's keeps its mode and device
    reference = TorchRuntime(model, spec, torch.device("cpu"))
    writers: dict[str, Callable[[Path], None]] = {
        "onnx": partial(_write_onnx, model, spec, calibration=calibration),
        "pt2": partial(_write_pt2, model, spec),
        "safetensors": partial(_write_safetensors, model, spec),
        "timm-dir": partial(_write_timm_dir, model),
    }
    open_path = new_folder if kind == "timm-dir" else replacing
    with open_path(path) as temporary:
        try:
            writers[kind](temporary)
            difference = _largest_difference(reference, _reload(temporary, kind, model), images)
        except ModuleNotFoundError as error:
            raise DimmixError(f"the export to {kind} needs {error.name}: pip install 'dimmix[export]'") from None
        except Exception as error:  # exporters and runtimes each raise their own
            raise DimmixError(f"{spec.name}: the export to {kind} failed ({first_line(error)})") from error
        if not difference <= atol:
            raise DimmixError(f"{path}: it differs from the model by {difference:.2e}, more than --atol {atol:g}")
        size = sum(file.stat().st_size for file in [temporary, *temporary.glob("*")] if file.is_file())
    return Exported(path, size, difference)


def sample_dataset(dataset: LabelledImages, images: int, track: Track = lambda samples: samples) -> LabelledImages:
    """At most so many images of a data set, drawn evenly from all of it with a fixed seed, in one pass."""
    generator = random.Random(0)
    chosen: list[Sample] = []
    for number, sample in enumerate(track(dataset)):
        if number < images:
            chosen.append(sample)
        elif (place := generator.randrange(number + 1)) < images:
            chosen[place] = sample
    generator.shuffle(chosen)
    return replace(dataset, length=len(chosen), samples=lambda: iter(chosen))


def readable(
    dataset: LabelledImages, preprocess: Preprocess, most: int | None = None
) -> tuple[LabelledImages, list[ImageError]]:
    """The images of a small data set that can be read, or the first so many, and what is wrong with those between."""
    samples: list[Sample] = []
    broken = []
    for sample in dataset:
        if len(samples) == most:
            break
        try:
            crop_image(sample.image, preprocess)
            samples.append(sample)
        except ImageError as error:
            broken.append(ImageError(sample.source, error.reason))
    return replace(dataset, length=len(samples), samples=partial(iter, samples)), broken


def split_dataset(dataset: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """The images to calibrate on and the others, to measure on."""
    samples = list(dataset)
    count = min(CALIBRATION_IMAGES, len(samples) // 4)
    first, rest = (
        replace(dataset, length=len(part), samples=partial(iter, part)) for part in (samples[:count], samples[count:])
    )
    return first, rest


def top1(runtime: Runtime, dataset: LabelledImages, track: Track = lambda samples: samples) -> float:
    """Accuracy in percent."""
    return evaluate(Classifier.of(runtime), dataset, track=track).top1


def _largest_difference(reference: Runtime, exported: Runtime, images: np.ndarray) -> float:
    """Of any logit or feature, over batches of `BATCHES` images."""
    batches = [images[:size] for size in BATCHES]
    pairs = [(reference.logits(batch), exported.logits(batch)) for batch in batches]
    pairs += [(reference.embed(batch), exported.embed(batch)) for batch in batches]
    return float(np.max([np.abs(expected - found).max() for expected, found in pairs]))  # NaN where there is one


def _reload(path: Path, kind: str, model: Any) -> Runtime:
    """What was written, as a user would load it."""
    if kind == "safetensors":
        return load_runtime(model.pretrained_cfg["architecture"], device="cpu", checkpoint=path)
    return load_runtime(f"local-dir:{path}" if kind == "timm-dir" else str(path), device="cpu")


class _WithFeatures(torch.nn.Module):
    """A model that gives the pooled features too, which cost nothing: the logits are made of them."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model: Any = model.to(memory_format=torch.contiguous_format)  # which files of torch.export ask for

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.model.forward_features(images)
        return {"logits": self.model.forward_head(maps), "features": self.model.forward_head(maps, pre_logits=True)}


def _example(model: torch.nn.Module, preprocess: Preprocess) -> tuple[torch.Tensor]:
    return (torch.zeros(2, *preprocess.input_size, dtype=next(model.parameters()).dtype),)


def _write_pt2(model: torch.nn.Module, spec: Spec, path: Path) -> None:
    batch = {0: torch.export.Dim("batch", min=1, max=65536)}
    program = torch.export.export(
        _WithFeatures(in_patches(fuse(model))).eval(), _example(model, spec.preprocess), dynamic_shapes=(batch,)
    )
    program.example_inputs = None  # it would be stored as a pickle
    torch.export.save(program, path, extra_files={METADATA_KEY: spec.to_json()})


def _write_safetensors(model: torch.nn.Module, spec: Spec, path: Path) -> None:
    import safetensors.torch

    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, path, metadata={METADATA_KEY: spec.to_json(), "format": "pt"})


def _write_timm_dir(model: torch.nn.Module, path: Path) -> None:
    from timm.models import save_for_hf

    save_for_hf(model, str(path), safe_serialization=True)


def _write_onnx(
    model: torch.nn.Module, spec: Spec, path: Path, calibration: Iterable[np.ndarray] | None = None
) -> None:
    import onnx

    folded = fuse(model)
    attentions = [module for module in folded.modules() if isinstance(module, ButterflyAttention)]
    for attention in attentions:
        attention.as_onnx_operator = True
    if calibration is None:  # products are what int8 is quick with
        folded = convolve_levels(folded, ONNX_GROUP)
    torch.onnx.export(
        _WithFeatures(merge_groups(in_patches(folded), ONNX_GROUP)).eval(),
        _example(model, spec.preprocess),
        path,
        dynamo=True,
        external_data=False,
        input_names=["images"],
        output_names=["logits", "features"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65536)},),
        verbose=False,
        opset_version=ONNX_OPSET if attentions else None,
    )
    if calibration is not None:
        _quantize(path, model, calibration)
    written = onnx.load(path)
    onnx.helper.set_model_props(written, {METADATA_KEY: spec.to_json()})
    onnx.checker.check_model(written)
    onnx.save(written, path)


class _Calibration:
    """Hands the batches to onnxruntime's quantizer one by one."""

    def __init__(self, batches: Iterable[np.ndarray]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(({"images": batch} for batch in self._batches), None)


def _quantize(path: Path, model: torch.nn.Module, calibration: Iterable[np.ndarray]) -> None:
    """In place: static QDQ where convolutions hold most of the weights, else dynamic."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if is_convolutional(model):
        quant_pre_process(path, path, skip_symbolic_shape=True)
        quantization.quantize_static(
            path,
            path,
            _Calibration(calibration),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
        )
    else:
        written = onnx.load(path)
        del written.graph.value_info[:]  # the quantizer transposes weights and would find their old shapes here
        # ONNX's Attention it takes for an older operator of that name.
        attentions = [node.name for node in written.graph.node if node.op_type == "Attention"]
        quantization.quantize_dynamic(written, path, nodes_to_exclude=attentions)


def is_convolutional(model: torch.nn.Module) -> bool:
    """Whether convolutions hold most of the weights."""
    convolutions = (m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    weights = sum(parameter.numel() for parameter in model.parameters())
    return 2 * sum(conv.weight.numel() for conv in convolutions) > weights
