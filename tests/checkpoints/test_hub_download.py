"""Downloads that go well: names, revisions, redirects, the cache, and who is asked for what."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_checkpoint import weights

import dimmix
from dimmix.checkpoints import CheckpointError, find
from tests.hub_server import TOKEN

NAME = "someone/toy"


def test_a_repository_is_downloaded_once_and_found_in_the_cache_afterwards(hub):
    hub.publish(NAME, {"model.safetensors": weights()})
    first = find(f"hf-hub:{NAME}")
    assert first.read_bytes() == weights()
    assert find(f"hf-hub:{NAME}") == first
    assert len(hub.seen("GET", "/cdn/")) == 1


def test_a_revision_pins_a_commit_and_main_follows_the_newest(hub):
    old = hub.publish(NAME, {"model.safetensors": weights(1)})
    new = hub.publish(NAME, {"model.safetensors": weights(2)})
    assert find(f"hf-hub:{NAME}@{old}").read_bytes() == weights(1)
    assert find(f"hf-hub:{NAME}", revision=new).read_bytes() == weights(2)
    assert find(f"hf-hub:{NAME}").read_bytes() == weights(2)
    hub.publish(NAME, {"model.safetensors": weights(3)})
    assert find(f"hf-hub:{NAME}").read_bytes() == weights(3)


def test_a_revision_that_is_not_there(hub):
    hub.publish(NAME, {"model.safetensors": weights()})
    with pytest.raises(CheckpointError, match=rf"hf-hub:{NAME}@nothing: there is no such revision"):
        find(f"hf-hub:{NAME}@nothing")


def test_a_renamed_repository_is_followed(hub):
    hub.publish("someone/new-name", {"model.safetensors": weights()})
    hub.moved["someone/old-name"] = "someone/new-name"
    assert find("hf-hub:someone/old-name").read_bytes() == weights()


def test_a_card_without_bundled_weights_is_fetched_from_its_namespace(hub, bundle, monkeypatch):
    bundle(weights(), with_weights=False)
    monkeypatch.setenv("DIMMIX_HUB_NAMESPACE", "elsewhere")
    hub.publish("elsewhere/toy_net.cifar10", {"model.safetensors": weights()})
    assert find("toy_net").read_bytes() == weights()


def test_what_matches_the_card_is_taken_from_the_cache_without_asking_the_hub(hub, bundle):
    bundle(weights(), with_weights=False)
    hub.publish("dimmix/toy_net.cifar10", {"model.safetensors": weights()})
    path = find("toy_net.cifar10")
    hub.requests.clear()
    assert find("toy_net.cifar10") == path
    assert hub.requests == []


def test_a_revision_of_a_bundled_name_comes_from_the_hub(hub, bundle):
    bundle(weights())
    old = hub.publish("dimmix/toy_net.cifar10", {"model.safetensors": weights(5)})
    assert find("toy_net.cifar10", revision=old).read_bytes() == weights(5)


def test_a_name_without_a_card_is_looked_for_on_the_hub(hub, bundle):
    hub.publish("dimmix/toy_net.newer", {"model.safetensors": weights()})
    assert find("toy_net.newer").read_bytes() == weights()


def test_a_mistyped_name_is_told_the_nearest_one(hub, bundle):
    bundle(weights())
    with pytest.raises(CheckpointError, match=r"no such repository.* did you mean toy_net\.cifar10\?"):
        find("toy_net.cifra10")


def test_a_private_repository_needs_the_token_which_the_store_never_sees(hub, token):
    hub.publish(NAME, {"model.safetensors": weights()}, private=True)
    assert find(f"hf-hub:{NAME}").read_bytes() == weights()
    assert hub.seen("HEAD", "/resolve/")[0]["authorization"] == f"Bearer {TOKEN}"
    assert "authorization" not in hub.seen("GET", "/cdn/")[0]


def test_a_repository_of_pickles_is_refused_and_none_is_downloaded(hub):
    hub.publish(NAME, {"pytorch_model.bin": b"\x80\x04."})
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin: a pickle, which can run code.*save_file"):
        find(f"hf-hub:{NAME}")
    assert hub.seen("GET", "/cdn/") == []


def test_another_file_of_a_repository_can_be_asked_for(hub):
    hub.publish(NAME, {"ema.safetensors": weights(4)})
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors, only ema\.safetensors"):
        find(f"hf-hub:{NAME}")
    assert find(f"hf-hub:{NAME}", filename="ema.safetensors").read_bytes() == weights(4)


def test_a_broken_header_on_the_hub_is_refused(hub):
    hub.publish(NAME, {"model.safetensors": weights()[:-4]})
    with pytest.raises(CheckpointError, match=r"ends at byte 80,000 of 79,996"):
        find(f"hf-hub:{NAME}")


def test_another_cache_folder(hub, tmp_path):
    hub.publish(NAME, {"model.safetensors": weights()})
    assert find(f"hf-hub:{NAME}", cache_dir=tmp_path / "mine").is_relative_to(tmp_path / "mine")


def test_offline_mode_uses_the_cache_and_says_what_it_lacks(hub, monkeypatch):
    hub.publish(NAME, {"model.safetensors": weights()})
    path = find(f"hf-hub:{NAME}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find(f"hf-hub:{NAME}") == path
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set; it is not in the cache either"):
        find("hf-hub:someone/other")


def test_two_processes_at_once_both_get_the_file(hub, tmp_path):
    hub.publish(NAME, {"model.safetensors": weights()})
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    root = str(Path(dimmix.__file__).parents[1])
    environment = {**os.environ, **settings, "PYTHONPATH": root, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    code = f"from dimmix.checkpoints import find; print(find('hf-hub:{NAME}'))"
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1
    assert Path(paths.pop()).read_bytes() == weights()


def test_a_name_that_cannot_be_a_repository(hub):
    with pytest.raises(CheckpointError, match="this is not the name of a repository; it should look like org/name"):
        find("hf-hub:a/b/c")
