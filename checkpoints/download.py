"""Downloading on purpose: all that a later use without a network needs, and copies of it on request."""

from pathlib import Path

from dimmix.files import write_atomically

from .errors import CheckpointError
from .hub import fetch_card, fetch_config
from .lookup import find, find_card, split_hub_name


def download(name: str, folder: Path | None = None) -> Path:
    """The verified weights of `name`, fetched unless they are here; the copy's path if they are copied to `folder`.

    A checkpoint of this release is copied as `NAME.safetensors` with its card beside it. A repository brings its
    `config.json` and, where it has one, its card, and is copied as a folder that `local-dir:` loads.

    Raises:
        DimmixError: it cannot be had, or a copy cannot be written, or would replace another file.
    """
    weights = find(name)
    repository, revision = split_hub_name(name)
    config = fetch_config(repository, revision) if repository else None
    own_card = fetch_card(repository, revision) if repository else None
    if folder is None:
        return weights
    if repository and config:
        folder /= repository.replace("/", "--")
        for path in filter(None, (config, own_card)):
            _copy(path.read_bytes(), folder / path.name)
        return _copy(weights.read_bytes(), folder / weights.name)
    card = find_card(name)
    if card is None:
        return _copy(weights.read_bytes(), folder / f"{Path(name).name.removesuffix('.safetensors')}.safetensors")
    _copy(card.to_json().encode(), folder / f"{card.name}.json")
    return _copy(weights.read_bytes(), folder / card.file)


def _copy(content: bytes, target: Path) -> Path:
    try:
        if not target.exists():
            write_atomically(target, content)
        elif target.read_bytes() != content:
            raise CheckpointError(f"{target} exists and is another file; remove it, or name another folder")
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror}") from error
    return target
