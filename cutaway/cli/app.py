"""The tree of commands. Nothing heavy is imported until a command runs, so help is instant."""

from __future__ import annotations

import ast
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter

import cutaway
from cutaway.cli.processes import is_main_process, joined
from cutaway.cli.shell import command_line, deliver, refused
from cutaway.cli.stdio import ordered, prepare

MAIN, ROOMS, LOOKS = (
    Group("The main job", sort_key=0),
    Group("Methods, by room", sort_key=1),
    Group("Looks", sort_key=2),
)

#: command → where it lives, its group, its line in the help
COMMANDS: dict[str, tuple[str, Group, str]] = {
    "explain": ("cutaway.cli.explain:explain", MAIN, "Tell why a model goes on with one word and not another."),
    "patch": ("cutaway.cli.method_commands:patch", MAIN, "Exchange activations between a clean and a corrupt run."),
    "trace": (
        "cutaway.cli.method_commands:trace",
        MAIN,
        "Restore single states after the subject is made unrecognisable.",
    ),
    "methods": ("cutaway.cli.inspect:methods", LOOKS, "List what can be asked, with paper, cost and control."),
    "tasks": ("cutaway.cli.inspect:tasks", LOOKS, "List the tasks that methods can be run on."),
    "sites": ("cutaway.cli.inspect:sites", LOOKS, "List the places of a forward pass, or those of one model."),
    "check": ("cutaway.cli.inspect:check", LOOKS, "Check that reads and edits of a model keep their identities."),
    "open": ("cutaway.cli.inspect:open_file", LOOKS, "Show a saved result."),
    "dict": ("cutaway.cli.dict.app:app", LOOKS, "Train sparse dictionaries."),
    "harvest": ("cutaway.cli.harvest:harvest", LOOKS, "Write a model's activations on many tokens to disk."),
    "zoo": ("cutaway.cli.zoo:app", LOOKS, "List and train the models that ship here."),
    "studio": ("cutaway.cli.studio:studio", MAIN, "Open a local web page on a model."),
    "mcp": ("cutaway.cli.mcp:mcp", LOOKS, "Offer all methods as tools for agents."),
    "compat": ("cutaway.cli.compat:app", LOOKS, "Run notebooks of other tools unchanged."),
}


def build() -> App:
    """Return the whole tree."""
    app = App(
        name="cutaway",
        group_commands=Group("About", sort_key=9),
        help=(cutaway.__doc__ or "").split("\n")[0],
        version=cutaway.__version__,
    )
    for name, (where, group, line) in COMMANDS.items():
        app.command(where, name=name, group=group, help=line)
    for room in cutaway.METHOD_ROOMS:
        app.command(f"cutaway.cli.method_commands:{room}", name=room, group=ROOMS, help=first_line(f"cutaway.{room}"))

    @app.meta.default
    def launch(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        json: Annotated[
            bool, Parameter(negative="", group="Output", show_default=False, help="data as JSON on stdout")
        ] = False,
    ) -> int:
        with joined():
            reply = app(tokens, **_OURS)
        if reply is not None and is_main_process():
            deliver(reply, json)
        return reply.code if reply is not None else 0

    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command_line.set(tuple(words))
    try:
        prepare()
        code = build().meta(ordered(words), **_OURS)
        sys.stdout.flush()
    except BaseException as error:
        return refused(error, shlex.join(["cutaway", *words]), as_json="--json" in words)
    return code or 0


def first_line(module: str) -> str:
    """Return the first line of a module's docstring, read without importing it."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or "").split("\n")[0]


_OURS = {"exit_on_error": False, "print_error": False, "result_action": "return_value"}
