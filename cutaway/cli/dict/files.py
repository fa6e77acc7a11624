"""Dictionaries that a command line names: opened in any format with their open questions answered, and converted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from cyclopts import Parameter

from cutaway.cli.shell import Reply
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from rich.console import Console

    from cutaway.dictionaries.dictionary import Dictionary

FILE = "a file or folder in any known format, or of the zoo (miniworld/NAME); with choices: FILE?site=resid_post.6"
CHOICE = "what the format's files leave open, such as site=resid_post.6; several are possible"
FORMAT = "name of the format, where the content fits several"


def open_dictionary(
    named: str, choices: Iterable[str] = (), format: str | None = None, options: bool = False
) -> Dictionary:
    """Open a dictionary by a word of the command line; see `dictionaries.opening`."""
    from cutaway.dictionaries import opening

    return opening.open_dictionary(named, choices, format, options)


def convert(
    file: Annotated[str, Parameter(help=f"the dictionary: {FILE}")],
    out: Annotated[Path, Parameter(help="file or folder to write, as the format has it")],
    /,
    *,
    format: Annotated[str, Parameter(help="name of the format to write")],
    choice: Annotated[list[str] | None, Parameter(help=CHOICE)] = None,
    option: Annotated[list[str] | None, Parameter(help="name=value of what the written format lets you choose")] = None,
) -> Reply:
    """Write a dictionary in another format, and read it back to see that it is the same."""
    from cutaway.dictionaries import formats
    from cutaway.dictionaries.opening import pairs, valued

    d = open_dictionary(file, choice or ())
    writer = formats.module(format).write
    hints = {n: h for n, h in get_type_hints(writer).items() if n not in ("dictionary", "path", "return")}
    given = pairs(option or ())
    for name in given:
        if name not in hints:
            raise Refused(
                f"--option {name}", f"format {format} has no such option", f"it has: {', '.join(hints) or 'none'}"
            )
    where = formats.write(d, out, format, **{n: valued(n, v, hints[n]) for n, v in given.items()})
    checked = _read_back(d, where, format)
    data = {"file": str(where), "format": format, "from": d.about.get("format", "house"), "read back": checked}

    def show(console: Console) -> None:
        from rich.markup import escape

        console.print(f"{d!r}", markup=False)
        console.print(f"written as {format}: [bold]{escape(str(where))}[/]; {_said(checked)}", soft_wrap=True)

    return Reply(data, show)


def _read_back(d: Dictionary, where: Path, format: str) -> dict[str, Any]:
    """Return the largest difference between what was written and what is read from there, on random tokens."""
    import inspect

    import torch

    from cutaway.core.stats import generator
    from cutaway.dictionaries import formats
    from cutaway.dictionaries.opening import spelled

    asked = inspect.signature(formats.module(format).read).parameters
    told = {
        "site": d.reads[0],
        "target": d.writes[0] if d.reads != d.writes else None,
        "k": getattr(d.gates[0], "k", None),
    }
    answers = {n: v for n, v in told.items() if n in asked and v is not None and len(d.blocks) == 1}
    try:
        again = formats.load(where, format, **answers)
    except Refused as refusal:
        return {"open": spelled(refusal, str(where), False).as_dict()}
    acts = {s: torch.randn(64, d.width(s), generator=generator(0)) for s in d.reads}
    pairs = zip(_outputs(d, acts).values(), _outputs(again, acts).values(), strict=True)
    return {"largest difference": max(float((a - b).abs().max()) for a, b in pairs), "tokens": 64}


def _outputs(d: Dictionary, acts: Mapping[str, Any]) -> dict[str, Any]:
    return d.forward({r: acts[s] for r, s in zip(d.reads, acts, strict=True)})


def _said(checked: dict[str, Any]) -> str:
    if "open" in checked:
        return f"its files leave something open: {checked['open']['why']}; {checked['open']['instead']}"
    return f"read back, its outputs differ by at most {checked['largest difference']:.1e}"
