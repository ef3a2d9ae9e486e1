"""The one door without the Hub: files, folders, bundled names."""

import subprocess
import sys

import pytest
from toy_checkpoint import weights

from dimmix.checkpoints import CheckpointError, find


def test_a_bundled_checkpoint_is_found_by_its_name_and_by_its_architecture(bundle):
    bundle(weights(2), tag="cifar100")
    card = bundle(weights(1))
    assert find("toy_net.cifar10") == find("toy_net") == card.path
    assert find("toy_net.cifar100").read_bytes() == weights(2)


def test_a_damaged_bundled_checkpoint_shows_both_digests(bundle):
    card = bundle(weights(1))
    card.path.write_bytes(weights(2))
    with pytest.raises(CheckpointError, match=f"damaged: its sha256 is [0-9a-f]{{64}}, expected {card.sha256}"):
        find("toy_net.cifar10")
    assert card.path.read_bytes() == weights(2)


def test_a_card_whose_dtype_is_not_the_files(bundle):
    bundle(weights(), dtype="bfloat16")
    with pytest.raises(CheckpointError, match="tensor 'w' is F32, the card says bfloat16"):
        find("toy_net.cifar10")


@pytest.mark.parametrize("name", ["toy", "toy_ent", ""])
def test_an_unknown_name_without_a_tag_is_not_looked_for_on_the_hub(bundle, name):
    bundle(weights())
    with pytest.raises(CheckpointError, match=f"there is no checkpoint '{name}'"):
        find(name)


def test_files_and_folders(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights())
    for name in (path, str(path), tmp_path, str(tmp_path), f"local-dir:{tmp_path}"):
        assert find(name) == path


def test_the_only_safetensors_file_of_a_folder_will_do_but_of_two_none_is_guessed(tmp_path):
    (tmp_path / "ema.safetensors").write_bytes(weights())
    (tmp_path / ".ema.k3x9.safetensors").write_bytes(weights()[:9])  # what a killed writer leaves
    assert find(tmp_path).name == "ema.safetensors"
    (tmp_path / "other.safetensors").write_bytes(weights())
    with pytest.raises(CheckpointError, match="holds several safetensors files"):
        find(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.pth.tar", "weights.pt"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=rf"{name} is a pickle, which can run code.*save_file"):
            find(path)


def test_what_is_not_there_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        find(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no file .*; for a repository on the Hub write hf-hub:org"):
        find("org/name")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
        find(tmp_path / "notes.txt")


def test_neither_torch_nor_timm_nor_the_hub_is_imported_to_find_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(weights())
    code = (
        f"import sys; from dimmix.checkpoints import find, cards; cards(); find({str(tmp_path)!r}); print(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "timm", "huggingface_hub", "numpy"} & set(modules)
