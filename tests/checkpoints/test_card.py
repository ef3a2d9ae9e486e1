"""Cards: what is read is what was written, and a wrong card says which key."""

import json

import pytest
from toy_checkpoint import make_card, weights

from dimmix.checkpoints import Card, CheckpointError, cards


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "toy_net.cifar10.json"
    make_card(weights()).write(path)
    return path


def change(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "<gone>"}))


def test_a_card_survives_its_file(written):
    assert Card.read(written) == make_card(weights())
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_failed_write_leaves_the_old_card(written, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        make_card(weights(), top1=1.0).write(written)
    assert Card.read(written).top1 == 91.5
    assert [path.name for path in written.parent.iterdir()] == [written.name]


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"top1": "<gone>"}, "lacks 'top1'"),
        ({"colour": "blue"}, "has the unknown key 'colour'"),
        ({"top1": "91.5"}, "'top1' is '91.5'"),
        ({"images": True}, "'images' is True"),
        ({"teacher": 3}, "'teacher' is 3"),
        ({"labels": ["cat", 3]}, "'labels' is"),
        ({"versions": {"torch": 2}}, "'versions' is"),
        ({"sha256": "abc"}, "sha256 'abc' is not 64"),
        ({"file": "../model.safetensors"}, "must be a .safetensors file beside the card"),
        ({"file": ".."}, "must be a .safetensors file beside the card"),
        ({"file": ""}, "must be a .safetensors file beside the card"),
        ({"model_args": ["depths"]}, "'model_args' is"),
        ({"model_args": {"depths": [1], "checkpoint_path": "x.pth"}}, "model_args must not hold 'checkpoint_path'"),
    ],
)
def test_a_wrong_card_names_its_file_and_key(written, changes, pattern):
    change(written, **changes)
    with pytest.raises(CheckpointError, match=rf"the card .*toy_net\.cifar10\.json.*{pattern}"):
        Card.read(written)


def test_a_whole_number_may_stand_for_a_float_and_null_for_no_teacher(written):
    change(written, top1=92, teacher=None)
    assert Card.read(written).top1 == 92.0


def test_what_training_started_from_may_be_left_out_and_survives(written):
    change(written, started_from="<gone>")
    assert Card.read(written).started_from == ""
    make_card(weights(), started_from="toy_net.cifar100").write(written)
    assert Card.read(written).started_from == "toy_net.cifar100"


def test_arguments_of_the_model_may_be_left_out_and_survive(written):
    change(written, model_args="<gone>")
    assert Card.read(written).model_args == {}
    make_card(weights(), model_args={"depths": [1, 2], "drop_rate": 0.1}).write(written)
    assert Card.read(written).model_args == {"depths": [1, 2], "drop_rate": 0.1}


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_card_that_is_not_json_is_one_line(written, text):
    written.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        Card.read(written)
    assert "\n" not in str(caught.value)


def test_the_bundled_cards_are_ordered_by_architecture_and_tag(bundle):
    bundle(weights(), tag="cifar100")
    bundle(weights(), tag="cifar10")
    bundle(weights(), architecture="a_net")
    assert list(cards()) == ["a_net.cifar10", "toy_net.cifar10", "toy_net.cifar100"]


def test_pretrained_cfg_is_what_timm_knows(monkeypatch):
    from timm.models import PretrainedCfg

    monkeypatch.setenv("DIMMIX_HUB_NAMESPACE", "elsewhere")
    cfg = PretrainedCfg(**make_card(weights()).pretrained_cfg())
    assert (cfg.hf_hub_id, cfg.num_classes, cfg.input_size) == ("elsewhere/toy_net.cifar10", 10, (3, 32, 32))
    assert cfg.label_names is not None
    assert cfg.label_names[3] == "cat"
