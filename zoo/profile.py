"""What a model costs: multiply-accumulates and memory of one forward pass."""

import os
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .layers import native


def count_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """Multiply-accumulates of `model` for one input of `input_size` (C, H, W): matrix products and convolutions.

    Biases, norms, activations and poolings are not counted. Every module is left in the mode it was in.
    """
    return macs_by_module(model, input_size)[""]


@torch.no_grad()
def macs_by_module(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, int]:
    """`count_macs` for each module by its name within `model`, whose own name is ""; those without any are left out."""
    modes = {module: module.training for module in model.modules()}
    weight = next(model.parameters())
    # The fused attention kernels have no count on every backend; the plain one is matrix products. Our own kernels take
    # several modules at once.
    try:
        with native.switched_off(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model.eval()(torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype))
    finally:
        for module, training in modes.items():
            module.training = training
    root = type(model).__name__
    counts = {name: sum(operators.values()) // 2 for name, operators in counter.get_flop_counts().items()}
    inner = {name.removeprefix(f"{root}."): macs for name, macs in counts.items() if name.startswith(f"{root}.")}
    return {"": counter.get_total_flops() // 2} | inner


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of CPU tensors that existed at once during `call`, beyond those there were before.

    Counted by torch's allocator, so the same every time; what another library allocates is not seen.
    """
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler greets on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak
