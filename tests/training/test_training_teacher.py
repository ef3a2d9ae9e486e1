import pytest
import timm
import torch

import dimmix.training.teacher  # noqa: F401
from dimmix.profile import count_macs


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("teacher_cnn", 1_978_026, 151_882_240),
        ("teacher_cnn_wide", 6_130_506, 464_196_608),
        ("teacher_cnn_deep", 7_457_610, 563_285_760),
    ],
)
def test_the_teachers_have_the_stated_size(name: str, params: int, macs: int) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == params
    assert count_macs(model, (3, 32, 32)) == macs


@pytest.mark.parametrize("name", ["teacher_cnn", "teacher_cnn_wide", "teacher_cnn_deep"])
def test_the_teachers_take_widths_and_classes(name: str) -> None:
    model = timm.create_model(name, num_classes=100, widths=(8, 16, 24))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_the_deep_teacher_adds_its_last_two_convolutions_to_what_they_read() -> None:
    model = timm.create_model("teacher_cnn_deep", widths=(8, 16, 24), stem=4).double().eval()
    first, norm, pool, gelu, residual = model.block2[0], *(model.block2[i] for i in (2, 1, 3, 4))
    convolutions = [module for module in residual if isinstance(module, torch.nn.Conv2d)]
    assert [conv.weight.shape[:2] for conv in (first, *convolutions)] == [(16, 8), (16, 16), (16, 16)]
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    y = gelu(norm(pool(first(x))))
    z = y
    for module in residual:
        z = module(z)
    torch.testing.assert_close(model.block2(x), y + z)
