import pytest
import torch
from torch import nn

from dimmix.butterfly import ButterflySchedule
from dimmix.layers import (
    BlockLinear,
    ButterflyAttention,
    ButterflyLinear,
    ButterflyMlp,
    ChannelTranspose,
    ConvStem,
    DenseMlp,
    MonarchMlp,
    PatchFold,
    Permute,
    TokenStem,
    butterfly_attention,
    gather_groups,
    random_order,
    scatter_groups,
)

from . import reference

# (n, radix): two levels, three levels with a copied middle one, uneven strides, shuffled levels, one level.
SIZES = [(64, 8), (121, 11), (64, 4), (24, 4), (12, 2), (10, 10)]


pytestmark = pytest.mark.usefixtures("float64")


def _close(actual, expected):
    assert (actual - expected).abs().max() < 1e-12


def _linear_reference(layer: ButterflyLinear) -> torch.Tensor:
    """The product of the level matrices, for a layer that keeps its width."""
    matrix = torch.eye(layer.in_features)
    for level, factor in zip(layer.schedule.levels, layer.factors, strict=True):
        matrix = reference.level_matrix(level, factor.linear.weight) @ matrix
    return matrix


def test_block_linear_is_its_block_diagonal_matrix():
    layer = BlockLinear(3, 4, 5)
    x = torch.randn(12, 7)
    _close(layer(x.view(3, 4, 7)).reshape(15, 7), layer.dense_equivalent() @ x + layer.bias.reshape(15, 1))


def test_each_block_begins_as_a_linear_layer_of_its_size():
    layer = BlockLinear(64, 16, 64)
    for values in (layer.weight, layer.bias):
        assert values.abs().max().item() == pytest.approx(1 / 16**0.5, rel=0.01)
        assert values.std().item() == pytest.approx(1 / (3 * 16) ** 0.5, rel=0.05)  # uniform


@pytest.mark.parametrize(("n", "radix"), SIZES)
def test_butterfly_linear_is_the_product_of_its_levels(n, radix):
    layer = ButterflyLinear(n, n, radix, bias=False)
    x = torch.randn(2, 3, n)
    _close(layer.dense_equivalent(), _linear_reference(layer))
    _close(layer(x), x @ _linear_reference(layer).T)


@pytest.mark.parametrize(
    ("n_in", "n_out", "radix"), [(64, 128, 8), (128, 64, 8), (24, 72, 4), (72, 24, 4), (12, 36, 2), (36, 12, 2)]
)
def test_rectangular_butterfly_linear_equals_its_dense_matrix_and_reaches_everything(n_in, n_out, radix):
    layer = ButterflyLinear(n_in, n_out, radix)
    x = torch.randn(5, n_in)
    matrix, bias = layer.dense_equivalent(), layer(torch.zeros(1, n_in))
    _close(layer(x), x @ matrix.T + bias)
    assert matrix.shape == (n_out, n_in)
    assert (matrix != 0).all()
    assert sum(f.linear.weight.numel() for f in layer.factors) < n_in * n_out


def test_a_shrinking_butterfly_linear_is_the_transpose_of_the_expanding_one():
    wide, narrow = ButterflyLinear(24, 72, 4, bias=False), ButterflyLinear(72, 24, 4, bias=False)
    for a, b in zip(wide.factors, reversed(narrow.factors), strict=True):
        b.linear.weight.data = a.linear.weight.data.transpose(1, 2).contiguous()
    _close(narrow.dense_equivalent(), wide.dense_equivalent().T)


def test_butterfly_linear_refuses_features_that_do_not_divide():
    with pytest.raises(ValueError, match="in_features=10 and out_features=15: neither divides the other"):
        ButterflyLinear(10, 15, 5)


@pytest.mark.parametrize(("n", "radix"), SIZES)
def test_butterfly_mlp_is_an_mlp_on_every_group(n, radix):
    layer = ButterflyMlp(n, radix, ratio=2)
    x = torch.randn(3, n)
    expected = x.clone()
    for level, mlp in zip(layer.schedule.levels, layer.levels, strict=True):
        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        expected = torch.stack([reference.block_mlp(row, level, *weights) for row in expected])
    _close(layer(x), expected)


