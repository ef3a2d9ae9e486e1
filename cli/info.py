"""`dimmix info`: a model's card, its mixing structure level by level, and its MACs against the dense twin."""

from typing import Annotated

import typer

from .options import CheckpointOption, Format, FormatOption, OutputOption
from .sink import Record, Sink


def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="NAME[.tag], hf-hub:org/name or local-dir:PATH.")],
    checkpoint: CheckpointOption = None,
    format: FormatOption = Format.auto,
    output: OutputOption = None,
) -> None:
    """Show what a model is: card, groups mixed at each level, and where its multiply-accumulates are.

    An architecture without weights is shown without a card.

    \b
    Examples:
      dimmix info butterfly_resnet20_convmix_w32
      dimmix info vit_butterfly_tiny_patch4_32 --format json
    """
    from dataclasses import asdict

    from dimmix.registry import dense_twin
    from dimmix.runtime import describe_model
    from dimmix.structure import macs_against_dense, mixing_levels

    network, spec = describe_model(model, checkpoint=checkpoint)
    modules = macs_against_dense(network, model, spec.preprocess.input_size, spec.card.get("model_args", {}))
    summary: Record = {
        "model": model,
        "params": sum(parameter.numel() for parameter in network.parameters()),
        "macs": modules[0]["macs"],
        "dense_twin": dense_twin(model),
        "dense_macs": modules[0]["dense"],
        **asdict(spec.preprocess),
        "classes": len(spec.labels),
    }
    levels = [asdict(level) for level in mixing_levels(network)]
    if Sink(format, output).format is not Format.table:
        with Sink(format, output, single=True) as sink:
            sink.write(summary | {"card": spec.card or None, "levels": levels, "modules": modules})
        return
    shown = {key: value for key, value in spec.card.items() if key not in ("labels", "per_class_accuracy")}
    with Sink(format, output, single=True) as sink:
        sink.write(shown | summary)
        for title, rows in (("What each layer mixes", levels), ("Multiply-accumulates", modules)):
            sink.new_table(title)
            for row in rows:
                sink.write(row)
