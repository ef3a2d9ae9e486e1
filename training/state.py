"""State of a run on disk: one safetensors file, tensors beside a JSON header, replaced whole.

Random numbers need no state: every draw of a step comes from a generator seeded by (seed, rank) and step.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dimmix.errors import DimmixError
from dimmix.files import write_atomically


def write_state(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `tensors` and the JSON-able `facts`; `path` holds the old or the new state at any moment."""
    plain = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    write_atomically(path, save(plain, {"dimmix": json.dumps(facts)}))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote. Raises DimmixError for a file that is not such a state."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["dimmix"])
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise DimmixError(f"{path}: not a run's state ({error}); --restart begins the run anew") from None


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimisers' per-parameter tensors as `optimizer.<i>.<parameter>.<key>`. Groups follow from the recipe."""
    return {
        f"optimizer.{i}.{index}.{key}": value
        for i, optimizer in enumerate(optimizers)
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if value is not None
    }


def load_optimizer_tensors(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Undo `optimizer_tensors`, each tensor in its parameter's memory layout, which fused updates rely on."""
    for i, optimizer in enumerate(optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            prefix = f"optimizer.{i}.{index}."
            for name in [key for key in tensors if key.startswith(prefix)]:
                value, key = tensors[name], name.removeprefix(prefix)
                if value.shape == parameter.shape:
                    value = torch.empty_like(parameter, requires_grad=False).copy_(value)
                else:  # the count of steps, which fused updates want beside the parameter
                    value = value.to(parameter.device)
                optimizer.state[parameter][key] = value