@pytest.mark.parametrize(("n", "radix"), SIZES)
def test_levels_with_a_residual_add_to_what_they_read_except_for_the_last(n, radix):
    layer = ButterflyMlp(n, radix, residual=True)
    x = torch.randn(3, n)
    expected = x
    for level, mlp in zip(layer.schedule.levels, layer.levels, strict=True):
        bias = torch.zeros(mlp.fc1.weight.shape[0], radix) if mlp.fc2.bias is None else mlp.fc2.bias
        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, bias)
        mixed = torch.stack([reference.block_mlp(row, level, *weights) for row in expected])
        expected = mixed if mlp is layer.levels[-1] else expected + mixed
    _close(layer(x), expected)
    with torch.no_grad():
        _close(layer(x), expected)


@torch.no_grad()
def test_no_rows_give_no_rows_of_as_many_features():
    for layer in (ButterflyLinear(12, 12, 2), ButterflyLinear(12, 24, 2), ButterflyMlp(12, 2), ButterflyMlp(16, 4)):
        n = layer.schedule.n
        outputs = layer(torch.randn(1, n)).shape[1]
        for shape in ((0,), (2, 0)):
            assert layer(torch.randn(*shape, n)).shape == (*shape, outputs)


@pytest.mark.parametrize(("n", "radix"), SIZES)
def test_monarch_mlp_is_an_mlp_with_its_dense_equivalents(n, radix):
    layer = MonarchMlp(n, radix)
    x = torch.randn(3, n)
    hidden = x @ layer.fc1.dense_equivalent().T + layer.fc1(torch.zeros(1, n))
    expected = torch.nn.functional.gelu(hidden) @ layer.fc2.dense_equivalent().T + layer.fc2(torch.zeros(1, 2 * n))
    _close(layer(x), expected)


def test_dense_mlp_mixes_either_axis_alike():
    layer = DenseMlp(6)
    x = torch.randn(4, 6)
    _close(layer.mix(x.t()).t(), layer(x))


@pytest.mark.parametrize(("n", "radix"), [(64, 8), (16, 4), (8, 2), (24, 4), (12, 2), (9, 9)])
def test_butterfly_attention_is_attention_inside_each_group(n, radix):
    for level in ButterflySchedule(n, radix).levels:
        layer = ButterflyAttention(8, level, num_heads=2)
        x = torch.randn(2, n, 8)
        expected = torch.stack([reference.attention(row, level, layer.qkv, layer.proj, 2) for row in x])
        _close(layer(x), expected)  # by products, as it trains
        with torch.no_grad():
            _close(layer(x), expected)  # by the fused kernel


def test_small_groups_train_by_products_with_the_gradients_of_the_fused_kernel(monkeypatch):
    layer, x = ButterflyAttention(8, ButterflySchedule(64, 8).levels[1], num_heads=2), torch.randn(2, 64, 8)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    layer(x).pow(2).sum().backward()
    monkeypatch.undo()
    products = layer.qkv.weight.grad.clone()
    layer.zero_grad()
    monkeypatch.setattr(butterfly_attention, "SMALL_GROUP", 0)
    layer(x).pow(2).sum().backward()
    _close(products, layer.qkv.weight.grad)


def test_small_groups_in_bfloat16_attend_by_products_too(monkeypatch):
    layer, x = ButterflyAttention(8, ButterflySchedule(64, 8).levels[1], num_heads=2), torch.randn(2, 64, 8)
    expected = layer(x)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    with torch.no_grad():
        actual = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - expected).abs().max() < 0.02
    with torch.no_grad(), pytest.raises(TypeError):
        layer.double()(x)  # by the fused kernel


@pytest.mark.parametrize("bias", [True, False])
def test_exported_attention_is_products_alone_and_gives_the_same(bias):
    layer = ButterflyAttention(8, ButterflySchedule(64, 8).levels[1], num_heads=2, qkv_bias=bias).eval()
    x = torch.randn(2, 64, 8)
    program = torch.export.export(layer, (x,))
    assert "scaled_dot_product_attention" not in program.graph_module.code
    assert "bmm" not in program.graph_module.code  # q, k and v by a linear map each
    _close(program.module()(x), layer(x))


