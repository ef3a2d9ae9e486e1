"""Files carry their name only when they are whole; what an interruption had finished stays beside them."""

import csv
import os

import numpy as np
import pytest

from dimmix.embeddings import embedding_writer
from dimmix.errors import DimmixError
from dimmix.files import new_folder, replacing, write_atomically
from dimmix.tables import table_writer

pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"source": name, "embedding": np.full(3, number, np.float32)} for number, name in enumerate("abc")]


def write(path, rows, error=None):
    if path.name.startswith("table"):
        with table_writer(path, {"source": "string"}) as write_row:
            for row in rows:
                write_row({"source": row["source"]})
            if error:
                raise error
    else:
        with embedding_writer(path) as write_embedding:
            for row in rows:
                write_embedding(row["source"], row["embedding"])
            if error:
                raise error


def sources(path):
    if ".csv" in path.name:
        with path.open() as file:
            return [row["source"] for row in csv.DictReader(file)]
    if ".npy" in path.name:
        return ["abc"[int(row[0])] for row in np.load(path)]
    return pq.read_table(path)["source"].to_pylist()


@pytest.mark.parametrize("name", ["table.csv", "table.parquet", "embeddings.npy", "embeddings.parquet"])
def test_what_an_interruption_had_finished_stays_beside_the_old_file(tmp_path, name):
    path, partial = tmp_path / name, tmp_path / f"{name}.partial"
    write(path, ROWS[:1])
    with pytest.raises(KeyboardInterrupt):
        write(path, [], KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt) as caught:
        write(path, ROWS, KeyboardInterrupt())
    assert sorted(tmp_path.iterdir()) == [path, partial]
    assert (sources(path), sources(partial)) == (["a"], ["a", "b", "c"])
    assert caught.value.__notes__ == [f"kept what was finished in {partial}"]


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(DimmixError, match=r"cannot be written \(Is a directory\)") as caught, replacing(tmp_path):
        pass
    assert caught.value.exit_code == 2


def test_a_whole_content_is_written_into_a_new_folder(tmp_path):
    write_atomically(tmp_path / "new" / "file", b"content")
    assert [path.read_bytes() for path in (tmp_path / "new").iterdir()] == [b"content"]


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DimmixError, match="not a regular file") as caught:
        write_atomically(tmp_path / "pipe", b"content")
    assert caught.value.exit_code == 2
    assert (tmp_path / "pipe").is_fifo()


def test_a_pipe_behind_a_link_is_named_by_the_link(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stdout").symlink_to(tmp_path / "pipe")
    with pytest.raises(DimmixError, match=r"stdout: not a regular file"):
        write_atomically(tmp_path / "stdout", b"content")


def test_names_that_are_no_utf_8_go_into_parquet_escaped(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    with table_writer(tmp_path / "t.parquet", {"source": "string"}) as write:
        write({"source": os.fsdecode(b"\xff.png")})
    assert pq.read_table(tmp_path / "t.parquet").to_pylist() == [{"source": "\\udcff.png"}]


def test_permissions_are_those_of_the_file_before_or_of_the_umask(tmp_path):
    before = os.umask(0o077)
    try:
        write_atomically(tmp_path / "new", b"1")
        (tmp_path / "old").write_bytes(b"0")
        (tmp_path / "old").chmod(0o640)
        write_atomically(tmp_path / "old", b"1")
        with new_folder(tmp_path / "folder"):
            pass
        os.umask(0o022)
        with replacing(tmp_path / "other") as path, new_folder(tmp_path / "full") as folder:
            path.unlink()  # as safetensors does
            path.touch(0o600)
            (folder / "in").touch(0o600)
    finally:
        os.umask(before)
    expected = {"new": 0o600, "old": 0o640, "folder": 0o700, "other": 0o644, "full": 0o755, "full/in": 0o644}
    assert {name: (tmp_path / name).stat().st_mode & 0o777 for name in expected} == expected
