"""Stages of residual blocks by our own kernel, on each instruction set, against torch's convolutions in float64."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from dimmix.butterfly_resnet import ButterflyResNet
from dimmix.fuse import fuse
from dimmix.layers import ConvNorm, ConvStem, native, native_stage
from dimmix.layers.butterfly_conv import ChannelTranspose
from dimmix.profile import count_macs

pytestmark = pytest.mark.skipif(
    not native.INSTRUCTIONS, reason="no kernels: no compiler when dimmix was installed, or no AVX2"
)


def _model(**args):
    """A small ResNet whose BatchNorms have seen something."""
    torch.manual_seed(0)
    model = ButterflyResNet(num_classes=10, **({"depths": (2, 2, 1), "width": 16, "radix": (4, 8, 8)} | args)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model


@pytest.fixture
def stages(monkeypatch):
    """The number of blocks of each stage that the kernel ran, and it runs every one."""
    seen, stage = [], native_stage.stage

    def count(x, blocks):
        seen.append(len(blocks))
        return stage(x, blocks)

    monkeypatch.setattr(native_stage, "stage", count)
    monkeypatch.setattr(native_stage, "pays", lambda images, blocks: True)
    return seen


def _relative(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


KINDS = [
    {"mixing": "conv"},
    {"mixing": "conv", "first_radix": (8, 4, 16), "radix": (2, 8, 32)},
    {"mixing": "block", "radix": (4, 4, 8)},
    {"mixing": "block", "radix": (2, 2, 2), "depths": (3, 2, 2)},
    {"mixing": "dense"},
    {"mixing": "dense", "width": 6},  # channels that no vector of rows divides
    {"mixing": "conv", "width": 24, "radix": (6, 6, 12)},
    {"mixing": "conv", "stem_stride": 2, "stem_full_res": True},
]


@pytest.mark.parametrize("size", [(32, 32), (16, 16), (8, 32), (16, 40), (15, 9), (4, 3)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_stages_are_what_torch_makes_of_them(instructions, stages, kind, size):
    model = _model(**kind)
    for images in (1, 5):  # one on all threads, and some on each
        x = torch.randn(images, 3, *size)
        with torch.no_grad():
            actual, folded = model.forward_features(x), fuse(model).forward_features(x)
            assert stages == [len(model.stem) // 2 + sum(map(len, model.blocks))] * 2
            stages.clear()
            expected = model.double().forward_features(x.double())
        model.float()
        assert stages == []
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert _relative(actual, expected) < 1e-5
        assert _relative(folded, expected) < 1e-5


def test_images_of_any_strides(instructions, stages):
    stage, x = _model().blocks[0], torch.randn(3, 16, 9, 12)
    with torch.no_grad():
        expected = stage(x)
        for other in (x.contiguous(memory_format=torch.channels_last), torch.randn(3, 16, 9, 24)[..., ::2].copy_(x)):
            assert other.stride() != x.stride()
            assert (stage(other) - expected).abs().max() < 1e-6
    assert stages == [2, 2, 2]


def test_a_pixel_that_is_not_a_number_spreads_as_far_as_it_is_seen(instructions, stages):
    stage, x = _model(mixing="dense").blocks[0], torch.randn(1, 16, 20, 20)
    x[0, 3, 2, 2] = torch.nan
    with torch.no_grad():
        bad = stage(x).isnan().any(1)[0]
    assert bad[:7, :7].all()
    assert bad.sum() == 49


def _altered():
    def hooked_convolution(stage):
        stage[0].conv2.conv.register_forward_hook(lambda *_: None)

    def hooked_block(stage):
        stage[1].register_forward_hook(lambda *_: None)

    def hooked_shortcut(stage):
        stage[0].shortcut.register_forward_hook(lambda *_: None)

    def pruned(stage):
        prune.l1_unstructured(stage[1].conv1.conv, "weight", 0.5)

    def replaced(stage):
        stage[0].conv1.conv = nn.Sequential(stage[0].conv1.conv)

    def another_block(stage):
        stage[1] = nn.Sequential(stage[1])

    def dilated(stage):
        stage[1].conv1.conv.dilation = stage[1].conv1.conv.padding = (2, 2)

    def normed_by_the_batch(stage):
        stage[1].conv2.bn = nn.BatchNorm2d(16, track_running_stats=False)

    def without_running_statistics(stage):
        stage[1].conv2.bn.running_mean = stage[1].conv2.bn.running_var = None

    def normed_without_bias(stage):
        stage[1].conv2.bn.bias = None

    def normed_without_weight(stage):
        stage[1].conv2.bn.weight = None

    def with_one_more_module(stage):
        stage[1].conv2.append(nn.Tanh())

    def learning(stage):
        stage[1].conv2.bn.train()

    def dropping(stage):
        stage[1].drop_path.train()

    return [
        hooked_convolution,
        hooked_block,
        hooked_shortcut,
        pruned,
        replaced,
        normed_by_the_batch,
        without_running_statistics,
        normed_without_bias,
        normed_without_weight,
        with_one_more_module,
        learning,
        dropping,
    ]


@pytest.mark.parametrize("alter", _altered(), ids=lambda alter: alter.__name__)
def test_what_was_altered_is_called(stages, alter):
    stage, x = _model(drop_path_rate=0.1).blocks[0], torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        stage(x)
        assert stages == [2]
        alter(stage)
        stage(x)
    assert stages == [2]


def _altered_stems():
    def hooked_convolution(stem):
        stem[2].conv.register_forward_hook(lambda *_: None)

    def hooked_relu(stem):
        stem[1].register_forward_hook(lambda *_: None)

    def without_its_first(stem):
        stem[0] = nn.Conv2d(3, 8, 3, padding=1)

    def without_a_convolution(stem):
        stem[0].conv = nn.Conv2d(3, 8, 1)

    def another_activation(stem):
        stem[3] = nn.GELU()

    def wider_steps(stem):
        stem[2].conv.stride = (3, 3)

    return [hooked_convolution, hooked_relu, without_its_first, without_a_convolution, another_activation, wider_steps]


@pytest.mark.parametrize("alter", [lambda m: m.append(nn.Tanh()), lambda m: setattr(m, "scatter", nn.Identity())])
def test_a_changed_block_of_block_mix_is_called(stages, alter):
    stage, x = _model(mixing="block", radix=(4, 4, 8)).blocks[0], torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        expected = stage(x)
        alter(stage[1])
        assert not torch.equal(stage(x), expected)
    assert stages == [2]


def test_what_is_added_behind_a_stem_is_called(stages):
    model, x = _model(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        model.stem.append(nn.Tanh())
        altered = model(x)
        with native.switched_off():
            assert (altered - model(x)).abs().max() < 1e-5
    assert not torch.equal(altered, expected)


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_the_middle_of_a_block_may_be_the_widest(instructions, stages, stride):
    stage = _model(depths=(1, 1), radix=(4, 8)).blocks[stride - 1]
    block, (c, out) = stage[0], ((16, 16), (16, 32))[stride - 1]
    block.conv1, block.conv2 = ConvNorm(c, 8 * c, 3, stride).eval(), ConvNorm(8 * c, out, 3).eval()
    block.shuffle = nn.Identity()
    x = torch.randn(2, c, 16, 16)
    y = stage(x)
    assert stages == [1]
    assert _relative(y, stage.double()(x.double())) < 1e-5


@pytest.mark.parametrize("alter", _altered_stems(), ids=lambda alter: alter.__name__)
def test_what_was_altered_in_a_stem_is_called(stages, alter):
    torch.manual_seed(0)
    stem, x = ConvStem(3, 16, 2, full_res=True).eval(), torch.randn(2, 3, 13, 11)
    with torch.no_grad():
        stem(x)
        assert stages == [2]
        alter(stem)
        assert (stem(x) - nn.Sequential(*stem)(x)).abs().max() == 0
    assert stages == [2]


def test_a_stem_that_ends_in_a_1x1_convolution(instructions, stages):
    torch.manual_seed(0)
    stem, x = ConvStem(3, 16, 4, full_res=True, dim=24).eval(), torch.randn(5, 3, 18, 14)
    with torch.no_grad():
        actual = stem(x)
        assert stages == [3]
        expected = nn.Sequential(*stem).double()(x.double())
    assert actual.shape == (5, 24, 5, 4)
    assert _relative(actual, expected) < 1e-5


def test_where_the_kernel_is_not_taken(stages):
    model = _model()
    model(torch.randn(2, 3, 16, 16))  # gradients are wanted
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 16, 16))
        shuffled = _model(mixing="block", width=12, radix=(2, 2, 2), depths=(4, 1, 1))  # a gather that is no transpose
        assert native_stage.blocks_for(torch.randn(2, 12, 16, 16), shuffled.blocks[0]) == []
        torch.export.export(model, (torch.randn(2, 3, 16, 16),))
        model.train()(torch.randn(2, 3, 16, 16))
    assert stages == []


def test_all_but_many_images_in_wide_groups_pay(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for width, images, expected in (
        (16, 64, True),
        (64, 64, True),
        (128, 64, False),
        (128, 32, False),
        (128, 31, True),
    ):
        stage = _model(width=128, radix=(width,) * 3, first_radix=(width,) * 3).blocks[0]
        with torch.no_grad():
            assert bool(native_stage.blocks_for(torch.randn(images, 128, 4, 4), stage)) == expected


def test_what_goes_together(monkeypatch):
    seen, stage = [], native_stage.stage
    monkeypatch.setattr(native_stage, "stage", lambda x, blocks: seen.append(len(blocks)) or stage(x, blocks))
    model = _model(depths=(2, 3, 2), stem_stride=2, stem_full_res=True)
    x = torch.randn(2, 3, 16, 16)

    def calls():
        seen.clear()
        with torch.no_grad():
            y = model.forward_features(x)
        assert (y - expected).abs().max() < 1e-5
        return list(seen)

    expected = model.double().forward_features(x.double()).detach().float()
    model.float()
    assert calls() == [9]
    monkeypatch.setattr(native_stage, "MOST_BLOCKS", 5)
    assert calls() == [4, 5]
    monkeypatch.setattr(native_stage, "LARGEST", 16 * 8 * 8 - 1)  # what stem and first stage give is more
    assert calls() == [2, 2]
    monkeypatch.setattr(native_stage, "LARGEST", 2**17)
    monkeypatch.setattr(native_stage, "MOST_BLOCKS", 16)
    monkeypatch.setattr(native_stage, "pays", lambda images, blocks: len(blocks) == 2)
    assert calls() == [4, 2]  # the second stage is torch's
    handle = model.blocks[1].register_forward_hook(lambda *_: None)
    assert calls() == [2, 2, 2]
    handle.remove()
    model.grad_checkpointing = True
    assert calls() == [2, 2, 2]


@torch.no_grad()
def test_images_of_other_channels_are_refused():
    model = _model()
    for layer, channels in ((model, 1), (model.stem, 4), (model.blocks[0], 8)):
        with pytest.raises(ValueError, match="channels expected"):
            layer(torch.randn(1, channels, 16, 16))


@torch.no_grad()
def test_convolutions_that_do_not_fit_each_other_are_refused():
    def another(stage, name, *shape):
        setattr(stage[1], name, ConvNorm(*shape).eval())

    for name, shape in (("conv1", (8, 16, 3)), ("conv2", (8, 16, 3)), ("conv2", (16, 8, 3)), ("shortcut", (16, 8, 1))):
        stage = _model().blocks[0]
        another(stage, name, *shape)
        with pytest.raises(ValueError, match="other channels"):
            stage(torch.randn(1, 16, 8, 8))
    for turn in ((1, 5, 5), (1, 2, 4), (4, 4, 4), (2, 0, 0)):
        stage = _model().blocks[0]
        stage[1].shuffle = ChannelTranspose(*turn)
        with pytest.raises(ValueError, match="permutation takes other channels"):
            stage(torch.randn(1, 16, 8, 8))


def test_large_images_stay_with_torch(stages):
    with torch.no_grad():
        _model().blocks[0](torch.randn(1, 16, 96, 96))
    assert stages == []


def test_multiply_accumulates_are_counted():
    model = timm.create_model("butterfly_resnet20_convmix_w32", num_classes=10).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 32, 32))
    assert "dimmix.stage" in str(counter.get_flop_counts())
    assert counter.get_total_flops() == 4 * count_macs(model, (3, 32, 32))


def test_a_compiled_model_takes_the_kernel():
    model, x = _model(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert (torch.compile(model, backend="eager", fullgraph=True)(x) - model(x)).abs().max() < 1e-6
