"""timm's `pretrained=True` through the one door, in every way timm's users ask for it."""

import json
import sys
import types

import pytest
import safetensors.torch
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from toy_checkpoint import make_card, weights

from dimmix import pretrained
from dimmix.checkpoints import CheckpointError, card
from tests.hub_server import flip_bit

CFG = {"num_classes": 10, "input_size": (3, 32, 32), "pool_size": None, "first_conv": "conv1", "classifier": "fc"}


def make_entry_point(name: str):
    def entry_point(pretrained_: bool = False, **kwargs):
        layout = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}
        return pretrained.build(ResNet, name, kwargs.pop("pretrained", pretrained_), **{**layout, **kwargs})

    entry_point.__name__, entry_point.__module__ = name, "toy_family"
    return entry_point


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A family registered with timm as ours are: `toy_net` with two bundled checkpoints, `toy_net_bare` with none."""
    folder = tmp_path_factory.mktemp("bundled")
    family = sys.modules["toy_family"] = types.ModuleType("toy_family")
    states = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(card, "FOLDER", folder)
        for tag, classes in (("cifar100", 100), ("cifar10", 10)):
            torch.manual_seed(classes)
            model = ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=classes)
            states[tag] = model.state_dict()
            content = safetensors.torch.save(states[tag])
            made = make_card(content, tag=tag, labels=tuple(f"class {i}" for i in range(classes)), dataset=tag)
            (folder / made.file).write_bytes(content)
            made.write(folder / f"{made.name}.json")
        family.default_cfgs = pretrained.default_cfgs({"toy_net": CFG, "toy_net_bare": CFG})
        for name in ("toy_net", "toy_net_bare"):
            timm.models.register_model(make_entry_point(name))
        yield states
    del sys.modules["toy_family"]


def assert_same(model, state):
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_timm_lists_the_checkpoints_and_the_bare_architecture(states):
    assert timm.list_models("toy_net*", pretrained=True) == ["toy_net.cifar10", "toy_net.cifar100"]
    assert timm.list_models("toy_net*") == ["toy_net", "toy_net_bare"]


def test_a_tag_chooses_the_checkpoint_and_no_tag_means_the_first(states):
    assert_same(timm.create_model("toy_net", pretrained=True), states["cifar10"])
    assert_same(timm.create_model("toy_net.cifar10", pretrained=True), states["cifar10"])
    assert_same(timm.create_model("toy_net.cifar100", pretrained=True), states["cifar100"])


def test_the_cards_preprocessing_and_labels_reach_timm(states):
    model = timm.create_model("toy_net.cifar10", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert (config["mean"], config["interpolation"]) == ((0.5, 0.5, 0.5), "bilinear")
    assert model.pretrained_cfg["label_names"][3] == "class 3"
    assert model.pretrained_cfg["hf_hub_id"] == "dimmix/toy_net.cifar10"


def test_without_pretrained_nothing_is_looked_for(states, monkeypatch):
    monkeypatch.setattr(pretrained, "find", lambda *_, **__: pytest.fail("find was called"))
    assert timm.create_model("toy_net").num_classes == 10


def test_another_number_of_classes_keeps_all_but_the_classifier(states):
    model = timm.create_model("toy_net", pretrained=True, num_classes=5)
    assert model.fc.out_features == 5
    assert torch.equal(model.conv1.weight, states["cifar10"]["conv1.weight"])


def test_grey_images_sum_the_first_convolution_over_colours(states):
    model = timm.create_model("toy_net", pretrained=True, in_chans=1)
    expected = states["cifar10"]["conv1.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(model.conv1.weight, expected)


def test_features_only(states):
    x = torch.zeros(2, 3, 32, 32)
    last = timm.create_model("toy_net", pretrained=True, features_only=True)
    assert [tuple(features.shape[1:]) for features in last(x)] == [(8, 4, 4), (8, 2, 2), (8, 1, 1)]
    model = timm.create_model("toy_net", pretrained=True, features_only=True, out_indices=(0, 1, 2, 3, 4))
    shapes = [tuple(features.shape[1:]) for features in model(x)]
    assert shapes == [(64, 16, 16), (8, 8, 8), (8, 4, 4), (8, 2, 2), (8, 1, 1)]
    assert torch.equal(model.model.conv1.weight, states["cifar10"]["conv1.weight"])


def test_a_file_of_the_user_goes_before_the_bundled_one(states, tmp_path):
    other = {key: value + 1 for key, value in states["cifar10"].items()}
    safetensors.torch.save_file(other, tmp_path / "mine.safetensors")
    overlay = {"file": str(tmp_path / "mine.safetensors")}
    assert_same(timm.create_model("toy_net", pretrained=True, pretrained_cfg_overlay=overlay), other)
    bare = timm.create_model("toy_net_bare", pretrained=True, pretrained_cfg_overlay=overlay)
    assert_same(bare, other)


def test_tensors_of_the_user_are_taken_as_they_are(states):
    other = {key: value + 1 for key, value in states["cifar10"].items()}
    model = timm.create_model("toy_net", pretrained=True, pretrained_cfg_overlay={"state_dict": dict(other)})
    assert_same(model, other)


def test_a_pickle_of_the_user_is_refused(states, tmp_path):
    (tmp_path / "mine.pth").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"mine\.pth is a pickle"):
        timm.create_model("toy_net", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "mine.pth")})


def test_weights_that_do_not_fit_are_one_line(states, tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(weights())
    with pytest.raises(CheckpointError, match=r"mine\.safetensors does not fit toy_net: Missing key") as caught:
        timm.create_model(
            "toy_net", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "mine.safetensors")}
        )
    assert "\n" not in str(caught.value)


def test_an_architecture_without_checkpoints_says_so(states):
    with pytest.raises(CheckpointError, match="there is no checkpoint 'toy_net_bare'"):
        timm.create_model("toy_net_bare", pretrained=True)


def test_a_repository_on_the_hub_and_a_revision_of_it(states, hub):
    config = {"architecture": "toy_net", "num_classes": 10, "pretrained_cfg": {**CFG, "pool_size": None}}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors.torch.save(states["cifar10"])}
    old = hub.publish("someone/toy", files)
    other = {key: value + 1 for key, value in states["cifar10"].items()}
    hub.publish("someone/toy", {"model.safetensors": safetensors.torch.save(other)})
    assert_same(timm.create_model("hf-hub:someone/toy", pretrained=True), other)
    assert_same(timm.create_model(f"hf-hub:someone/toy@{old}", pretrained=True), states["cifar10"])
    overlay = {"hf_hub_id": "someone/toy"}
    assert_same(timm.create_model("toy_net_bare", pretrained=True, pretrained_cfg_overlay=overlay), other)


@pytest.mark.parametrize("load", [timm.create_model, pretrained.create_model])
def test_a_repository_of_pickles_is_refused(states, hub, load):
    config = {"architecture": "toy_net", "num_classes": 10, "pretrained_cfg": CFG}
    hub.publish("someone/toy", {"config.json": json.dumps(config).encode(), "pytorch_model.bin": b"\x80\x04."})
    options = {"pretrained": True} if load is timm.create_model else {}
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin: a pickle"):
        load("hf-hub:someone/toy", **options)
    assert hub.seen("GET", "/cdn/") == []


def test_files_that_a_repositorys_config_names_are_not_touched(states, hub, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(weights())
    cfg = {**CFG, "file": str(tmp_path / "secret.safetensors"), "state_dict": {"a": 1}}
    config = {"architecture": "toy_net", "num_classes": 10, "pretrained_cfg": cfg}
    content = safetensors.torch.save(states["cifar10"])
    hub.publish("someone/toy", {"config.json": json.dumps(config).encode(), "model.safetensors": content})
    assert_same(timm.create_model("hf-hub:someone/toy", pretrained=True), states["cifar10"])


def test_a_damaged_config_in_the_cache_is_fetched_again(states, hub):
    config = {"architecture": "toy_net", "num_classes": 10, "pretrained_cfg": CFG}
    content = safetensors.torch.save(states["cifar10"])
    hub.publish("someone/toy", {"config.json": json.dumps(config).encode(), "model.safetensors": content})
    hub.fail("GET", "config.json", flip_bit)
    assert_same(pretrained.create_model("hf-hub:someone/toy"), states["cifar10"])


def test_another_namespace_does_not_hide_what_is_bundled(states, monkeypatch):
    monkeypatch.setenv("DIMMIX_HUB_NAMESPACE", "someone")
    assert_same(timm.create_model("toy_net.cifar10", pretrained=True), states["cifar10"])


def test_timms_own_architectures_come_through_the_same_door(hub):
    torch.manual_seed(0)
    state = timm.create_model("test_resnet").state_dict()
    hub.publish("timm/test_resnet.r160_in1k", {"model.safetensors": safetensors.torch.save(state)})
    assert_same(pretrained.create_model("test_resnet.r160_in1k"), state)
    assert_same(pretrained.create_model("test_resnet", num_classes=1000), state)
