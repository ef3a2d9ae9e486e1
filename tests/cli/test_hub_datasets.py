"""`dimmix eval hf://org/dataset`: the real `datasets` library reads from a Hub on loopback."""

import io
import json

import pytest
from PIL import Image

from ..hub_server import Hub

pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COLOURS = ("blue", "green", "red")
RUN = "import sys; from dimmix_cli.main import main; sys.argv[0] = 'dimmix'; main()"


def shard(columns):
    """A parquet file in the Hub's layout."""
    features = {"colour": {"_type": "ClassLabel", "names": COLOURS}, "photo": {"_type": "Image"}}
    table, file = pa.table(columns), io.BytesIO()
    if columns.keys() <= features.keys():
        declared = {"info": {"features": {name: features[name] for name in columns}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(declared)})
    pq.write_table(table, file)
    return file.getvalue()


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (9, 9), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{colour}.png"}


@pytest.fixture(scope="module")
def hub():
    photos = {"colour": [0, 1, 2, 2], "photo": [png(name) for name in (*COLOURS, "blue")]}
    with Hub() as server:
        files = {f"data/{split}-00000-of-00001.parquet": shard(photos) for split in ("train", "test")}
        server.publish("datasets/org/colours", files)
        texts = {"kind": ["red", "red"], "id": [7, 8], "box": [{"x": 1}] * 2, "photo": [png("red"), None]}
        server.publish("datasets/org/texts", {"data/test-00000-of-00001.parquet": shard(texts)})
        server.publish("datasets/org/numbers", {"data/test-00000-of-00001.parquet": shard({"colour": [0, 1]})})
        yield server


@pytest.fixture
def evaluate(process, monkeypatch, hub, brightest, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return lambda data, *options: process(RUN, "eval", data, "--model", brightest, *options)


def test_a_dataset_of_the_hub_is_measured_by_its_names(evaluate, tmp_path):
    done = evaluate("hf://org/colours", "--predictions", tmp_path / "p.csv")
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert (record["data"], record["split"], record["images"], record["top1"]) == ("hf://org/colours", "test", 4, 75.0)
    assert (tmp_path / "p.csv").read_text().splitlines()[4].startswith("blue.png,red,blue,")


def test_columns_may_hold_texts_and_a_row_nothing(evaluate):
    done = evaluate("hf://org/texts", "--label-column", "kind")
    assert json.loads(done.stdout)["top1"] == 100
    assert done.returncode == 1
    assert done.stderr.startswith("dimmix: row 1: not an image")


@pytest.mark.parametrize(
    ("data", "options", "reason"),
    [
        ("hf://org/none", [], "cannot be loaded (Dataset 'org/none' doesn't exist on the Hub or cannot be accessed.)"),
        ("hf://org/numbers", [], "none of its columns holds images"),
        ("hf://org/colours", ["--split", "dev"], "no split 'dev' among train, test; choose one with --split"),
    ],
)
def test_what_cannot_be_read_is_one_line(evaluate, data, options, reason):
    done = evaluate(data, *options)
    assert (done.returncode, done.stdout, done.stderr) == (2 if options else 1, "", f"dimmix: {data}: {reason}\n")
