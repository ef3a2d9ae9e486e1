"""Linear maps of many rows as 1x1 convolutions, which a CPU can run twice as fast.

torch on x86 gives matrix products in float32 to MKL, which on an AMD processor has half of the speed of oneDNN, where
convolutions go; and a convolution in groups beats a batch of small products (docs/performance.md). So in eager
inference rows of features, (rows, n), are read as images of 4x4 pixels with n channels, in the channels_last format,
which is the same memory. Elsewhere, or of few rows, a product stays a product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import native
from .eager import is_hooked, parameter, runs_eagerly

SIDE = 4
FEWEST_ROWS = 256
"""Of fewer, the start of a convolution costs more than it saves; and one thread runs 16 images or more by oneDNN."""


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., n) -> (..., m), contiguous, by a weight (m, n)."""
    return to_rows(F.conv2d(to_pixels(x), weight[:, :, None, None], bias)).view(*x.shape[:-1], len(weight))


@torch.jit.unused
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., n) -> (..., m) by a weight (m, n), by torch's faster way."""
    return pointwise(x, weight, bias) if beats_a_product(x) else F.linear(x, weight, bias)


def to_pixels(x: Tensor) -> Tensor:
    """(..., n) -> (images, n, 4, 4) in the channels_last format, a view of a contiguous x."""
    return x.reshape(-1, SIDE, SIDE, x.shape[-1]).permute(0, 3, 1, 2)


def to_rows(x: Tensor) -> Tensor:
    """(images, n, 4, 4) -> (rows, n), contiguous, a view of an x in the channels_last format."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


@torch.jit.unused
def folds_into_pixels(x: Tensor) -> bool:
    """Whether x, (..., n), is whole images by `to_pixels`, and enough of them for oneDNN."""
    if not runs_eagerly(x) or not torch.backends.mkldnn.is_available():
        return False
    rows = x.shape[:-1].numel()
    return x.dtype in (torch.float32, torch.bfloat16) and rows >= FEWEST_ROWS and rows % SIDE**2 == 0


@torch.jit.unused
def beats_a_product(x: Tensor) -> bool:
    """Whether `pointwise` is faster than a dense product: one that would go to MKL. In bfloat16 both go to oneDNN."""
    if not folds_into_pixels(x) or not torch.backends.mkl.is_available():
        return False
    return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


@torch.jit.unused
def is_as_built(linear: nn.Module) -> bool:
    """Whether a Linear is as it was built: nothing in its place and no hook on it, so that its weights say all."""
    return type(linear) in (nn.Linear, Linear) and not is_hooked(linear)


@torch.jit.unused
def step_of(linear: nn.Module) -> native.Step | None:
    """A Linear for `native.mix`, or None where it has to be called."""
    return _step(parameter(linear, "weight"), parameter(linear, "bias")) if is_as_built(linear) else None


@torch.jit.unused
def _step(weight: Tensor | None, bias: Tensor | None) -> native.Step | None:
    if weight is None:
        return None
    step = native.Step(1, 1, weight.shape[1], weight.shape[0], weight, bias)
    return step if native.fits(step) else None


@torch.jit.unused
def by_kernel(linear: nn.Linear, x: Tensor) -> Tensor | None:
    """What `linear.forward` gives, by our own kernel, or None where it does not apply."""
    step = _step(linear.weight, linear.bias) if native.takes(x) else None
    if step is None:
        return None
    return native.mix(x.reshape(-1, x.shape[-1]).t(), [step], True).view(*x.shape[:-1], step.outer)


class Linear(nn.Linear):
    """`nn.Linear` that takes the faster way."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not torch.jit.is_scripting():
            y = by_kernel(self, x)
            return linear(x, self.weight, self.bias) if y is None else y
        return F.linear(x, self.weight, self.bias)
