"""Is this a torch.export archive that is safe to load? `torch.export.load` would unpickle and run what it finds."""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DimmixError

_PARTS = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|extra/\w+|archive_format|archive_version|byteorder|\.data/\w+"
)
# sympy evaluates the expressions of shapes as Python: no word beyond these, and no text but a symbol's name.
_WORDS = "Symbol|Integer|Add|Mul|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|positive|integer|True|False"
_EXPRESSION = re.compile(rf"(({_WORDS})\b|(?<=Symbol\()'[su]\d+'|\b[su]?\d+\b|[\s+\-(),<>=/]|(?<!\*)\*(?!\*))*")

# torch looks a target up by its dotted name, in whatever the first part names.
_TARGET = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|neg|eq|ne|ge|gt|le|lt)"
)


def checked_archive(path: Path) -> io.BytesIO:
    """A copy in memory of the program and the plain tensors that `path` holds, and of nothing else.

    A copy, because torch and Python read a malformed archive differently: what was looked at is what is loaded.

    Raises:
        DimmixError: there is a pickle, a library or code in it, or it is no such archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            roots = {name.partition("/")[0] for name in archive.namelist()}
            entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
            if len(roots) != 1 or len(entries) != len(archive.namelist()):
                raise DimmixError(f"{path}: refused: it holds two folders, or two files of one name")
            root = roots.pop()
        _check(path, entries)
    except (
        OSError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:  # an archive with a password is a RuntimeError
        raise DimmixError(f"{path}: not a torch.export archive ({type(error).__name__}: {error})") from error
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)
    copy.seek(0)
    return copy


def _check(path: Path, entries: dict[str, bytes]) -> None:
    if wrong := [name for name in entries if not _PARTS.fullmatch(name)]:
        raise DimmixError(f"{path}: refused: it holds {wrong[0]}, which no export of dimmix does")
    if entries["data/sample_inputs/model.pt"]:
        raise DimmixError(f"{path}: refused: its sample inputs are a pickle, which could run code")
    for kind in ("weights", "constants"):
        config = json.loads(entries[f"data/{kind}/model_{kind}_config.json"])["config"]
        if any(entry["use_pickle"] or "_obj" in entry["path_name"] for entry in config.values()):
            raise DimmixError(f"{path}: refused: one of its {kind} is a pickle, which could run code")
    program = json.loads(entries["models/model.json"])
    for expression in _under("expr_str", program):
        if not _EXPRESSION.fullmatch(expression):
            raise DimmixError(f"{path}: refused: the shape {expression[:40]!r} is no plain expression")
    for target in _under("target", program):
        if not _TARGET.fullmatch(target):
            raise DimmixError(f"{path}: refused: it calls {target[:40]!r}, which no export of dimmix does")


def _under(key: str, value: Any) -> Iterator[str]:
    """Every text under `key`, however deep; what is no text comes as one, so that it is refused."""
    if isinstance(value, dict):
        if key in value:
            yield value[key] if isinstance(value[key], str) else repr(value[key])
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _under(key, item)
