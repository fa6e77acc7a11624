"""Dictionaries that a command line names: opened in any format with their open questions answered, and converted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import Parameter

from cutaway.cli.shell import Reply
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from rich.console import Console

    from cutaway.dictionaries.dictionary import Dictionary

FILE = "a file or folder in any known format, or of the zoo (miniworld/NAME); with choices: FILE?site=resid_post.6"
CHOICE = "what the format's files leave open, such as site=resid_post.6; several are possible"
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false"}
FORMAT = "name of the format, where the content fits several"


def opened(named: str, choices: Iterable[str] = (), format: str | None = None, options: bool = False) -> Dictionary:
    """The dictionary that a word of the command line means: PATH, or PATH?name=value&name=value.

    `choices` are further `name=value`; with `options` refusals ask for `--choice` and `--format`, else for the part
    behind the question mark.

    Raises:
        Refused: nothing there, no known format, several that fit, an open question, or a choice that cannot be.
    """
    from cutaway.dictionaries import formats

    path, query = _parted(named)
    given = _pairs([*(part for part in query.split("&") if part), *choices])
    format = asked = given.pop("format", format)
    try:
        if format is None and given:
            fitting = formats.detect(_file(path))
            format = fitting[0] if len(fitting) == 1 else None
        hints = {} if format is None else get_type_hints(formats.module(format).read)
        found = formats.load(path, format, **{n: valued(n, v, hints.get(n)) for n, v in given.items()})
    except Refused as refusal:
        raise _spelled(refusal, path, options) from None
    return _again(found, path, [*(f"{n}={v}" for n, v in given.items()), *([f"format={asked}"] if asked else [])])


def _parted(named: str) -> tuple[str, str]:
    """The path and the choices behind its question mark; a path that exists may have question marks of its own."""
    ends = [n for n, letter in enumerate(named) if letter == "?"]
    path = next((named[:n] for n in (len(named), *reversed(ends)) if Path(named[:n]).exists()), None)
    path = named.partition("?")[0] if path is None else path
    return path, named[len(path) + 1 :]


def _again(found: Dictionary, path: str, choices: list[str]) -> Dictionary:
    """The dictionary with the words that open it again: they are the caller's own, whole paths for relative ones."""
    how = found.made
    if how is None:
        return found
    whole = str(how.flags[""]).partition("?")[0] if not Path(path).exists() else str(Path(path).absolute())
    said = "&".join(_whole(c) for c in choices)
    return replace(found, made=replace(how, flags={"": f"{whole}?{said}" if said else whole}, no_flags=""))


def _whole(choice: str) -> str:
    name, _, value = choice.partition("=")
    return f"{name}={Path(value).absolute()}" if value.endswith(".safetensors") and Path(value).exists() else choice


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

    d = opened(file, choice or ())
    writer = formats.module(format).write
    hints = {n: h for n, h in get_type_hints(writer).items() if n not in ("dictionary", "path", "return")}
    given = _pairs(option or ())
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


def valued(name: str, text: str, hint: Any = None) -> Any:
    """A value of the command line as what a reader takes: a number, true or false, JSON, one of some words, tensors.

    Tensors come from a .safetensors file: the only one in it, or those that are named by numbers.

    Raises:
        Refused: a word that is none of those that can be, or a file without such tensors.
    """
    kinds = _kinds(hint)
    words = [w for k in kinds if get_origin(k) is Literal for w in get_args(k)]
    if text in words or hint is str or (str in kinds and not words):
        return text
    if "Tensor" in repr(hint) and text.endswith(".safetensors"):
        return _tensors(name, text, any(get_origin(k) is dict for k in kinds))
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(value, str) and words:
        more = ", or a .safetensors file" if "Tensor" in repr(hint) else ""
        raise Refused(f"choice {name}={text}", "it cannot be that", f"use {', '.join(words)}{more}")
    plain = tuple(k for k in kinds if k in (int, float, bool))
    if plain and (not isinstance(value, (*plain, int)) or (isinstance(value, bool) and bool not in plain)):
        raise Refused(f"choice {name}={text}", "it cannot be that", f"give {' or '.join(_PLAIN[k] for k in plain)}")
    return value


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _tensors(name: str, path: str, several: bool) -> Any:
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise Refused(f"choice {name}={path}", "there is no such file", "give a .safetensors file")
    held = load_file(path)
    if several and all(n.isdigit() for n in held):
        return {int(n): t for n, t in held.items()}
    if several or len(held) != 1:
        want = "tensors named by the number of their layer" if several else "one tensor"
        raise Refused(f"choice {name}={path}", f"it holds {', '.join(held)}", f"give a file with {want}")
    return next(iter(held.values()))


def _pairs(given: Iterable[str]) -> dict[str, str]:
    out = {}
    for part in given:
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise Refused(f"choice {part!r}", "it is not name=value", "write for example --choice site=resid_post.6")
        out[name.strip()] = value.strip()
    return out


def _file(path: str) -> Path:
    from cutaway import zoo

    return (None if Path(path).exists() else zoo.dictionary(path)) or Path(path)


def _spelled(refusal: Refused, path: str, options: bool) -> Refused:
    """The same refusal, its `name=…` as the command line has it."""
    choice, format = ("--choice ", "--format ") if options else (f"{path}?", f"{path}?format=")
    text = re.sub(r"\bformat=", format, refusal.instead)
    text = re.sub(r"(?<![\w?.-])([a-z]\w*)=(?=…|\"|'|\w)", rf"{choice}\1=", text)
    return Refused(refusal.what, refusal.why, text.replace('"', ""))


def _read_back(d: Dictionary, where: Path, format: str) -> dict[str, Any]:
    """The largest difference between what was written and what is read from there, on random tokens."""
    import inspect

    import torch

    from cutaway.core.stats import generator
    from cutaway.dictionaries import formats

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
        return {"open": _spelled(refusal, str(where), False).as_dict()}
    acts = {s: torch.randn(64, d.width(s), generator=generator(0)) for s in d.reads}
    pairs = zip(_outputs(d, acts).values(), _outputs(again, acts).values(), strict=True)
    return {"largest difference": max(float((a - b).abs().max()) for a, b in pairs), "tokens": 64}


def _outputs(d: Dictionary, acts: Mapping[str, Any]) -> dict[str, Any]:
    return d.forward({r: acts[s] for r, s in zip(d.reads, acts, strict=True)})


def _said(checked: dict[str, Any]) -> str:
    if "open" in checked:
        return f"its files leave something open: {checked['open']['why']}; {checked['open']['instead']}"
    return f"read back, its outputs differ by at most {checked['largest difference']:.1e}"
