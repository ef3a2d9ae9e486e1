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
        sets = {
            f"{name}/test-00000-of-00001.parquet": shard(photos | {"colour": [at] * 4}) for at, name in enumerate("ab")
        }
        readme = "---\nconfigs:\n" + "".join(
            f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}/*.parquet\n" for name in "ab"
        )
        server.publish("datasets/org/sets", sets | {"README.md": (readme + "---\n").encode()})
        server.publish("datasets/org/broken", {"data/test-00000-of-00001.parquet": b"PAR1 no, it is not PAR1"})
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


@pytest.mark.parametrize(("name", "right"), [("a", 50), ("b", 25)])
def test_a_configuration_and_a_revision_are_named_in_the_address(evaluate, name, right):
    done = evaluate(f"hf://org/sets/{name}@main")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["top1"] == right


def test_columns_may_hold_texts_and_a_row_nothing(evaluate):
    done = evaluate("hf://org/texts", "--label-column", "kind")
    assert json.loads(done.stdout)["top1"] == 100
    assert done.returncode == 1
    assert done.stderr.startswith("dimmix: row 1: not an image")


@pytest.mark.parametrize(
    ("data", "options", "code", "reason"),
    [
        ("hf://org/none", [], 1, "cannot be loaded (Dataset 'org/none' doesn't exist on the Hub or cannot be "),
        ("hf://org/broken", [], 1, "cannot be loaded (Parquet file size is 23 bytes, smaller than "),
        ("hf://org/numbers", [], 1, "none of its columns holds images"),
        ("hf://org/sets", [], 2, "2 data sets lie in it; name one of hf://org/sets/a, hf://org/sets/b"),
        ("hf://org/colours", ["--split", "dev"], 2, "no split 'dev' among train, test; choose one with --split"),
    ],
)
def test_what_cannot_be_read_is_one_line(evaluate, data, options, code, reason):
    done = evaluate(data, *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert done.stderr.startswith(f"dimmix: {data}: {reason}")
