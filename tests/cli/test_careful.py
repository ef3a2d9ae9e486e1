"""What the user has is not lost, and what nobody foresaw is one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from dimmix_cli import main

from ..conftest import CIFAR10


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def model(tiny):
    return ["--model", tiny.architecture, "--checkpoint", tiny.checkpoint]


def unchanged(path, done, words="is read, "):
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    return path.read_bytes()


def test_predict_does_not_write_over_what_it_reads(dimmix, brightest, red, tmp_path):
    photo = red.read_bytes()
    listing = tmp_path / "list.csv"
    listing.write_text(f"{red}\n")
    (tmp_path / "link.png").symlink_to(red)
    for source in (red, tmp_path, f"{tmp_path}/r*.png", f"@{listing}"):
        for output in (red, tmp_path / "link.png"):
            done = dimmix("predict", source, "-m", brightest, "-f", "csv", "-o", output)
            assert unchanged(red, done) == photo
    done = dimmix("predict", f"@{listing}", "-m", brightest, "-o", listing)
    assert unchanged(listing, done) == f"{red}\n".encode()
    both = tmp_path / "both.npy"
    both.write_bytes(b"mine")
    done = dimmix("predict", red, "-m", brightest, "-f", "jsonl", "-o", both, "--embeddings", both)
    assert unchanged(both, done) == b"mine"


def test_eval_explain_and_export_do_not_write_over_what_they_read(dimmix, model, red, tmp_path):
    (tmp_path / "shards").mkdir()
    data = tmp_path / "shards" / "test.parquet"
    shutil.copy(CIFAR10, data)
    content, photo = data.read_bytes(), red.read_bytes()
    for given in (data, data.parent):
        assert unchanged(data, dimmix("eval", given, *model, "--predictions", data)) == content
    both = ["-o", tmp_path / "both.csv", "--predictions", tmp_path / "both.csv"]
    assert dimmix("eval", data, *model, *both).code == 2
    assert unchanged(red, dimmix("explain", red, *model, "-o", red)) == photo
    weights = model[3].read_bytes()
    export = ["export", model[1], *model[2:], "--to", "safetensors", "-o", model[3]]
    assert unchanged(model[3], dimmix(*export)) == weights


def test_eval_looks_at_its_outputs_first(dimmix, model, tmp_path):
    predictions = ["--predictions", tmp_path / "p.csv"]
    (tmp_path / "file").write_text("")
    for wrong in (["-o", tmp_path / "none" / "r.json"], ["-o", tmp_path / "r.txt"], ["--report", tmp_path / "file"]):
        assert dimmix("eval", CIFAR10, *model, *predictions, *wrong).code == 2
        assert not (tmp_path / "p.csv").exists()


def test_brackets_in_a_name_are_no_markup(dimmix, model, tmp_path):
    folder = tmp_path / "set[/x] [red]"
    folder.mkdir(parents=True)
    shutil.copy(CIFAR10, folder / "test.parquet")
    done = dimmix("eval", folder, *model, "-f", "table", "-o", tmp_path / "out.txt")
    assert done.code == 0
    assert "set[/x] [red]" in (tmp_path / "out.txt").read_text()


def test_a_pipe_and_a_looping_link_in_a_folder_are_errors_and_the_others_are_answered(dimmix, brightest, red, tmp_path):
    (tmp_path / "inner").mkdir()
    shutil.copy(red, tmp_path / "inner" / "z.png")
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to("loop")
    done = dimmix("predict", tmp_path, "-m", brightest, "-k", 1)
    rows = {Path(row["source"]).name: row["error"] for row in map(json.loads, done.out.splitlines())}
    assert rows == {
        "a.png": "not a regular file",
        "loop": "Too many levels of symbolic links",
        "red.png": None,
        "z.png": None,
    }
    done = dimmix("predict", f"{tmp_path}/*.png", "-m", brightest)
    assert [Path(json.loads(line)["source"]).name for line in done.out.splitlines()] == ["red.png"]


def test_a_list_may_begin_with_a_byte_order_mark(dimmix, brightest, red, tmp_path):
    (tmp_path / "list.txt").write_text(f"\ufeff{red}\n", encoding="utf-8")
    assert dimmix("predict", f"@{tmp_path}/list.txt", "-m", brightest).code == 0


def test_what_nobody_foresaw_is_one_line(dimmix, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("dimmix.widths.designs", broken)
    done = dimmix("widths", "--connections", "512")
    assert (done.code, done.err) == (
        1,
        "dimmix: unexpected ZeroDivisionError: division by zero; DIMMIX_DEBUG=1 shows where\n",
    )
    monkeypatch.setenv("DIMMIX_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main._with_one_line_errors(broken)()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "x.png", "--model", ""], "name is empty"),
        (["predict", "x.png", "--checkpoint", "~nobody-here/x.safetensors"], "~nobody-here"),
        (["widths", "--connections", "2^18", "--gamma", "0", "--sweep"], "gamma above 0"),
        (["widths", "--connections", "2^18", "--gamma", "-1", "--sweep"], "gamma above 0"),
        (["export", "resnet18", "--to", "onnx", "--atol", "inf"], "finite"),
    ],
)
def test_wrong_values_are_one_line(dimmix, arguments, said):
    done = dimmix(*arguments)
    assert done.code in (1, 2)
    assert said in done.err
    assert "unexpected" not in done.err
    assert done.err.count("\n") == 1


def test_sigterm_keeps_what_is_finished_beside_what_was_kept_before(brightest, red, tmp_path):
    (tmp_path / "list.txt").write_text(f"{red}\n" * 1_000_000)
    (tmp_path / "out.csv.partial").write_text("precious")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "dimmix_cli", "predict", f"@{tmp_path}/list.txt", "-m", str(brightest)]
    with subprocess.Popen(
        [*command, "-o", str(tmp_path / "out.csv")], env=environment, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(p.stat().st_size for p in tmp_path.glob(".out.*.csv")):
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 143
    assert "Traceback" not in err
    assert (tmp_path / "out.csv.partial").read_text() == "precious"
    assert len((tmp_path / "out.csv.partial2").read_text().splitlines()) > 1
    assert not list(tmp_path.glob(".out.*"))
