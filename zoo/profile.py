"""What a model costs: multiply-accumulates of one forward pass."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Multiply-accumulates of `model` for one input of `input_size` (C, H, W): matrix products and convolutions.

    Biases, norms, activations and poolings are not counted. The model is left in the mode it was in.
    """
    return macs_by_module(model, input_size)[""]


@torch.no_grad()
def macs_by_module(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, int]:
    """`count_macs` for each module by its name within `model`, whose own name is ""; those without any are left out."""
    training = model.training
    weight = next(model.parameters())
    # The fused attention kernels have no count on every backend; the plain one is matrix products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval()(torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype))
    model.train(training)
    root = type(model).__name__
    counts = {name: sum(operators.values()) // 2 for name, operators in counter.get_flop_counts().items()}
    inner = {name.removeprefix(f"{root}."): macs for name, macs in counts.items() if name.startswith(f"{root}.")}
    return {"": counter.get_total_flops() // 2} | inner
