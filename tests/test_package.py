"""What an installation puts on the disk."""

import shutil
from importlib.metadata import distributions

import pytest


def _installed() -> set[str]:
    """The files of the installed wheel; a build leaves a second record of the package in the source tree."""
    for found in distributions(name="dimmix"):
        files = {str(file) for file in found.files or ()}
        if any(".dist-info/" in file for file in files) and not any("__editable__" in file for file in files):
            return files
    pytest.skip("not installed from a wheel: an editable installation holds links, not the package")


def test_the_wheel_holds_two_import_packages_and_nothing_else():
    tops = {file.split("/")[0] for file in _installed() if not file.startswith("..")}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dimmix", "dimmix_cli"}


def test_the_wheel_holds_weights_cards_and_types():
    files = _installed()
    name = "dimmix/checkpoints/butterfly_resnet20_convmix_w32.cifar10"
    assert {f"{name}.json", f"{name}.safetensors", "dimmix/py.typed", "dimmix_cli/py.typed"} <= files


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler to build the kernels with")
def test_the_wheel_holds_the_kernels_and_not_their_source():
    files = _installed()
    assert any(file.startswith("dimmix/_native.") for file in files)
    assert not any(file.startswith("dimmix/native/") for file in files)
