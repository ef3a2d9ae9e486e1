"""docs/cli.md is what the commands say, and every one of its examples runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dimmix.checkpoints import cards
from dimmix_cli.docs import render
from dimmix_cli.main import COMMANDS

from ..conftest import CIFAR10

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "cli.md"

SMALLER = {
    "--images 10000 --epochs 4": "--recipe recipes/wide_mixer_study.cifar10.toml",
    "study width": "study width --images 20 --epochs 1 --connections 64",
}
"""What is run instead, to be done in seconds."""

SMALLER_RECIPE = {
    r"\[data\]": "[data]\nheld_back = 20",
    r"epochs = \d+": "epochs = 1",
    r"warmup_epochs = .*": "warmup_epochs = 0.5",
    r"batch_size = \d+": "batch_size = 20",
    r"plain_epochs = \d+": "",
}
"""Lines of the recipes, whose data here are sixty images."""

SHELL = f"""
dimmix() {{ {sys.executable} -m dimmix_cli "$@"; }}
torchrun() {{ {sys.executable} -m torch.distributed.run --standalone "$@"; }}
"""


def examples(command: str) -> list[str]:
    section = DOCS.read_text(encoding="utf-8").partition(f"\n## dimmix {command} ")[2].partition("\n## ")[0]
    return re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()


@pytest.fixture
def place(tmp_path, monkeypatch, class_folders, tiny, hub, token):
    """A folder with all that the examples name; the Hub is on loopback."""
    monkeypatch.chdir(tmp_path)
    Path("photos").symlink_to(class_folders)
    Image.open(next((class_folders / "cat").iterdir())).save("photo.png")
    shutil.copy(CIFAR10, "test.parquet")
    for name in ("datasets/cifar10", "datasets/cifar100"):
        Path(name).mkdir(parents=True)
        for split in ("train", "test"):
            shutil.copy(CIFAR10, f"{name}/{split}-00000-of-00001.parquet")
    Path("data").symlink_to("datasets")
    Path("recipes/cpu").mkdir(parents=True)
    for recipe in (ROOT / "recipes").rglob("*.toml"):
        text = recipe.read_text(encoding="utf-8")
        for line, smaller in SMALLER_RECIPE.items():
            text = re.sub(f"^{line}$", smaller, text, flags=re.MULTILINE)
        Path(recipe.relative_to(ROOT)).write_text(text, encoding="utf-8")
    for teacher in (ROOT / "recipes").glob("teacher_cnn*"):
        Path("recipes", teacher.name).symlink_to(teacher)
    Path("runs/mine").mkdir(parents=True)
    shutil.copy(tiny.checkpoint, "runs/mine")
    shutil.copy(tiny.checkpoint.with_suffix(".json"), "runs/mine/butterfly_resnet_fast_32.photos.json")
    monkeypatch.setattr("dimmix.training.study.densify", lambda model: None)  # it takes two gigabytes
    monkeypatch.setattr("dimmix.training.study.STEPS_TIMED", 1)
    hub.publish("timm/resnet18.a1_in1k", {"config.json": b"{}", "model.safetensors": tiny.checkpoint.read_bytes()})


def test_docs_are_made_from_the_commands():
    assert DOCS.read_text(encoding="utf-8") == render(), "run `python -m dimmix_cli.docs > docs/cli.md`"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
@pytest.mark.skipif(not cards(), reason="the examples use the bundled checkpoints")
def test_the_examples_of_a_command_run(dimmix, place, command):
    assert len(examples(command)) >= 2
    for example in examples(command):
        for text, smaller in SMALLER.items():
            example = example.replace(text, smaller)
        if example.startswith("dimmix "):
            code, _, err = dimmix(*shlex.split(example)[1:])
        else:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(["bash", "-c", SHELL + example], env=environment, capture_output=True, text=True)
            code, err = done.returncode, done.stderr
        assert code == 0, f"{example}: {err}"
