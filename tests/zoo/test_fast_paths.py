"""What runs where no gradient is wanted, against what runs where one is, in float64 and on every kind of level."""

import pytest
import timm
import torch
import torch.nn.functional as F

from dimmix.butterfly import ButterflySchedule
from dimmix.fuse import fuse
from dimmix.layers import (
    ButterflyAttention,
    ButterflyLinear,
    ButterflyMlp,
    ChannelTranspose,
    DenseMlp,
    Linear,
    MonarchMlp,
    PatchFold,
    block_linear,
    butterfly_attention,
    gather_groups,
    pointwise,
)
from dimmix.layers.permute import transpose_last
from dimmix.layers.pointwise import to_pixels, to_rows
from dimmix.patch_only_mixer import PatchStep

SIZES = [(64, 8), (121, 11), (64, 4), (24, 4), (12, 2), (10, 10)]


pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("rows", [1, 10, 11])  # one row, whole tiles, and a part of one at the end
@pytest.mark.parametrize(("n", "radix"), SIZES)
@pytest.mark.parametrize("kind", [ButterflyLinear, ButterflyMlp, MonarchMlp])
def test_rows_in_tiles_are_what_all_rows_at_once_are(monkeypatch, kind, n, radix, rows):
    layer = kind(n, 3 * n, radix) if kind is ButterflyLinear else kind(n, radix)
    x = torch.randn(rows, n)
    expected = layer(x)
    monkeypatch.setattr(block_linear, "TILE", 2 * n)
    with torch.no_grad():
        assert (layer(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("features", [(36, 12), (72, 24)])
def test_a_shrinking_linear_in_tiles(monkeypatch, features):
    layer = ButterflyLinear(*features, 4)
    x = torch.randn(2, 5, features[0])
    monkeypatch.setattr(block_linear, "TILE", 2 * features[0])
    with torch.no_grad():
        actual = layer(x)
    assert (actual - layer(x)).abs().max() < 1e-12


@pytest.mark.parametrize(("n", "radix"), SIZES)
def test_features_last_is_the_transpose_of_features_first(n, radix):
    for layer in (ButterflyLinear(n, n, radix), ButterflyMlp(n, radix), MonarchMlp(n, radix)):
        x = torch.randn(n, 5)
        assert (layer.mix(x, True) - layer.mix(x).reshape(n, 5).t()).abs().max() < 1e-12


@pytest.mark.parametrize("features", [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize(("n", "radix"), SIZES)
def test_rows_by_convolutions_are_rows_by_products(n, radix, features):
    wide, narrow = features
    layers = [ButterflyLinear(wide * n, narrow * n, radix)]
    if wide == narrow:
        layers += [ButterflyMlp(n, radix), ButterflyMlp(n, radix, residual=True), MonarchMlp(n, radix)]
    for layer in layers:
        x = torch.randn(32, wide * n)
        with torch.no_grad():
            convolved = to_rows(layer.mix_pixels(to_pixels(x)))
            assert (convolved - layer.mix(x.t(), True)).abs().max() < 1e-12


@pytest.fixture
def convolutions(monkeypatch):
    """How many groups each convolution had, of layers that take float64 of 16 rows and more."""
    seen, convolve = [], F.conv2d

    def count(x, weight, bias=None, groups=1):
        seen.append(groups)
        return convolve(x, weight, bias, groups=groups)

    def takes(x):
        return not torch.is_grad_enabled() and x.shape[:-1].numel() % 16 == 0

    monkeypatch.setattr(F, "conv2d", count)
    monkeypatch.setattr(block_linear, "folds_into_pixels", takes)
    for module in (pointwise, butterfly_attention):
        monkeypatch.setattr(module, "beats_a_product", takes)
    return seen


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (lambda: Linear(12, 8), [1]),
        (lambda: Linear(12, 8, bias=False), [1]),
        (lambda: DenseMlp(12), [1, 1]),
        (lambda: ButterflyMlp(12, 4), [3, 3, 3, 3]),
        (lambda: ButterflyAttention(12, ButterflySchedule(16, 4).levels[1], 3), [1, 1, 1, 1]),
        (lambda: ButterflyAttention(12, ButterflySchedule(16, 4).levels[1], 3, qkv_bias=False), [1, 1, 1, 1]),
    ],
)
def test_layers_that_take_convolutions_are_the_same_functions(monkeypatch, convolutions, make, groups):
    monkeypatch.setattr(block_linear, "GROUP_MACS", 1)
    layer, x = make(), torch.randn(3, 16, 12)
    expected = layer(x)
    assert convolutions == []
    with torch.no_grad():
        actual = layer(x)
    assert convolutions == groups
    assert actual.is_contiguous()
    assert (actual - expected).abs().max() < 1e-12


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("make", [lambda: ButterflyMlp(64, 8), lambda: ButterflyLinear(64, 64, 8)])
def test_a_part_that_computes_something_else_is_called(monkeypatch, make):
    monkeypatch.setattr(block_linear, "GROUP_MACS", 0)
    monkeypatch.setattr(pointwise, "FEWEST_ROWS", 16)
    layer, x = make().float().eval(), torch.randn(32, 64, dtype=torch.float32)
    part = layer.levels[1] if isinstance(layer, ButterflyMlp) else layer.factors[1]

    class Doubling(type(part)):
        def forward(self, x, features_last=False):
            return 2 * super().forward(x, features_last)

    expected = layer(x).detach()
    with torch.no_grad():
        assert (layer(x) - expected).abs().max() < 1e-5
        part.__class__ = Doubling
        assert (layer(x) - 2 * expected).abs().max() < 1e-5


def test_what_folds_into_pixels():
    x = torch.randn(256, 4, dtype=torch.float32)
    assert not pointwise.folds_into_pixels(x)  # gradients are wanted
    with torch.no_grad():
        assert pointwise.folds_into_pixels(x)
        assert pointwise.folds_into_pixels(x.view(16, 16, 4))
        assert pointwise.folds_into_pixels(x.bfloat16())
        assert not pointwise.beats_a_product(x.bfloat16())
        assert not pointwise.folds_into_pixels(x.double())
        assert not pointwise.folds_into_pixels(x[:250])
        assert not pointwise.folds_into_pixels(x[:128])
        with torch.autocast("cpu", torch.bfloat16):
            assert not pointwise.beats_a_product(x)


def test_convolutions_in_float32_are_as_exact_as_products():
    layer, x = ButterflyMlp(256, 16).float(), torch.randn(2048, 256, dtype=torch.float32)
    with torch.no_grad():
        convolved, product = to_rows(layer.mix_pixels(to_pixels(x))), layer.mix(x.t(), True)
        exact = layer.double().mix(x.double().t(), True)
    assert (convolved - exact).abs().max() < 2 * (product - exact).abs().max() + 1e-7


def test_transpose_last_is_a_transpose_of_the_last_axis():
    x = torch.randn(2, 3, 12)
    expected = x.view(2, 3, 3, 4).transpose(2, 3).reshape(2, 3, 12)
    assert torch.equal(transpose_last(x, 3, 4), expected)
    with torch.no_grad():
        assert torch.equal(transpose_last(x, 3, 4), expected)
        assert torch.equal(transpose_last(x.transpose(0, 1), 3, 4), expected.transpose(0, 1))


@pytest.mark.parametrize("groups", [(1, 3, 4), (2, 3, 2)])
def test_channel_transpose_is_the_same_without_gradients_and_stays_channels_last(groups):
    layer = ChannelTranspose(*groups)
    x = torch.randn(2, 12, 5, 5).contiguous(memory_format=torch.channels_last)
    expected = layer(x)
    with torch.no_grad():
        actual = layer(x)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_exported_channel_transpose_is_the_same():
    layer = gather_groups(ButterflySchedule(16, 4).levels[1])
    x = torch.randn(2, 16, 3, 3)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize(
    "name", ["butterfly_resnet_nano_32", "butterfly_resnet20_blockmix_w32", "vit_butterfly_nano_patch4_32"]
)
def test_a_fused_model_is_the_same_function_without_a_batch_norm(name):
    torch.set_default_dtype(torch.float32)
    model = timm.create_model(name, num_classes=10)
    x = torch.randn(4, 3, 32, 32)
    for _ in range(3):
        model(x)  # running statistics of its own
    names = set(model.state_dict())
    with torch.no_grad():
        fused = fuse(model)
        assert (fused(x) - model.eval()(x)).abs().max() < 1e-5
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize(("channels", "size", "side", "stride"), [(3, (10, 15), 5, 1), (4, (8, 16), 2, 4)])
def test_patches_of_whole_pixels_are_the_patches_of_the_paper(channels, size, side, stride, across):
    step = PatchStep(PatchFold(channels, size, side, stride), None, 2, across, 0.0, 0.0)
    for parameter in step.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, channels, *size, requires_grad=True)
    y = step(x)
    actual = torch.autograd.grad((y**2).sum(), [x, *step.parameters()])
    assert y.is_contiguous(memory_format=torch.channels_last)
    plain = x + step.fold.fold(step.mlp(step.norm(step.fold.unfold(x))))
    if across:
        patches = step.across_norm(step.fold.unfold(plain)).transpose(1, 2)
        plain = plain + step.fold.fold(step.across(patches).transpose(1, 2))
    expected = torch.autograd.grad((plain**2).sum(), [x, *step.parameters()])
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    seen = []
    step.norm.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(step(x), plain, rtol=1e-12, atol=1e-12)
    assert seen == [1]
