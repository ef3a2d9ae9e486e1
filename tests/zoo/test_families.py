import itertools
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F

import dimmix
from dimmix.layers import native
from dimmix.registry import dense_twin

PAPER = {
    "vit_butterfly_paper_patch4_d4": 618_122,
    "vit_butterfly_paper_patch4_d8": 1_148_042,
    "vit_butterfly_paper_patch2_d4": 298_570,
    "vit_butterfly_paper_patch1_d4": 789_514,
    "butterfly_mixer_paper_d7": 197_745,
    "butterfly_mixer_paper_d7_monarch": 193_860,
    "butterfly_mixer_paper_d7_dense": 615_288,
    "patch_only_mixer_paper_d7": 807_082,
    "patch_only_mixer_paper_d10": 1_137_220,
    "butterfly_resnet20_convmix_w32": 129_578,
    "butterfly_resnet20_blockmix_w32": 140_202,
    "butterfly_resnet20_convmix_w64": 360_266,
    "butterfly_resnet20_blockmix_w64": 331_594,
    "butterfly_resnet26_blockmix_w64": 884_810,
}

FAMILIES = (
    "vit_butterfly_nano_patch4_32",
    "butterfly_mixer_nano_32",
    "patch_only_mixer_tiny_32",
    "butterfly_resnet_nano_32",
)


def _create(name, **kwargs):
    return timm.create_model(name, **kwargs).eval()


def _image(model, batch=2):
    return torch.randn(batch, *model.default_cfg["input_size"])


@pytest.mark.parametrize(("name", "params"), PAPER.items())
def test_parameter_counts_of_the_paper(name, params):
    model = _create(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize(
    "order",
    [
        "import dimmix, timm",
        "import timm, dimmix",
        "from timm import create_model; import dimmix, timm",
        "from dimmix.trunk import Trunk; import timm",
        "from dimmix.pretrained import build; import timm",
        "from dimmix.butterfly_mixer import ButterflyMixer; import timm",
        "import dimmix, importlib.util as u; assert u.find_spec('timm') and u.find_spec('timm'); import timm",
    ],
)
def test_families_register_whichever_import_comes_first(order):
    code = f"{order}; print(timm.create_model('butterfly_resnet20_convmix_w32').num_classes)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "10\n"


def test_importing_dimmix_imports_neither_torch_nor_timm():
    code = "import dimmix, dimmix.checkpoints, sys; print([m for m in ('torch', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_no_name_of_ours_is_one_of_timms():
    code = "import timm; print('\\n'.join(timm.list_models()))"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(theirs) > 1000
    assert not set(theirs) & set(dimmix.list_models())


def test_every_sparse_variant_has_a_dense_twin_and_each_family_every_size():
    no_twin = ("wide_", "rp_", "sw_", "resnet20_")
    names = {name for name in dimmix.list_models() if not name.startswith(no_twin)}
    assert all(dense_twin(name) in names for name in names if not name.endswith("_dense"))
    for family in ("butterfly_resnet", "vit_butterfly", "butterfly_mixer", "patch_only_mixer"):
        for size in (32, 64, 224):
            assert any(name.startswith(family) and name.endswith(f"_{size}") for name in names)


def test_list_models_filters_by_wildcard():
    assert set(dimmix.list_models("*butterfly*")) == set(timm.list_models("*butterfly*"))
    assert dimmix.list_models("vit_butterfly_paper*_d8") == ["vit_butterfly_paper_patch4_d8"]


def test_dense_twin_has_the_shape_of_its_sparse_model_and_more_weights():
    sparse, dense = _create("butterfly_resnet_nano_32"), _create("butterfly_resnet_nano_32_dense")
    x = _image(sparse)
    assert sparse.forward_features(x).shape == dense.forward_features(x).shape
    assert sum(p.numel() for p in dense.parameters()) > 4 * sum(p.numel() for p in sparse.parameters())


def test_the_dense_twin_of_variants_of_one_shape_is_that_of_the_first():
    assert dense_twin("butterfly_resnet20_convmix_w32.cifar10") == "butterfly_resnet20_convmix_w32_dense"
    assert dense_twin("butterfly_resnet20_blockmix_w32") == "butterfly_resnet20_convmix_w32_dense"
    assert dense_twin("butterfly_mixer_paper_d7_monarch") == "butterfly_mixer_paper_d7_dense"
    assert dense_twin("butterfly_resnet20_convmix_w32_dense") is None
    assert dense_twin("resnet18") is None

    first, second = _create("butterfly_resnet20_convmix_w32_dense"), _create("butterfly_resnet20_blockmix_w32_dense")
    second.load_state_dict(first.state_dict())
    x = _image(first)
    torch.testing.assert_close(second(x), first(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["vit_butterfly_nano_patch4_32", "butterfly_mixer_nano_32", "butterfly_resnet_nano_32"]
)
def test_images_of_a_batch_do_not_mix(name):
    model = _create(name)
    x = _image(model, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]), rtol=1e-4, atol=1e-5)


