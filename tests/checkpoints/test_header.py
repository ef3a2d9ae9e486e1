"""Which files may be loaded: every lie a safetensors header can tell is refused before anything is allocated."""

import json
import struct

import pytest
import safetensors.numpy
from toy_checkpoint import weights

from dimmix.checkpoints import CheckpointError, find
from dimmix.checkpoints.header import read_header, verify


def write(path, header, data=b"", length=None):
    """A file with this header (an object or its text) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_what_safetensors_writes_is_accepted(path):
    np = pytest.importorskip("numpy")
    tensors = {"a": np.zeros((2, 3), np.float32), "n": np.zeros((), np.int64), "e": np.zeros((0, 4), np.float16)}
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    assert {name: (t["dtype"], t["shape"]) for name, t in read_header(path).items()} == {
        "a": ("F32", [2, 3]),
        "n": ("I64", []),
        "e": ("F16", [0, 4]),
    }


def test_tensors_may_be_named_in_another_order_than_they_lie_in(path):
    write(path, {"b": tensor([1], 4, 8), "a": tensor([1], 0, 4)}, bytes(8))
    assert read_header(path).keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("header", "data", "pattern"),
    [
        ({"a": tensor([4], 0, 16)}, bytes(12), "ends at byte 16 of 12"),
        ({"a": tensor([4], 0, 16)}, bytes(20), "4 bytes belong to no tensor"),
        ({"a": tensor([4], 0, 16), "b": tensor([4], 8, 24)}, bytes(24), "'b' overlaps another"),
        ({"a": tensor([4], 0, 16), "b": tensor([4], 20, 36)}, bytes(36), "'b' leaves a gap before it"),
        ({"a": tensor([2**40, 2**40], 0, 16)}, bytes(16), "absurd shape"),
        ({"a": tensor([2**62, 0], 0, 0)}, b"", "absurd shape"),
        ({"a": tensor([-4], 0, 16)}, bytes(16), "absurd shape"),
        ({"a": tensor([True] * 4, 0, 4)}, bytes(4), "absurd shape"),
        ({"a": tensor([5], 0, 16)}, bytes(16), r"shape \[5\] and type F32 cannot lie at bytes \[0, 16\]"),
        ({"a": tensor([4], 16, 0)}, bytes(16), "cannot lie at bytes"),
        ({"a": tensor([4], 0, 16, "F99")}, bytes(16), "unknown dtype 'F99'"),
        ({"a": tensor([4], 0, 16, ["F32"])}, bytes(16), "unknown dtype"),
        ({"a": {"dtype": "F32", "shape": [4]}}, bytes(16), "does not give exactly dtype, shape and data_offsets"),
        ({"__metadata__": {"format": 1}}, b"", "metadata is not an object of strings"),
        ([], b"", "not a JSON object"),
        (b'{"a": 1, "a": 2}', b"", "duplicate key 'a'"),
        (b'{"a":' * 100_000, b"", "nested too deep"),
        (b"{", b"", "Expecting property name"),
        (b"\xff\xfe", b"", "utf-8"),
    ],
)
def test_a_header_that_lies_is_refused(path, header, data, pattern):
    with pytest.raises(CheckpointError, match=rf"model\.safetensors is not a valid safetensors file: .*{pattern}"):
        read_header(write(path, header, data))


@pytest.mark.parametrize(("length", "pattern"), [(2**63, "the limit is 25,000,000"), (1000, "the file holds 10")])
def test_a_header_longer_than_the_file_or_the_limit_is_refused(path, length, pattern):
    with pytest.raises(CheckpointError, match=pattern):
        read_header(write(path, {}, length=length))


def test_an_empty_file_is_refused(path):
    path.touch()
    with pytest.raises(CheckpointError, match="holds only 0 bytes"):
        read_header(path)


def test_a_dtype_the_card_does_not_say_is_refused_but_counters_may_be_integers(path):
    write(path, {"w": tensor([4], 0, 16), "steps": tensor([], 16, 24, "I64")}, bytes(24))
    verify(path, dtype="float32")
    with pytest.raises(CheckpointError, match="tensor 'w' is F32, the card says float16"):
        verify(path, dtype="float16")


def test_a_digest_mismatch_shows_both(path):
    path.write_bytes(weights())
    with pytest.raises(CheckpointError, match=rf"sha256 is [0-9a-f]{{64}}, expected {'0' * 64}"):
        verify(path, sha256="0" * 64)


def test_find_refuses_a_damaged_file_of_the_user_and_leaves_it(path):
    path.write_bytes(weights()[:-1])
    with pytest.raises(CheckpointError, match="ends at byte 80,000 of 79,999"):
        find(path)
    assert path.stat().st_size == len(weights()) - 1
