"""How quickly the command line answers, against what it cannot go below; paired in one run.

    python benchmarks/cli.py [--rounds 5] [--images 5000] [--out docs/benchmarks/cli.json]

Start-up: `dimmix --help`, `dimmix predict` of one image against `import torch, timm`, and of an ONNX file. Throughput:
`predict` on small JPEG files against the model alone at the same batch size and against decoding alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--model", default=None, help="an architecture; the best bundled checkpoint if not given")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/cli.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = {
            "cores": os.cpu_count(),
            "python": sys.version.split()[0],
            "rounds": arguments.rounds,
            **start_up(Path(folder), arguments.model, arguments.rounds),
            **throughput(Path(folder), arguments.model, arguments.images, arguments.rounds),
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def start_up(folder: Path, model: str | None, rounds: int) -> dict[str, Any]:
    """Median seconds of processes that take turns."""
    from dimmix.images import sample_images

    image = folder / "photo.png"
    sample_images()[3].save(image)
    exported = folder / "model.onnx"
    name, weights = weights_of(model, folder)
    dimmix = [sys.executable, "-m", "dimmix_cli"]
    export = [*dimmix, "export", name, *weights, "--to", "onnx", "-o", exported, "-q"]
    subprocess.run(export, check=True, stdout=subprocess.DEVNULL)
    commands: dict[str, list[Any]] = {
        "help": [*dimmix, "--help"],
        "import_torch_timm": [sys.executable, "-c", "import torch, timm"],
        "predict": [*dimmix, "predict", image, "--model", name, *weights],
        "predict_onnx": [*dimmix, "predict", image, "--model", exported],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):  # the first round fills the caches
        for key, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[key].append(time.perf_counter() - start)
    medians = {f"{key}_seconds": statistics.median(values[1:]) for key, values in times.items()}
    ratio = medians["predict_seconds"] / medians["import_torch_timm_seconds"]
    return {**medians, "predict_over_import": ratio}


def throughput(folder: Path, model: str | None, images: int, rounds: int) -> dict[str, Any]:
    """Images a second of the whole, the model alone and decoding alone; medians of rounds that take turns."""
    import numpy as np

    from dimmix import Classifier
    from dimmix.allocator import keep_freed_memory
    from dimmix.images import sample_images
    from dimmix.stream import load_batches

    keep_freed_memory()  # as the command line does
    name, weights = weights_of(model, folder)
    classifier = Classifier(name, "cpu", weights[1] if weights else None)
    photos = folder / "photos"
    photos.mkdir()
    samples = sample_images()
    for number in range(images):
        samples[number % len(samples)].save(photos / f"{number:05d}.jpg", quality=90)
    paths = sorted(photos.iterdir())
    batch = np.zeros((BATCH, *classifier.runtime.spec.preprocess.input_size), np.float32)

    def whole() -> None:
        for _ in classifier.stream(paths, batch_size=BATCH):
            pass

    def model_alone() -> None:
        for start in range(0, images, BATCH):
            classifier.runtime.logits(batch[: images - start])

    def decoding_alone() -> None:
        for _ in load_batches(paths, classifier.prepare, BATCH):
            pass

    runs = {"predict": whole, "model_alone": model_alone, "decoding_alone": decoding_alone}
    rates: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            rates[key].append(images / (time.perf_counter() - start))
    medians = {f"{key}_images_per_second": statistics.median(values) for key, values in rates.items()}
    bound = min(medians["model_alone_images_per_second"], medians["decoding_alone_images_per_second"])
    share = medians["predict_images_per_second"] / bound
    return {"model": classifier.name, "images": images, "batch_size": BATCH, **medians, "predict_over_bound": share}


def weights_of(model: str | None, folder: Path) -> tuple[str, list[Any]]:
    """A model's name and the options for its weights: bundled ones, or random ones, which take the same time."""
    from dimmix.checkpoints import cards
    from dimmix.classifier import default_model

    if model is None:
        return default_model(), []
    if model in cards():
        return model, []
    import safetensors.torch
    import timm

    path = folder / "random.safetensors"
    if not path.exists():
        safetensors.torch.save_file(timm.create_model(model).state_dict(), path)
    return model, ["--checkpoint", path]


if __name__ == "__main__":
    main()