def test_stochastic_depth_drops_whole_images_in_the_mixer():
    model = timm.create_model("butterfly_mixer_nano_32", drop_path_rate=0.5).train()
    block = model.blocks[-1]
    x = torch.randn(64, 40, 192)
    changed = (block(x) != x).flatten(2).any(2)  # (tokens, images)
    assert (changed == changed[0]).all()
    assert 0 < changed[0].sum() < 40


@pytest.mark.parametrize("name", FAMILIES)
def test_stochastic_depth_grows_from_nothing_to_its_rate_at_the_last_block(name):
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.2)
    paths = [module.drop_path for module in model.blocks.modules() if hasattr(module, "drop_path")]
    rates = [getattr(path, "drop_prob", 0.0) for path in paths]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0, pytest.approx(0.2))


@pytest.mark.parametrize(
    "name", ["vit_butterfly_nano_patch4_32", "patch_only_mixer_tiny_32", "butterfly_resnet_nano_32"]
)
def test_stochastic_depth_leaves_a_share_of_the_images_as_they_were(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.5).train()
    last = [module for module in model.blocks.modules() if hasattr(module, "drop_path")][-1]
    seen = []
    last.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(torch.randn(64, 3, 32, 32))
    [(x, y)] = seen
    kept = last.shortcut(x).relu() if hasattr(last, "shortcut") else x
    assert 5 < (y == kept).flatten(1).all(1).sum() < 59


def test_random_token_order_is_kept_by_checkpoints_and_undone_in_features():
    model = _create("vit_butterfly_nano_patch4_32", token_order="random", seed=3)
    other = _create("vit_butterfly_nano_patch4_32", token_order="random", seed=4)
    assert not torch.equal(model.order.order, other.order.order)
    other.load_state_dict(model.state_dict())
    x = _image(model)
    torch.testing.assert_close(other(x), model(x))
    raster = _create("vit_butterfly_nano_patch4_32")
    raster.load_state_dict(model.state_dict(), strict=False)
    raster.blocks = model.blocks = torch.nn.Sequential()
    torch.testing.assert_close(model.forward_features(x), raster.forward_features(x))


def test_vit_takes_another_input_size():
    model = _create("vit_butterfly_nano_patch4_32")
    model.set_input_size(img_size=(64, 48))
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 10)
    assert {block.attn.radix for block in model.blocks} == {16}  # 192 tokens
    assert [block.attn.level[2] for block in model.blocks] == [1, 12] * 3  # strides


def test_positions_of_vit_keep_their_places_in_images_of_another_size():
    model = _create("vit_butterfly_nano_patch4_32")
    with torch.no_grad():  # a ramp from left to right over the eight columns
        model.pos_embed.copy_(torch.arange(8.0).repeat(8)[None, :, None])
    overlay = {"state_dict": model.state_dict()}
    loaded = _create("vit_butterfly_nano_patch4_32", pretrained=True, img_size=64, pretrained_cfg_overlay=overlay)
    model.set_input_size(64)
    for resized in (model, loaded):
        assert resized.pos_embed.shape == (1, 256, 96)
        rows = resized.pos_embed[0, :, 0].view(16, 16)
        assert torch.allclose(rows, rows[:1], atol=1e-4)
        assert (rows.diff() > 0).all()
        assert rows[0, 0] < 1
        assert rows[0, -1] > 6


