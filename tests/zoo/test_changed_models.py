"""What a user changes in a model is seen by the kernels and the fast paths, or they leave the work to torch."""

import io
import os
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import dimmix
from dimmix.butterfly_resnet import ButterflyResNet
from dimmix.fuse import fuse
from dimmix.layers import BlockLinear, ButterflyMlp, DenseMlp, MonarchMlp
from dimmix.layers.pointwise import Linear


class Half(nn.Module):
    """Stands where a dropout was."""

    def forward(self, x):
        return x * 0.5


class AlwaysDrops(nn.Dropout):
    """Monte Carlo dropout."""

    def forward(self, x):
        return F.dropout(x, self.p, True)


def _model(name, **args):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **args).eval()


def _images(count=2, channels=3, side=32):
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))


def _agree(model, x):
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stand_in", [Half, partial(AlwaysDrops, 0.5)], ids=["half", "always"])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("vit_butterfly_nano_patch4_32", "blocks.0.mlp.drop"),
        ("vit_butterfly_nano_patch4_32", "blocks.0.attn.proj_drop"),
        ("vit_butterfly_nano_patch4_32", "blocks.0.drop_path"),
        ("butterfly_mixer_nano_32", "blocks.0.token_mlp.levels.0.drop"),
        ("butterfly_mixer_paper_d7_monarch", "blocks.0.channel_mlp.drop"),
        ("patch_only_mixer_tiny_32", "blocks.0.0.drop_path"),
        ("butterfly_resnet_nano_32", "blocks.0.0.drop_path"),
    ],
)
def test_what_stands_for_a_dropout_is_called(name, place, stand_in):
    model, x = _model(name), _images()
    with torch.no_grad():
        before = model(x)
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, stand_in().eval())
        after = model(x)
        drawn = not torch.equal(after, model(x))
    assert not torch.allclose(before, after, atol=1e-4)
    assert drawn == (stand_in is not Half)
    if stand_in is Half:
        _agree(model, x)


def _short_bias(model):
    model.blocks[0].mlp.fc1.bias = nn.Parameter(torch.ones(1))  # which torch broadcasts


def _short_convolution_bias(model):
    model.blocks[0][0].conv1.conv.bias = nn.Parameter(torch.ones(1))


def _short_norm(model):
    model.blocks[0].norm1.bias = nn.Parameter(torch.ones(3))


def _other_norm(model):
    model.blocks[0][0].conv1.bn = nn.BatchNorm2d(4).eval()


def _fewer_blocks(model):
    level = model.blocks[0].token_mlp.levels[0]
    level.fc1 = BlockLinear(2, level.radix, 2 * level.radix)


def _narrow_map(model):
    model.blocks[0].mlp.fc1.weight = nn.Parameter(model.blocks[0].mlp.fc1.weight[:, :4].clone())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vit_butterfly_nano_patch4_32", _short_norm),
        ("vit_butterfly_nano_patch4_32", _narrow_map),
        ("butterfly_resnet_nano_32", _other_norm),
        ("butterfly_resnet_nano_32", _short_convolution_bias),
        ("butterfly_mixer_nano_32", _fewer_blocks),
    ],
)
def test_tensors_of_the_wrong_size_are_refused_as_torch_does(name, change):
    model = _model(name)
    change(model)
    with pytest.raises((RuntimeError, ValueError)):
        model(_images())


def test_a_bias_that_torch_broadcasts_is_broadcast():
    model = _model("vit_butterfly_nano_patch4_32")
    _short_bias(model)
    _agree(model, _images())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_butterfly_nano_patch4_32", "butterfly_mixer_nano_32"])
def test_blocks_refuse_another_number_of_tokens_than_they_mix(name):
    blocks = _model(name).blocks
    tokens_first = getattr(blocks, "tokens_first", False)
    channels = _model(name).num_features
    x = torch.randn(2, 50, channels)
    with pytest.raises((RuntimeError, ValueError)):
        blocks(x.transpose(0, 1) if tokens_first else x)


def test_a_resnet_with_an_embedding_of_its_own_uses_it():
    class Doubled(ButterflyResNet):
        def embed(self, x):
            return super().embed(2 * x)

    class Left(ButterflyResNet):
        def leave(self, x):
            return super().leave(3 * x)

    for kind in (Doubled, Left):
        torch.manual_seed(0)
        _agree(kind(width=16, num_classes=7).eval(), _images())
    model = _model("butterfly_resnet_nano_32")
    embed = model.embed
    model.embed = lambda x: embed(2 * x)
    _agree(model, _images())


def test_a_hook_in_a_monarch_mlp_leaves_its_second_product_to_the_kernels():
    torch.manual_seed(0)
    mlp, x, seen = MonarchMlp(64, 8).eval(), torch.randn(10, 64), []
    mlp.fc1.factors[0].register_forward_hook(lambda *args: seen.append(args))
    _agree(mlp, x)
    assert len(seen) == 2


