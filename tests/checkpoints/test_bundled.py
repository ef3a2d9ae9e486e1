"""The bundled checkpoints, each held to its card and to its stored answers."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from store_logits import STORED, logits

import dimmix
from dimmix.checkpoints import cards, find
from dimmix.checkpoints.publish import write_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
BUNDLED = pytest.mark.parametrize("name", cards())
FIRST = "butterfly_resnet20_convmix_w32.cifar10"


@BUNDLED
def test_answers_as_it_did_when_it_was_stored(name):
    stored = safetensors.torch.load_file(STORED)[name]
    torch.testing.assert_close(logits(name), stored, rtol=1e-3, atol=1e-3)


@BUNDLED
def test_card_tells_the_truth_about_its_file(name):
    card = cards()[name]
    weights = safetensors.torch.load_file(find(name))
    model = timm.create_model(card.architecture, num_classes=len(card.labels))
    model.load_state_dict(weights)
    assert card.params == sum(p.numel() for p in model.parameters())
    assert len(card.per_class_accuracy) == len(card.labels)
    assert sum(card.per_class_accuracy) / len(card.labels) == pytest.approx(card.top1, abs=0.01)
    assert (Path(__file__).parents[2] / card.recipe).exists()


@BUNDLED
def test_the_shipped_photographs_are_named_right(name):
    label = {"cifar10": "cat", "cifar100": "rocket"}[cards()[name].dataset]
    best = dimmix.Classifier(name).predict(EXAMPLES / f"{label}.jpg", topk=1)[0]
    assert best.label == label
    assert best.score > 0.5


def test_the_default_is_the_best_of_a_hundred_classes():
    name = dimmix.Classifier().name
    hundred = [card for card in cards().values() if card.dataset == "cifar100"]
    assert cards()[name].top1 == max(card.top1 for card in hundred)


def test_timm_lists_and_loads_it_by_name_with_and_without_its_tag():
    assert FIRST in timm.list_models("*butterfly*", pretrained=True)
    tagged, plain = (timm.create_model(name, pretrained=True).eval() for name in (FIRST, FIRST.split(".")[0]))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tagged(x), plain(x))


def test_other_channels_and_classes_start_from_the_same_weights():
    colour = timm.create_model(FIRST, pretrained=True)
    other = timm.create_model(FIRST, pretrained=True, in_chans=1, num_classes=5)
    summed = colour.stem[0].conv.weight.sum(1, keepdim=True).half()  # which the file stores, and timm sums in
    torch.testing.assert_close(other.stem[0].conv.weight.half(), summed)
    assert torch.equal(other.blocks[2][2].conv2.conv.weight, colour.blocks[2][2].conv2.conv.weight)
    assert other(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_a_published_folder_loads_through_local_dir(tmp_path):
    write_folder(cards()[FIRST], find(FIRST), tmp_path / "published")
    copy = timm.create_model(f"local-dir:{tmp_path / 'published'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy(x), timm.create_model(FIRST, pretrained=True).eval()(x))
