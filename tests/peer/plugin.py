"""pytest plugin that turns timm's own tests/test_models.py on our architectures.

    python -m pytest -p tests.peer.plugin PATH/TO/timm/tests/test_models.py

It narrows `timm.list_models` to our families before that file is collected, leaves out its tests of particular timm
models, and stops the run unless every test below was collected for every architecture it is for.
"""

import pytest
import timm

import dimmix  # noqa: F401  registers the families
from dimmix import FAMILIES

_ALL = (
    "test_model_forward",
    "test_model_backward",
    "test_model_forward_torchscript",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
)
# timm goes by words in a name (mixer, vit, ...) whether a model is held to its layout or to less.
_STANDARD, _OTHER = ("test_model_default_cfgs", "test_model_forward_features"), "test_model_default_cfgs_non_std"

_list_all = timm.list_models


def _list_ours(filter="", module="", **kwargs):
    """timm's tests name its own modules; whatever they ask for, answer from ours."""
    return _list_all(filter, module=FAMILIES, **kwargs)


timm.list_models = _list_ours
timm.list_pretrained = lambda filter="", exclude_filters="": _list_ours(
    filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True
)


def pytest_configure(config):
    markers = "base cfg cfg_nonstd torchscript features fxforward fxbackward forward backward"
    for marker in markers.split():
        config.addinivalue_line("markers", f"{marker}: timm's")


@pytest.hookimpl(tryfirst=True)  # before -k and -m, so that the check sees everything
def pytest_collection_modifyitems(config, items):
    ours = set(_list_ours())
    kept, dropped = [], []
    for item in items:
        name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
        # A list that is empty for us leaves a placeholder that is no string.
        (kept if isinstance(name, str) and name.split(".")[0] in ours else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    collected = {(item.originalname, item.callspec.params["model_name"].split(".")[0]) for item in kept}
    expected = {(test, name) for name in ours for test in _ALL}
    expected |= {(test, name) for name in ours if (_OTHER, name) not in collected for test in _STANDARD}
    expected |= {("test_model_load_pretrained", name.split(".")[0]) for name in _list_ours(pretrained=True)}
    if missing := sorted(expected - collected):
        raise pytest.UsageError(f"{len(missing)} of timm's tests were not collected for us, first {missing[0]}")
