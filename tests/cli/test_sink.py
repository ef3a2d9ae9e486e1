"""One sink: the four formats, files that appear whole, and what an interruption leaves."""

import csv
import io
import json
import re
import sys

import pytest

from dimmix.errors import DimmixError
from dimmix_cli.options import Format
from dimmix_cli.sink import Sink

RECORDS = [
    {"name": "a,b", "score": 0.25, "error": None},
    {"name": "[red]c[/red]\x1b[31m", "score": 2.0, "error": "bad"},
]


def written(capsys, format, **options):
    with Sink(format, **options) as sink:
        for record in RECORDS:
            sink.write(record)
    return capsys.readouterr().out


def test_what_cannot_be_finished_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    path.write_text("old")
    monkeypatch.setattr(Sink, "_finish", lambda self: (_ for _ in ()).throw(ValueError("late")))
    with pytest.raises(ValueError, match="late"), Sink(Format.csv, path) as sink:
        sink.write(RECORDS[0])
    assert path.read_text() == "old"
    assert (tmp_path / "out.csv.partial").exists()


def test_json_is_a_list_and_json_lines_are_lines(capsys):
    assert json.loads(written(capsys, Format.json)) == RECORDS
    assert [json.loads(line) for line in written(capsys, Format.jsonl).splitlines()] == RECORDS


def test_auto_is_json_lines_in_a_pipe(capsys):
    assert written(capsys, Format.auto) == written(capsys, Format.jsonl)


def test_csv_quotes_and_leaves_nothing_empty_out(capsys):
    rows = list(csv.DictReader(io.StringIO(written(capsys, Format.csv))))
    assert [row["name"] for row in rows] == [record["name"] for record in RECORDS]
    assert rows[0]["error"] == ""


def test_a_table_shows_markup_and_control_characters_as_text(capsys):
    out = written(capsys, Format.table)
    assert "[red]c[/red]" in out
    assert "\x1b" not in out
    assert "0.2500" in out


@pytest.mark.parametrize("single", [False, True])
def test_a_narrow_terminal_cuts_no_name_into_pieces(monkeypatch, single):
    name = "fast_r64_32" if single else "butterfly_resnet_tiny_r64_32.cifar10"
    record = {name: "word " * 20} if single else {"name": name, "params": 1_105_828, "top1": 77.98}
    lines = shown_on_a_terminal(monkeypatch, 40, [record], single=single)
    assert sum(name in line for line in lines) == 1
    if single:
        assert max(map(len, lines)) <= 40
    else:
        assert any("1,105,828" in line for line in lines)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown_on_a_terminal(monkeypatch, columns, records, **options):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout", Terminal())
    with Sink(Format.table, **options) as sink:
        for record in records:
            sink.write(record)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in sys.stdout.getvalue().splitlines()]


def test_a_long_name_of_a_field_leaves_its_value_a_place(monkeypatch):
    lines = shown_on_a_terminal(monkeypatch, 80, [{"top1": 71.23, f"accuracy of {'shark, ' * 20}": 88}], single=True)
    assert any("71.23" in line for line in lines)
    assert any("88" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_long_text_is_folded_and_widens_no_other_row(monkeypatch):
    rows = [{"source": f"{n}.png", "score": 0.5, "error": "word " * 20 if n == 2 else ""} for n in range(4)]
    lines = shown_on_a_terminal(monkeypatch, 80, rows)
    assert max(map(len, lines)) <= 80
    assert sum(".png" in line for line in lines) == 4


def test_what_is_nested_is_json_in_csv(capsys):
    nested = {"levels": [{"n": 16, "radix": 4}], "sizes": [3, 32, 32], "card": {"a": None}, "none": []}
    with Sink(Format.csv) as sink:
        sink.write(nested)
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert json.loads(row["levels"]) == nested["levels"]
    assert json.loads(row["card"]) == nested["card"]
    assert (row["sizes"], row["none"]) == ("3 32 32", "")


def test_no_record_is_an_empty_json_list(capsys):
    with Sink(Format.json):
        pass
    assert json.loads(capsys.readouterr().out) == []


def test_auto_follows_the_suffix_of_the_file(tmp_path):
    with Sink(Format.auto, tmp_path / "out.csv") as sink:
        sink.write(RECORDS[0])
    assert (tmp_path / "out.csv").read_text() == 'name,score,error\n"a,b",0.25,\n'


def write_one_and_raise(output, error):
    with Sink(Format.json, output) as sink:
        sink.write(RECORDS[0])
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, DimmixError("x")])
def test_an_interrupted_run_keeps_what_is_finished_beside_the_old_file(tmp_path, error):
    output = tmp_path / "out.json"
    output.write_text("old")
    with pytest.raises((KeyboardInterrupt, DimmixError)):
        write_one_and_raise(output, error)
    assert output.read_text() == "old"
    assert json.loads((tmp_path / "out.json.partial").read_text()) == RECORDS[:1]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interruption_before_the_first_record_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), Sink(Format.json, tmp_path / "out.json"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_wrong_usage(tmp_path):
    with pytest.raises(DimmixError, match="No such file") as caught, Sink(Format.json, tmp_path / "no" / "out.json"):
        pass
    assert caught.value.exit_code == 2
