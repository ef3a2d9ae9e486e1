"""Publishing: the folder timm, transformers and this package load a checkpoint from, and its upload to the Hub."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from dimmix.errors import first_line
from dimmix.files import new_folder

from .card import Card
from .errors import CheckpointError
from .header import verify
from .hub import CARD, WEIGHTS, one_line
from .lookup import find, find_card, split_hub_name


def open_source(name: str) -> tuple[Card, Path]:
    """The card and the verified weights of a bundled checkpoint, or of a `.json` card with its weights beside it.

    Raises:
        CheckpointError: there is no such checkpoint or card, or the weights are not the card's.
    """
    if name.endswith((".json", ".safetensors")):
        card_path = Path(name).with_suffix(".json")
        card = Card.read(card_path)
        weights = find(card_path.with_name(card.file))
        verify(weights, sha256=card.sha256, dtype=card.dtype)
        return card, weights
    found = find_card(name)
    if found is None:
        raise CheckpointError(f"there is no checkpoint {name!r}; name a bundled one, or the .json card of yours")
    return found, find(found.name)


def write_folder(card: Card, weights: Path, folder: Path, repository: str | None = None) -> list[Path]:
    """Write everything a repository holds into the new or empty `folder`, load it back, and list its files.

    The folder appears complete or not at all. `repository` is what the README tells people to load.

    Raises:
        DimmixError: the folder holds something, cannot be written, or timm does not load back what was written; a
            name that no repository can have.
    """
    from huggingface_hub.utils import validate_repo_id

    if repository:
        with one_line(repository):
            validate_repo_id(repository)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as draft:
            shutil.copyfile(weights, draft / WEIGHTS)
            for name, text in _texts(card, repository or card.hub_id).items():
                (draft / name).write_text(text, encoding="utf-8")
            _load_back(draft)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error.strerror}") from error
    return sorted(folder.iterdir())


def upload(folder: Path, repository: str, card: Card, *, private: bool = False) -> str:
    """Upload a folder of `write_folder` in one commit, making the repository if it is new; the commit's address.

    Raises:
        CheckpointError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="dimmix")
    with one_line(repository):
        api.create_repo(repository, private=private or None, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Add {card.name}")
    return str(commit.commit_url)


def _texts(card: Card, repository: str) -> dict[str, str]:
    config = _config(card)
    processor = {"image_processor_type": "TimmWrapperImageProcessor", "architecture": card.architecture}
    processor["pretrained_cfg"] = config["pretrained_cfg"]
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "preprocessor_config.json": json.dumps(processor, indent=2) + "\n",
        CARD: dataclasses.replace(card, file=WEIGHTS).to_json(),
        "README.md": _readme(card, repository),
    }


def _config(card: Card) -> dict[str, Any]:
    """What timm and transformers build the model from: only arguments that differ from the architecture's own.

    `num_classes` must not be among `model_args`, because transformers passes it a second time.
    """
    from timm.models import is_model, resolve_pretrained_cfg

    if not is_model(card.architecture):
        raise CheckpointError(f"the card of {card.name} names an architecture that timm does not know")
    own = resolve_pretrained_cfg(card.architecture).to_dict(remove_source=True)
    cfg = {**own, **card.pretrained_cfg(), "tag": card.tag}
    for key in ("architecture", "hf_hub_id", "label_names"):
        cfg.pop(key, None)
    model_args = dict(card.model_args)
    if card.input_size[0] != own["input_size"][0]:
        model_args["in_chans"] = card.input_size[0]
    if own.get("fixed_input_size") and card.input_size[1:] != tuple(own["input_size"][1:]):
        model_args["img_size"] = list(card.input_size[1:])
    return {
        "architecture": card.architecture,
        "dtype": "float32",  # or transformers computes in the float16 that the file is stored in, slowly on a CPU
        "num_classes": len(card.labels),
        "label_names": card.labels,
        "model_args": model_args,
        "pretrained_cfg": cfg,
    }


def _load_back(folder: Path) -> None:
    """Fail unless timm builds the model from the folder with exactly the tensors of the file."""
    import safetensors.torch
    import timm
    import torch

    try:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    except Exception as error:  # timm raises whatever the architecture does
        raise CheckpointError(f"timm does not load what would be published: {first_line(error)}") from error
    saved = safetensors.torch.load_file(folder / WEIGHTS)
    different = saved.keys() ^ loaded.keys() or {key for key in saved if not torch.equal(saved[key], loaded[key])}
    if different:
        raise CheckpointError(f"timm loads {min(different)!r} differently from what would be published")


def _readme(card: Card, repository: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = "image-classification"
    result: dict[str, Any] = {"task_type": task, "dataset_type": card.dataset, "dataset_name": card.dataset}
    metrics = [("top-1 accuracy, %", card.top1), ("top-5 accuracy, %", card.top5)]
    metadata = ModelCardData(
        license=card.pretrained_cfg()["license"],
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "transformers", "dimmix", *(f"arxiv:{paper}" for paper in card.papers)],
        datasets=[card.dataset],
        base_model=_base_model(card),
        metrics=["accuracy"],
        model_name=card.name,
        eval_results=[
            EvalResult(**result, dataset_split=card.split, metric_type="accuracy", metric_name=name, metric_value=value)
            for name, value in metrics
        ],
    )
    rows = {
        "Measured on": f"{card.images:,} images of {card.dataset}, {card.split}",
        "Top-1, top-5": f"{card.top1:.2f} %, {card.top5:.2f} %",
        "NLL, ECE": f"{card.nll:.4f}, {card.ece:.4f}",
        "Parameters, MACs": f"{card.params:,}, {card.macs:,}",
        "Input": f"{' x '.join(map(str, card.input_size))}, {card.interpolation}",
        "Classes": ", ".join(card.labels) if len(card.labels) <= 20 else str(len(card.labels)),
        "Training": f"{card.epochs} epochs, seed {card.seed}, {card.train_minutes:.1f} minutes on {card.hardware}",
        "Started from": f"`{card.started_from}`" if card.started_from else "",
        "Command": f"`{card.command}`",
        "Papers": ", ".join(f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in card.papers),
        "sha256": f"`{card.sha256}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    return README.format(metadata=metadata.to_yaml(), card=card, table=table, repository=repository)


def _base_model(card: Card) -> str | None:
    """The repository of the checkpoint that training started from, where it has one."""
    start = find_card(card.started_from)
    if start is not None:
        return start.hub_id
    return split_hub_name(card.started_from)[0]


README = """---
{metadata}
---

# {card.name}

An image classifier of dimmix, structured-sparse vision models for timm.
{card.notes}

| | |
|---|---|
{table}

```python
import dimmix, timm  # pip install dimmix

model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()
```

```python
import dimmix
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{repository}")
model = AutoModelForImageClassification.from_pretrained("{repository}")
```
"""
