"""`dimmix widths` and `dimmix study` from the command line."""

import json
from pathlib import Path

import pytest

from dimmix_cli.study import Kind
from dimmix_cli.widths import parse_connections


def test_widths_prints_the_designs(dimmix):
    outcome = dimmix("widths", "--connections", "2^18", "--format", "json")
    rows = {row["model"]: row for row in json.loads(outcome.out)}
    assert outcome.code == 0
    assert rows.keys() == {"mixer", "s_mixer", "rp_mixer", "sw_mlp", "sw_mlp, dense mask"}
    assert (rows["mixer"]["tokens"], rows["mixer"]["channels"], rows["mixer"]["width"]) == (64, 64, 4096)


def test_widths_sweeps_the_papers_figure(dimmix):
    outcome = dimmix("widths", "--connections", "2^21", "--sweep", "--format", "json")
    pairs = [(row["channels"], row["tokens"]) for row in json.loads(outcome.out)]
    assert {(16, 504), (32, 346), (64, 226), (128, 128), (504, 16)} <= set(pairs)


@pytest.mark.parametrize("text", ["0", "-4", "2^", "-2^2", "2^-1", "many", "1.5", "2^99", ""])
def test_connections_are_a_whole_number_or_a_power(dimmix, text):
    outcome = dimmix("widths", f"--connections={text}")
    assert outcome.code == 2
    assert "is not a positive whole number such as 262144 or 2^18" in " ".join(outcome.err.split())
    assert parse_connections("2^18") == parse_connections("262144") == 262_144
    assert parse_connections("262_144") == parse_connections(" 2 ^ 18 ") == 262_144


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--connections", 100, "--channels", 500), "too few connections; that needs at least 125250"),
        (("--connections", 100, "--channels", 0), "--channels 0: must be at least 1"),
        (("--connections", 100, "--gamma", 0), "gamma above 0"),
        (("--connections", "999999999999999999^63"), "connection"),
        (("--connections", 100, "--sweep", "--tokens", 4), "leave out --channels and --tokens"),
    ],
)
def test_what_is_impossible_is_one_line(dimmix, arguments, message):
    outcome = dimmix("widths", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.cost])
def test_a_study_without_data_is_one_line(dimmix, tmp_path, kind):
    outcome = dimmix("study", kind.value, "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert outcome.code == 1
    assert "no such file or folder" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_study_of_a_path_is_refused(dimmix, tmp_path):
    recipe = Path(__file__).parents[2] / "recipes" / "wide_mixer_study.cifar10.toml"
    where = ["--data", tmp_path, "--dataset", tmp_path / "toy", "--out", tmp_path / "out"]
    outcome = dimmix("study", "depth", *where, "--recipe", recipe)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "must be the name of a folder in --data, and no path" in outcome.err


def test_widths_imports_no_torch(process):
    code = "import sys; from dimmix_cli.main import app; app(standalone_mode=False); sys.exit('torch' in sys.modules)"
    assert process(code, "widths", "--connections", "512").returncode == 0
