"""Our own kernels, on each instruction set that this machine has, against torch's operators in float64."""

import os
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from dimmix.butterfly import ButterflySchedule
from dimmix.layers import (
    ButterflyAttention,
    ButterflyLinear,
    ButterflyMlp,
    DenseMlp,
    Linear,
    MonarchMlp,
    native,
    native_branches,
)
from dimmix.profile import count_macs

pytestmark = pytest.mark.skipif(
    not native.INSTRUCTIONS, reason="no kernels: no compiler when dimmix was installed, or no AVX2"
)

SIZES = [(64, 8), (121, 11), (64, 4), (81, 3), (12, 12), (27, 27), (400, 20)]
ROWS = [1, 15, 16, 33, 64, 70]  # parts of a tile, tiles of both widths, and tiles with a part at the end


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


@torch.no_grad()
def test_attention_refuses_what_is_no_whole_groups():
    layer, q = ButterflyAttention(16, ButterflySchedule(16, 4).levels[1], 2), torch.randn(16, 16)
    for images in (1, 2):  # two images of 24 tokens are three groups of 16, across images
        with pytest.raises(ValueError, match="24 tokens are no groups of 4 that lie 4 apart"):
            layer(torch.randn(images, 24, 16))
    for k, v in ((q[:12], q), (q, q[:, :8])):
        with pytest.raises(ValueError, match=r"not tokens in groups of 4, 4 apart"):
            layer.attend(q, k, v)
    with pytest.raises(RuntimeError, match="dtype"):  # torch's own
        layer.attend(q, q.double(), q)


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
        assert layer(torch.tensor([[-1e4, -1e8, -1e30, 1e30]])).tolist() == [[0, 0, 0, torch.tensor(1e30).item()]]
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

    def count(x, steps, features_last):
        seen.append(x.shape[1])
        return mix(x, steps, features_last)

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


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("butterfly_mixer_paper_d7", 8_686_986),
        ("vit_butterfly_paper_patch4_d4", 34_600_000),
        ("patch_only_mixer_tiny_32", 11_284_560),
        ("patch_only_mixer_tiny_32_dense", 12_508_560),
    ],
)
def test_multiply_accumulates_are_counted(monkeypatch, name, macs):
    model, x = timm.create_model(name, num_classes=10).eval(), torch.randn(2, 3, 32, 32)
    assert count_macs(model, (3, 32, 32)) == pytest.approx(macs, rel=2e-3)
    for whole in (True, False):  # in one call, or layer by layer
        monkeypatch.setattr(native_branches, "LARGEST", 2**20 if whole else 0)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == 4 * count_macs(model, (3, 32, 32))


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch.func's own
@pytest.mark.parametrize("name", ["butterfly_mixer_fast_32", "butterfly_resnet_fast_32"])
def test_what_torch_func_transforms_goes_by_torchs_operators(name):
    torch.manual_seed(0)
    models = [timm.create_model(name, num_classes=3).eval() for _ in range(2)]
    x, tangent = torch.randn(2, 2, 3, 32, 32).unbind(0)
    slope = torch.func.jvp(models[0], (x,), (tangent,))[1]
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters, buffers, x):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(models[0], (x,), (tangent,))[1], slope)
        each = torch.func.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
        torch.testing.assert_close(each, torch.stack([model(x) for model in models]), rtol=1e-4, atol=1e-5)
    assert slope.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "path"),
    [("vit_butterfly_nano_patch4_32", "blocks.0.attn"), ("butterfly_resnet_fast_32", "blocks.0.0.conv1")],
)
@torch.no_grad()
def test_a_forward_that_was_replaced_is_called(name, path):
    model = timm.create_model(name, num_classes=3).eval()
    module, calls = model.get_submodule(path), []
    forward = module.forward
    module.forward = lambda *inputs: calls.append(1) or forward(*inputs)
    model(torch.randn(1, 3, 32, 32))
    assert calls == [1]


@torch.no_grad()
def test_an_adapter_in_place_of_the_map_to_queries_is_called():
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x)

    model = timm.create_model("vit_butterfly_nano_patch4_32", num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    for block in model.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_kernels_are_on_again_when_the_last_who_wanted_them_off_is_done():
    first, second = native.switched_off(), native.switched_off()
    x = torch.randn(2, 2)
    with torch.no_grad():
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert not native.takes(x)
        second.__exit__(None, None, None)
        assert native.takes(x)
