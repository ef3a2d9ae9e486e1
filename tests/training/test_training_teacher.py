import pytest
import timm
import torch

import dimmix.training.teacher  # noqa: F401
from dimmix.profile import count_macs


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("teacher_cnn", 1_978_026, 151_882_240), ("teacher_cnn_wide", 6_130_506, 464_196_608)],
)
def test_the_teachers_have_the_stated_size(name: str, params: int, macs: int) -> None:
    model = timm.create_model(name, num_classes=10).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == params
    assert count_macs(model, (3, 32, 32)) == macs


@pytest.mark.parametrize("name", ["teacher_cnn", "teacher_cnn_wide"])
def test_the_teachers_take_widths_and_classes(name: str) -> None:
    model = timm.create_model(name, num_classes=100, widths=(8, 16, 24))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
