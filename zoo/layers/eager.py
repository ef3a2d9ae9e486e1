"""Whether a fast path that depends on the numbers' place, and not on the function, may be taken."""

import torch
from torch import Tensor


@torch.jit.unused
def runs_eagerly(x: Tensor) -> bool:
    """Inference on a CPU that nobody traces, compiles or differentiates."""
    return not (
        isinstance(x, torch.fx.Proxy)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.device.type != "cpu"
    )
