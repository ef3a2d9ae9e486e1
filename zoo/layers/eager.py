"""Whether a fast path that depends on the numbers' place, and not on the function, may be taken."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


@torch.jit.unused
def runs_eagerly(x: Tensor) -> bool:
    """Inference on a CPU that nobody traces, compiles or differentiates."""
    return not torch.is_grad_enabled() and on_cpu_untraced(x)


@torch.jit.unused
def infers_on_cpu(x: Tensor) -> bool:
    """Inference on a CPU, eager or compiled, whose operators nobody writes down for elsewhere."""
    if torch.is_grad_enabled() or isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting():
        return False
    return not torch.jit.is_tracing() and x.device.type == "cpu"


@torch.jit.unused
def on_cpu_untraced(x: Tensor) -> bool:
    """A pass on a CPU, with or without gradients, that nobody traces or compiles."""
    return not (
        isinstance(x, torch.fx.Proxy)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.device.type != "cpu"
    )


@torch.jit.unused
def trains_eagerly(x: Tensor) -> bool:
    """A pass on a CPU for torch's own backward pass: nobody traces, compiles or transforms it."""
    return torch.is_grad_enabled() and on_cpu_untraced(x) and not is_transformed()


@torch.compiler.assume_constant_result  # torch.func guards what is compiled; for dual tensors there is `refuse_tangent`
def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation goes along, which `no_grad` does not switch off."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


@torch.jit.unused
def is_hooked(module: nn.Module) -> bool:
    """Whether something waits for calls of a module, stands in for its `forward`, or makes its weights in its call."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_pre_hooks or module._backward_hooks or "forward" in module.__dict__)


@torch.jit.unused
def all_are_hooked() -> bool:
    """Whether something waits for calls of any module, but for torch's tracker, which notes names alone."""
    if torch.compiler.is_compiling() or not torch.nn.modules.module._has_any_global_hook():
        return False
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    hooks = [hook for kind in kinds for hook in getattr(torch.nn.modules.module, f"_global_{kind}_hooks").values()]
    return any(getattr(hook, "__module__", "") != "torch.utils.module_tracker" for hook in hooks)


@torch.jit.unused
def part(module: nn.Module, name: str) -> Any:
    """A submodule by its name, several times as fast as an attribute of a module is found."""
    return module._modules[name]


@torch.jit.unused
def parameter(module: nn.Module, name: str) -> Any:
    """A parameter by its name, or None where there is none, as fast as `part`."""
    return module._parameters.get(name)


@torch.jit.unused
def is_idle(drop: nn.Module) -> bool:
    """Whether a dropout or stochastic depth, torch's or timm's, passes everything on and nobody watches it."""
    kind = type(drop)
    off = not drop.training and (kind is nn.Dropout or kind.__module__ == "timm.layers.drop")
    return (off or kind is nn.Identity) and not is_hooked(drop)
