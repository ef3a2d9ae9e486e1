"""`dimmix publish`: a checkpoint as a repository that timm, transformers and dimmix load."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dimmix.errors import DimmixError

from .options import Format, FormatOption, OutputOption, QuietOption
from .sink import Sink, note


def publish(
    name: Annotated[str, typer.Argument(help="A bundled checkpoint, or the .json card of yours, weights beside it.")],
    repo: Annotated[str | None, typer.Option("--repo", help="The repository on the Hub: org/name.")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Only write the files, to this new folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the files.")] = False,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new, make it private.")] = False,
    format: FormatOption = Format.auto,
    output: OutputOption = None,
    quiet: QuietOption = False,
) -> None:
    """Upload a checkpoint to the Hugging Face Hub, with its model card and all that is needed to load it.

    Before anything is uploaded the files are loaded back and compared. HF_TOKEN, or `hf auth login`, logs you in.

    \b
    Examples:
      dimmix publish butterfly_resnet20_convmix_w32.cifar10 --repo me/butterfly --dry-run
      dimmix publish runs/mine/butterfly_resnet_fast_32.photos.json --repo me/mine --private
      dimmix publish runs/mine/butterfly_resnet_fast_32.photos.json --to mine
    """
    if repo is None and to is None and not dry_run:
        raise DimmixError("name the repository with --repo org/name, or a folder with --to", exit_code=2)
    from dimmix.checkpoints.publish import open_source, upload, write_folder

    card, weights = open_source(name)
    with tempfile.TemporaryDirectory() as temporary:
        keep = to is not None and not dry_run
        folder = to if to is not None and keep else Path(temporary) / "repository"
        with Sink(format, output) as sink:
            for file in write_folder(card, weights, folder, repo):
                sink.write({"file": str(file) if keep else file.name, "bytes": file.stat().st_size})
        if repo is None or keep or dry_run:
            return
        note(f"published at {upload(folder, repo, card, private=private)}", quiet)