def test_hooks_on_all_modules_see_every_one_of_them():
    model, x, seen = _model("vit_butterfly_nano_patch4_32"), _images(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(x)
        calls = len(seen)
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert len(seen) == 2 * calls > 100


@pytest.mark.parametrize("name", ["butterfly_resnet_nano_32", "patch_only_mixer_tiny_32", "butterfly_mixer_nano_32"])
def test_models_can_be_mapped_over_single_images(name):
    model, x = _model(name), _images()
    with torch.no_grad():
        mapped = torch.func.vmap(lambda image: model(image[None])[0])(x)
        torch.testing.assert_close(mapped, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["butterfly_mixer_nano_32", "patch_only_mixer_fast_32"])
def test_recomputed_blocks_draw_the_same_dropout(name):
    from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt

    model, x = _model(name, proj_drop_rate=0.5).train(), _images(40)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    losses, gradients, before = [], [], use_reentrant_ckpt()
    set_reentrant_ckpt(True)
    try:
        for recompute in (False, True):
            model.set_grad_checkpointing(recompute)
            model.zero_grad()
            torch.manual_seed(2)
            loss = model(x).square().sum()
            loss.backward()
            losses.append(loss.item())
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    finally:
        set_reentrant_ckpt(before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "place"),
    [("butterfly_mixer_nano_32_dense", "blocks.0.token_mlp.fc1"), ("patch_only_mixer_tiny_32", "blocks.0.0.mlp.fc2")],
)
def test_a_linear_without_bias_may_stand_in_an_mlp(name, place):
    model = _model(name)
    parent, _, child = place.rpartition(".")
    old = model.get_submodule(place)
    setattr(model.get_submodule(parent), child, nn.Linear(old.in_features, old.out_features, bias=False))
    _agree(model, _images())


def test_a_norm_of_the_batch_sees_the_whole_batch():
    model = _model("butterfly_mixer_nano_32")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    with dimmix.layers.native.switched_off():
        _agree(model, _images(40))


@torch.no_grad()
@pytest.mark.parametrize("change", ["hook", "parametrized", "pruned"])
def test_what_is_watched_or_made_in_its_call_is_not_folded(change):
    model, x, seen = _model("butterfly_resnet_nano_32"), _images(), []
    layer = model.blocks[0][0].conv1
    if change == "hook":
        layer.bn.register_forward_hook(lambda module, args, y: seen.append(y) or 2 * y)
    elif change == "parametrized":
        parametrize.register_parametrization(layer.conv, "weight", Half())
    else:
        prune.l1_unstructured(layer.conv, "weight", 0.5)
    fused = fuse(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    assert type(fused.blocks[0][0].conv1.bn) is nn.BatchNorm2d
    assert type(fused.blocks[0][0].conv2.bn) is nn.Identity


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch.func's own
@torch.no_grad()
def test_compiled_layers_have_derivatives_and_can_be_mapped():
    torch.manual_seed(0)
    mlp, (x, tangent) = ButterflyMlp(16, 4), torch.randn(2, 5, 3, 16)
    slope = torch.func.jvp(mlp, (x,), (tangent,))[1]
    assert slope.abs().max() > 1e-3
    compiled = torch.compile(mlp, backend="eager")
    within = torch.compile(lambda x, t: torch.func.jvp(mlp, (x,), (t,))[1], backend="eager")
    torch.testing.assert_close(within(x, tangent), slope)
    torch.testing.assert_close(compiled(x), mlp(x))
    torch.testing.assert_close(torch.func.vmap(compiled)(x), mlp(x))
    torch.testing.assert_close(compiled(x), mlp(x))


@torch.no_grad()
def test_a_map_of_sparse_or_negated_inputs_is_torchs():
    linear, x = Linear(4, 4), torch.eye(4)
    torch.testing.assert_close(linear(x.to_sparse()), linear(x))
    torch.testing.assert_close(linear(torch._neg_view(-x)), linear(x))


@torch.no_grad()
def test_what_was_compiled_for_plain_tensors_refuses_dual_ones():
    mlp, x = ButterflyMlp(16, 4), torch.randn(5, 16)
    compiled = torch.compile(mlp, backend="eager")
    torch.testing.assert_close(compiled(x), mlp(x))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="compiled for tensors without tangents"):
        compiled(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", ["vit_butterfly_nano_patch4_32", "butterfly_mixer_nano_32"])
@torch.no_grad()
def test_models_can_be_traced_symbolically(name):
    model, x = timm.create_model(name, num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_mlp_may_give_other_features_than_it_takes():
    mlp = DenseMlp(16)
    mlp.fc2 = Linear(32, 8)
    assert mlp(torch.randn(2, 5, 16)).shape == (2, 5, 8)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="threads are counted in /proc")
def test_a_new_thread_of_python_has_the_number_of_threads_that_was_set():
    code = """
import threading, torch
from dimmix.layers import ButterflyMlp
torch.set_num_threads(1)
tasks = lambda: len(__import__("os").listdir("/proc/self/task"))
def run():
    before, layer, x = tasks(), LAYER, ROWS
    with torch.no_grad():
        layer(x)
    print(tasks() - before)
LAYER, ROWS = ButterflyMlp(64, 8), torch.randn(4096, 64)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "6"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["0"]


def test_one_image_without_a_batch_is_refused():
    for name in ("vit_butterfly_nano_patch4_32", "butterfly_resnet_nano_32"):
        with torch.no_grad(), pytest.raises(AssertionError, match="a batch of them"):
            _model(name)(_images()[0])


def test_a_classifier_reads_open_files_and_asks_for_one_class_at_least():
    classifier = dimmix.Classifier("butterfly_resnet_fast_32.cifar10")
    image = Image.new("RGB", (40, 40), "navy")
    file = io.BytesIO()
    image.save(file, "PNG")
    expected = classifier.predict(image, topk=2)
    file.seek(0)
    assert classifier.predict(file, topk=2) == expected
    with pytest.raises(ValueError, match="topk=-1: at least 1"):
        classifier.predict(image, topk=-1)
    x = torch.zeros(3, 32, 32, requires_grad=True)
    assert len(classifier.predict(x, topk=3)) == 3


@torch.no_grad()
def test_torchs_own_exporter_makes_a_file_that_runs(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x, path = _model("vit_butterfly_fast_patch2_32", depth=2), _images(), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, opset_version=18, input_names=["x"], verbose=False)
    (found,) = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)
