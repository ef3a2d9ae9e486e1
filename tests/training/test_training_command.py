import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dimmix.errors import DimmixError
from dimmix.training.__main__ import main
from dimmix.training.plot import plot_curves


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["dimmix.training", *map(str, arguments)])
    with pytest.raises(SystemExit) as raised:
        main()
    return int(raised.value.code or 0)


def test_trains_prints_the_card_and_draws_the_curves(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    toy: Path,
    tmp_path: Path,
    recipe_file: Callable[..., Path],
) -> None:
    arguments = [recipe_file(), "--data", toy, "--runs", tmp_path / "runs", "--split", "val", "--set", "train.seed=5"]
    assert call(monkeypatch, *arguments) == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["seed"], card["split"]) == (5, "val")
    assert card["command"] == "dimmix train toy_resnet.toy.toml --split val --set train.seed=5"
    assert call(monkeypatch, *arguments, "--plot") == 0
    picture = Path(capsys.readouterr().out.strip())
    assert picture == tmp_path / "runs" / "toy_resnet.toy-val" / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_card_says_with_how_many_threads_and_processes(
    monkeypatch: pytest.MonkeyPatch, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    commands = []
    monkeypatch.setattr("dimmix.training.loop.train", lambda recipe, options: commands.append(options.command))
    for count in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["dimmix.training", str(recipe_file()), "--threads", "3"])
            with pytest.raises(SystemExit, match="0"):
                main()
    run = "toy_resnet.toy.toml --split full --threads 3"
    assert commands == [f"dimmix train {run}", f"torchrun --nproc-per-node 2 -m dimmix.training {run}"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--device", "abacus"], "--device abacus"),
        (["--device", "meta"], "--device meta"),
        (["--runs", "/dev/null"], "error: /dev/null"),
        (["--plot"], "no epochs to draw"),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    toy: Path,
    recipe_file: Callable[..., Path],
    options: list[str],
    said: str,
) -> None:
    code = call(monkeypatch, recipe_file(), "--data", toy, "--runs", tmp_path / "runs", *options)
    error = capsys.readouterr().err
    assert code in (1, 2)
    assert error.count("\n") == 1
    assert said in error


def test_a_log_without_epochs_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(DimmixError, match="no epochs to draw"):
        plot_curves(tmp_path / "log.jsonl")
