"""The commands `dimmix download` and `dimmix publish`, and where each checkpoint is."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import typer
from toy_checkpoint import make_card, weights

from dimmix.checkpoints import Card, CheckpointError, status
from dimmix.errors import DimmixError
from dimmix_cli.download import download
from dimmix_cli.list import list_models
from dimmix_cli.publish import publish

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def records(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def trained(tmp_path):
    """The card of a small trained model, its weights beside it."""
    content = safetensors.torch.save(timm.create_model("test_resnet", num_classes=10).state_dict())
    card = make_card(content, architecture="test_resnet", tag="mine")
    (tmp_path / card.file).write_bytes(content)
    card.write(tmp_path / "mine.json")
    return tmp_path / "mine.json"


def test_download_says_where_a_checkpoint_lies(hub, bundle, capsys):
    card = bundle(weights(), with_weights=False)
    hub.publish(card.hub_id, {"model.safetensors": weights()})
    download([card.name], quiet=True)
    (record,) = records(capsys)
    assert (record["name"], record["bytes"]) == (card.name, len(weights()))
    assert Path(record["path"]).read_bytes() == weights()


def test_download_all_copies_weights_and_cards_and_goes_on_past_a_failure(hub, bundle, tmp_path, capsys):
    here = bundle(weights(1))
    bundle(weights(2), with_weights=False, tag="cifar100")
    with pytest.raises(typer.Exit) as caught:
        download(all=True, to=tmp_path / "copies", quiet=True)
    assert caught.value.exit_code == 1
    assert [record["name"] for record in records(capsys)] == [here.name]
    assert sorted(path.name for path in (tmp_path / "copies").iterdir()) == [f"{here.name}.json", here.file]
    assert Card.read(tmp_path / "copies" / f"{here.name}.json") == here


def test_a_downloaded_repository_works_without_a_network(hub, trained, tmp_path, monkeypatch):
    publish(str(trained), to=tmp_path / "out")
    hub.publish("someone/mine", {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    download(["hf-hub:someone/mine"], to=tmp_path / "copies", quiet=True)
    hub.stop()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    state = safetensors.torch.load_file(trained.with_name("test_resnet.mine.safetensors"))
    for name in ("hf-hub:someone/mine", f"local-dir:{tmp_path / 'copies' / 'someone--mine'}"):
        loaded = timm.create_model(name, pretrained=True).state_dict()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_revision_brings_its_own_config(hub, tmp_path, capsys):
    old = hub.publish("someone/toy", {"model.safetensors": weights(1), "config.json": b'{"old": 1}'})
    hub.publish("someone/toy", {"model.safetensors": weights(2), "config.json": b'{"new": 1}'})
    download([f"hf-hub:someone/toy@{old}"], to=tmp_path / "copies", quiet=True)
    copy = Path(records(capsys)[0]["path"])
    assert copy.read_bytes() == weights(1)
    assert copy.with_name("config.json").read_text() == '{"old": 1}'


@pytest.mark.parametrize("content", [b"precious", weights(2)])
def test_a_copy_never_replaces_another_file(bundle, tmp_path, capsys, content):
    card = bundle(weights(1))
    (tmp_path / card.file).write_bytes(content)
    with pytest.raises(typer.Exit) as caught:
        download([card.name], to=tmp_path, quiet=True)
    assert caught.value.exit_code == 1
    assert "exists and is another file" in capsys.readouterr().err
    assert (tmp_path / card.file).read_bytes() == content


def test_publish_dry_run_shows_the_files_and_uploads_none(hub, token, trained, capsys):
    publish(str(trained), repo="someone/mine", dry_run=True)
    names = ["README.md", "config.json", "model.json", "model.safetensors", "preprocessor_config.json"]
    assert [record["file"] for record in records(capsys)] == names
    assert hub.requests == []


def test_publish_uploads_and_says_where(hub, token, trained, capsys):
    publish(str(trained), repo="someone/mine", quiet=False)
    assert f"published at {hub.url}/someone/mine/commit/" in capsys.readouterr().err
    assert "model.safetensors" in hub.repos["someone/mine"].commits[hub.repos["someone/mine"].head]


def test_publish_to_a_folder_asks_no_hub(hub, trained, tmp_path, capsys):
    publish(str(trained), repo="someone/mine", to=tmp_path / "out")
    assert all(record["file"].startswith(str(tmp_path / "out")) for record in records(capsys))
    assert "hf-hub:someone/mine" in (tmp_path / "out" / "README.md").read_text()
    assert hub.requests == []


@pytest.mark.parametrize(
    ("command", "options"), [(publish, {"name": "mine"}), (download, {}), (download, {"names": ["a"], "all": True})]
)
def test_wrong_usage_exits_with_2(command, options):
    with pytest.raises(DimmixError) as caught:
        command(**options)
    assert caught.value.exit_code == 2


def test_status_compares_bundled_cached_and_remote(hub, bundle):
    bundle(weights(1), tag="a")
    bundle(weights(2), tag="b")
    bundle(weights(3), tag="c", with_weights=False)
    hub.publish("dimmix/toy_net.a", {"model.safetensors": weights(1)})
    hub.publish("dimmix/toy_net.b", {"model.safetensors": weights(9)})
    hub.publish("dimmix/toy_net.d", {"model.safetensors": weights(4)})
    assert status() == [
        {"name": "toy_net.a", "bundled": True, "cached": False, "remote": "same"},
        {"name": "toy_net.b", "bundled": True, "cached": False, "remote": "differs"},
        {"name": "toy_net.c", "bundled": False, "cached": False, "remote": "absent"},
        {"name": "toy_net.d", "bundled": False, "cached": False, "remote": "new"},
    ]


def test_list_remote_shows_the_status_of_what_matches(hub, bundle, capsys):
    bundle(weights(1), tag="a")
    bundle(weights(2), tag="b")
    hub.publish("dimmix/toy_net.a", {"model.safetensors": weights(1)})
    list_models("*.a", remote=True)
    (record,) = records(capsys)
    assert (record["name"], record["bundled"], record["remote"]) == ("toy_net.a", True, "same")


def test_status_without_a_hub_is_one_line(hub, bundle):
    hub.stop()
    with pytest.raises(CheckpointError, match=r"no connection to http://127\.0\.0\.1:\d+ .*check the network"):
        status()
