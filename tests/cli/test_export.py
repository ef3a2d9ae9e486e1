"""`dimmix export`, and its ONNX file where torch cannot be imported."""

import json

import pytest
from PIL import Image

from ..conftest import CIFAR10

WITHOUT_TORCH = (
    "import sys\n"
    "class Blocked:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.partition('.')[0] in ('torch', 'timm', 'torchvision', 'torchmetrics'): raise ImportError(name)\n"
    "sys.meta_path.insert(0, Blocked())\n"
    "from dimmix_cli.main import main\n"
    "main()"
)


@pytest.fixture
def model(tiny):
    return [tiny.architecture, "--checkpoint", tiny.checkpoint]


def test_an_onnx_file_predicts_and_evaluates_without_torch(dimmix, process, model, class_folders, tiny_onnx):
    expected = json.loads(dimmix("eval", CIFAR10, "--model", model[0], "--checkpoint", model[2]).out)
    found = process(WITHOUT_TORCH, "eval", CIFAR10, "--model", tiny_onnx)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["nll"] == pytest.approx(expected["nll"], abs=1e-5)
    image = next((class_folders / "cat").iterdir())
    answer = process(WITHOUT_TORCH, "predict", image, "--model", tiny_onnx)
    assert answer.returncode == 0, answer.stderr
    ours = json.loads(dimmix("predict", image, "--model", model[0], "--checkpoint", model[2]).out)["predictions"]
    assert json.loads(answer.stdout)["predictions"][0]["score"] == pytest.approx(ours[0]["score"], abs=1e-5)


def test_int8_shows_the_accuracy_before_and_after(dimmix, model, tmp_path):
    done = dimmix("export", *model, "--to", "onnx", "--int8", "--data", CIFAR10, "-o", tmp_path / "m.onnx")
    record = json.loads(done.out)
    assert record["images"] == 45
    assert abs(record["top1_after"] - record["top1_before"]) < 10
    assert 0 < record["max_difference"] < 2
    assert b"QuantizeLinear" in (tmp_path / "m.onnx").read_bytes()


def test_the_record_says_what_was_written(dimmix, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = dimmix("export", *model, "--to", "safetensors")
    record = json.loads(done.out)
    assert (done.code, record["file"]) == (0, f"{model[0]}.safetensors")
    assert record["bytes"] == (tmp_path / record["file"]).stat().st_size
    assert record["max_difference"] < 1e-6 < record["atol"]


def test_a_difference_over_atol_is_exit_1_and_no_file(dimmix, model, tmp_path, monkeypatch):
    monkeypatch.setattr("dimmix.export._largest_difference", lambda *arguments: 0.5)
    done = dimmix("export", *model, "--to", "safetensors", "-o", tmp_path / "m.safetensors", "--data", CIFAR10)
    assert (done.code, list(tmp_path.iterdir())) == (1, [])
    assert "more than --atol 0.0001" in done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "onnx", "--int8"],
        ["--to", "pt2", "--int8", "--data", "x"],
        ["--to", "onnx", "-o", "m.pt2"],
        ["--to", "onnx", "--split", "test"],
    ],
)
def test_wrong_usage_is_exit_2(dimmix, model, arguments):
    assert dimmix("export", *model, *arguments).code == 2


def test_data_without_an_image_that_can_be_read_is_one_line(dimmix, model, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(
        pa.table({"img": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), tmp_path / "e.parquet"
    )
    (tmp_path / "thin" / "a").mkdir(parents=True)
    Image.new("RGB", (1, 200_000)).save(tmp_path / "thin" / "a" / "thin.png")
    (tmp_path / "none" / "a").mkdir(parents=True)
    for data, said in (("e.parquet", "no images in it"), ("thin", "too long and thin"), ("none", "without images")):
        done = dimmix(
            "export", *model, "--to", "safetensors", "-o", tmp_path / "m.safetensors", "--data", tmp_path / data
        )
        assert done.code in (1, 2)
        assert said in done.err
        assert not (tmp_path / "m.safetensors").exists()


def test_images_that_cannot_be_read_are_named_and_the_others_taken(dimmix, model, class_folders, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "broken.png").write_bytes(b"x")
    (tmp_path / "dog").symlink_to(class_folders / "dog")
    (tmp_path / "m.safetensors").touch()
    (tmp_path / "m.safetensors").chmod(0o644)
    done = dimmix("export", *model, "--to", "safetensors", "-o", tmp_path / "m.safetensors", "--data", tmp_path)
    assert done.code == 0
    assert "broken.png: not an image" in done.err
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o644


def test_weights_are_not_written_beside_the_card_of_others(dimmix, model, tiny, tmp_path):
    (tmp_path / "m.json").write_text("{}")
    done = dimmix("export", *model, "--to", "safetensors", "-o", tmp_path / "m.safetensors")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "a card of other weights lies beside" in done.err
