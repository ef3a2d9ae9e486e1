"""Wide Mixer: an MLP-Mixer seen, and built, as a very wide and sparse MLP.

Paper: Understanding MLP-Mixer as a Wide and Sparse MLP (arXiv 2306.01470). Tokens X, (S, C), written as one vector of
m = S * C features, a mixing layer is an MLP layer of width m with the sparse weight I_C kron W or V^T kron I_S
(`dimmix.wide` makes that weight). So S and C are chosen for width, not by the patch: a linear map of each patch makes
C channels, and the first token mixing goes from the patches S0 to S tokens, with LN(W~ X) as its skip. `order`:

  * "mlp_mixer": token MLP, then channel MLP, each S -> gamma S -> S or alike after a LayerNorm and with a skip;
  * "s_mixer": GELU(GELU(W X) V), one Linear for each axis, after one LayerNorm and with one skip; no expansion.

`mixing` says what mixes:

  * "mixer": the above;
  * "rp": the RP-Mixer, frozen random permutations of all m features around each MLP, a pair of its own for each;
  * "sparse": the SW-MLP, weights with a frozen random mask of as many connections instead, x + (M2 * W2) GELU((M1 * W1)
    LN x) in the first order and x + GELU((M * W) LN x) in the second. Only the connections are stored. Patch embedding
    and head are those of the mixer, so that the two differ in their mixing alone.

Differs from the paper: linear biases, and the mean over tokens and a last LayerNorm before the head, as MLP-Mixer has.
"""

import math
from typing import Any

import torch
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn

from .data_cfg import base_cfg
from .layers import Linear, Permute, SparseLinear, TokenStem, mlp_step, random_order
from .layers.eager import is_hooked, is_idle, part
from .layers.native import Norm
from .layers.native_branches import CHANNELS, TOKENS, Blocks, Branch, by_kernel, in_a_row, residual
from .pretrained import build
from .pretrained import default_cfgs as make_default_cfgs
from .registry import register_variants
from .trunk import Trunk, drop_path_rates
from .widths import mean_connections

ORDERS, MIXINGS = ("mlp_mixer", "s_mixer"), ("mixer", "rp", "sparse")


class Shuffle(nn.Module):
    """A frozen random permutation of all S * C features of an image."""

    def __init__(self, tokens: int, channels: int, seed: int, device=None) -> None:
        super().__init__()
        self.channels = channels
        self.permute = Permute(random_order(tokens * channels, seed), dim=1, persistent=True, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S, C)."""
        return self.permute(x.flatten(1)).unflatten(1, [-1, self.channels])


class AxisMlp(nn.Module):
    """An MLP along one axis of (B, S, C), the same for every position of the other, between two shuffles or none."""

    def __init__(self, mlp: nn.Sequential, tokens: bool, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.mlp, self.tokens, self.before, self.after = mlp, tokens, before, after

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S', C), S' the tokens that the MLP makes, or (B, S, C)."""
        x = self.before(x)
        if self.tokens:
            x = self.mlp(x.transpose(1, 2)).transpose(1, 2)
        else:
            x = self.mlp(x)
        return self.after(x)

    @torch.jit.unused
    def branch(self, norm: Norm | None) -> Branch | None:
        """x + self(norm(x)) for `native_branches`, or None where a part has to be called."""
        ends, mlp = (self.before, self.after), part(self, "mlp")
        if any(type(end) is not nn.Identity or is_hooked(end) for end in ends) or is_hooked(mlp) or len(mlp) != 4:
            return None
        if type(self) is not AxisMlp:
            return None
        fc1, gelu, drop, fc2 = mlp
        if type(gelu) is not nn.GELU or gelu.approximate != "none" or is_hooked(gelu):
            return None
        step = mlp_step(fc1, drop, fc2)
        return None if step is None else Branch(TOKENS if self.tokens else CHANNELS, norm, [step])


