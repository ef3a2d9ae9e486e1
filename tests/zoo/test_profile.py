import pytest
import timm
import torch
from torch import nn

from dimmix.layers import BlockLinear
from dimmix.profile import count_macs, macs_by_module, peak_bytes


def test_macs_of_convolutions_and_products() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 36, 5, bias=False)
    )
    assert count_macs(model, (3, 8, 8)) == 8 * 8 * 8 * 27 + 36 * 8 * 18 + 8 * 36 * 5


def test_macs_by_module_name_every_part_and_sum_up() -> None:
    inner = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model = nn.Sequential(nn.Linear(6, 4), inner)
    assert macs_by_module(model, (6,)) == {"": 24 + 12 + 6, "0": 24, "1": 12 + 6, "1.0": 12, "1.2": 6}


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = BlockLinear(4, 8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(4, 8, -1))


def test_macs_of_blocks() -> None:
    assert count_macs(Blocks(), (1, 32, 6)) == 4 * 8 * 16 * 6


def test_macs_of_attention_are_counted_and_the_mode_is_kept() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4, class_token=False,
        global_pool="avg", num_classes=10,
    ).train()  # fmt: skip
    projections = 2 * 64 * 12 * 64 * 64
    attention = 2 * 2 * 64 * 64 * 64
    assert count_macs(model, (3, 32, 32)) == projections + attention + 64 * 48 * 64 + 64 * 10
    assert model.training


def test_frozen_parts_stay_frozen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).train()
    model[0].eval()
    count_macs(model, (4,))
    assert [module.training for module in model.modules()] == [True, False, True]
    with pytest.raises(RuntimeError):
        count_macs(model, (5,))
    assert [module.training for module in model.modules()] == [True, False, True]


def test_peak_bytes_counts_what_exists_at_once() -> None:
    x = torch.randn(100, 100)
    assert peak_bytes(lambda: x @ x + x @ x) == 3 * x.nbytes  # two products and their sum
    assert peak_bytes(lambda: (x @ x).sum()) == x.nbytes + 4
