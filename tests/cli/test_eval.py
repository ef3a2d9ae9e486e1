"""`dimmix eval`: the record, the files beside it, the check against the card."""

import csv
import json

import pytest

from dimmix.evaluation import Evaluation

from ..conftest import CIFAR10

KEYS = ["model", "data", "split", "images", "top1", "top5", "nll", "ece", "images_per_second", "seconds"]


@pytest.fixture
def model(tiny):
    return ["--model", tiny.architecture, "--checkpoint", tiny.checkpoint]


def test_json_is_one_object_of_the_metrics(dimmix, model):
    done = dimmix("eval", CIFAR10, *model, "--format", "json", "--check")
    record = json.loads(done.out)
    assert done.code == 0
    assert list(record) == KEYS
    assert (record["images"], record["top1"]) == (60, 10.0)
    half = 0.0005  # what rounding takes from the seconds, or adds
    assert 60 / (record["seconds"] + half) - 0.1 < record["images_per_second"] < 60 / (record["seconds"] - half) + 0.1


def test_a_table_has_every_class(dimmix, model, class_folders):
    out = dimmix("eval", class_folders, *model, "--format", "table").out
    assert "accuracy of airplane" in out
    assert "accuracy of truck" in out


def test_predictions_are_written_for_each_image(dimmix, model, class_folders, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    dimmix("eval", class_folders, *model, "--predictions", tmp_path / "p.csv")
    dimmix("eval", class_folders, *model, "--predictions", tmp_path / "p.parquet")
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(tmp_path / "p.parquet").to_pydict()
    assert len(rows) == 60
    assert [row["prediction"] for row in rows] == table["prediction"]
    assert sum(table["correct"]) == 6


def test_ctrl_c_keeps_the_finished_predictions(dimmix, model, class_folders, tmp_path, monkeypatch):
    update = Evaluation.update

    def interrupt(self, logits, labels, samples):
        if self.images:
            raise KeyboardInterrupt
        return update(self, logits, labels, samples)

    monkeypatch.setattr(Evaluation, "update", interrupt)
    done = dimmix("eval", class_folders, *model, "--batch-size", 8, "--predictions", tmp_path / "p.csv")
    partial = tmp_path / "p.csv.partial"
    assert (done.code, done.err) == (130, f"dimmix: interrupted\ndimmix: kept what was finished in {partial}\n")
    assert len(partial.read_text().splitlines()) == 1 + 8
    assert list(tmp_path.iterdir()) == [partial]


def test_the_report_is_written(dimmix, model, tmp_path):
    done = dimmix("eval", CIFAR10, *model, "--report", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert "wrote" in done.err


def test_check_fails_on_data_that_gives_another_accuracy(dimmix, model, tmp_path, class_folders):
    (tmp_path / "airplane").symlink_to(class_folders / "airplane")
    done = dimmix("eval", tmp_path, *model, "--check")
    assert done.code == 1
    assert "top-1 is 100.00 on 6 images, the card says 10.00 on 60" in done.err


def test_check_needs_a_card(dimmix, brightest, class_folders):
    assert dimmix("eval", class_folders, "-m", brightest, "--check").code == 2


def test_labels_that_do_not_match_are_one_line_with_both(dimmix, brightest, class_folders):
    done = dimmix("eval", class_folders, "-m", brightest)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "10 classes (airplane," in done.err
    assert "3 classes (red, green, blue)" in done.err


def test_no_parquet_file_is_written_among_class_folders(dimmix, model, class_folders, tmp_path):
    (tmp_path / "cat").symlink_to(class_folders / "cat")
    done = dimmix("eval", tmp_path, *model, "--predictions", tmp_path / "p.parquet")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "would be one of the data" in done.err


def test_a_label_beyond_the_classes_names_its_column(dimmix, model, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = pq.read_table(CIFAR10)["img"][0].as_py()["bytes"]
    pq.write_table(pa.table({"image": [image], "id": [77]}), tmp_path / "x.parquet")
    done = dimmix("eval", tmp_path / "x.parquet", *model)
    assert done.code == 1
    assert "row 0 is of class 77, the model has 10 classes; labels are of the column id" in done.err


def test_a_broken_image_is_named_and_the_rest_measured(dimmix, model, class_folders, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "broken.png").write_bytes(b"x")
    (tmp_path / "dog").symlink_to(class_folders / "dog")
    done = dimmix("eval", tmp_path, *model)
    assert (done.code, json.loads(done.out)["images"]) == (1, 6)
    assert "cat/broken.png: not an image" in done.err
