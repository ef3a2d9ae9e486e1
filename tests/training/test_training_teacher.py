from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import dimmix.training.teacher  # noqa: F401
from dimmix.checkpoints import Card
from dimmix.profile import count_macs

RECIPES = Path(__file__).parents[2] / "recipes"


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


@pytest.mark.parametrize("name", ["teacher_cnn", "teacher_cnn_wide", "teacher_cnn_deep"])
def test_the_teachers_of_the_recipes_know_the_images(name: str, cifar_rows: list[tuple[Image.Image, int]]) -> None:
    weights = RECIPES / f"{name}.cifar10.safetensors"
    rows = cifar_rows[::2]
    card = Card.beside(weights)
    assert card
    model = timm.create_model(name, num_classes=10).eval()
    model.load_state_dict(load_file(weights))
    x = torch.from_numpy(np.stack([image for image, _ in rows])).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(card.mean).view(3, 1, 1)) / torch.tensor(card.std).view(3, 1, 1)
    with torch.inference_mode():
        logits = model(x)
    labels = torch.tensor([label for _, label in rows])
    assert torch.nn.functional.cross_entropy(logits, labels) < 0.4
    assert (logits.argmax(1) == labels).sum() >= 27
