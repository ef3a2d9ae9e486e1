"""`python -m dimmix_cli.docs` prints docs/cli.md, made from the commands themselves."""

import inspect
from typing import Any

import typer.main

from .main import app

_HEAD = """# The command line

Made by `python -m dimmix_cli.docs > docs/cli.md`; a test compares the two.

Results go to stdout, progress and notes to stderr. `--format auto` is a table on a terminal and JSON lines in a pipe;
`json` is one list (one object for `eval`, `export` and `info`). A file that a command writes appears under its name
only when all of it is there; what an interrupted run had finished is kept as `NAME.partial`. A file of that name is
replaced where `--output` named it, and where the name is the default one of `export` and `explain` it is not.

Exit codes: 0 all done, 1 some input failed, 2 wrong usage, 130 after Ctrl-C, 143 after SIGTERM. With `DIMMIX_DEBUG=1`
there are tracebacks.
`dimmix --install-completion` sets up your shell. `dimmix.Classifier` does all of `predict` from Python.
"""


def render() -> str:
    """docs/cli.md as text."""
    group: Any = typer.main.get_command(app)
    return "\n".join([_HEAD, *(_command(name, command) for name, command in group.commands.items())])


def _command(name: str, command: Any) -> str:
    about, _, examples = inspect.cleandoc(command.callback.__doc__).partition("\b\nExamples:\n")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join(["dimmix", name, *(_usage(p) for p in arguments), "[OPTIONS]"])
    rows = [f"| `{_metavar(p)}` | {_help(p)} |" for p in arguments]
    rows += [f"| `{', '.join([*p.opts, *p.secondary_opts])}` | {_help(p)} |" for p in options]
    lines = [f"## {usage}", about.strip(), "```sh", inspect.cleandoc(examples), "```", "| | |\n|---|---|", *rows]
    return "\n\n".join(lines[:2]) + "\n\n" + "\n".join(lines[2:5]) + "\n\n" + "\n".join(lines[5:]) + "\n"


def _metavar(parameter: Any) -> str:
    return (parameter.metavar or parameter.name.upper()).strip("[]")


def _usage(parameter: Any) -> str:
    name = _metavar(parameter) + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _help(parameter: Any) -> str:
    text = (parameter.help or "").replace("|", "\\|")
    default = parameter.default
    if default in (None, False, "", ()) or callable(default) or parameter.param_type_name == "argument":
        return text
    return f"{text} Default: `{getattr(default, 'value', default)}`."


if __name__ == "__main__":
    print(render(), end="")