def test_butterfly_attention_without_bias_and_with_heads_that_do_not_divide():
    level = ButterflySchedule(4, 2).levels[1]
    layer = ButterflyAttention(8, level, num_heads=2, qkv_bias=False)
    x = torch.randn(1, 4, 8)
    _close(layer(x)[0], reference.attention(x[0], level, layer.qkv, layer.proj, 2))
    with pytest.raises(ValueError, match="num_heads=3 does not divide dim=8"):
        ButterflyAttention(8, level, num_heads=3)


def test_attention_folds_every_level_without_copying_q_k_v(monkeypatch):
    seen = []

    def spy(q, k, v):
        seen.append([t.untyped_storage().data_ptr() for t in (q, k, v)] + [q.ndim, q.stride(-1)])
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for level in ButterflySchedule(64, 4).levels:
        with torch.no_grad():
            ButterflyAttention(8, level, num_heads=2)(torch.randn(2, 64, 8))
    assert len(seen) == 3
    for q, k, v, ndim, last_stride in seen:
        assert q == k == v  # one product made all three, and they are still views of it
        assert (ndim, last_stride) == (4, 1)


@pytest.mark.parametrize(("n", "radix"), [(64, 8), (32, 4), (12, 2)])
def test_gather_groups_brings_each_block_together_and_scatter_undoes_it(n, radix):
    x = torch.arange(n).view(1, n, 1, 1).expand(2, n, 3, 3)
    for level in ButterflySchedule(n, radix).levels:
        gathered = gather_groups(level)(x)
        assert gathered[0, :, 0, 0].view(level.blocks, radix).tolist() == level.members()
        assert torch.equal(scatter_groups(level)(gathered), x)


def test_channel_transpose_stays_channels_last_and_shuffles_as_torch_does():
    x = torch.randn(2, 12, 4, 4)
    y = ChannelTranspose(1, 3, 4)(x)
    _close(y, nn.ChannelShuffle(3)(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_patch_fold_orders_values_as_unfold_does_and_undoes_itself():
    fold = PatchFold(3, (6, 8), 2)
    x = torch.randn(2, 3, 6, 8)
    _close(fold.unfold(x), torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2))
    assert torch.equal(fold.fold(fold.unfold(x)), x)
    with pytest.raises(ValueError, match="patch_size=5 does not divide the image size 6x8"):
        PatchFold(3, (6, 8), 5)


def test_strided_patches_are_the_pixels_so_far_apart():
    fold = PatchFold(3, (8, 12), 2, stride=2)
    x = torch.randn(2, 3, 8, 12)
    patches = fold.unfold(x)
    assert patches.shape == (2, fold.num_patches, fold.values) == (2, 24, 12)
    corners = [(row + i, column + j) for row in (0, 4) for i in (0, 1) for column in (0, 4, 8) for j in (0, 1)]
    plain = [x[:, :, row : row + 3 : 2, column : column + 3 : 2].flatten(1) for row, column in corners]
    assert torch.equal(patches, torch.stack(plain, 1))
    assert torch.equal(fold.fold(patches), x)
    with pytest.raises(ValueError, match="patch_size=2 at stride 4 does not divide the image size 8x12"):
        PatchFold(3, (8, 12), 2, stride=4)


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_of_whole_pixels_have_the_same_values_in_an_order_of_their_own(stride):
    fold = PatchFold(3, (12, 8), 2, stride)
    x = torch.randn(2, 3, 12, 8)
    pixels = x.permute(0, 2, 3, 1)
    order = fold.turned(torch.arange(12))
    assert order.tolist() == [4 * channel + pixel for pixel in range(4) for channel in range(3)]
    assert torch.equal(fold.unfold_pixels(pixels), fold.unfold(x)[:, :, order])
    assert torch.equal(fold.fold_pixels(fold.unfold_pixels(pixels)), pixels)


def test_permute_undoes_itself_and_refuses_what_is_no_permutation():
    permute = Permute([2, 0, 1], dim=1)
    x = torch.tensor([[10, 11, 12]])
    assert permute(x).tolist() == [[12, 10, 11]]
    assert torch.equal(permute.undo(permute(x)), x)
    with pytest.raises(ValueError, match="not a permutation"):
        Permute([0, 0, 1], dim=1)


def test_random_order_depends_on_the_seed_alone():
    with torch.device("meta"):
        drawn = random_order(50, seed=1)
    torch.manual_seed(99)
    assert drawn == random_order(50, seed=1) != random_order(50, seed=2)


def test_stems_downsample_by_their_stride():
    image = torch.randn(1, 3, 16, 16)
    assert ConvStem(3, 32, 1)(image).shape == (1, 32, 16, 16)
    assert ConvStem(3, 6, 8)(image).shape == (1, 6, 2, 2)
    assert TokenStem(3, 10, (16, 16), 4)(image).shape == (1, 16, 10)
    narrow = TokenStem(3, 10, (16, 16), 4, convs=True, width=8)
    assert narrow(image).shape == (1, 16, 10)
    assert [conv.weight.shape[:2] for conv in narrow.modules() if isinstance(conv, nn.Conv2d)] == [
        (8, 3),
        (8, 8),
        (10, 8),
    ]
    with pytest.raises(ValueError, match="stride=3"):
        ConvStem(3, 32, 3)
    with pytest.raises(ValueError, match="patch_size=5 does not divide the image size 16x16"):
        TokenStem(3, 10, (16, 16), 5)


def _mixers():
    yield "linear", lambda **dd: ButterflyLinear(64, 64, 4, **dd)
    yield "shuffled linear", lambda **dd: ButterflyLinear(12, 24, 2, **dd)
    yield "monarch", lambda **dd: MonarchMlp(64, 8, **dd)
    yield "mlp", lambda **dd: ButterflyMlp(64, 8, **dd)
    yield "mlp with residuals", lambda **dd: ButterflyMlp(64, 8, residual=True, **dd)
    yield "attention", lambda **dd: ButterflyAttention(16, ButterflySchedule(16, 4).levels[1], num_heads=2, **dd)


MIXERS = pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in _mixers()])


