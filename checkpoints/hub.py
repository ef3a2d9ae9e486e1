"""Fetching from the Hugging Face Hub. huggingface_hub does the work, so its HF_* settings all apply."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dimmix.errors import first_line

from .card import cards, hub_id, namespace
from .errors import CheckpointError, DamagedError
from .header import file_sha256, verify

WEIGHTS = "model.safetensors"
CARD = "model.json"  # beside them, as every card lies beside its weights
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".tar")
CONVERT = (
    "a pickle, which can run code when it is loaded; where you trust it, convert it once: "
    "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
)


def fetch(
    repository: str,
    *,
    revision: str | None = None,
    filename: str = WEIGHTS,
    sha256: str | None = None,
    dtype: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The verified `filename` of `repository` in the Hub's cache, downloaded unless it is there.

    With `sha256` a cached file that matches it is used without asking the Hub; without, the Hub is asked whether
    `revision` moved, and the digest it states for the file is checked.

    Raises:
        CheckpointError: it cannot be had, or what was downloaded is wrong even the second time.
    """
    if sha256 is not None:
        known = cached(repository, revision=revision, filename=filename, cache_dir=cache_dir)
        if known is not None and file_sha256(known) == sha256:
            verify(known, dtype=dtype)
            return known

    def check(path: Path) -> None:
        if sha256 is None:
            _check_stated(path)
        verify(path, sha256=sha256, dtype=dtype)

    return _download_checked(repository, filename, revision, cache_dir, check)


def _download_checked(
    repository: str, filename: str, revision: str | None, cache_dir: str | Path | None, check: Callable[[Path], None]
) -> Path:
    """A file that passes `check`, which raises DamagedError; one that does not is downloaded once more."""
    first = None
    try:
        first = _download(repository, filename, revision, cache_dir)
        check(first)
        return first
    except DamagedError as error:
        damage = error
    try:
        second = _download(repository, filename, revision, cache_dir, force=True)
    except CheckpointError as error:
        raise CheckpointError(f"{damage}; it could not be downloaded again: {error}") from error
    if first not in (None, second):
        _drop_if_damaged(first)
    try:
        check(second)
    except DamagedError as error:
        _drop_if_damaged(second)
        raise CheckpointError(f"hf-hub:{repository}, downloaded twice: {error}") from error
    return second


