"""Common parts of all commands: replies on stdout as text or JSON, progress on stderr, refusals with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cutaway.cli import stdio
from cutaway.cli.processes import is_main_process
from cutaway.cli.words import spelled
from cutaway.core.json_lines import finite
from cutaway.core.out_of_memory import is_out_of_memory
from cutaway.core.progress import listening
from cutaway.core.refuse import Refused, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from cutaway.core.result import Result

INTERRUPTED, REFUSED = 130, 2
#: the words of the command that runs, so that a reply can repeat them
command_line: ContextVar[tuple[str, ...]] = ContextVar("command_line", default=())


@dataclass(frozen=True)
class Reply:
    """The reply of a command.

    Attributes:
        data: JSON-ready data.
        show: prints the same on a console.
        code: the exit code.
    """

    data: Any
    show: Callable[[Console], None]
    code: int = 0


def deliver(reply: Reply, as_json: bool) -> None:
    """Write a reply to stdout."""
    if as_json:
        sys.stdout.write(stdio.as_json(finite(reply.data)))
    else:
        reply.show(console())
    sys.stdout.flush()


def console() -> Console:
    """Return the console of stdout."""
    from rich.console import Console
    from rich.theme import Theme

    ground = "on white" if stdio.ground() == "light" else "on black"
    made = Console(highlight=False, theme=Theme({"ground": ground}))
    made.on_broken_pipe = _gone  # its own way is to exit with an error
    return made


def speaks() -> bool:
    """Return True if this process prints text as results come: the main one, where JSON was not asked for."""
    return is_main_process() and "--json" not in command_line.get()


def _gone() -> None:
    raise BrokenPipeError


def as_data(result: Result, field: str | None = None) -> dict[str, Any]:
    """Return a result as JSON-ready data: all of its fields, or one with its interval and control."""
    from cutaway.views.spec import checked, with_beside

    kept = result.tensors() if field is None else with_beside(result, checked(result, field))
    fields = {n: {"axes": list(result.axes()[n]), "values": result.tensors()[n].tolist()} for n in kept}
    return {
        "kind": result.kind,
        "fields": fields,
        "labels": result.labels,
        "units": result.units,
        "neutral": result.neutral,
        "facts": result.facts(),
        "reasons": result.reasons,
        "record": result.record,
    }


@contextmanager
def working(text: str) -> Iterator[None]:
    """A sign of life on stderr, where that is a terminal: what is done, how far it is, and the time left."""
    with stages() as step:
        step(text)
        yield


class Stages:
    """The progress of a command on stderr: call it with the name of each stage."""

    def __init__(self, bar: Any = None):
        self._bar = bar
        self._task = bar.add_task("", total=None) if bar is not None else None

    def __call__(self, text: str) -> None:
        if self._bar is not None:
            self._bar.reset(self._task, description=text, total=None)

    def listen(self, done: float, total: float) -> None:
        """Show how far the stage is."""
        self._bar.update(self._task, completed=done, total=total)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block, the terminal is free for results."""
        if self._bar is None:
            yield
            return
        self._bar.stop()
        yield
        sys.stdout.flush()
        self._bar.start()


@contextmanager
def stages() -> Iterator[Stages]:
    """Within the block, show progress as `working` does, in stages."""
    from rich.console import Console

    errors = Console(stderr=True)
    if not errors.is_terminal or not is_main_process():
        yield Stages()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=20), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), *columns, console=errors, transient=True) as bar:
        step = Stages(bar)
        with listening(step.listen):
            yield step


def refused(error: BaseException, command: str, as_json: bool) -> int:
    """Say on stderr why a command was not done, and return its exit code; unknown errors are raised again.

    Of several processes the first one says it, and all return the code.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, KeyboardInterrupt):
        stdio.tell("interrupted\n")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        stdio.abandon(sys.stdout)  # the reader left; so may we
        return 0
    if isinstance(error, OSError) and error.filename is None:
        stdio.abandon(sys.stdout)
    refusal = as_refusal(error, command)
    if refusal is None:
        raise error
    if isinstance(error, Refused):
        refusal = spelled(error, command_line.get())
    if not is_main_process() and not is_out_of_memory(
        error
    ):  # the same is refused everywhere; memory may be short in one process
        return REFUSED
    stdio.tell(stdio.as_json({"refused": refusal.as_dict()}) if as_json else f"refused: {refusal}\n")
    return REFUSED


def as_refusal(error: BaseException, command: str) -> Refused | None:
    """Return an error as a refusal, if it is the caller's to mend."""
    from cyclopts import CycloptsError, UnknownCommandError, UnknownOptionError

    if isinstance(error, Refused):
        return error
    if isinstance(error, UnknownCommandError) and error.app is not None and error.unused_tokens:
        return _unknown_command(error.unused_tokens[0], list(error.app), command)
    if isinstance(error, UnknownOptionError) and error.token is not None:
        return _unknown_option(error, command)
    if isinstance(error, CycloptsError):
        chain = " ".join(["cutaway", *(error.command_chain or ())])
        return Refused(command.strip(), " ".join(str(error).split()), f"see {chain} --help")
    if is_out_of_memory(error):
        return Refused(command, "the memory is not enough", "use a shorter prompt, fewer pairs or a smaller model")
    if isinstance(error, OSError) and error.filename is None and error.errno is not None:
        why = f"stdout takes no more: {error.strerror}"
        return Refused("writing the answer", why, "send it elsewhere, or make room")
    return None


def _unknown_option(error: Any, command: str) -> Refused:
    flag = str(error.token.keyword or error.token.value).partition("=")[0]
    chain = " ".join(["cutaway", *(error.command_chain or ())])
    known = [n for a in error.argument_collection or () for n in a.names if n.startswith("--")]
    close = nearest(flag, [n for n in known if n != flag], 1)
    why = f"there is no option {flag}" + (f"; did you mean {close}?" if close else "")
    text = "a text that begins with a hyphen goes behind --, or into --flag=TEXT"
    return Refused(command, why, f"see {chain} --help; {text}")


def _unknown_command(word: str, known: list[str], command: str) -> Refused:
    names = [n for n in known if not n.startswith("-")]
    close = nearest(word, names)
    why = f"there is no command {word!r}" + (f"; did you mean {close}?" if close else "")
    return Refused(command, why, f"use one of: {', '.join(names)}")
