"""Plain references: each mixing layer from its definition, index by index, with no view and no batched product."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dimmix.butterfly import ButterflySchedule, Level


def level_matrix(level: Level, blocks: Tensor, width: int = 1) -> Tensor:
    """The matrix of a block-diagonal `blocks` (blocks * width, a, a) acting on the groups of `level`.

    Dimension p carries `width` features from p * width on; feature k of each forms blocks of its own.
    """
    n = level.groups * level.radix * level.stride
    matrix = torch.zeros(n * width, n * width, dtype=blocks.dtype)
    members = level.members()  # in the order (group, offset); width runs inside the offset
    for b, dims in enumerate(members):
        for k in range(width):
            block = blocks[b * width + k]
            for i, p in enumerate(dims):
                for j, q in enumerate(dims):
                    matrix[p * width + k, q * width + k] = block[i, j]
    return matrix


def block_mlp(x: Tensor, level: Level, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """(n,) -> (n,): an MLP of its own on each group of `level`."""
    y = torch.empty_like(x)
    for b, dims in enumerate(level.members()):
        y[dims] = w2[b] @ F.gelu(w1[b] @ x[dims] + b1[b]) + b2[b]
    return y


def attention(x: Tensor, level: Level, qkv: torch.nn.Linear, proj: torch.nn.Linear, heads: int) -> Tensor:
    """(N, C) -> (N, C): softmax attention of every token over the tokens of its group."""
    N, C = x.shape
    q, k, v = (part.view(N, heads, C // heads) for part in qkv(x).chunk(3, dim=-1))
    y = torch.empty_like(q)
    for dims in level.members():
        for h in range(heads):
            scores = q[dims, h] @ k[dims, h].T / (C // heads) ** 0.5
            y[dims, h] = scores.softmax(-1) @ v[dims, h]
    return proj(y.reshape(N, C))


def reach(schedule: ButterflySchedule, levels: int) -> Tensor:
    """(n, n) counts of paths from input to output after the first `levels` levels."""
    paths = torch.eye(schedule.n, dtype=torch.float64)
    for level in schedule.levels[:levels]:
        paths = level_matrix(level, torch.ones(level.blocks, level.radix, level.radix, dtype=torch.float64)) @ paths
    return paths
