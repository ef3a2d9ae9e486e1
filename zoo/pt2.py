"""Is this a torch.export archive that is safe to load? `torch.export.load` would unpickle and run what it finds."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import DimmixError

_PARTS = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|extra/\w+|archive_format|archive_version|byteorder|\.data/\w+"
)
_EXPRESSION = re.compile(r"(?!.*__)([\w+\-*/(), <>=]|'\w+')*")  # of shapes; sympy evaluates them


def check_archive(path: Path) -> None:
    """Raises DimmixError unless the archive is a program and plain tensors: no pickle, no library, no code."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            if wrong := [name for name in entries if not _PARTS.fullmatch(name)]:
                raise DimmixError(f"{path}: refused: it holds {wrong[0]}, which no export of dimmix does")
            if entries["data/sample_inputs/model.pt"].file_size:
                raise DimmixError(f"{path}: refused: its sample inputs are a pickle, which could run code")
            for kind in ("weights", "constants"):
                config = json.loads(archive.read(entries[f"data/{kind}/model_{kind}_config.json"]))["config"]
                if any(entry["use_pickle"] or "_obj" in entry["path_name"] for entry in config.values()):
                    raise DimmixError(f"{path}: refused: one of its {kind} is a pickle, which could run code")
            for expression in _expressions(json.loads(archive.read(entries["models/model.json"]))):
                if not _EXPRESSION.fullmatch(expression):
                    raise DimmixError(f"{path}: refused: the shape {expression[:40]!r} is no plain expression")
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DimmixError(f"{path}: not a torch.export archive ({type(error).__name__}: {error})") from error


def _expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "expr_str":
                yield str(item)
            yield from _expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _expressions(item)
