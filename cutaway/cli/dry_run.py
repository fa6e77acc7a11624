"""`--dry-run`: the cost of a command in place of its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from cutaway.cli.shell import Reply

DryRunFlag = Annotated[
    bool, Parameter(group="Output", negative="", help="say what it would cost (forwards, seconds, memory), and stop")
]


def cost(call: Callable[..., Any], /, *subjects: Any, **options: Any) -> Reply:
    """Return the cost of a call as the answer of its command."""
    from cutaway.suites.dry_run import dry_run

    found = dry_run(call, *subjects, **options)

    def show(console: Any) -> None:
        from rich.text import Text

        console.print(Text(str(found)))

    return Reply(found.as_dict(), show)
