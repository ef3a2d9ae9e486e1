"""`dimmix predict` on real images, broken ones, pipes and folders of many."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

RUN = "import sys; from dimmix_cli.main import main; sys.argv[0] = 'dimmix'; main()"


@pytest.fixture
def model(tiny):
    return ["--model", tiny.architecture, "--checkpoint", tiny.checkpoint]


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_json_has_the_top_five_of_each_image(dimmix, model, class_folders):
    done = dimmix("predict", class_folders / "cat", *model, "--format", "json")
    records = json.loads(done.out)
    assert done.code == 0
    assert len(records) == 6
    for record in records:
        assert set(record) == {"source", "predictions", "error"}
        assert [set(prediction) for prediction in record["predictions"]] == [{"label", "index", "score"}] * 5
        scores = [prediction["score"] for prediction in record["predictions"]]
        assert scores == sorted(scores, reverse=True)


def test_a_table_names_the_class_and_its_probability(dimmix, brightest, red):
    done = dimmix("predict", red, "--model", brightest, "--format", "table")
    assert "red.png" in done.out
    assert next(line.split()[1:3] for line in done.out.splitlines() if "red.png" in line) == ["1", "red"]


def test_broken_images_are_rows_and_the_others_are_answered(dimmix, brightest, red, tmp_path):
    (tmp_path / "broken.png").write_bytes(red.read_bytes()[:50])
    done = dimmix("predict", tmp_path, tmp_path / "none.png", red, "-m", brightest, "--format", "csv", "-k", 1)
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert done.code == 1
    assert [row["label"] for row in rows] == ["", "red", "", "red"]
    assert rows[2]["error"] == "no such file or directory"
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["dimmix", "dimmix"]
    assert "Traceback" not in done.err


def test_an_empty_folder_is_an_error(dimmix, brightest, tmp_path):
    done = dimmix("predict", tmp_path, "--model", brightest)
    assert done.code == 1
    assert done.err == f"dimmix: {tmp_path}: a folder without images\n"


def test_one_image_comes_through_a_pipe(process, brightest, red):
    code = f"import sys, io; sys.stdin = io.TextIOWrapper(io.BytesIO(open({str(red)!r}, 'rb').read())); {RUN}"
    record = json.loads(process(code, "predict", "-", "--model", brightest).stdout)
    assert (record["source"], record["predictions"][0]["label"]) == ("-", "red")


def test_the_threshold_leaves_out_unlikely_classes(dimmix, brightest, red):
    record = json.loads(dimmix("predict", red, "-m", brightest, "--threshold", 0.5).out)
    assert [prediction["label"] for prediction in record["predictions"]] == ["red"]


def test_labels_may_be_replaced(dimmix, brightest, red, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("rot\ngrün\nblau\n", encoding="utf-8")
    done = dimmix("predict", red, "-m", brightest, "--labels", names, "-k", 1)
    assert json.loads(done.out)["predictions"][0]["label"] == "rot"
    names.write_text("rot\n")
    done = dimmix("predict", red, "-m", brightest, "--labels", names)
    assert (done.code, "1 names for a model of 3 classes" in done.err) == (2, True)


def test_embeddings_go_to_npy_and_parquet(dimmix, model, class_folders, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    folder = class_folders / "dog"
    done = dimmix("predict", folder, tmp_path / "none.png", *model, "--embeddings", tmp_path / "e.npy")
    rows = [json.loads(line) for line in done.out.splitlines()]
    array = np.load(tmp_path / "e.npy")
    assert (done.code, array.shape[0], array.dtype) == (1, 6, np.float32)
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4, 5, None]
    dimmix("predict", folder, *model, "--embeddings", tmp_path / "e.parquet")
    table = pq.read_table(tmp_path / "e.parquet").to_pydict()
    assert table["source"] == [row["source"] for row in rows[:6]]
    np.testing.assert_allclose(table["embedding"], array, atol=1e-5)


def test_an_onnx_file_without_features_has_no_embeddings(dimmix, brightest, red, tmp_path):
    done = dimmix("predict", red, "-m", brightest, "--embeddings", tmp_path / "e.npy")
    assert (done.code, done.err) == (2, "dimmix: brightest: this file gives no features; export the model again\n")
    assert not (tmp_path / "e.npy").exists()


def test_an_output_that_is_a_folder_is_wrong_usage_before_any_work(dimmix, brightest, red, tmp_path):
    done = dimmix("predict", red, "-m", brightest, "--output", tmp_path)
    assert (done.code, done.err) == (2, f"dimmix: {tmp_path}: cannot be written (Is a directory)\n")
    assert [path.name for path in tmp_path.iterdir()] == ["red.png"]


def test_a_glob_is_answered_in_order(dimmix, brightest, red, tmp_path):
    for name in "dbca":
        os.link(red, tmp_path / f"{name}.png")
    done = dimmix("predict", f"{tmp_path}/?.png", "-m", brightest)
    assert [json.loads(line)["source"][-5:] for line in done.out.splitlines()] == ["a.png", "b.png", "c.png", "d.png"]


def test_a_checkpoint_that_does_not_fit_is_one_line(dimmix, tiny, red):
    done = dimmix("predict", red, "--model", "butterfly_resnet20_blockmix_w32", "--checkpoint", tiny.checkpoint)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "weights of butterfly_resnet20_convmix_w32, not of butterfly_resnet20_blockmix_w32" in done.err


MEMORY = (
    "import resource, sys\nfrom dimmix_cli.main import app\n"
    "try: app(sys.argv[1:])\nexcept SystemExit: pass\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
)


def test_memory_is_flat_over_twenty_thousand_files(process, brightest, red, tmp_path):
    peaks = []
    for count in (2_000, 20_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for number in range(count):
            os.link(red, folder / f"{number}.png")
        done = process(MEMORY, "predict", folder, "-m", brightest, "-o", tmp_path / "out.jsonl", "-j", 2)
        assert (tmp_path / "out.jsonl").read_text().count("\n") == count
        peaks.append(int(done.stderr))
    assert peaks[1] <= 1.3 * peaks[0]


@pytest.fixture
def heard_ctrl_c():
    """Children hear Ctrl-C even where the tests run in the background, which a shell lets ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_is_exit_130_and_keeps_what_is_finished(brightest, red, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text(f"{red}\n" * 1_000_000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "dimmix_cli", "predict", f"@{listing}", "-m", str(brightest)]
    with subprocess.Popen(
        [*command, "-o", str(tmp_path / "out.csv")], env=environment, stderr=subprocess.PIPE, text=True
    ) as running:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any(p.stat().st_size for p in tmp_path.glob(".out.*.csv")):
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "out.csv").exists()
    assert len((tmp_path / "out.csv.partial").read_text().splitlines()) > 1
    assert err.splitlines()[-2:] == [
        "dimmix: interrupted",
        f"dimmix: kept what was finished in {tmp_path}/out.csv.partial",
    ]