def fetch_config(repository: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """The `config.json` that timm builds a repository's model from, in the Hub's cache.

    Raises:
        CheckpointError: there is none, or it cannot be had.
    """
    return _download_checked(repository, "config.json", revision, cache_dir, _check_stated)


def fetch_card(repository: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path | None:
    """The card of a repository's weights, in the Hub's cache beside them; None where it has none or does not answer."""
    from huggingface_hub import hf_hub_download

    try:
        with one_line(repository, revision):
            return Path(
                hf_hub_download(repository, CARD, revision=revision, cache_dir=cache_dir, library_name="dimmix")
            )
    except CheckpointError:
        return None


def cached(
    repository: str, *, revision: str | None = None, filename: str = WEIGHTS, cache_dir: str | Path | None = None
) -> Path | None:
    """The file in the Hub's cache, unverified; None when it is not there. Asks no server."""
    from huggingface_hub import try_to_load_from_cache

    with one_line(repository, revision):
        path = try_to_load_from_cache(repository, filename, cache_dir=cache_dir, revision=revision)
    return Path(path) if isinstance(path, str) else None


def status() -> list[dict[str, str | bool]]:
    """For every checkpoint that is bundled or in our namespace on the Hub: where it is, and whether the two agree.

    One record each: `name`; `bundled` and `cached`, true or false; `remote`, which is `same`, `differs` or `absent`
    against the card, or `new` when no card of it comes with this release.

    Raises:
        CheckpointError: the Hub does not answer.
    """
    from huggingface_hub import HfApi

    with one_line(namespace()):
        published = {model.id.partition("/")[2] for model in HfApi().list_models(author=namespace())}
    records: list[dict[str, str | bool]] = []
    for name in [*cards(), *sorted(published - cards().keys())]:
        card = cards().get(name)
        digest = _remote_sha256(hub_id(name)) if card is not None and name in published else None
        if card is None:
            remote = "new"
        elif name not in published:
            remote = "absent"
        else:
            remote = "same" if digest == card.sha256 else "differs"
        bundled = card is not None and card.path.is_file()
        records.append({"name": name, "bundled": bundled, "cached": cached(hub_id(name)) is not None, "remote": remote})
    return records


def _remote_sha256(repository: str) -> str | None:
    from huggingface_hub import HfApi

    with one_line(repository):
        siblings = HfApi().model_info(repository, files_metadata=True).siblings or []
    return next((file.lfs.sha256 for file in siblings if file.rfilename == WEIGHTS and file.lfs), None)


def _download(
    repository: str, filename: str, revision: str | None, cache_dir: str | Path | None, force: bool = False
) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with one_line(repository, revision):
        try:
            path = hf_hub_download(
                repository,
                filename,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force,
                library_name="dimmix",
            )
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise CheckpointError(_missing(repository, filename, revision)) from error
    return Path(path)


def _missing(repository: str, filename: str, revision: str | None) -> str:
    """Why a repository without the wanted file cannot be used."""
    from huggingface_hub import HfApi

    files = [file.rfilename for file in HfApi().model_info(repository, revision=revision).siblings or []]
    if any(name.endswith(".safetensors") for name in files):
        others = ", ".join(name for name in files if name.endswith(".safetensors"))
        return f"hf-hub:{repository} holds no {filename}, only {others}"
    if pickles := [name for name in files if name.endswith(PICKLES)]:
        return f"hf-hub:{repository} holds no {filename}, only {', '.join(pickles)}: {CONVERT}"
    return f"hf-hub:{repository} holds no {filename}"


def _stated_digest(path: Path) -> str | None:
    """The digest the Hub stated for a cached file: its blob is named by it, where the cache uses links.

    Of a large file it is the sha256, of another one the sha1 that git gives a blob.
    """
    stated = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    return stated if len(stated) in (40, 64) else None


def _check_stated(path: Path) -> None:
    stated = _stated_digest(path)
    if stated is None:
        return
    found = file_sha256(path) if len(stated) == 64 else _git_sha1(path)
    if found != stated:
        kind = "sha256" if len(stated) == 64 else "git sha1"
        raise DamagedError(f"{path} is damaged: its {kind} is {found}, expected {stated}")


def _git_sha1(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _drop_if_damaged(path: Path) -> None:
    """Take a download out of the cache that is not what its own name says, so that no one else uses it."""
    try:
        if path.exists():
            _check_stated(path)
    except DamagedError:
        (path.parent / os.readlink(path)).unlink()
        path.unlink()


@contextmanager
def one_line(repository: str, revision: str | None = None) -> Iterator[None]:
    """Whatever goes wrong between here and the Hub becomes one line; the cause stays attached for debugging."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # huggingface_hub's, its HTTP client's and the operating system's share no base
        where = f"hf-hub:{repository}" + (f"@{revision}" if revision else "")
        # huggingface_hub's word for a body of another length than the one it was told.
        kind = DamagedError if str(error).startswith("Consistency check failed") else CheckpointError
        raise kind(f"{where}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    from huggingface_hub import constants, errors

    cause = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{_reason(cause) if cause else 'HF_HUB_OFFLINE is set'}; it is not in the cache either"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.GatedRepoError):
        return "access is granted by its owners only: ask there, then set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision"
    if status in (401, 404) or isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or your HF_TOKEN does not allow it"
    if status == 403:
        return "your HF_TOKEN does not allow this"
    if status == 429:
        return "the Hub is asked too often (429); wait a little, or set HF_TOKEN for a higher limit"
    if status in (400, 422):
        return f"the Hub refuses this ({status}: {str(error).strip().splitlines()[-1].strip()})"
    if status is not None:
        return f"the Hub answered {status}; try again later"
    if isinstance(error, errors.HFValidationError):
        return "this is not the name of a repository; it should look like org/name"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for the cache {constants.HF_HUB_CACHE}; free some, or set HF_HOME to another disk"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the cache {constants.HF_HUB_CACHE} cannot be written to; set HF_HOME to a folder that can"
    if isinstance(error, ValueError) and "Invalid metadata" in str(error):
        return f"the Hub refuses the model card: {' '.join(str(error).split())}"
    if isinstance(error, ValueError | RuntimeError) and cause is not None:  # "... failed due to the above error"
        return _reason(cause)
    if type(error).__module__.startswith(("http", "requests")):
        return f"no connection to {constants.ENDPOINT} ({first_line(error)}); check the network or HF_ENDPOINT"
    return first_line(error)
