"""How timm's `pretrained=True` comes through the one door for weights, `dimmix.checkpoints.find`."""

import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from dimmix.checkpoints import CheckpointError, cards, find
from dimmix.checkpoints.hub import fetch_config
from dimmix.checkpoints.lookup import split_hub_name


def default_cfgs(untagged: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """timm's `default_cfgs` for `{architecture: cfg}`: one `architecture.tag` for each bundled card.

    An architecture's first card is what its name without a tag means; one without cards has no weights.
    """
    from timm.models import generate_default_cfgs

    cfgs: dict[str, Any] = {}
    for architecture, cfg in untagged.items():
        own = [card for card in cards().values() if card.architecture == architecture]
        cfgs |= {card.name: cfg | card.pretrained_cfg() for card in own} or {architecture: cfg}
    return generate_default_cfgs(cfgs)


def build(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[..., dict[str, Any]] | None = None,
    **kwargs: Any,
) -> Any:
    """timm's `build_model_with_cfg`, with verified weights from `dimmix.checkpoints` when `pretrained`.

    `features_only` gives the last three blocks, as timm's models of tokens do, unless a `feature_cfg` says otherwise.

    Raises:
        CheckpointError: there are no weights of this name, they cannot be had, are damaged or do not fit.
    """
    from timm.models import build_model_with_cfg

    if "feature_cfg" not in kwargs:
        kwargs["feature_cfg"] = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    if pretrained:
        kwargs["pretrained_cfg_overlay"] = _with_local_weights(
            variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"), kwargs.get("cache_dir")
        )
    try:
        return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=filter_fn, **kwargs)
    except RuntimeError as error:
        summary, *details = str(error).splitlines()
        if not summary.startswith("Error(s) in loading state_dict"):
            raise
        path = kwargs["pretrained_cfg_overlay"].get("file", "the given state_dict")
        reason = textwrap.shorten(details[0], 200, placeholder=" ...")
        raise CheckpointError(f"{path} does not fit {variant}: {reason}") from error


def create_model(name: str, **kwargs: Any) -> Any:
    """`timm.create_model(name, pretrained=True, **kwargs)`, timm's own architectures through the same door as ours.

    Raises:
        CheckpointError: the weights cannot be had, are damaged, or are not safetensors.
    """
    import timm

    overlay, cache_dir = kwargs.pop("pretrained_cfg_overlay", None), kwargs.get("cache_dir")
    if ":" in name:
        repository, revision = split_hub_name(name)
        if repository:
            fetch_config(repository, revision, cache_dir)  # which timm would take from the cache as it is
        overlay = {**(overlay or {}), **_local_file(name, cache_dir=cache_dir)}
    else:
        architecture, _, tag = name.partition(".")
        overlay = _with_local_weights(architecture, kwargs.get("pretrained_cfg") or tag, overlay, cache_dir)
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def _with_local_weights(variant: str, cfg: Any, overlay: dict[str, Any] | None, cache_dir: Any) -> dict[str, Any]:
    """The overlay that makes timm load one verified local file, or the tensors the caller handed over."""
    from timm.models import resolve_pretrained_cfg

    overlay = overlay or {}
    resolved = resolve_pretrained_cfg(variant, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    # What a repository's config.json says about files or tensors does not count: its weights are its own.
    remote = resolved.source == "hf-hub"
    if overlay.get("state_dict") or (resolved.state_dict and not remote):
        return {**overlay, "source": None}
    options = {"cache_dir": cache_dir}
    if resolved.hf_hub_filename:
        options["filename"] = resolved.hf_hub_filename
    if overlay.get("file") or (resolved.file and not remote):
        return {**overlay, **_local_file(f"local-dir:{resolved.file}", **options)}
    if resolved.hf_hub_id and resolved.hf_hub_id != _own_hub_id(variant, resolved.tag):
        return {**overlay, **_local_file(f"hf-hub:{resolved.hf_hub_id}", **options)}
    return {**overlay, **_local_file(f"{variant}.{resolved.tag}" if resolved.tag else variant, cache_dir=cache_dir)}


def _local_file(name: str, **options: Any) -> dict[str, Any]:
    return {"file": str(find(name, **options)), "source": None, "state_dict": None, "custom_load": False}


def _own_hub_id(variant: str, tag: str | None) -> str | None:
    """Where timm was told that a bundled checkpoint is published."""
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(f"{variant}.{tag}") if f"{variant}.{tag}" in cards() else None
    return cfg.hf_hub_id if cfg else None
