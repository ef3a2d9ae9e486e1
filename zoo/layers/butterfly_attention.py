"""Butterfly Attention: self-attention inside the strided groups of one butterfly level."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..butterfly import Level
from . import native
from .eager import is_idle, on_cpu_untraced, part
from .native_branches import ATTENTION, Branch
from .permute import Permute
from .pointwise import Linear, beats_a_product, by_kernel, is_as_built, pointwise, step_of

SMALL_GROUP, SMALL_GROUP_BF16 = 64, 256
"""Up to so many tokens in a group, training on a CPU keeps the scores, and bfloat16 does so in inference too: the fused
kernel takes two to six times as long in bfloat16 (docs/performance.md), and the scores of such groups are few. Exports
keep them up to the second."""


class ButterflyAttention(nn.Module):
    """Multi-head self-attention in which a token attends to the `radix` tokens of its group alone.

    Layout: q, k and v come contiguous, (B, N, C) each, from one batched product or three. Token index (group, i,
    offset) then folds as (B * groups, radix, stride * heads, head_dim): the offset joins the heads, so every level,
    whatever its stride, is one 4-D view and stays on the fast kernels of scaled_dot_product_attention. Cost: N * radix
    instead of N * N. (Dimension Mixer, section 4.2.) `radix = N` is ordinary attention.

    Args:
        dim: channels C.
        level: a level of a schedule over N tokens.
        num_heads: must divide `dim`.
        qkv_bias: learn a bias for q, k and v.
        proj_drop: dropout after the output projection.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    as_onnx_operator = False
    """Whether an export may use ONNX's operator for attention, which opsets below 23 do not have."""

    def __init__(
        self,
        dim: int,
        level: Level,
        num_heads: int = 8,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.set_level(level)

    def set_level(self, level: Level) -> None:
        """Attend within the groups of another level, as when the number of tokens changes; no weight depends on it."""
        self.level = (level.groups, level.radix, level.stride)
        self.radix, self.fold = level.radix, level.stride * self.num_heads
        device = next(self.parameters()).device
        self.permute = None if level.order is None else Permute(list(level.order), dim=1, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C).

        Raises:
            ValueError: N is not a multiple of radix * stride.
        """
        B, N, C = x.shape
        if not torch.jit.is_scripting():
            self._check(N)
        if self.permute is not None:
            x = self.permute(x)
        q, k, v = self.queries_keys_values(x.reshape(B * N, C))
        x = self.attend(q, k, v).view(B, N, C)
        if self.permute is not None:
            x = self.permute.undo(x)
        return self.proj_drop(self.proj(x))

    @torch.jit.unused
    def _check(self, tokens: int) -> None:
        """Raises ValueError for groups that would reach into the next image; what is traced goes unchecked."""
        if isinstance(tokens, torch.fx.Proxy | Tensor) or torch.compiler.is_exporting():
            return
        if tokens % (self.radix * self.level[2]):
            raise ValueError(f"{tokens} tokens are no groups of {self.radix} that lie {self.level[2]} apart")

    @torch.jit.unused
    def branch(self, norm: native.Norm | None) -> Branch | None:
        """x + self(norm(x)) for `native_branches`, or None where a part has to be called."""
        if type(self) is not ButterflyAttention or self.permute is not None or self.radix > native.LONGEST:
            return None
        if not is_idle(part(self, "proj_drop")):
            return None
        first, last = step_of(part(self, "qkv")), step_of(part(self, "proj"))
        if first is None or last is None:
            return None
        return Branch(ATTENTION, norm, (first, last), (self.radix, self.level[2], self.num_heads))

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B * N, C) -> three of that shape, each contiguous, but for `native.attend`."""
        if not torch.jit.is_scripting():  # an `if` of its own, or TorchScript would read the next one  # noqa: SIM102
            if not is_as_built(self.qkv):  # an adapter, a parametrised map
                q, k, v = (part.contiguous() for part in self.qkv(x).chunk(3, -1))
                return q, k, v
        weight, bias = self.qkv.weight, self.qkv.bias
        if not torch.jit.is_scripting():
            if self.radix <= native.LONGEST:
                y = by_kernel(self.qkv, x)
                if y is not None:
                    q, k, v = y.chunk(3, -1)
                    return q, k, v
            if torch.compiler.is_exporting():
                return _in_thirds(F.linear, x, weight, bias)  # in ONNX the product of all three is three copies of x
            if beats_a_product(x):
                return _in_thirds(pointwise, x, weight, bias)
        weight = weight.view(3, -1, x.shape[1]).transpose(1, 2)
        tokens = x.unsqueeze(0).expand(3, -1, -1)
        if bias is None:
            q, k, v = torch.bmm(tokens, weight).unbind(0)
        else:
            q, k, v = torch.baddbmm(bias.view(3, 1, -1), tokens, weight).unbind(0)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k and v of every token, (B * N, C) -> what each token attends to, (B * N, C)."""
        shape = q.shape
        if not torch.jit.is_scripting():  # an `if` of its own, or TorchScript would read the next one
            if self.radix <= native.LONGEST and native.takes(q) and q.dtype == k.dtype == v.dtype:
                return native.attend(q, k, v, self.radix, self.level[2], self.num_heads)
            if self.as_onnx_operator and torch.compiler.is_exporting() and self.radix <= SMALL_GROUP:
                return self._attend_in_onnx(q, k, v)
        q, k, v = self.fold_groups(q), self.fold_groups(k), self.fold_groups(v)
        if not torch.jit.is_scripting():
            if torch.compiler.is_exporting() and self.radix <= SMALL_GROUP_BF16:
                # What ONNX makes of the fused kernel works out shapes as it runs, and turns the keys twice.
                return ((q @ k.mT * self.head_dim**-0.5).softmax(-1) @ v).transpose(1, 2).reshape(shape)
            if _keeps_scores(q, self.radix):
                return _attend_by_products(q, k, v).transpose(1, 2).reshape(shape)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(shape)

    @torch.jit.unused
    def _attend_in_onnx(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ONNX's own operator, which needs no tensor turned: of groups, tokens and heads it makes what it likes."""
        q, k, v = (x.view(-1, self.radix, self.fold * self.head_dim) for x in (q, k, v))
        y = torch.onnx.ops.attention(q, k, v, q_num_heads=self.fold, kv_num_heads=self.fold)[0]
        return y.reshape(-1, self.num_heads * self.head_dim)

    def fold_groups(self, x: Tensor) -> Tensor:
        """(B * N, C) -> (B * groups, stride * heads, radix, head_dim), a view."""
        return x.view(-1, self.radix, self.fold, self.head_dim).transpose(1, 2)

    def extra_repr(self) -> str:
        return "groups={}, radix={}, stride={}, ".format(*self.level) + f"num_heads={self.num_heads}"


@torch.jit.unused
def _keeps_scores(q: Tensor, group: int) -> bool:
    if not on_cpu_untraced(q):  # before anything is asked of a traced value
        return False
    if q.dtype == torch.bfloat16:
        return group <= SMALL_GROUP_BF16
    return torch.is_grad_enabled() and group <= SMALL_GROUP


@torch.jit.unused
def _in_thirds(
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, C) by each third of a weight (3 * C, C) and of its bias."""
    C = x.shape[1]
    q, k, v = (linear(x, weight[i : i + C], None if bias is None else bias[i : i + C]) for i in (0, C, 2 * C))
    return q, k, v


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (..., radix, head_dim) as two batched products with the scores in memory."""
    shape = q.shape
    q, k, v = (x.reshape(-1, *shape[-2:]) for x in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(1), q, k.transpose(1, 2), beta=0, alpha=shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v).view(shape)
