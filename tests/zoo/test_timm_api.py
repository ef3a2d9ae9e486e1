"""What users of timm do to a model: adapters and hooks, weight decay, layouts, batches of nothing."""

import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import nn

import dimmix  # noqa: F401
from dimmix.layers import ButterflyLinear, ButterflyMlp, DenseMlp


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


@pytest.mark.parametrize("path", ["blocks.1.attn.qkv", "blocks.1.attn.proj"])
def test_hooks_are_called(path):
    model = timm.create_model("vit_butterfly_nano_patch4_32", num_classes=3).eval()
    seen = []
    model.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    model(torch.randn(2, 3, 32, 32))
    assert len(seen) == 1


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


def test_maps_have_no_layout_of_tokens():
    model = timm.create_model("butterfly_resnet_nano_32", num_classes=3)
    with pytest.raises(ValueError, match=r"output_fmt='NLC' is not 'NCHW'$"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="NLC")
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 128, 8, 8)
    with pytest.raises(ValueError, match="a classifier of maps"):
        model.reset_classifier(3, "")
