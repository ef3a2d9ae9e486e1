"""One entry point of timm for each row of a family's table of variants."""

import sys
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

_TWINS: dict[str, str] = {}


def with_dense_twins(variants: dict[str, dict[str, Any]], structure: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Adds `name_dense` for every variant: the same shape with `mixing="dense"`.

    Variants that differ in `structure` alone, arguments that a dense model does not read, have one dense twin under
    several names; `dense_twin` knows it by that of the first.
    """
    shapes: dict[str, dict[str, Any]] = {}
    for name, args in variants.items():
        shapes[name] = {key: value for key, value in args.items() if key not in structure and key != "mixing"}
        first = next(known for known, shape in shapes.items() if shape == shapes[name])
        _TWINS[name] = f"{first}_dense"
    return variants | {f"{name}_dense": args | {"mixing": "dense"} for name, args in variants.items()}


def dense_twin(name: str) -> str | None:
    """The dense twin of an architecture or of a checkpoint, `name.tag`; None where there is none."""
    import timm  # noqa: F401  registers the families

    return _TWINS.get(name.partition(".")[0].removesuffix("_monarch"))


def register_variants(module: str, create: Callable[..., nn.Module], variants: dict[str, dict[str, Any]]) -> None:
    """Registers, for each row, `name(pretrained=False, **kwargs)`: `create(name, pretrained, **args | kwargs)`.

    Args:
        module: `__name__` of the family's module, which holds its `default_cfgs` and gets the functions.
        create: builds a variant.
        variants: arguments of the model by name; a caller's keyword arguments override them.
    """
    from timm.models import register_model

    for name, args in variants.items():
        entry_point = _entry_point(module, create, name, args)
        setattr(sys.modules[module], name, entry_point)
        register_model(entry_point)


def _entry_point(
    module: str, create: Callable[..., nn.Module], name: str, args: dict[str, Any]
) -> Callable[..., nn.Module]:
    def entry_point(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return create(name, pretrained, **args | kwargs)

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__module__ = module
    entry_point.__doc__ = f"{', '.join(f'{key}={value!r}' for key, value in args.items())}."
    return entry_point