def _input(layer, batch=3, **kwargs):
    if isinstance(layer, ButterflyAttention):
        return torch.randn(batch, 16, 16, **kwargs)
    return torch.randn(batch, 2, layer.in_features if isinstance(layer, ButterflyLinear) else 64, **kwargs)


@MIXERS
def test_every_parameter_gets_a_gradient(make):
    layer = make()
    layer(_input(layer)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@MIXERS
def test_gradients_are_right(make):
    layer = make()
    x = _input(layer, batch=1)[:, :, :].requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


@MIXERS
def test_bfloat16_follows_float32(make):
    layer = make(dtype=torch.float32)
    x = _input(layer, dtype=torch.float32)
    expected = layer(x)
    actual = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).abs().max() < 0.05 * expected.abs().max() + 0.01


@MIXERS
def test_meta_device(make):
    layer = make(device="meta")
    assert layer(_input(layer, device="meta")).device.type == "meta"


@MIXERS
def test_compiles_in_one_graph(make):
    layer = make(dtype=torch.float32)
    x = _input(layer, dtype=torch.float32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@MIXERS
def test_exports_with_a_dynamic_batch(make):
    layer = make()
    program = torch.export.export(layer, (_input(layer),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = _input(layer, batch=5)
    _close(program.module()(x), layer(x))


@pytest.mark.parametrize(("channels", "radix"), [(32, 4), (12, 2)])
def test_conv_mixing_is_the_convolution_of_each_block_alone(channels, radix):
    x = torch.randn(2, channels, 5, 5)
    for level in ButterflySchedule(channels, radix).levels:
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=level.blocks, bias=False)
        mixed = scatter_groups(level)(conv(gather_groups(level)(x)))
        for weight, dims in zip(conv.weight.unflatten(0, [level.blocks, radix]), level.members(), strict=True):
            _close(mixed[:, dims], torch.nn.functional.conv2d(x[:, dims], weight, padding=1))
