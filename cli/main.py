"""`dimmix`: the commands, and what becomes of an error. Neither torch nor timm is imported to print help."""

import functools
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dimmix import __version__
from dimmix.allocator import keep_freed_memory
from dimmix.errors import DimmixError, Interrupted, first_line, system_error

from .sink import note

COMMANDS = {
    "predict": "predict",
    "eval": "evaluate",
    "export": "export",
    "list": "list_models",
    "info": "info",
    "benchmark": "benchmark",
    "explain": "explain",
    "train": "train",
    "widths": "widths",
    "study": "study",
    "download": "download",
    "publish": "publish",
    "doctor": "doctor",
}
"""Each command's module in this package, and the function in it."""

app = typer.Typer(
    name="dimmix",
    help="Structured-sparse vision models: predict, evaluate, export and compare them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        print(f"dimmix {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _with_one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        # Else each retry is a warning, and a broken file an error of its own, before our one line.
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("DATASETS_VERBOSITY", "critical")
        if kwargs.get("quiet") or not sys.stderr.isatty():
            # The Hub's libraries draw bars of their own, and read this when they are imported.
            os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as error:
            _say("interrupted", error)
            raise typer.Exit(getattr(error, "exit_code", 130)) from None
        except DimmixError as error:
            if os.environ.get("DIMMIX_DEBUG") == "1":
                raise
            _say(str(error), error)
            raise typer.Exit(error.exit_code) from None
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, a folder that may not be written to
            if os.environ.get("DIMMIX_DEBUG") == "1":
                raise
            _say(system_error(error), error)
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:  # nobody foresaw it, and it is one line all the same
            if os.environ.get("DIMMIX_DEBUG") == "1":
                raise
            _say(f"unexpected {type(error).__name__}: {first_line(error)}; DIMMIX_DEBUG=1 shows where", error)
            raise typer.Exit(1) from None

    return run


def _say(message: str, error: BaseException) -> None:
    """One line, and one for each note that the exception got on its way."""
    for line in (message, *getattr(error, "__notes__", ())):
        note(line)


for module_name, function_name in COMMANDS.items():
    module = importlib.import_module(f"{__package__}.{module_name}")
    app.command(module_name)(_with_one_line_errors(getattr(module, function_name)))


def main() -> None:
    """The console script: usage errors exit with 2, failed inputs with 1, Ctrl-C with 130, SIGTERM with 143."""
    if os.environ.get("DIMMIX_DEBUG") != "1":
        warnings.simplefilter("ignore")
    keep_freed_memory()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as a daemon's may be
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the process lives
    for name in ("SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):
            signal.signal(number, _interrupt)
    try:
        app()
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "exit_code", 130))
    except OSError as error:  # of what is printed, or written for the shell's completion, outside of a command
        if os.environ.get("DIMMIX_DEBUG") == "1":
            raise
        _say(system_error(error), error)
        sys.exit(1)


def _interrupt(number: int, _: Any) -> None:
    raise Interrupted(number)
