"""Our own kernels, on each instruction set that this machine has, against torch's operators in float64."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from dimmix.butterfly import ButterflySchedule
from dimmix.layers import (
    ButterflyAttention,
    ButterflyLinear,
    ButterflyMlp,
    DenseMlp,
    Linear,
    MonarchMlp,
    PatchFold,
    native,
)
from dimmix.profile import count_macs

pytestmark = pytest.mark.skipif(
    not native.INSTRUCTIONS, reason="no kernels: no compiler when dimmix was installed, or no AVX2"
)

SIZES = [(64, 8), (121, 11), (64, 4), (81, 3), (12, 12), (27, 27), (400, 20)]
ROWS = [1, 15, 16, 33, 64, 70]  # parts of a tile, tiles of both widths, and tiles with a part at the end


@pytest.fixture(params=["avx2", "avx512"])
def instructions(request):
    """The kernels for one instruction set."""
    if native._native.use(request.param) != request.param:
        pytest.skip(f"this processor has no {request.param}")
    torch.manual_seed(0)
    yield request.param
    native._native.use(native.INSTRUCTIONS)


def _layers(n, radix):
    yield ButterflyLinear(n, n, radix)
    yield ButterflyLinear(n, 3 * n, radix)
    yield ButterflyLinear(2 * n, n, radix, bias=False)
    yield ButterflyMlp(n, radix)
    yield ButterflyMlp(n, radix, ratio=3, residual=True)
    yield MonarchMlp(n, radix)
    yield DenseMlp(n, ratio=1.5)


@torch.no_grad()
def _difference(layer, x, features_last):
    """The largest one to the same in float64, in units of the result's largest number."""
    actual = layer.mix_natively(x, features_last)
    expected = layer.double().mix_levels(x.double(), features_last)
    layer.float()
    if not features_last:
        expected = expected.reshape(-1, x.shape[1])
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("n", "radix"), SIZES)
def test_levels_are_what_torch_makes_of_them(instructions, n, radix):
    for layer in _layers(n, radix):
        features = layer.in_features if isinstance(layer, ButterflyLinear) else n
        for rows in ROWS:
            for x in (
                torch.randn(features, rows),
                torch.randn(rows, features).t(),
                torch.randn(2 * features, 2 * rows)[::2, ::2],
            ):
                assert _difference(layer, x, features_last=False) < 2e-6
                assert _difference(layer, x, features_last=True) < 2e-6


@pytest.mark.parametrize("dim", [8, 12, 40])
@pytest.mark.parametrize(("n", "radix"), [(64, 8), (16, 4), (81, 9), (144, 12), (64, 64), (100, 100)])
def test_attention_is_what_torch_makes_of_it(instructions, n, radix, dim):
    for level in ButterflySchedule(n, radix).levels:
        layer = ButterflyAttention(dim, level, num_heads=2)
        q, k, v = (torch.randn(2 * n, dim) for _ in range(3))
        with torch.no_grad():
            actual = layer.attend(q, k, v)
            expected = layer.attend(q.double(), k.double(), v.double())
        assert actual.shape == expected.shape
        assert (actual - expected).abs().max() < 2e-6


def test_queries_keys_and_values_may_lie_side_by_side(instructions):
    qkv = torch.randn(64, 3 * 24)
    parts = qkv.chunk(3, 1)
    expected = native.attend(*(part.contiguous() for part in parts), 8, 8, 2)
    assert torch.equal(native.attend(*parts, 8, 8, 2), expected)


def test_large_scores_do_not_overflow(instructions):
    q = torch.full((8, 4), 300.0)
    v = torch.randn(8, 4)
    assert (native.attend(q, q, v, 8, 1, 1) - v.mean(0)).abs().max() < 1e-6


def test_gelu_near_zero_and_far_from_it(instructions):
    layer = ButterflyMlp(4, 4)
    with torch.no_grad():
        for part in layer.levels:
            part.fc1.weight.zero_()
            part.fc1.weight[0, :4] = torch.eye(4)
            part.fc1.bias.zero_()
            part.fc2.weight.zero_()
            part.fc2.weight[0, :, :4] = torch.eye(4)
            part.fc2.bias.zero_()
        x = torch.tensor([-30.0, -4.0, -3.0, -1e-3, 0.0, 1e-3, 3.0, 6.0, 1e4, 0.5, -0.5, 2.0]).view(3, 4)
        error = (layer(x) - nn.functional.gelu(x.double())).abs()
    assert (error / x.abs().clamp(min=1)).max() < 5e-7


