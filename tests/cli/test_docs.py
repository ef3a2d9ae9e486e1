"""docs/cli.md is what the commands say, and its examples run."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from dimmix.checkpoints import cards
from dimmix_cli.docs import render

from ..conftest import CIFAR10

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
HERE = ("predict", "eval", "export", "list", "info", "benchmark", "explain", "download", "doctor")
"""The commands whose examples need nothing but images; the others are tested apart."""


def examples() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_docs_are_made_from_the_commands():
    assert DOCS.read_text(encoding="utf-8") == render(), "run `python -m dimmix_cli.docs > docs/cli.md`"


def test_the_examples_of_every_command_run(dimmix, tmp_path, monkeypatch, class_folders):
    if not cards():
        pytest.skip("the examples use the bundled checkpoints")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(class_folders)
    (tmp_path / "test.parquet").write_bytes(CIFAR10.read_bytes())
    Image.open(next((class_folders / "cat").iterdir())).save("photo.png")
    chosen = [example for example in examples() if example.split()[1] in HERE and "hf-hub:" not in example]
    assert len(chosen) >= 15
    for example in chosen:
        done = dimmix(*shlex.split(example)[1:])
        assert done.code == 0, f"{example}: {done.err}"
