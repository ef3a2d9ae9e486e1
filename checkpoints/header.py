"""Is this a safetensors file that is safe to load, and is it the one that was meant?

Everything is checked on the file's header, before a single tensor is allocated.
"""

import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from .errors import CheckpointError, DamagedError

# Bytes for each element of the types that torch can hold.
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
MAX_HEADER = 25_000_000  # bytes; huggingface_hub's own limit
MAX_DIMENSION = 2**31 - 1


def verify(path: Path, *, sha256: str | None = None, dtype: str | None = None) -> None:
    """Check the header of `path` and, where given, its digest and the type of its floating point tensors.

    `dtype` is a torch name (`"float32"`).

    Raises:
        DamagedError: with both digests on a mismatch, else with what is wrong with the header.
        CheckpointError: a wrong dtype, or the file cannot be read.
    """
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise DamagedError(f"{path} is damaged: its sha256 is {found}, expected {sha256}")
    for name, tensor in read_header(path).items():
        if dtype is not None and tensor["dtype"] in FLOATS.values() and tensor["dtype"] != FLOATS.get(dtype):
            raise CheckpointError(f"{path}: tensor {name!r} is {tensor['dtype']}, the card says {dtype}")


def file_sha256(path: Path) -> str:
    """The file's sha256 as hexadecimal digits."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> `{"dtype", "shape", "data_offsets"}`, each checked against the size of the file.

    Raises:
        DamagedError: not a safetensors file; it declares more or less data than it holds; tensors overlap or
            leave gaps; an unknown dtype, an absurd shape or a duplicate name.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise ValueError(f"it holds only {size} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER:
                raise ValueError(f"its header claims {length:,} bytes, the limit is {MAX_HEADER:,}")
            if length > size - 8:
                raise ValueError(f"its header claims {length:,} bytes, the file holds {size:,}")
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        _check_metadata(header.pop("__metadata__", {}))
        _check_layout(header, size - 8 - length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError:
        raise DamagedError(f"{path} is not a valid safetensors file: its header is nested too deep") from None
    except ValueError as error:
        raise DamagedError(f"{path} is not a valid safetensors file: {error}") from error
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not an object of strings")


def _check_layout(header: dict[str, Any], held: int) -> None:
    """Every tensor is well formed and together they fill the `held` bytes of data exactly."""
    spans = sorted((*_span(name, tensor), name) for name, tensor in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise ValueError(f"tensor {name!r} {'overlaps another' if start < end else 'leaves a gap before it'}")
        if stop > held:
            raise ValueError(f"tensor {name!r} ends at byte {stop:,} of {held:,}")
        end = stop
    if end != held:
        raise ValueError(f"{held - end:,} bytes belong to no tensor")


def _span(name: str, tensor: Any) -> tuple[int, int]:
    """First and last byte of one tensor in the data, checked against its shape and type."""
    if not isinstance(tensor, dict) or set(tensor) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} does not give exactly dtype, shape and data_offsets")
    dtype, shape, offsets = tensor["dtype"], tensor["shape"], tensor["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in shape):
        raise ValueError(f"tensor {name!r} has the absurd shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"tensor {name!r} has the offsets {offsets!r}")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ValueError(f"tensor {name!r} of shape {shape} and type {dtype} cannot lie at bytes {offsets}")
    return offsets[0], offsets[1]
