"""dimmix: structured-sparse vision models for timm.

Importing this package makes every architecture known to timm, whichever of the two is imported first. It does so
without importing torch or timm itself, so that `dimmix --help`, the checkpoint cards and onnxruntime inference stay
light: the families are imported as soon as timm is, by `_RegisterAfterTimm`.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import DimmixError

if TYPE_CHECKING:
    from .classifier import Classifier

__version__ = "0.1.0"
__all__ = ["Classifier", "DimmixError", "list_models"]

FAMILIES = ("butterfly_resnet", "vit_butterfly", "butterfly_mixer", "patch_only_mixer", "wide_mixer")
_OTHER_PREFIXES = {"resnet20_": "butterfly_resnet", "rp_mixer": "wide_mixer", "sw_mlp": "wide_mixer"}


def _register_families() -> None:
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}")


class _RegisterAfterTimm(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook: when timm has been imported, import our families, which register themselves with it.

    It stays until then, since many a library looks for timm's spec only to learn whether it is installed.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "timm":
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        spec = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        self._timm_loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._timm_loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._timm_loader
        self._timm_loader.exec_module(module)
        sys.meta_path.remove(self)
        _register_families()


if "timm" in sys.modules:
    _register_families()
else:
    sys.meta_path.insert(0, _RegisterAfterTimm())


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names of the architectures this package registers, or with `pretrained` of its checkpoints (`name.tag`).

    `filter` is a wildcard such as `"*resnet*"`, as in `timm.list_models`.
    """
    import timm

    return sorted(timm.list_models(filter=filter, module=FAMILIES, pretrained=pretrained))


def family_of(architecture: str) -> str:
    """The family that registers `architecture`, or "" for another's; by its name, so that timm need not be imported."""
    prefixes = {family: family for family in FAMILIES} | _OTHER_PREFIXES
    return next((family for prefix, family in prefixes.items() if architecture.startswith(prefix)), "")


def __getattr__(name: str) -> Any:
    if name == "Classifier":
        from .classifier import Classifier

        return Classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
