"""`dimmix export`: a model to a file that runs elsewhere, verified before it gets its name."""

import math
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dimmix.errors import DimmixError
from dimmix.files import refuse_existing, refuse_same

from .options import (
    CheckpointOption,
    Format,
    FormatOption,
    ImageColumnOption,
    LabelColumnOption,
    QuietOption,
    SplitOption,
)
from .progress import ProgressBar
from .sink import Record, Sink, note

if TYPE_CHECKING:
    import numpy as np

    from dimmix.datasets import LabelledImages
    from dimmix.runtime import Spec

COMPARED_IMAGES = 16
"""So many at a time are preprocessed, and a file that is not int8 is compared with the model on no more."""

MEASURED_IMAGES = 2048
"""At most so many images of --data are read."""


class Kind(StrEnum):
    """What to export to."""

    onnx = "onnx"
    pt2 = "pt2"
    safetensors = "safetensors"
    timm_dir = "timm-dir"


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="NAME[.tag], hf-hub:org/name or local-dir:PATH.")],
    to: Annotated[Kind, typer.Option("--to", help="onnx, pt2 (torch.export), safetensors, or a folder for timm.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write. Default: the model's name, here.")
    ] = None,
    checkpoint: CheckpointOption = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Quantize ONNX: static for convolutions, else dynamic, which saves size alone."),
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="Images to compare on, as for eval; --int8 needs them to calibrate.")
    ] = None,
    split: SplitOption = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    atol: Annotated[
        float | None,
        typer.Option("--atol", min=0, help="Largest difference of a logit or feature. Default: 1e-4; int8: 2."),
    ] = None,
    format: FormatOption = Format.auto,
    quiet: QuietOption = False,
) -> None:
    """Write a model to a file with preprocessing, labels and (but for timm-dir) card, and compare it with the original.

    What differs by more than --atol is not kept, and the exit code is 1. `dimmix predict` and `dimmix eval` run the
    file: --model FILE. ONNX and torch.export files give `logits` and the pooled `features` by name.

    \b
    Examples:
      dimmix export butterfly_resnet20_convmix_w32.cifar10 --to onnx
      dimmix export butterfly_resnet_fast_32.cifar10 --to onnx --int8 --data photos/ -o small.onnx
      dimmix predict photo.png --model butterfly_resnet20_convmix_w32.cifar10.onnx
    """
    if int8 and (to is not Kind.onnx or data is None):
        raise DimmixError("--int8 goes with --to onnx and --data, images to calibrate on", exit_code=2)
    if atol is not None and not math.isfinite(atol):
        raise DimmixError(f"--atol {atol}: needs a finite number", exit_code=2)
    refuse_same({"--output": output}, [checkpoint, model, data])
    if data is None and (split or image_column or label_column):
        raise DimmixError("--split, --image-column and --label-column go with --data", exit_code=2)
    import logging

    from dimmix.datasets import open_dataset
    from dimmix.export import SUFFIXES, export_model, readable, sample_dataset
    from dimmix.runtime import load_model

    logging.getLogger().setLevel(logging.ERROR)  # the quantizer's advice is for who calls it, not for who calls us
    path = output or refuse_existing(Path(model.rstrip("/").rpartition("/")[2].rpartition(":")[2] + SUFFIXES[to]))
    network, spec = load_model(model, checkpoint=checkpoint)
    if path.suffix != SUFFIXES[to] and to is not Kind.timm_dir:
        raise DimmixError(f"--output {path}: a file of --to {to} ends in {SUFFIXES[to]}", exit_code=2)
    if to is Kind.safetensors and path.with_suffix(".json").is_file():
        raise DimmixError(f"--output {path}: a card of other weights lies beside; choose another folder", exit_code=2)
    dataset = None
    if data is not None:
        found = open_dataset(data, split=split, image_column=image_column, label_column=label_column)
        drawn = sample_dataset(found, MEASURED_IMAGES, ProgressBar("images read", found.length, quiet=quiet).track)
        dataset, broken = readable(drawn, spec.preprocess, None if int8 else COMPARED_IMAGES)
        if broken and not dataset.length:
            raise broken[0]
        for error in broken:
            note(str(error))
    tolerance = atol if atol is not None else 2.0 if int8 else 1e-4
    record: Record = {"model": model, "to": str(to)}
    if int8 and dataset is not None:
        record |= _export_int8(network, spec, path, dataset, tolerance, quiet)
    else:
        with ProgressBar("exported", 1, quiet=quiet).shown():
            written = export_model(network, spec, to, path, _some_images(spec, dataset), atol=tolerance)
        record |= {"file": str(path), "bytes": written.size, "max_difference": written.difference, "atol": tolerance}
    with Sink(format, single=True) as sink:
        sink.write(record)
    note(f"wrote {path}", quiet)


def _export_int8(network: Any, spec: "Spec", path: Path, dataset: "LabelledImages", atol: float, quiet: bool) -> Record:
    import torch

    from dimmix.export import export_model, split_dataset, top1
    from dimmix.runtime import TorchRuntime, load_runtime

    calibration, rest = split_dataset(dataset)
    batches = [_some_images(spec, calibration, start) for start in range(0, calibration.length or 0, COMPARED_IMAGES)]
    if not batches:
        raise DimmixError(f"--data {dataset.name}: too few images to calibrate on", exit_code=2)
    sample = _some_images(spec, rest)
    before = ProgressBar("images, before", rest.length, quiet=quiet).track
    top1_before = top1(TorchRuntime(network, spec, torch.device("cpu")), rest, before)
    bar = ProgressBar("calibration batches", len(batches), quiet=quiet)
    with bar.shown():
        written = export_model(network, spec, "onnx", path, sample, atol=atol, calibration=bar.count(batches))
    top1_after = top1(load_runtime(str(path)), rest, ProgressBar("images, after", rest.length, quiet=quiet).track)
    return {
        "file": str(path),
        "bytes": written.size,
        "max_difference": written.difference,
        "atol": atol,
        "images": rest.length,
        "top1_before": top1_before,
        "top1_after": top1_after,
    }


def _some_images(spec: "Spec", dataset: "LabelledImages | None", start: int = 0) -> "np.ndarray":
    """Up to sixteen preprocessed images from `start` on: of the data, or those that come with the package."""
    import itertools

    import numpy as np

    from dimmix.images import sample_images
    from dimmix.preprocess import crop_image

    found: Iterable[Any] = sample_images() if dataset is None else (sample.image for sample in dataset)
    images = list(itertools.islice(found, start, start + COMPARED_IMAGES))
    if not images:
        raise DimmixError(f"--data {dataset.name if dataset else ''}: no images in it", exit_code=2)
    while len(images) < 7:
        images += images
    return np.stack([spec.preprocess.normalize(crop_image(image, spec.preprocess)) for image in images])