class FlatMlp(nn.Module):
    """An MLP of SparseLinear layers on all S * C features of an image at once."""

    def __init__(self, mlp: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.mlp, self.channels = mlp, channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, C) -> (B, S', C)."""
        return self.mlp(x.flatten(1).t()).t().unflatten(1, [-1, self.channels])


class TokenSkip(nn.Module):
    """LN(W~ X): the skip of a first layer that changes the number of tokens."""

    def __init__(self, in_tokens: int, tokens: int, channels: int, **dd: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(in_tokens, tokens, bias=False, **dd)
        self.norm = nn.LayerNorm(channels, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S0, C) -> (B, S, C)."""
        return self.norm(self.linear(x.transpose(1, 2)).transpose(1, 2))


class MixingLayer(nn.Module):
    """skip(x) + mix(norm(x)): one residual layer of the wide MLP; `mix` is one or two AxisMlp, or a FlatMlp."""

    def __init__(
        self, norm: nn.LayerNorm, mix: nn.Sequential, skip: nn.Module, in_tokens: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm, self.mix, self.skip = norm, mix, skip
        self.in_tokens, self.channels = in_tokens, norm.normalized_shape[-1]
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, S0, C) -> (B, S, C)."""
        if not torch.jit.is_scripting():
            y = by_kernel(x, self.branches)
            if y is not None:
                return y
        return self.skip(x) + self.drop_path(self.mix(self.norm(x)))

    @torch.jit.unused
    def branches(self) -> list[Branch]:
        """The layer for `native_branches`; none where a part has to be called, or it mixes twice."""
        skip, mix = part(self, "skip"), part(self, "mix")
        if type(self) is not MixingLayer or type(skip) is not nn.Identity or len(mix) != 1:
            return []
        if is_hooked(skip) or is_hooked(mix) or not is_idle(part(self, "drop_path")):
            return []
        return in_a_row(residual(part(self, "norm"), mix[0]))


class _LayerFactory:
    """Makes the mixing layers of one model, each with random numbers of its own."""

    def __init__(
        self, channels: int, mixing: str, ratios: tuple[float, float], connections: int, drop: float, seed: int, dd: Any
    ) -> None:
        self.channels, self.mixing, self.connections, self.drop, self.dd = channels, mixing, connections, drop, dd
        self.token_ratio, self.channel_ratio = ratios
        self.seeds = iter(range(seed << 12, (seed + 1) << 12))

    def layer(self, parts: str, in_tokens: int, tokens: int, expand: bool, drop_path: float) -> MixingLayer:
        """The layer that mixes along `parts`, "t" for tokens and "c" for channels, or what "sparse" has for it."""
        C, mix = self.channels, nn.Sequential()
        if self.mixing == "sparse":
            norm = nn.LayerNorm([in_tokens, C], **self.dd)
            mix.append(self._flat(in_tokens, tokens, expand))
        else:
            norm = nn.LayerNorm(C, **self.dd)
            for part in parts:
                # The first of them takes the tokens as they come.
                mix.append(self._axis(part == "t", in_tokens if part == parts[0] else tokens, tokens, expand))
        skip = nn.Identity() if in_tokens == tokens else TokenSkip(in_tokens, tokens, C, **self.dd)
        return MixingLayer(norm, mix, skip, in_tokens, drop_path)

    def _axis(self, is_token: bool, in_tokens: int, tokens: int, expand: bool) -> AxisMlp:
        before, after = self._shuffle(in_tokens), self._shuffle(tokens)
        n_in, n_out = (in_tokens, tokens) if is_token else (self.channels, self.channels)
        if not expand:
            return AxisMlp(nn.Sequential(Linear(n_in, n_out, **self.dd), nn.GELU()), is_token, before, after)
        hidden = round((self.token_ratio if is_token else self.channel_ratio) * n_out)
        fc1, fc2 = Linear(n_in, hidden, **self.dd), Linear(hidden, n_out, **self.dd)
        return AxisMlp(nn.Sequential(fc1, nn.GELU(), nn.Dropout(self.drop), fc2), is_token, before, after)

    def _flat(self, in_tokens: int, tokens: int, expand: bool) -> FlatMlp:
        n_in, n_out = in_tokens * self.channels, tokens * self.channels
        if not expand:
            return FlatMlp(nn.Sequential(self._sparse(n_in, n_out), nn.GELU()), self.channels)
        hidden = round((self.token_ratio + self.channel_ratio) / 2 * n_out)
        fc1, fc2 = self._sparse(n_in, hidden), self._sparse(hidden, n_out)
        return FlatMlp(nn.Sequential(fc1, nn.GELU(), nn.Dropout(self.drop), fc2), self.channels)

    def _sparse(self, n_in: int, n_out: int) -> SparseLinear:
        return SparseLinear(n_in, n_out, self.connections, next(self.seeds), **self.dd)

    def _shuffle(self, tokens: int) -> nn.Module:
        if self.mixing != "rp":
            return nn.Identity()
        return Shuffle(tokens, self.channels, next(self.seeds), self.dd.get("device"))


class WideMixer(Trunk):
    """See the module's docstring.

    `blocks` holds single residual layers, two for each step of `depth` except in S-Mixers.

    Args:
        img_size: (H, W) or one number; fixed for good, since token mixing has weights for every position.
        patch_size: side of a patch.
        tokens: S; None for as many as there are patches.
        channels: C.
        depth: pairs of a token and a channel mixing.
        token_ratio, channel_ratio: the expansion gamma of the two MLPs; S-Mixers have none.
        order: "mlp_mixer" or "s_mixer".
        mixing: "mixer", "rp" or "sparse".
        connections: weights of each Linear when `mixing` is "sparse"; None for the mean over those of the mixer (its
            first layer apart, where `tokens` is not the number of patches).
        seed: of the frozen permutations and masks.
        num_classes, in_chans, global_pool, drop_rate, proj_drop_rate: as in timm.
        drop_path_rate: stochastic depth of the last layer, growing linearly from 0.

    Raises:
        ValueError: a patch that does not divide the image, no tokens or channels, an expansion that leaves no hidden
            features, more connections than places, unknown `order` or `mixing`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        tokens: int | None = None,
        channels: int = 64,
        depth: int = 2,
        token_ratio: float = 1.0,
        channel_ratio: float = 1.0,
        order: str = "mlp_mixer",
        mixing: str = "mixer",
        connections: int | None = None,
        seed: int = 0,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        height, width = to_2tuple(img_size)
        if order not in ORDERS or mixing not in MIXINGS:
            raise ValueError(f"order={order!r}, mixing={mixing!r}: not of {ORDERS} and {MIXINGS}")
        if (tokens is not None and tokens < 1) or channels < 1 or depth < 1:
            raise ValueError(f"tokens={tokens}, channels={channels}, depth={depth}: each must be at least 1")
        self.stem = TokenStem(in_chans, channels, (height, width), patch_size, **dd)
        patches = self.stem.grid[0] * self.stem.grid[1]
        tokens = tokens or patches
        ratios = (token_ratio, channel_ratio) if order == "mlp_mixer" else (1.0, 1.0)
        if min(round(ratios[0] * tokens), round(ratios[1] * channels)) < 1:
            raise ValueError(f"token_ratio={token_ratio}, channel_ratio={channel_ratio}: no hidden features are left")
        connections = connections or round(mean_connections(tokens, channels, *ratios))
        factory = _LayerFactory(channels, mixing, ratios, connections, proj_drop_rate, seed, dd)
        # An S-Mixer mixes both axes in one residual layer; its SW-MLP, like any other, has two for that.
        parts = ["tc"] * depth if order == "s_mixer" and mixing != "sparse" else ["t", "c"] * depth
        rates = drop_path_rates(drop_path_rate, len(parts))
        self.blocks = Blocks(
            *[
                factory.layer(part, tokens if i else patches, tokens, order == "mlp_mixer", rates[i])
                for i, part in enumerate(parts)
            ]
        )
        self.norm = nn.LayerNorm(channels, **dd)
        grid = self.stem.grid if tokens == patches else _most_square(tokens)
        self.finish(
            num_classes=num_classes,
            in_chans=in_chans,
            features=channels,
            grid=grid,
            widths=[channels] * len(parts),
            reduction=[max(1, height // grid[0])] * len(parts),
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )


def _most_square(tokens: int) -> tuple[int, int]:
    """Rows and columns for tokens that have no places in the image, so that they can be looked at as a map."""
    rows = next(rows for rows in range(math.isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows


_SS = {"depth": 2, "token_ratio": 4.0, "channel_ratio": 4.0}
_SSW = _SS | {"patch_size": 4, "tokens": 64, "channels": 487}
_C48 = {"patch_size": 4, "tokens": 64, "channels": 48, "depth": 3, "token_ratio": 2.0, "channel_ratio": 2.0}
_SQUARE = {"patch_size": 4, "tokens": 64, "channels": 64, "depth": 3, "order": "s_mixer"}
_BW = {"img_size": 224, "patch_size": 14, "tokens": 256, "channels": 588, "depth": 8}

VARIANTS: dict[str, dict[str, Any]] = {
    # CIFAR-10 error in the paper: 15.91 and 12.07 %.
    "wide_mixer_ss8_32": _SS | {"patch_size": 8, "tokens": 16, "channels": 986},
    "wide_mixer_ssw_32": _SSW,
    "rp_mixer_ssw_32": _SSW | {"mixing": "rp"},
    # The shapes of the paper's table of memory, FLOPs and time.
    "wide_mixer_c48_32": _C48,
    "rp_mixer_c48_32": _C48 | {"mixing": "rp"},
    "sw_mlp_mixer_c48_32": _C48 | {"mixing": "sparse"},
    # Ours: as wide as 78 minutes of a CPU core train well.
    "wide_mixer_c192_32": _C48 | {"channels": 192},
    # C = S, the widest at its number of connections.
    "wide_mixer_simple_32": _SQUARE,
    "rp_mixer_simple_32": _SQUARE | {"mixing": "rp"},
    "sw_mlp_mixer_simple_32": _SQUARE | {"mixing": "sparse"},
    "wide_mixer_bw_224": _BW | {"token_ratio": 4.57, "channel_ratio": 4.57},
}


def _cfg(args: dict[str, Any]) -> dict[str, Any]:
    paper = {"paper_ids": "arXiv:2306.01470", "paper_name": "Understanding MLP-Mixer as a Wide and Sparse MLP"}
    return base_cfg(args.get("img_size", 32), first_conv="stem.proj", fixed_input_size=True, **paper)


default_cfgs = make_default_cfgs({name: _cfg(args) for name, args in VARIANTS.items()})


def _create_wide_mixer(variant: str, pretrained: bool = False, **kwargs: Any) -> WideMixer:
    return build(WideMixer, variant, pretrained, **kwargs)


register_variants(__name__, _create_wide_mixer, VARIANTS)