def test_vit_refuses_what_it_cannot_become():
    with pytest.raises(ValueError, match="flattened head has a weight for every position"):
        _create("vit_butterfly_paper_patch4_d4").set_input_size(img_size=64)
    with pytest.raises(ValueError, match="patch_size=4 does not divide the image size 30x30"):
        _create("vit_butterfly_nano_patch4_32", img_size=30)
    with pytest.raises(ValueError, match="radix 7 does not divide n=64; nearest radices that do: 4 and 8"):
        _create("vit_butterfly_nano_patch4_32", radix=7)
    model = _create("vit_butterfly_nano_patch4_32", radix=8)
    x = _image(model)
    before = model(x)
    with pytest.raises(ValueError, match="radix 8 does not divide n=81"):
        model.set_input_size(36)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_butterfly_nano_patch4_32", {"mixing": "conv"}, "mixing='conv' is not one of 'butterfly', 'dense'"),
        ("vit_butterfly_nano_patch4_32", {"token_order": "hilbert"}, "token_order='hilbert'"),
        ("butterfly_mixer_nano_32", {"mixing": "conv"}, "is not one of 'butterfly', 'monarch', 'dense'"),
        ("patch_only_mixer_tiny_32", {"mixing": "conv"}, "mixing='conv' is not one of 'butterfly', 'dense'"),
        ("patch_only_mixer_tiny_32", {"patch_sizes": (4,)}, "patch_size=4 does not divide the image size 15x15"),
        ("patch_only_mixer_fast_32", {"patch_radix": 48}, "radix 48 does not divide n=400"),
        ("patch_only_mixer_strided_32", {"grid_size": 12}, "have no chain of strides over grid_size=12"),
        ("butterfly_resnet_nano_32", {"mixing": "monarch"}, "is not one of 'conv', 'block', 'dense'"),
        ("butterfly_resnet_nano_32", {"radix": (7, 7, 7)}, "radix 7 does not divide n=32"),
        ("butterfly_resnet_nano_32", {"global_pool": "median"}, "global_pool='median' is not one of"),
        ("butterfly_resnet_nano_32", {"global_pool": "flatten"}, "global_pool='flatten': a classifier of maps"),
        ("butterfly_resnet_nano_32", {"global_pool": ""}, "global_pool='': a classifier of maps"),
        ("butterfly_resnet20_blockmix_w32", {"radix": (8, 8, 24)}, "radix 24 does not divide n=64"),
        ("butterfly_resnet20_convmix_w32", {"first_radix": (5, 8, 8)}, "first_radix 5 does not divide the 32 and 32"),
        ("vit_butterfly_nano_patch4_32", {"img_size": 4}, "n=1 is nothing to mix"),
    ],
)
def test_bad_options_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        _create(name, **kwargs)


def test_images_of_the_wrong_size_are_refused():
    with pytest.raises(AssertionError, match="image height 36 does not match"):
        _create("vit_butterfly_nano_patch4_32")(torch.randn(1, 3, 36, 32))


def test_patch_only_mixer_takes_grey_images_as_three_equal_channels():
    colour = _create("patch_only_mixer_paper_d7", num_classes=10)
    overlay = {"state_dict": colour.state_dict()}
    grey = _create("patch_only_mixer_paper_d7", pretrained=True, in_chans=1, pretrained_cfg_overlay=overlay)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)))


