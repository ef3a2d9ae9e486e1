"""Residual branches by our own kernel, on each instruction set, against torch's operators in float64."""

import pytest
import timm
import torch
from torch import nn

from dimmix.butterfly import ButterflySchedule, square_radix
from dimmix.butterfly_mixer import MixerBlock
from dimmix.layers import ButterflyAttention, ButterflyMlp, DenseMlp, MonarchMlp, PatchFold, native, native_branches
from dimmix.layers.native_branches import ACROSS, CHANNELS, PATCHES, TOKENS, Branch, norm_alone, residual, run
from dimmix.patch_only_mixer import PatchStep
from dimmix.vit_butterfly import Block

pytestmark = pytest.mark.skipif(
    not native.INSTRUCTIONS, reason="no kernels: no compiler when dimmix was installed, or no AVX2"
)

IMAGES = [1, 2, 3, 11]  # fewer than threads, as many, more, and more than the cache of one takes at once


@pytest.fixture(autouse=True)
def two_threads():
    """So that they share one image."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def runs(monkeypatch):
    """The number of branches of each call of the kernel."""
    seen = []

    def count(x, branches):
        seen.append(len(branches))
        return run(x, branches)

    monkeypatch.setattr(native_branches, "run", count)
    return seen


def _drawn(module):
    """A module whose norms are not as they were built."""
    for norm in module.modules():
        if isinstance(norm, nn.LayerNorm):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    return module.eval()


@torch.no_grad()
def _check(module, x, runs, calls=1, most=2e-6):
    """The module by the kernel, in so many calls, is what torch makes of it in float64, and of each image by itself."""
    actual = module(x)
    assert len(runs) == calls
    with native.switched_off():
        expected = module.double()(x.double())
    module.float()
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) < most * float(expected.abs().max())
    return actual


@pytest.mark.parametrize("pre_norm", [True, False])
@pytest.mark.parametrize(("channels", "tokens", "radix"), [(24, 16, 4), (33, 9, 3), (64, 64, 64), (8, 27, 3)])
def test_blocks_of_a_vit(instructions, runs, channels, tokens, radix, pre_norm):
    heads = 4 if channels % 4 == 0 else 3
    for level in ButterflySchedule(tokens, radix).levels:
        block = _drawn(Block(channels, level, heads, 2.0, pre_norm, 0.0, 0.0))
        for images in IMAGES:
            x = torch.randn(images, tokens, channels) + 1
            actual = _check(block, x, runs)
            assert actual.is_contiguous()
            with torch.no_grad():
                assert torch.equal(block(x[-1:]), actual[-1:])
            runs.clear()
    assert [len(block.branches()), block.branches()[0].numbers] == [2 if pre_norm else 4, (radix, level.stride, heads)]


@pytest.mark.parametrize(("channels", "tokens"), [(24, 16), (81, 9), (100, 64), (7, 36)])
@pytest.mark.parametrize("kind", [DenseMlp, ButterflyMlp, MonarchMlp])
def test_blocks_of_a_mixer(instructions, runs, kind, channels, tokens):
    def mlp(n):
        return kind(n) if kind is DenseMlp else kind(n, n if n == 7 else round(n**0.5) if n != 24 else 6)

    block = _drawn(MixerBlock(mlp(tokens), mlp(channels), channels, 0.0))
    for images in IMAGES:
        x = torch.randn(tokens, images, channels) + 1
        _check(block, x, runs)
        runs.clear()
        _check(block, torch.randn(images, tokens, channels).transpose(0, 1), runs)
        runs.clear()


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
def test_steps_of_a_patch_only_mixer(instructions, runs, channels, size, side, stride):
    for across, radix in ((False, None), (True, None), (False, square_radix(channels * side**2))):
        step = _drawn(PatchStep(PatchFold(channels, size, side, stride), radix, 2, across, 0.0, 0.0))
        for images in (1, 3):
            x = torch.randn(images, channels, *size)
            actual = _check(step, x, runs, most=4e-6)
            with torch.no_grad():
                again = step(x.contiguous(memory_format=torch.channels_last))
            assert torch.equal(again, actual)
            runs.clear()


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("channels", [5, 16, 40])
def test_branches_in_a_row_are_one_after_the_other(instructions, count, channels):
    norm, mlp = _drawn(nn.LayerNorm(channels, eps=1e-3)), DenseMlp(channels, ratio=1.5)
    tokens = residual(norm, DenseMlp(12), kind=TOKENS)
    branches = ([residual(norm, mlp), tokens, norm_alone(norm), residual(None, mlp)] * 2)[:count]
    for images in (1, 2, 700):  # in several rounds of what the cache holds
        expected = x = torch.randn(images, 12, channels)
        for branch in branches:
            expected = run(expected, [branch])
        kept = x.clone()
        assert torch.equal(run(x, branches), expected)
        assert torch.equal(x, kept)


@torch.no_grad()
def test_images_too_large_for_the_cache_of_a_thread(instructions):
    norm, mlp, x = _drawn(nn.LayerNorm(130)), DenseMlp(130, ratio=0.1), torch.randn(3, 4100, 130)
    actual = run(x, [residual(norm, mlp), norm_alone(norm)])
    for i in range(3):
        expected = x[i].double()
        expected = norm.double()(expected + mlp.double()(norm.double()(expected)))
        norm.float(), mlp.float()
        assert (actual[i] - expected).abs().max() < 1e-5


@torch.no_grad()
def test_a_norm_alone(instructions):
    for channels in (1, 5, 16, 100):
        norm, x = _drawn(nn.LayerNorm(channels, eps=1e-3)), torch.randn(3, 4, channels) + 5
        expected = norm.double()(x.double())
        assert (run(x, [norm_alone(norm.float())]) - expected).abs().max() < 3e-6


@torch.no_grad()
def test_what_is_not_a_number_stays_in_its_image(instructions):
    block = Block(8, ButterflySchedule(16, 4).levels[1], 2, 2.0, True, 0.0, 0.0).eval()
    x = torch.randn(3, 16, 8)
    x[1, 3, 5] = torch.nan
    assert block(x).isnan().any(2).nonzero().tolist() == [[1, 3], [1, 7], [1, 11], [1, 15]]


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("vit_butterfly_nano_patch4_32", 12),
        ("vit_butterfly_nano_patch4_32_dense", 12),
        ("vit_butterfly_paper_patch4_d4", 16),
        ("butterfly_mixer_nano_32", 12),
        ("butterfly_mixer_paper_d7_monarch", 14),
        ("patch_only_mixer_strided_32", 16),
        ("patch_only_mixer_fast_32", 4),
        ("patch_only_mixer_tiny_32_dense", 20),
        ("wide_mixer_c192_32", 6),
    ],
)
def test_a_model_is_one_call(runs, name, branches):
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(3, *model.default_cfg["input_size"])
    with torch.no_grad():
        model(x)
        assert runs == [branches]
        runs.clear()
        model.forward_intermediates(x)
        assert runs == [branches // len(model.blocks)] * len(model.blocks)


@pytest.mark.parametrize(
    "name", ["vit_butterfly_nano_patch4_32", "butterfly_mixer_nano_32", "patch_only_mixer_tiny_32"]
)
def test_what_watches_a_residual_branch_is_called(runs, name):
    model, x, seen = timm.create_model(name, num_classes=3).eval(), torch.randn(1, 3, 32, 32), []
    with torch.no_grad():
        expected = model(x)
        assert len(runs) == 1
        block = model.blocks[0]
        inner = block[0] if isinstance(block, nn.Sequential) else block
        for part in ("", "norm2", "mlp", "attn", "channel_mlp", "drop_path", "norm", "fold"):
            module = getattr(inner, part, None) if part else block
            if module is not None:
                handle = module.register_forward_hook(lambda module, *_: seen.append(module))
                assert (model(x) - expected).abs().max() < 1e-5
                assert module in seen or part == "fold"  # of which parts are called, not the whole
                handle.remove()
        name = "channel_mlp" if hasattr(inner, "channel_mlp") else "mlp"
        setattr(inner, name, nn.Sequential(getattr(inner, name)))
        runs.clear()
        assert (model(x) - expected).abs().max() < 1e-5
        in_the_others = len(model.blocks[1].branches())
        steps_beside = len(block) - 1 if isinstance(block, nn.Sequential) else 0
        assert runs == [1] * steps_beside + [in_the_others] * (len(model.blocks) - 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["vit_butterfly_nano_patch4_32", "butterfly_mixer_nano_32", "patch_only_mixer_tiny_32", "wide_mixer_c48_32"]
)
def test_a_block_that_does_something_else_is_called(runs, name):
    model, x = timm.create_model(name, num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    block = model.blocks[0][0] if "patch_only" in name else model.blocks[0]
    expected = model.forward_features(x)
    block.__class__ = type(
        "Doubling", (type(block),), {"forward": lambda self, x: 2 * super(type(self), self).forward(x)}
    )
    runs.clear()
    assert (model.forward_features(x) - expected).abs().max() > 0.1
    assert len(runs) == len(model.blocks) - 1 + (len(model.blocks[0]) - 1 if "patch_only" in name else 0)


@torch.no_grad()
def test_attention_that_does_something_else_is_called(runs):
    model, x = timm.create_model("vit_butterfly_nano_patch4_32", num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    expected = model(x)
    attn = model.blocks[0].attn
    attn.__class__ = type("Nothing", (ButterflyAttention,), {"forward": lambda self, x: torch.zeros_like(x)})
    assert (model(x) - expected).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("butterfly_mixer_nano_32", "blocks.1.channel_mlp"),
        ("butterfly_mixer_nano_32", "blocks.1.channel_mlp.levels.1"),
        ("butterfly_mixer_nano_32_dense", "blocks.1.channel_mlp"),
        ("butterfly_mixer_paper_d7_monarch", "blocks.1.channel_mlp"),
        ("butterfly_mixer_paper_d7_monarch", "blocks.1.channel_mlp.fc2"),
        ("butterfly_mixer_paper_d7_monarch", "blocks.1.channel_mlp.fc2.factors.0"),
        ("vit_butterfly_nano_patch4_32", "blocks.1.mlp"),
        ("patch_only_mixer_tiny_32", "blocks.1.0.mlp"),
    ],
)
def test_a_mixer_that_does_something_else_is_called(name, path):
    model, x = timm.create_model(name, num_classes=3).eval(), torch.randn(1, 3, 32, 32)
    mixer, plain = model.get_submodule(path), model.forward_features(x)

    class Doubling(type(mixer)):
        def forward(self, *args):
            return 2 * super().forward(*args)

        def mix(self, *args):
            return 2 * super().mix(*args)

    mixer.__class__ = Doubling
    actual = model.forward_features(x)
    with native.switched_off():
        expected = model.forward_features(x)
    assert (actual - plain).abs().max() > 1e-4
    assert (actual - expected).abs().max() < 1e-5


def test_where_the_kernel_is_not_taken(runs, monkeypatch):
    level = ButterflySchedule(16, 4).levels[1]
    block, x = Block(8, level, 2, 2.0, True, 0.1, 0.1), torch.randn(2, 16, 8)
    block.eval()(x)  # gradients are wanted
    with torch.no_grad():
        block.train()(x)
        block.eval()
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
        monkeypatch.setattr(native_branches, "LARGEST", 16 * 8 - 1)
        expected = block(x)
        assert runs == []
        monkeypatch.setattr(native_branches, "LARGEST", 16 * 8)
        assert (block(x) - expected).abs().max() < 1e-6
        assert runs == [2]
        block.norm1 = nn.LayerNorm(8, elementwise_affine=False)
        block(x)
        monkeypatch.setattr(native, "LONGEST", 3)
        Block(8, level, 2, 2.0, True, 0.0, 0.0).eval()(x)
    assert runs == [2]


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    mlp, norm, x = DenseMlp(16), nn.LayerNorm(16), torch.randn(2, 12, 16)
    attention = ButterflyAttention(16, ButterflySchedule(16, 4).levels[1], 2).eval()
    with pytest.raises(ValueError, match="20 features expected, the input has 16"):
        run(x, [residual(nn.LayerNorm(20), mlp)])
    for branch in (
        residual(norm, mlp, kind=TOKENS),  # of 12
        residual(norm, attention),  # to 16 tokens, or a multiple
        residual(norm, DenseMlp(8)),
        Branch(CHANNELS, None, ()),
        residual(norm, attention, numbers=(4, 1, 3)),  # heads
        Branch(7, None, mlp.steps()),
    ):
        with pytest.raises(ValueError, match="a branch does not fit the images"):
            run(x, [residual(norm, mlp), branch])
    with pytest.raises(ValueError, match="a branch of tokens on an input of 4 axes"):
        run(x.view(2, 3, 4, 16), [residual(norm, mlp)])
    with pytest.raises(ValueError, match="a branch of patches on an input of 3 axes"):
        run(x, [residual(norm, mlp, kind=PATCHES, numbers=(1, 1, 12))])
    patches, images = residual(nn.LayerNorm(12), DenseMlp(12), kind=PATCHES), torch.randn(1, 3, 4, 4)
    run(images, [patches._replace(numbers=(2, 2, 4))])
    run(images, [residual(nn.LayerNorm(12), DenseMlp(4), kind=ACROSS, numbers=(2, 2, 4))])
    with pytest.raises(ValueError, match="a branch does not fit the images"):
        run(images, [patches._replace(kind=ACROSS, numbers=(2, 2, 4))])
    for numbers in ((2, 2, 8), (2, 4, 4), (2, 0, 4), (-2, -1, 4)):
        with pytest.raises(ValueError, match="a branch does not fit the images"):
            run(images, [patches._replace(numbers=numbers)])


def test_the_operator_is_one_of_torch_s():
    with torch.no_grad():
        branches = [residual(nn.LayerNorm(12), DenseMlp(12)), norm_alone(nn.LayerNorm(12))]
    weights, shapes = native.lists_of(branches[0].steps)
    norms = [torch.ones(12), torch.zeros(12)] * 2
    arguments = ([0, 1, 0, 0, 0, 0, 0, 0, 0, 0], [w.detach() for w in weights], shapes, norms, [1e-5, 1e-5])
    torch.library.opcheck(torch.ops.dimmix.branches.default, (torch.randn(2, 3, 12), *arguments))
    blocks = native_branches.Blocks(Block(8, ButterflySchedule(16, 4).levels[1], 2, 2.0, True, 0.0, 0.0)).eval()
    compiled, x = torch.compile(blocks, backend="eager", fullgraph=True), torch.randn(2, 16, 8)
    with torch.no_grad():
        assert torch.equal(compiled(x), blocks(x))
