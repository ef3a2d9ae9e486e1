import timm
import torch

import dimmix.training.teacher  # noqa: F401
from dimmix.profile import count_macs


def test_the_teacher_has_the_stated_size() -> None:
    model = timm.create_model("teacher_cnn", num_classes=10).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == 1_978_026
    assert count_macs(model, (3, 32, 32)) == 151_882_240


def test_the_teacher_takes_widths_and_classes() -> None:
    model = timm.create_model("teacher_cnn", num_classes=100, widths=(8, 16, 24))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 100)