def test_patch_only_mixer_reaches_every_pixel_and_one_step_does_not():
    model = _create("patch_only_mixer_tiny_32", depth=3).double()

    def reached(blocks):
        x = torch.zeros(1, 8, 15, 15, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            start = torch.randn_like(x)
        blocks(x + start)[0, 0, 7, 7].backward()
        return (x.grad != 0).all(1).double().mean().item()

    assert reached(model.blocks[0][0]) == pytest.approx(9 / 225)
    assert reached(model.blocks) > reached(model.blocks[:1]) > 9 / 225
    dense = _create("patch_only_mixer_tiny_32_dense").double()
    assert reached(dense.blocks[0][0]) == 1.0


def test_a_round_of_strided_patches_reaches_every_pixel_and_fewer_steps_do_not():
    model = _create("patch_only_mixer_strided_32").double()
    steps = model.blocks[0]
    assert [step.fold.stride for step in steps] == [1, 2, 4, 8]
    for count, share in ((1, 4 / 256), (2, 16 / 256), (3, 64 / 256), (4, 1.0)):
        x = torch.randn(1, 12, 16, 16, dtype=torch.float64, requires_grad=True)
        steps[:count](x)[0, 0, 7, 7].backward()
        assert (x.grad != 0).all(1).double().mean().item() == share


def test_a_butterfly_of_small_mlps_mixes_the_values_of_each_patch():
    """Against loops over patches, levels and blocks (Dimension Mixer, sections 4.1 and 4.3)."""
    step = _create("patch_only_mixer_fast_32").double().blocks[1][0]  # pixels four apart
    x = torch.randn(1, 25, 16, 16, dtype=torch.float64)
    expected = x.clone()
    for row, column in itertools.product(range(4), range(4)):
        patch = x[0, :, row::4, column::4].flatten()
        values = step.norm(patch)
        for level, (mlp, stride) in enumerate(zip(step.mlp.levels, (1, 5), strict=True)):
            mixed = torch.empty_like(values)
            for block in range(5):
                members = range(80 * block, 80 * block + 80) if stride == 1 else range(block, 400, 5)
                hidden = F.gelu(mlp.fc1.weight[block] @ values[members] + mlp.fc1.bias[block])
                mixed[members] = mlp.fc2.weight[block] @ hidden
                mixed[members] += values[members] if level == 0 else mlp.fc2.bias[block]
            values = mixed
        expected[0, :, row::4, column::4] += values.view(25, 4, 4)
    torch.testing.assert_close(step(x), expected, rtol=1e-10, atol=1e-10)


def test_a_head_of_patches_pools_their_values_after_a_norm():
    model = _create("patch_only_mixer_strided_tiny_32").double()
    assert model.num_features == 4 * 32
    torch.nn.init.normal_(model.norm.weight)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    mixed = model.blocks(model.stem(x))
    patches = mixed.reshape(2, 32, 8, 2, 8, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 64, 128)
    normed = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    pooled = (normed * model.norm.weight + model.norm.bias).mean(1)
    torch.testing.assert_close(model(x), pooled @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("pool", ["avg", "max", "flatten", ""])
def test_pooling(pool):
    model = _create("vit_butterfly_nano_patch4_32", num_classes=0, global_pool=pool)
    features = model.forward_features(_image(model))
    expected = {"avg": features.mean(1), "max": features.amax(1), "flatten": features.flatten(1), "": features}[pool]
    torch.testing.assert_close(model.forward_head(features), expected)
    assert model.num_features == model.head_hidden_size == expected.shape[1 if pool else 2]


def test_intermediates_in_both_layouts():
    model = _create("butterfly_mixer_nano_32")
    x = _image(model)
    maps = model.forward_intermediates(x, indices=[1], intermediates_only=True)[0]
    tokens = model.forward_intermediates(x, indices=[1], output_fmt="NLC", intermediates_only=True)[0]
    assert maps.shape == (2, 192, 8, 8)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), tokens)
    with pytest.raises(ValueError, match="output_fmt='NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("name", FAMILIES)
def test_models_export_with_a_dynamic_batch(name):
    model = _create(name)
    program = torch.export.export(model, (_image(model),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    x = _image(model, batch=5)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_data_config_comes_from_the_cfg():
    config = timm.data.resolve_model_data_config(_create("butterfly_resnet20_convmix_w32"))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("training", [False, True])
def test_images_in_tiles_are_what_the_whole_batch_is(training):
    model = _create("butterfly_resnet_nano_32").train(training)
    x = torch.randn(40, 3, 32, 32)
    model.images_per_tile = 16
    with torch.no_grad(), native.switched_off():
        tiled = model.forward_features(x)
        model.images_per_tile = 0
        torch.testing.assert_close(tiled, model.forward_features(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batch_norms_in_training_mode_see_the_whole_batch_at_once():
    model = _create("butterfly_resnet_nano_32")
    model.images_per_tile = 16
    norms = [module.train() for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with native.switched_off():
        model(torch.randn(40, 3, 32, 32))
    assert {norm.num_batches_tracked.item() for norm in norms} == {1}
