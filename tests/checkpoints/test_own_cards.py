"""A model of a folder or a repository has the card that came with its weights, and no bundled one of the same name."""

import shutil
from dataclasses import asdict

import numpy as np
import pytest
import safetensors.torch
import timm
from toy_checkpoint import make_card

import dimmix  # noqa: F401  registers the architectures
from dimmix.checkpoints import publish
from dimmix.checkpoints.download import download
from dimmix.export import export_model
from dimmix.runtime import load_model

ARCHITECTURE, ARGS = "vit_butterfly_nano_patch4_32", {"depth": 2}
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.fixture
def card(bundle, tmp_path):
    """Of a published folder, `tmp_path / "out"`; of the same name as a bundled checkpoint of other weights."""
    content = safetensors.torch.save(timm.create_model(ARCHITECTURE, num_classes=10, **ARGS).state_dict())
    bundle(content[:-4] + b"\0\0\0\0", architecture=ARCHITECTURE, tag="mine", top1=12.0)
    made = make_card(content, architecture=ARCHITECTURE, tag="mine", model_args=ARGS, input_size=(3, 32, 32))
    (tmp_path / made.file).write_bytes(content)
    publish.write_folder(made, tmp_path / made.file, tmp_path / "out")
    return {**asdict(made), "file": "model.safetensors"}


def test_of_a_folder(card, tmp_path):
    _, spec = load_model(f"local-dir:{tmp_path / 'out'}")
    assert spec.card == card


def test_weights_that_are_not_the_cards_have_none(card, tmp_path):
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert load_model(f"local-dir:{tmp_path / 'out'}")[1].card == {}
    (tmp_path / "out" / "model.json").write_text('{"of": "another program"}')
    assert load_model(f"local-dir:{tmp_path / 'out'}")[1].card == {}


def test_of_a_repository_and_of_its_copy(hub, card, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    hub.publish("someone/mine", files)
    hub.publish("someone/bare", {name: files[name] for name in ("model.safetensors", "config.json")})
    assert load_model("hf-hub:someone/bare")[1].card == {}
    download("hf-hub:someone/mine", tmp_path / "copies")
    shutil.rmtree(tmp_path / "out")
    hub.stop()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("hf-hub:someone/mine", f"local-dir:{tmp_path / 'copies' / 'someone--mine'}"):
        assert load_model(name)[1].card == card


def test_a_folder_with_arguments_of_its_own_is_exported(card, tmp_path):
    model, spec = load_model(f"local-dir:{tmp_path / 'out'}")
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    exported = export_model(model, spec, "safetensors", tmp_path / "copy.safetensors", images, atol=1e-5)
    assert exported.difference < 1e-5
    again, spec = load_model(ARCHITECTURE, checkpoint=tmp_path / "copy.safetensors")
    assert len(again.blocks) == 2
    assert spec.card["top1"] == card["top1"] == 91.5
