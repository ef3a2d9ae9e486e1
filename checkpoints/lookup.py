"""The one door for weights: a name in, a verified local safetensors file out."""

import difflib
from pathlib import Path

from .card import Card, cards, hub_id
from .errors import CheckpointError
from .header import file_sha256, verify
from .hub import CONVERT, PICKLES, WEIGHTS, fetch, fetch_card

HUB_PREFIXES = ("hf-hub:", "hf_hub:")
LOCAL_PREFIX = "local-dir:"


def find(
    name: str | Path, *, revision: str | None = None, filename: str = WEIGHTS, cache_dir: str | Path | None = None
) -> Path:
    """The verified local weight file of `name`: a path, else bundled, else in the Hub's cache, else downloaded.

    `name` is a file, a folder holding `filename`, `local-dir:FOLDER`, `hf-hub:org/name[@revision]`, the name of a
    checkpoint (`architecture.tag`), or an architecture, which means its first checkpoint. `revision` pins a commit,
    branch or tag on the Hub. `cache_dir` replaces the Hub's cache.

    Raises:
        CheckpointError: it does not exist, cannot be fetched, or is not a sound safetensors file.
    """
    text = str(name)
    repository, pinned = split_hub_name(text)
    if repository is not None:
        return fetch(repository, revision=pinned or revision, filename=filename, cache_dir=cache_dir)
    if text.startswith(LOCAL_PREFIX) or isinstance(name, Path) or _looks_like_path(text):
        path = Path(text.removeprefix(LOCAL_PREFIX))
        try:
            return _find_local(path.expanduser(), filename)
        except RuntimeError as error:  # ~name of nobody here
            raise CheckpointError(f"{path}: {error}") from None
    return _find_named(text, revision, cache_dir)


def split_hub_name(name: str) -> tuple[str | None, str | None]:
    """The repository and the revision of `hf-hub:org/name[@revision]`; None for what is not there."""
    if not name.startswith(HUB_PREFIXES):
        return None, None
    repository, _, revision = name.split(":", 1)[1].partition("@")
    return repository, revision or None


def _looks_like_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.endswith((".safetensors", *PICKLES))


def _find_local(path: Path, filename: str) -> Path:
    if path.is_dir():
        path = _choose_weights(path, filename)
    elif not path.is_file():
        raise CheckpointError(f"there is no file {path}; for a repository on the Hub write hf-hub:org/name")
    if path.suffix != ".safetensors":
        kind = CONVERT if path.name.endswith(PICKLES) else "not a .safetensors file"
        raise CheckpointError(f"{path} is {kind}")
    verify(path)
    return path


def _choose_weights(folder: Path, filename: str) -> Path:
    """The file `filename` of a folder, else its only safetensors file, else a pickle for the caller to refuse."""
    if (folder / filename).is_file():
        return folder / filename
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))  # half-written ones
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{folder} holds several safetensors files and no {filename}; name the one to load")
    pickles = sorted(path for path in folder.iterdir() if path.name.endswith(PICKLES))
    if not pickles:
        raise CheckpointError(f"{folder} holds no {filename}")
    return pickles[0]


def _find_named(name: str, revision: str | None, cache_dir: str | Path | None) -> Path:
    card = find_card(name)
    if card is None and "." not in name:
        raise CheckpointError(f"there is no checkpoint {name!r}{_suggestion(name)}")
    if card is not None and revision is None:
        if not card.path.is_file():
            return fetch(card.hub_id, sha256=card.sha256, dtype=card.dtype, cache_dir=cache_dir)
        verify(card.path, sha256=card.sha256, dtype=card.dtype)
        return card.path
    try:
        return fetch(hub_id(card.name if card else name), revision=revision, cache_dir=cache_dir)
    except CheckpointError as error:
        hint = "" if card else f"; {name!r} does not come with this release either{_suggestion(name)}"
        raise CheckpointError(f"{error}{hint}") from error


def find_card(name: str) -> Card | None:
    """The bundled card called `name`, or the first one of the architecture `name`."""
    bundled = cards()
    return bundled.get(name) or next((card for card in bundled.values() if card.architecture == name), None)


def card_beside(name: str, weights: Path) -> Card | None:
    """The card that came with `weights`, found as `hf-hub:org/name` or `local-dir:FOLDER`; None if it is of others."""
    repository, revision = split_hub_name(name)
    try:
        path = fetch_card(repository, revision) if repository else weights.with_suffix(".json")
        card = Card.read(path) if path and path.is_file() else None
        return card if card and card.sha256 == file_sha256(weights) else None
    except CheckpointError:  # another file of that name
        return None


def _suggestion(name: str) -> str:
    close = difflib.get_close_matches(name, cards(), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; `dimmix list` shows those there are"
