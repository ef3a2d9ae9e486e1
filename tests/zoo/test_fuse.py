"""Folded norms and merged groups: other weights, the same function."""

import pytest
import timm
import torch
from torch import nn

import dimmix  # noqa: F401
from dimmix.fuse import convolve_levels, fuse, in_patches, merge_groups
from dimmix.layers import ButterflyMlp, ConvButterflyMlp, Permute
from dimmix.patch_only_mixer import PatchStep


def _trained_a_little(name, **args):
    """A model in float64 whose BatchNorms are not where they started."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **args).double()
    model(torch.randn(8, 3, 32, 32, dtype=torch.float64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    return model.eval()


def _groups(model):
    return {module.groups for module in model.modules() if isinstance(module, nn.Conv2d)}


@torch.no_grad()
def test_a_fused_model_has_no_norm_and_gives_the_same():
    model = _trained_a_little("butterfly_resnet_nano_32")
    fused = fuse(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    weights = [module.weight for module in fused.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not model.blocks[0][0].conv1.conv.weight.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("name", ["butterfly_resnet20_convmix_w32", "butterfly_resnet20_blockmix_w32"])
def test_merged_groups_are_wide_enough_and_give_the_same(name):
    model = fuse(_trained_a_little(name))
    before = _groups(model)
    merged = merge_groups(model, 16)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-12, atol=1e-12)
    grouped = [module for module in merged.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert {conv.in_channels // conv.groups for conv in grouped} == {16}
    assert _groups(model) == before


@torch.no_grad()
def test_merging_leaves_groups_that_do_not_add_up():
    narrow, odd = nn.Conv2d(6, 12, 1, groups=3), nn.Conv2d(12, 12, 1, groups=4)
    merged = merge_groups(nn.Sequential(narrow, odd, nn.Conv2d(16, 16, 3, groups=16)), 4)
    # 3 groups of 2 do not pair, 4 is no multiple of 3, and single channels have a fast way of their own.
    assert [conv.groups for conv in merged] == [3, 4, 16]
    wide = merge_groups(nn.Sequential(nn.Conv2d(8, 16, 3, groups=4)).to(memory_format=torch.channels_last), 4)[0]
    assert wide.groups == 2
    assert wide.weight.shape == (16, 4, 3, 3)
    assert (wide.weight[:4, 2:] == 0).all()
    assert (wide.weight[4:8, :2] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "convolved", "groups"),
    [
        ("butterfly_mixer_nano_32", 12, {4, 12}),  # blocks of 8 tokens, which pair, and of 16 channels
        ("butterfly_mixer_fast_32", 4, {4}),  # 20 channels do not fill vectors of 16
        ("butterfly_mixer_fast_patch2_32", 4, {16}),  # the channels are one block
        ("butterfly_mixer_paper_d7", 7, {4}),  # blocks of 11 channels
    ],
)
def test_levels_as_convolutions_give_the_same(name, convolved, groups):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).double().eval()
    other = convolve_levels(model, 16)
    assert sum(isinstance(module, ConvButterflyMlp) for module in other.modules()) == convolved
    assert not any(isinstance(module, ConvButterflyMlp) for module in model.modules())
    merged = merge_groups(other, 16)
    convs = [conv for module in merged.modules() if isinstance(module, ConvButterflyMlp) for conv in module.modules()]
    assert {conv.groups for conv in convs if isinstance(conv, nn.Conv2d)} == groups
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for same in (other, merged):
        torch.testing.assert_close(same(x), model(x), rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("residual", [False, True])
def test_a_butterfly_of_convolutions_gives_the_same_whatever_comes_first(residual):
    torch.manual_seed(0)
    mlp = ButterflyMlp(192, 16, residual=residual, dtype=torch.float64).eval()
    conv = ConvButterflyMlp(mlp)
    x = torch.randn(10, 192, dtype=torch.float64)
    for got in (conv(x), conv.mix_exported(x), conv.mix(x.t()).flatten(0, -2).t(), conv.mix(x.t(), True)):
        torch.testing.assert_close(got, mlp(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("patch_only_mixer_paper_d7", {}),
        ("patch_only_mixer_tiny_32_dense", {}),
        ("patch_only_mixer_strided_32_dense", {}),
        ("patch_only_mixer_strided_tiny_32", {}),
        ("patch_only_mixer_strided_tiny_32", {"global_pool": "flatten"}),
        ("patch_only_mixer_strided_tiny_32", {"head_patch": 4}),
        ("patch_only_mixer_fast_32_dense", {}),
        ("patch_only_mixer_strided_32", {"grid_size": 27, "patch_sizes": (3,), "depth": 2}),
        ("patch_only_mixer_strided_32", {"patch_sizes": (2, 4), "depth": 2}),
    ],
    ids=str,
)
def test_steps_in_patches_give_the_same(name, args):
    model = fuse(_trained_a_little(name, **args))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    turned = in_patches(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected, found = model.forward_features(x), turned.forward_features(x)
    for pre_logits in (False, True):
        close = turned.forward_head(found, pre_logits), model.forward_head(expected, pre_logits)
        torch.testing.assert_close(*close, rtol=1e-10, atol=1e-10)
    fold = model.head_fold
    pixels = expected.unflatten(2, (fold.channels, -1)).transpose(2, 3).flatten(2)  # a patch's, one after the other
    torch.testing.assert_close(found, pixels, rtol=1e-10, atol=1e-10)
    assert type(model.blocks[0][0]) is PatchStep


@torch.no_grad()
@pytest.mark.parametrize(
    ("args", "gathers"),
    [
        ({}, 4 * 3 + 5),
        ({"global_pool": "flatten"}, 4 * 3 + 5),
        ({"head_patch": None}, 4 * 3 + 5),
        ({"channels": 24, "patch_radix": 48}, 4 * 3 + 5),
        ({"patch_sizes": (2, 4), "channels": 8, "patch_radix": 16, "depth": 1}, None),
    ],
    ids=str,
)
def test_butterflies_in_patches_find_their_values_by_gathers(args, gathers):
    model = fuse(_trained_a_little("patch_only_mixer_fast_32", **args))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    turned = in_patches(convolve_levels(model, 16))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for pre_logits in (False, True):
        found, expected = (m.forward_head(m.forward_features(x), pre_logits) for m in (turned, model))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if gathers is not None:
        assert sum(isinstance(module, Permute) for module in turned.modules()) == gathers
    assert type(model.blocks[0][0]) is PatchStep


@pytest.mark.parametrize("name", ["patch_only_mixer_fast_32", "butterfly_mixer_nano_32", "resnet10t"])
def test_what_is_not_all_in_patches_stays(name):
    model = timm.create_model(name, num_classes=3).eval()
    copied = in_patches(model)
    assert copied is not model
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]


@torch.no_grad()
def test_an_mlp_that_steps_share_is_turned_once():
    model = _trained_a_little("patch_only_mixer_strided_32")
    model.blocks[1][0].mlp = model.blocks[0][2].mlp = model.blocks[0][0].mlp
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(in_patches(model)(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "gathers"), [("patch_only_mixer_strided_32", 17), ("patch_only_mixer_tiny_32", 11)])
def test_one_gather_leads_from_step_to_step(name, gathers):
    turned = in_patches(timm.create_model(name, num_classes=3))
    assert sum(isinstance(module, Permute) for module in turned.modules()) == gathers


@torch.no_grad()
def test_steps_that_were_altered_stay_as_they_are():
    model = timm.create_model("patch_only_mixer_tiny_32", num_classes=3).eval()
    model.blocks[1][0].norm = nn.LayerNorm(model.blocks[1][0].fold.values, bias=False)
    x = torch.randn(2, 3, 32, 32)
    copied = in_patches(model)
    assert copied is not model
    assert type(copied.blocks[0][0]) is PatchStep
    torch.testing.assert_close(copied(x), model(x))


def test_a_level_that_computes_something_else_is_not_made_of_convolutions():
    mlp = ButterflyMlp(64, 16)
    assert type(convolve_levels(nn.Sequential(mlp), 16)[0]) is ConvButterflyMlp
    mlp.levels[0].__class__ = type("Other", (type(mlp.levels[0]),), {})
    assert type(convolve_levels(nn.Sequential(mlp), 16)[0]) is ButterflyMlp
