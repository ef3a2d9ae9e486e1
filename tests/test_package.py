"""What an installation puts on the disk."""

from importlib.metadata import distribution
from pathlib import PurePosixPath

import pytest


def _installed() -> set[str]:
    files = [PurePosixPath(str(file)) for file in distribution("dimmix").files or ()]
    top = {file.parts[0] for file in files if file.parts[0] != ".."}
    if any(name.startswith("__editable__") for name in top):
        pytest.skip("an editable installation holds links, not the package")
    return {str(file) for file in files}


def test_the_wheel_holds_two_import_packages_and_nothing_else():
    tops = {file.split("/")[0] for file in _installed() if not file.startswith("..")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dimmix", "dimmix_cli"}


def test_the_wheel_holds_weights_cards_and_types():
    files = _installed()
    name = "dimmix/checkpoints/butterfly_resnet20_convmix_w32.cifar10"
    assert {f"{name}.json", f"{name}.safetensors", "dimmix/py.typed", "dimmix_cli/py.typed"} <= files
