import copy

import pytest
import timm
import torch
from torch import nn

from dimmix.profile import count_macs
from dimmix.training.grouped import DenseGroups, train_groups_densely

GPU, CPU = torch.device("cuda"), torch.device("cpu")  # only named


@pytest.mark.parametrize(("groups", "stride", "bias"), [(2, 1, False), (4, 2, True)])
def test_groups_trained_densely_have_results_and_gradients_of_a_grouped_convolution(
    groups: int, stride: int, bias: bool
) -> None:
    torch.manual_seed(0)
    reference = nn.Conv2d(16, 24, 3, stride, 1, groups=groups, bias=bias, dtype=torch.float64)
    reference.to(memory_format=torch.channels_last)
    dense = copy.deepcopy(reference)
    train_groups_densely(dense, GPU)
    assert type(dense) is DenseGroups
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(3, 16, 9, 9, dtype=dtype, requires_grad=True)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-4
        found = []
        for layer in (reference.to(dtype), dense.to(dtype)):
            y = layer(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
        for mine, expected in zip(found[1], found[0], strict=True):
            assert torch.allclose(mine, expected, rtol=tolerance, atol=tolerance)


def test_weights_multiply_accumulates_and_evaluation_stay_those_of_the_model() -> None:
    model = timm.create_model("butterfly_resnet_tiny_r64_32", num_classes=10).eval()
    trained = copy.deepcopy(model)
    train_groups_densely(trained, GPU)
    assert sum(isinstance(module, DenseGroups) for module in trained.modules()) == 16
    assert trained.state_dict().keys() == model.state_dict().keys()
    assert count_macs(trained.train(), (3, 32, 32)) == count_macs(model, (3, 32, 32)) == 256_051_712
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(trained.eval()(x), model(x))


def test_many_groups_depthwise_and_convolutions_of_a_cpu_stay() -> None:
    layers = nn.Sequential(
        nn.Conv2d(16, 16, 3, groups=8), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3, groups=2, padding_mode="circular")
    )
    train_groups_densely(layers, GPU)
    few = nn.Conv2d(16, 16, 3, groups=2)
    train_groups_densely(few, CPU)
    assert all(type(layer) is nn.Conv2d for layer in [*layers, few])
