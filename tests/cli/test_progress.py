"""The progress bar: on a terminal it counts, elsewhere it keeps quiet."""

import contextlib
import os
import pty
import re

from PIL import Image

from dimmix_cli.progress import ProgressBar

CODE = (
    "import time\nfrom dimmix_cli import progress\nprogress.DELAY = 0\n"
    "bar = progress.ProgressBar('images')\nbar.total = 40\n"
    "for _ in bar.track(range(40)): time.sleep(0.02)\n"
)


PREDICT = (
    "import sys\nfrom dimmix_cli import progress\nprogress.DELAY = 0\n"
    "from dimmix_cli.main import main\nsys.argv[0] = 'dimmix'\nmain()"
)


def on_a_terminal(process, code, *arguments):
    """What a process writes to a terminal at its stderr."""
    ours, theirs = pty.openpty()
    process(code, *arguments, stderr=theirs, stdout=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # the other side is closed and all is read
        while part := os.read(ours, 65536):
            seen += part
    os.close(ours)
    return seen.decode()


def test_a_terminal_sees_count_rate_and_time_left(process):
    seen = on_a_terminal(process, CODE)
    assert "images" in seen
    assert "/40" in seen
    assert "/s" in seen
    assert "0:00:0" in seen


def test_nothing_is_shown_before_the_delay_or_when_quiet(process):
    assert "images" not in on_a_terminal(process, CODE.replace("progress.DELAY = 0", "progress.DELAY = 60"))
    assert "images" not in on_a_terminal(process, CODE.replace("('images')", "('images', quiet=True)"))


def test_a_table_after_the_bar_leaves_the_cursor_shown(process):
    code = CODE + "with bar.paused(): print('table')\n"
    seen = on_a_terminal(process, code)
    assert seen.count("\x1b[?25l") == seen.count("\x1b[?25h") > 0
    assert seen.rindex("table") > seen.rindex("images")


def test_items_come_through_unchanged():
    assert list(ProgressBar("images").track(iter("abc"))) == list("abc")


def test_predict_shows_its_progress_on_a_terminal_and_none_in_a_pipe(process, brightest, tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "red.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/red.png\n" * 3000)
    arguments = ["predict", f"@{tmp_path}/list.txt", "-m", brightest, "-o", tmp_path / "out.jsonl"]
    seen = on_a_terminal(process, PREDICT, *arguments)
    assert re.search(r"images .*/3000\S* [\d,.]+/s \d:\d\d:\d\d", seen)
    assert "images" not in on_a_terminal(process, PREDICT, *arguments, "--quiet")
    assert process(PREDICT, *arguments).stderr == ""
