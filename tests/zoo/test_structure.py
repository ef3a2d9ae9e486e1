"""The mixing structure read off a model, and its MACs against the dense twin."""

import pytest
import timm
from torch import nn

from dimmix.butterfly import ButterflySchedule
from dimmix.butterfly_resnet import ButterflyResNet
from dimmix.layers import ButterflyAttention, ButterflyMlp
from dimmix.profile import count_macs
from dimmix.structure import macs_against_dense, mixing_levels


def levels(name):
    found = mixing_levels(timm.create_model(name, num_classes=10))
    return [(level.mixes, level.n, level.radix, level.stride, level.groups) for level in found]


def test_conv_mix_has_two_levels_in_each_block():
    assert levels("butterfly_resnet20_convmix_w32")[:2] == [("channels", 32, 4, 1, 8), ("channels", 32, 8, 4, 1)]


def test_block_mix_steps_through_the_strides():
    found = levels("butterfly_resnet20_blockmix_w32")
    assert [level[3] for level in found[:6:2]] == [1, 4, 8]


def test_butterfly_attention_alternates_between_its_levels():
    assert levels("vit_butterfly_paper_patch4_d4") == [("tokens", 64, 8, 1, 8), ("tokens", 64, 8, 8, 1)] * 2


def test_a_mixer_mixes_tokens_and_channels():
    assert levels("butterfly_mixer_paper_d7")[:4] == [
        ("features", 64, 8, 1, 8),
        ("features", 64, 8, 8, 1),
        ("features", 121, 11, 1, 11),
        ("features", 121, 11, 11, 1),
    ]


def test_shuffled_levels_have_no_stride():
    model = ButterflyResNet(width=20, radix=(4, 4, 8), mixing="block", num_classes=10)
    found = [(level.radix, level.stride, level.groups) for level in mixing_levels(model)]
    assert found[:6] == [(4, 1, 5)] * 2 + [(4, None, 5)] * 4
    assert [level.stride for level in mixing_levels(ButterflyMlp(12, 2))][-1] is None
    attention = ButterflyAttention(8, ButterflySchedule(12, 2).levels[-1], 1)
    assert [level.stride for level in mixing_levels(nn.Sequential(attention))] == [None]


def test_patches_are_groups_too():
    assert levels("patch_only_mixer_paper_d7") == [("patches", 3675, 75, 1, 49), ("patches", 3675, 147, 1, 25)] * 7


def test_patches_of_pixels_far_apart_have_their_stride():
    rounds = [("patches", 8192, 128, stride, 64 // stride**2) for stride in (1, 2, 4, 8)] * 4
    assert levels("patch_only_mixer_strided_tiny_32") == rounds
    found = mixing_levels(timm.create_model("patch_only_mixer_strided_tiny_32", num_classes=10))
    assert {level.non_zero for level in found} == {1 / 64}


def test_a_butterfly_within_patches_has_levels_of_its_own():
    one = [("patches", 6400, 400, 1, 16), ("features", 400, 80, 1, 5), ("features", 400, 80, 5, 1)]
    four = [("patches", 6400, 400, 4, 1), *one[1:]]
    assert levels("patch_only_mixer_fast_32") == (one + four) * 2


def test_non_zero_is_the_share_of_the_dense_matrix():
    level = mixing_levels(timm.create_model("butterfly_mixer_paper_d7", num_classes=10))[2]
    assert level.non_zero == level.radix / level.n == 1 / 11


def test_a_dense_model_has_no_levels():
    assert levels("butterfly_resnet20_convmix_w32_dense") == []


def test_macs_add_up_and_stand_beside_the_dense_twins():
    model = timm.create_model("butterfly_mixer_paper_d7", num_classes=10)
    whole, *parts = macs_against_dense(model, "butterfly_mixer_paper_d7", (3, 32, 32))
    assert whole["macs"] == sum(part["macs"] for part in parts) == count_macs(model, (3, 32, 32))
    assert whole["macs"] / 1e6 == pytest.approx(8.69, abs=0.01)
    assert whole["dense"] / 1e6 == pytest.approx(40.6, abs=0.05)
    assert whole["of_dense"] == whole["macs"] / whole["dense"]


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [
        ("butterfly_mixer_nano_32", {"img_size": 64}, (3, 64, 64)),
        ("vit_butterfly_nano_patch4_32", {"in_chans": 1}, (1, 32, 32)),
        ("butterfly_resnet_nano_32", {"in_chans": 4}, (4, 48, 48)),
    ],
)
def test_the_twin_takes_the_size_and_the_channels_of_the_model(name, args, size):
    whole, *_ = macs_against_dense(timm.create_model(name, num_classes=10, **args), name, size)
    assert whole["dense"] == count_macs(timm.create_model(f"{name}_dense", num_classes=10, **args), size)


def test_the_twin_differs_from_its_architecture_as_the_model_does():
    name, args = "butterfly_mixer_nano_32", {"depth": 2, "mixing": "monarch"}
    model = timm.create_model(name, num_classes=10, **args)
    whole, *_ = macs_against_dense(model, name, (3, 32, 32), {**args, "pretrained": True})
    assert whole["dense"] == count_macs(timm.create_model(f"{name}_dense", num_classes=10, depth=2), (3, 32, 32))


def test_a_model_without_a_twin_stands_alone():
    model = timm.create_model("test_resnet", num_classes=10)
    assert macs_against_dense(model, "test_resnet", (3, 32, 32))[0]["dense"] is None
