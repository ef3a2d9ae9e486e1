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


def test_a_default_name_that_is_taken_is_left_alone(dimmix, model, red, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / f"{model[1]}.safetensors"
    shutil.copy(model[3], weights)
    done = dimmix("export", model[1], "--checkpoint", weights, "--to", "safetensors")
    assert unchanged(weights, done, "there is one already") == model[3].read_bytes()
    taken = tmp_path / "red.explained.png"
    taken.write_text("precious")
    assert unchanged(taken, dimmix("explain", red, *model), "there is one already") == b"precious"


def test_eval_does_not_write_into_its_data_or_over_its_report(dimmix, model, red, tmp_path):
    folder = tmp_path / "data" / "cat"
    folder.mkdir(parents=True)
    photo = shutil.copy(red, folder / "1.png")
    for outputs in (["-o", photo, "-f", "json"], ["--predictions", photo]):
        done = dimmix("eval", folder.parent, *model, *outputs)
        assert unchanged(photo, done, "is among the data") == red.read_bytes()
    (folder.parent / "result.json").write_text("of last time")
    assert dimmix("eval", folder.parent, *model, "-o", folder.parent / "result.json").code == 0
    assert json.loads((folder.parent / "result.json").read_text())["images"] == 1
    page = tmp_path / "report" / "report.html"
    assert dimmix("eval", CIFAR10, *model, "--report", page.parent, "-f", "json", "-o", page).code == 2
    assert not page.exists()


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("red.png\n".encode("utf-16"), "not a list of names"),
        (b"red.png\0blue.png\0", "not a list of names"),
        (b"red.png\n\0\n", "no file can have this name"),
    ],
)
def test_a_list_of_what_are_no_names_does_not_stop_the_others(dimmix, brightest, red, tmp_path, content, said):
    (tmp_path / "list.txt").write_bytes(content)
    done = dimmix("predict", f"@{tmp_path}/list.txt", red, "-m", brightest)
    assert done.code == 1
    *_, bad, good = map(json.loads, done.out.splitlines())
    assert said in bad["error"]
    assert (good["source"], good["error"]) == (str(red), None)


@pytest.mark.parametrize(("closed", "code"), [("2>&-", 0), (">&-", 0), ("<&-", 1)])
def test_a_closed_stream_is_as_one_that_leads_nowhere(brightest, red, tmp_path, closed, code):
    source = "-" if closed == "<&-" else red
    command = f"{sys.executable} -m dimmix_cli predict {source} -m {brightest} -f jsonl {closed}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert len(done.stdout.splitlines()) == (closed != ">&-")
    assert len(done.stderr.splitlines()) == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("option", ["--version", "--help"])
def test_a_full_disk_is_one_line_outside_of_commands_too(option):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "dimmix_cli", option]
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (1, "dimmix: output: No space left on device\n")


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
        (["widths", "--connections", "10", "--gamma", "1e-300"], "gamma above 0"),
        (["export", "resnet18", "--to", "onnx", "--atol", "inf"], "finite"),
        (["benchmark", "resnet18", "--backend", "eager", "-b", str(2**20)], f"--batch-size {2**20}"),
        (["study", "cost", "--gamma", "2"], "leave --connections and --gamma out"),
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
