"""What users of timm do to a model: adapters and hooks, weight decay, layouts, batches of nothing."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn.utils import prune

import dimmix  # noqa: F401
from dimmix.layers import ButterflyLinear, ButterflyMlp, DenseMlp
from dimmix.vit_butterfly import checkpoint_filter_fn


class Adapter(nn.Module):
    """A Linear with a low-rank term, whose weights pass for its own as in adapters of others."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Parameter(torch.randn(2, linear.in_features))
        self.up = nn.Parameter(torch.randn(linear.out_features, 2))

    weight = property(lambda self: self.linear.weight)
    bias = property(lambda self: self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        merged = nn.Linear(self.linear.in_features, self.linear.out_features)
        merged.load_state_dict({"weight": self.weight + self.up @ self.down, "bias": self.bias})
        return merged


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("vit_butterfly_nano_patch4_32", "blocks.1.attn.qkv"),
        ("butterfly_mixer_nano_32_dense", "blocks.1.token_mlp.fc1"),
        ("butterfly_mixer_nano_32_dense", "blocks.1.token_mlp.fc2"),
    ],
)
def test_an_adapter_in_place_of_a_linear_is_used_and_learns(name, path):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3).eval()
    adapter = Adapter(model.get_submodule(path))
    x = torch.randn(2, 3, 32, 32)
    model.set_submodule(path, adapter.merged())
    expected = model(x)
    model.set_submodule(path, adapter)
    actual = model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    actual.sum().backward()
    assert adapter.up.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("vit_butterfly_nano_patch4_32", "blocks.1.attn.qkv"),
        ("vit_butterfly_nano_patch4_32", "blocks.1.attn.proj"),
        ("butterfly_mixer_nano_32", "blocks.1.token_mlp.levels.1.fc2"),
        ("butterfly_mixer_nano_32_dense", "blocks.1.token_mlp.fc1"),
    ],
)
def test_hooks_are_called(name, path):
    model = timm.create_model(name, num_classes=3).eval()
    seen = []
    model.get_submodule(path).register_forward_hook(lambda *_: seen.append("forward"))
    model.get_submodule(path).register_full_backward_hook(lambda *_: seen.append("backward"))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert seen == ["forward", "backward"]


@pytest.mark.parametrize("name", ["butterfly_mixer_nano_32", "butterfly_resnet_nano_32"])
def test_a_hook_sees_a_batch_whole(name):
    model = timm.create_model(name, num_classes=3).eval()
    seen = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        logits = model(torch.randn(40, 3, 32, 32))
    assert len(seen) == 1
    torch.testing.assert_close(model.forward_head(model.leave(model.norm(seen[0]))), logits)


@pytest.mark.parametrize("rows", [16, 4096])
def test_pruned_blocks_learn_and_are_read_anew_by_every_path(rows):
    torch.manual_seed(0)
    mlp, other = ButterflyMlp(256, 16), ButterflyMlp(256, 16)
    for pruned in (mlp, other):
        for level in pruned.levels:
            prune.random_unstructured(level.fc2, "weight", 0.5)
    x = torch.randn(rows, 256)
    for _ in range(2):  # a mask is multiplied in as the module is called, or the second pass would use a freed graph
        mlp(x).sum().backward()
    mlp.load_state_dict(other.state_dict())
    with torch.no_grad():
        fast = mlp(x)
    torch.testing.assert_close(fast, other(x), rtol=1e-4, atol=1e-5)


def test_a_model_made_without_memory_knows_its_shuffles():
    args = {"embed_dim": 12, "channel_radix": 2, "num_classes": 3}
    model = timm.create_model("butterfly_mixer_nano_32", **args).eval()
    with torch.device("meta"):
        empty = timm.create_model("butterfly_mixer_nano_32", **args).eval()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    for module in empty.modules():  # as timm's reinit_non_persistent_buffers does
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(empty(x), model(x))


def test_depths_of_other_stages_need_as_many_radixes():
    assert timm.create_model("butterfly_resnet_nano_32_dense", depths=(1, 1, 1, 1)).num_classes == 10
    with pytest.raises(ValueError, match="3 numbers for the 4 stages"):
        timm.create_model("butterfly_resnet_nano_32", depths=(1, 1, 1, 1))


def test_a_checkpoint_of_another_size_keeps_no_order_where_there_are_no_positions():
    args = {"pos_embed": False, "token_order": "random", "num_classes": 3}
    small = timm.create_model("vit_butterfly_nano_patch4_32", **args)
    large = timm.create_model("vit_butterfly_nano_patch4_32", img_size=64, **args)
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    assert sorted(large.order.order.tolist()) == list(range(256))
    large.set_input_size(64, (4, 4))
    with pytest.raises(ValueError, match="patch_size=8"):
        large.set_input_size(64, 8)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["butterfly_mixer_nano_32", "butterfly_mixer_paper_d7_monarch", "wide_mixer_c48_32"])
def test_a_batch_of_nothing_gives_nothing(name, grad):
    with torch.set_grad_enabled(grad):
        assert timm.create_model(name, num_classes=3).eval()(torch.zeros(0, 3, 32, 32)).shape == (0, 3)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", [ButterflyMlp, lambda n, radix: ButterflyLinear(n, 2 * n, radix), DenseMlp])
def test_shuffled_levels_of_no_rows(make, grad):
    with torch.set_grad_enabled(grad):
        assert make(12, 2)(torch.zeros(0, 12)).shape[0] == 0


@pytest.mark.parametrize("name", ["sw_mlp_mixer_c48_32", "butterfly_mixer_nano_32", "vit_butterfly_nano_patch4_32"])
def test_weight_decay_leaves_norms_biases_and_positions(name):
    model = timm.create_model(name, num_classes=3)
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert not [name for name in decayed if name.endswith(".bias") or "norm" in name or name == "pos_embed"]
    assert model.no_weight_decay()


def test_dropout_is_in_the_head_and_behind_every_map_of_a_block():
    model = timm.create_model("vit_butterfly_nano_patch4_32", drop_rate=0.3, proj_drop_rate=0.4)
    assert model.head_drop.p == 0.3
    assert {drop.p for block in model.blocks for drop in (block.attn.proj_drop, block.mlp.drop)} == {0.4}


def test_vit_begins_with_narrow_linear_maps():
    torch.manual_seed(0)
    model = timm.create_model("vit_butterfly_nano_patch4_32")
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.blocks[0].attn.qkv.bias.any()


def test_maps_have_no_layout_of_tokens():
    model = timm.create_model("butterfly_resnet_nano_32", num_classes=3)
    with pytest.raises(ValueError, match=r"output_fmt='NLC' is not 'NCHW'$"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NLC")
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 128, 8, 8)
    with pytest.raises(ValueError, match="a classifier of maps"):
        model.reset_classifier(3, "")
