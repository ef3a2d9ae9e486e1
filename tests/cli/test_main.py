"""The frame around the commands: help without torch, one-line errors, exit codes."""

import pytest

from dimmix import __version__
from dimmix_cli.main import COMMANDS

RUN = "import sys; from dimmix_cli.main import main; sys.argv[0] = 'dimmix'; main()"


def test_help_imports_neither_torch_nor_timm_nor_numpy(process):
    code = (
        "import sys\nfrom dimmix_cli.main import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'timm', 'numpy', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    )
    done = process(code)
    assert done.stderr == "[]\n"
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(dimmix, command):
    done = dimmix(command, "--help")
    assert done.code == 0
    assert f"dimmix {command}" in done.out.partition("Examples:")[2]


def test_version(dimmix):
    assert dimmix("--version").out == f"dimmix {__version__}\n"


@pytest.mark.parametrize("arguments", [["predict"], ["predict", "x.png", "--topk", "0"], ["no-such-command"], []])
def test_wrong_usage_is_exit_2_without_a_traceback(dimmix, arguments):
    done = dimmix(*arguments)
    assert done.code == 2
    assert "Traceback" not in done.err


def test_an_unknown_model_is_one_line_with_close_matches(dimmix):
    done = dimmix("predict", "x.png", "--model", "butterfly_resnet20_convmix_w33")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "did you mean butterfly_resnet20_convmix_w32" in done.err


def test_debug_shows_the_traceback(process, monkeypatch):
    monkeypatch.setenv("DIMMIX_DEBUG", "1")
    done = process(RUN, "predict", "x.png", "--model", "none.onnx")
    assert "Traceback" in done.stderr
    monkeypatch.delenv("DIMMIX_DEBUG")
    done = process(RUN, "predict", "x.png", "--model", "none.onnx")
    assert (done.returncode, done.stderr) == (1, "dimmix: none.onnx: no such file\n")


def test_shell_completion_is_offered(process, monkeypatch):
    monkeypatch.setenv("_DIMMIX_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "dimmix pre")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert "predict" in process(RUN).stdout