def test_a_closed_pipe_ends_quietly(brightest, red, tmp_path):
    listing = tmp_path / "list.txt"
    listing.write_text(f"{red}\n" * 20_000)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "dimmix_cli", "predict", f"@{listing}", "-m", str(brightest)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert json.loads(run.stdout.readline())["source"] == str(red)
        run.stdout.close()
        assert "Traceback" not in run.stderr.read()


def test_embeddings_take_no_options_of_classes(dimmix, brightest, red, tmp_path):
    for options in (["-k", 2], ["--threshold", 0.5], ["--labels", red]):
        done = dimmix("predict", red, "-m", brightest, "--embeddings", tmp_path / "e.npy", *options)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "--embeddings has no classes" in done.err


def test_a_list_from_a_pipe_is_not_read_to_be_counted(tmp_path, red):
    from dimmix_cli.predict import _count

    class Bar:
        total = None

    os.mkfifo(tmp_path / "pipe")
    _count([f"@{tmp_path / 'pipe'}"], Bar)  # would wait for a writer
    assert Bar.total is None
    (tmp_path / "list.txt").write_text(f"{red}\n{red}\n")
    _count([f"@{tmp_path / 'list.txt'}", "-"], Bar)
    assert Bar.total == 3


def test_an_unknown_suffix_of_the_output_is_wrong_usage(dimmix, brightest, red, tmp_path):
    done = dimmix("predict", red, "-m", brightest, "-o", tmp_path / "out.parquet")
    assert (done.code, done.err.count("\n"), list(tmp_path.glob("out*"))) == (2, 1, [])
    assert dimmix("predict", red, "-m", brightest, "-o", tmp_path / "out.CSV").code == 0
    assert (tmp_path / "out.CSV").read_text().startswith("source,rank")
