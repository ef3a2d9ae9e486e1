"""`dimmix explain`: a picture of what a prediction rests on."""

from pathlib import Path
from typing import Annotated

import typer

from dimmix.files import refuse_existing, refuse_same

from .options import CheckpointOption, Device, DeviceOption, Format, FormatOption, ModelOption, QuietOption
from .sink import Sink, note


def explain(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file.")],
    model: ModelOption = None,
    checkpoint: CheckpointOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The picture. Default: IMAGE.explained.png, here.")
    ] = None,
    device: DeviceOption = Device.auto,
    format: FormatOption = Format.auto,
    quiet: QuietOption = False,
) -> None:
    """Draw which patches of each layer reach the prediction, and a heat map (Grad-CAM) over the image.

    \b
    Examples:
      dimmix explain photo.png
      dimmix explain photo.png --output heat.png
    """
    from dimmix.classifier import Classifier
    from dimmix.explain import draw
    from dimmix.explain import explain as run

    path = output or refuse_existing(Path(f"{Path(image).stem}.explained.png"))
    refuse_same({"--output": path}, [image, checkpoint, model])
    explanation = run(Classifier(model, device, checkpoint), image)
    draw(explanation, path)
    best = explanation.prediction
    with Sink(format) as sink:
        for layer in explanation.layers:
            rows, columns = layer.sensitivity.shape
            shape = {"rows": rows, "columns": columns, "reaching": layer.reaching}
            sink.write({"layer": layer.layer, **shape, "label": best.label, "score": best.score})
    note(f"wrote {path}", quiet)
