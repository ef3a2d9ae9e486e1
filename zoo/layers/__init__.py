"""The mixing layers: each a small module over one level, or all levels, of a ButterflySchedule."""

from .block_linear import BlockLinear, FeatureMixer, LevelView
from .butterfly_attention import ButterflyAttention
from .butterfly_conv import ChannelTranspose, gather_groups, scatter_groups
from .butterfly_linear import ButterflyFactor, ButterflyLinear
from .butterfly_mlp import BlockMlp, ButterflyMlp, ConvButterflyMlp, DenseMlp, MonarchMlp, mlp_step
from .conv_norm import ConvNorm
from .patch_fold import PatchFold
from .permute import Permute, random_order
from .pointwise import Linear
from .sparse_linear import SparseLinear
from .stem import ConvStem, TokenStem

__all__ = [
    "BlockLinear",
    "BlockMlp",
    "ButterflyAttention",
    "ButterflyFactor",
    "ButterflyLinear",
    "ButterflyMlp",
    "ChannelTranspose",
    "ConvButterflyMlp",
    "ConvNorm",
    "ConvStem",
    "DenseMlp",
    "FeatureMixer",
    "LevelView",
    "Linear",
    "MonarchMlp",
    "PatchFold",
    "Permute",
    "SparseLinear",
    "TokenStem",
    "gather_groups",
    "mlp_step",
    "random_order",
    "scatter_groups",
]