def test_what_is_not_a_number_stays_so(instructions):
    layer, attention = ButterflyMlp(16, 4), ButterflyAttention(4, ButterflySchedule(16, 4).levels[1], 1)
    x, q = torch.randn(40, 16), torch.randn(16, 4)
    x[3, 5] = q[0, 0] = torch.nan
    with torch.no_grad():
        assert layer(x).isnan().any(1).nonzero().tolist() == [[3]]
        assert attention.attend(q, q, q).isnan().any(1).nonzero().flatten().tolist() == [0, 4, 8, 12]


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_map_is_what_torch_makes_of_it(instructions, calls, bias):
    for features, rows in ((1, 3), (24, 10), (100, 33), (129, 64)):
        linear, x = Linear(features, 37, bias=bias), torch.randn(2, rows, features)
        actual = linear(x)
        assert calls == [2 * rows]
        calls.clear()
        expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
        assert actual.shape == expected.shape
        assert actual.is_contiguous()
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def _norm(n):
    norm = nn.LayerNorm(n, eps=1e-3)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    return norm


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 15, 32, 70])
@pytest.mark.parametrize("features_last", [False, True])
def test_a_norm_before_and_a_sum_behind(instructions, rows, features_last):
    for features in (1, 5, 48):
        norm, layer, x = _norm(features), DenseMlp(features), torch.randn(rows, features) + 3
        for laid_out in (x.t(), x.t().contiguous()):
            plus = torch.randn(rows, features) if features_last else torch.randn(features, rows)
            actual = native.mix(laid_out, layer.steps(), features_last, native.norm_of(norm), plus)
            expected = layer.double()(norm.double()(x.double()))
            layer.float(), norm.float()
            expected = (expected if features_last else expected.t()) + plus
            assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_residual_branches_are_what_torch_makes_of_them(instructions, calls):
    level = ButterflySchedule(16, 4).levels[1]
    for layer, passes in ((DenseMlp(24), 1), (ButterflyMlp(24, 6), 1), (ButterflyAttention(24, level, 3), 2)):
        norm, x = _norm(24), torch.randn(3, 16, 24)
        actual = layer.eval().add_natively(x, norm)
        assert calls == [48] * passes
        calls.clear()
        expected = x.double() + layer.double()(norm.double()(x.double()))
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "name", ["vit_butterfly_nano_patch4_32", "butterfly_mixer_nano_32", "patch_only_mixer_tiny_32"]
)
def test_what_watches_a_residual_branch_is_called(name):
    model, x, seen = timm.create_model(name, num_classes=3).eval(), torch.randn(1, 3, 32, 32), []
    with torch.no_grad():
        expected = model(x)
        for part in ("norm2", "mlp", "attn", "channel_mlp", "drop_path", "norm"):
            block = model.blocks[0]
            module = getattr(block[0] if isinstance(block, nn.Sequential) else block, part, None)
            if module is not None:
                handle = module.register_forward_hook(lambda module, *_: seen.append(module))
                assert (model(x) - expected).abs().max() < 1e-5
                assert module in seen
                handle.remove()
        another = nn.Sequential(getattr(block, "mlp", None) or getattr(block, "channel_mlp", None) or block[0].mlp)
        if hasattr(block, "channel_mlp"):
            block.channel_mlp = another
        else:
            (block[0] if isinstance(block, nn.Sequential) else block).mlp = another
        assert (model(x) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    for layer, x in (
        (ButterflyMlp(16, 4), torch.randn(20, 12)),
        (ButterflyLinear(16, 16, 4), torch.randn(20, 32)),
        (DenseMlp(16), torch.randn(20, 8)),
        (Linear(16, 8), torch.randn(4, 8)),
        (ButterflyAttention(16, ButterflySchedule(16, 4).levels[0], 2), torch.randn(2, 16, 8)),
    ):
        with pytest.raises(ValueError, match="16 features expected"):
            layer(x)
    layer, x = DenseMlp(16), torch.randn(16, 20)
    with pytest.raises(ValueError, match="to be added"):
        native.mix(x, layer.steps(), False, None, torch.randn(20, 16))
    with pytest.raises(ValueError, match="16 features expected"):
        layer.add_natively(x.t(), nn.LayerNorm(20))
    with pytest.raises(ValueError, match="a level takes"):
        native.mix(x, [*layer.steps(), *DenseMlp(8).steps()], False)
    on_meta = DenseMlp(16, device="meta")
    assert on_meta.steps() == []


def test_norms_that_the_kernels_do_not_know():
    assert native.norm_of(nn.LayerNorm(4)) is not None
    for norm in (nn.LayerNorm((2, 4)), nn.LayerNorm(4, elementwise_affine=False), nn.LayerNorm(4, bias=False)):
        assert native.norm_of(norm) is None
    assert native.norm_of(nn.Identity()) is None
    assert native.norm_of(nn.LayerNorm(4).double()) is None


def test_dense_layers_that_were_altered_are_called(calls):
    mlp, linear, x = DenseMlp(16, drop=0.1), Linear(16, 16), torch.randn(2, 5, 16)
    attention = ButterflyAttention(16, ButterflySchedule(16, 4).levels[1], 2).eval()
    tokens = torch.randn(1, 16, 16)
    with torch.no_grad():
        mlp.eval()(x), linear(x), attention(tokens)
        assert calls == [10, 10, 16, 16]
        prune.l1_unstructured(mlp.fc1, "weight", 0.5)
        mlp(x)
        assert calls == [10, 10, 16, 16, 10, 10]  # each Linear by itself, after the hook that makes its weight
        DenseMlp(16, drop=0.1).train().mix(x.flatten(0, 1).t())
        linear.weight.data = linear.weight.data.t()
        linear(x)
        nn.utils.parametrizations.weight_norm(attention.qkv)
        attention(tokens)
        assert calls == [10, 10, 16, 16, 10, 10, 16]  # its projection alone


@pytest.fixture
def calls(monkeypatch):
    """The rows of each call of `native.mix`."""
    seen, mix = [], native.mix

    def count(x, steps, features_last, norm=None, plus=None):
        seen.append(x.shape[1])
        return mix(x, steps, features_last, norm, plus)

    monkeypatch.setattr(native, "mix", count)
    return seen


def _altered():
    def hooked(layer):
        layer.levels[0].fc2.register_forward_hook(lambda *_: None)

    def pruned(layer):
        prune.l1_unstructured(layer.levels[1].fc1, "weight", 0.5)

    def normed(layer):
        nn.utils.parametrizations.weight_norm(layer.levels[0].fc1)

    def replaced(layer):
        layer.levels[1].fc2 = nn.Sequential(layer.levels[1].fc2)

    def strided(layer):
        layer.levels[0].fc1.weight.data = layer.levels[0].fc1.weight.data.mT.contiguous().mT

    def dropping(layer):
        layer.levels[0].drop = nn.Dropout(0.5)
        layer.train()

    return [hooked, pruned, normed, replaced, strided, dropping]


@pytest.mark.parametrize("alter", _altered(), ids=lambda alter: alter.__name__)
def test_what_was_altered_is_called(calls, alter):
    layer, x = ButterflyMlp(16, 4).eval(), torch.randn(20, 16)
    with torch.no_grad():
        layer(x)
        assert calls == [20]
        alter(layer)
        if alter.__name__ != "replaced":  # which has no features_last
            layer(x)
        else:
            assert layer.steps() == []
    assert calls == [20]


@pytest.mark.parametrize(
    ("channels", "size", "side", "stride"),
    [
        (3, (35, 35), 5, 1),
        (3, (35, 35), 7, 1),
        (8, (15, 30), 3, 1),
        (4, (16, 16), 2, 1),
        (4, (8, 16), 2, 4),
        (2, (18, 36), 3, 2),
    ],
)
@torch.no_grad()
def test_patches_are_mixed_where_they_lie(instructions, channels, size, side, stride):
    fold = PatchFold(channels, size, side, stride)
    norm, mlp = nn.LayerNorm(fold.values), DenseMlp(fold.values)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    for images in (1, 3):
        x = torch.randn(images, channels, *size)
        actual = fold.add_natively(x, norm, mlp)
        expected = x + fold.fold(mlp.double()(norm.double()(fold.unfold(x.double()))))
        mlp.float(), norm.float()
        assert actual.is_contiguous()
        assert float((actual - expected).abs().max()) < 2e-6 * float(expected.abs().max())
        assert torch.equal(fold.add_natively(x.contiguous(memory_format=torch.channels_last), norm, mlp), actual)


@torch.no_grad()
def test_patches_that_do_not_fit_are_refused():
    fold = PatchFold(3, (4, 4), 2)
    norm, steps = native.norm_of(nn.LayerNorm(12)), DenseMlp(12).steps()
    with pytest.raises(ValueError, match="a patch has 8 values, the steps take 12, the norm 12"):
        native.mix_patches(torch.randn(1, 2, 4, 4), 2, 1, steps, norm)
    with pytest.raises(ValueError, match="patches that do not fit"):
        native.mix_patches(torch.randn(1, 3, 4, 5), 2, 1, steps, norm)
    hooked = DenseMlp(12)
    hooked.register_forward_hook(lambda *_: None)
    assert fold.add_natively(torch.randn(1, 3, 4, 4), nn.LayerNorm(12), hooked) is None


def test_where_the_kernels_are_not_taken(calls):
    layer, x = ButterflyMlp(16, 4), torch.randn(20, 16)
    layer(x)  # gradients are wanted
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
        layer(x[:0])
        ButterflyMlp(12, 2)(torch.randn(20, 12))  # a shuffle between levels
        layer.bfloat16()(x.bfloat16())
        layer.double()(x.double())
        torch.export.export(layer, (x.double(),))
    assert calls == []


def test_a_compiled_layer_takes_the_kernels():
    layer, x = ButterflyMlp(16, 4), torch.randn(20, 16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    torch.library.opcheck(torch.ops.dimmix.attend.default, (x, x, x, 4, 1, 2))
    weights, numbers = native._lists(DenseMlp(12).steps())
    images, weights = torch.randn(2, 3, 4, 4), [tensor.detach() for tensor in weights]
    operator = torch.ops.dimmix.mix_patches.default
    torch.library.opcheck(operator, (images, 2, 1, weights, numbers, torch.ones(12), torch.zeros(12), 1e-5))


@pytest.mark.parametrize(
    ("name", "macs"), [("butterfly_mixer_paper_d7", 8_686_986), ("vit_butterfly_paper_patch4_d4", 34_600_000)]
)
def test_multiply_accumulates_are_counted(monkeypatch, name, macs):
    model = timm.create_model(name, num_classes=10)
    counted = count_macs(model, (3, 32, 32))
    assert counted == pytest.approx(macs, rel=2e-3)
    monkeypatch.setattr(native, "INSTRUCTIONS", "")
    assert count_macs(model, (3, 32, 32)) == counted


@pytest.mark.parametrize(("wish", "expected"), [("0", ""), ("avx2", "avx2"), ("sse9", native.INSTRUCTIONS)])
def test_the_environment_chooses(wish, expected):
    code = "from dimmix.layers import native; print(native.INSTRUCTIONS)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"DIMMIX_NATIVE": wish}, capture_output=True, text=True
    )
    assert done.stdout == expected + "\n"


@pytest.mark.parametrize(
    "name",
    [
        "butterfly_mixer_nano_32",
        "butterfly_mixer_paper_d7_monarch",
        "butterfly_resnet_nano_32",
        "patch_only_mixer_tiny_32",
        "patch_only_mixer_tiny_32_dense",
        "vit_butterfly_nano_patch4_32",
        "vit_butterfly_paper_patch4_d4",
        "wide_mixer_c192_32",
    ],
)
def test_models_answer_the_same_without(name):
    model, x = timm.create_model(name, num_classes=10).eval(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        by_kernels = model(x)
        with native.switched_off():
            assert (model(x) - by_kernels).abs().max() < 1e-5
        assert torch.equal(model(x), by_kernels)
