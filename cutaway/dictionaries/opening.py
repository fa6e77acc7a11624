"""Dictionaries by a word of the command line, `PATH?name=value`: any format, its open questions answered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import load_file

from cutaway import zoo
from cutaway.core.refuse import Keyword, Refused, Word
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.dictionaries import formats
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import Relu
from cutaway.dictionaries.transforms import autoencoder
from cutaway.models.model import Model

_PLAIN = {int: "a whole number", float: "a number", bool: "true or false"}


def open_dictionary(
    named: str, choices: Iterable[str] = (), format: str | None = None, options: bool = False
) -> Dictionary:
    """Open the dictionary that a word of the command line means: PATH, or PATH?name=value&name=value.

    `choices` are further `name=value`; with `options` refusals ask for `--choice` and `--format`, else for the part
    behind the question mark.

    Raises:
        Refused: nothing there, no known format, several that fit, an open question, or a choice that cannot be.
    """
    path, query = _parted(named)
    given = pairs([*(part for part in query.split("&") if part), *choices])
    format = asked = given.pop("format", format)
    try:
        if format is None and given:
            fitting = formats.detect(_file(path))
            format = fitting[0] if len(fitting) == 1 else None
        hints = {} if format is None else get_type_hints(formats.module(format).read)
        found = formats.load(path, format, **{n: valued(n, v, hints.get(n)) for n, v in given.items()})
    except Refused as refusal:
        raise spelled(refusal, path, options) from None
    return _again(found, path, [*(f"{n}={v}" for n, v in given.items()), *([f"format={asked}"] if asked else [])])


def _parted(named: str) -> tuple[str, str]:
    """Return the path and the choices behind its question mark; an existing path may contain question marks."""
    ends = [n for n, letter in enumerate(named) if letter == "?"]
    path = next((named[:n] for n in (len(named), *reversed(ends)) if Path(named[:n]).exists()), None)
    path = named.partition("?")[0] if path is None else path
    return path, named[len(path) + 1 :]


def _again(found: Dictionary, path: str, choices: list[str]) -> Dictionary:
    """Return the dictionary with the words that open it again: they are the caller's own, whole paths for relative
    ones.
    """
    how = found.made
    if how is None:
        return found
    whole = str(how.flags[""]).partition("?")[0] if not Path(path).exists() else str(Path(path).absolute())
    said = "&".join(_whole(c) for c in choices)
    return replace(found, made=replace(how, flags={"": f"{whole}?{said}" if said else whole}, no_flags=""))


def _whole(choice: str) -> str:
    name, _, value = choice.partition("=")
    return f"{name}={Path(value).absolute()}" if value.endswith(".safetensors") and Path(value).exists() else choice


def valued(name: str, text: str, hint: Any = None) -> Any:
    """Parse a value of the command line as what a reader takes: a number, a truth value, JSON, a word, tensors.

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
    if not Path(path).is_file():
        raise Refused(f"choice {name}={path}", "there is no such file", "give a .safetensors file")
    held = load_file(path)
    if several and all(n.isdigit() for n in held):
        return {int(n): t for n, t in held.items()}
    if several or len(held) != 1:
        want = "tensors named by the number of their layer" if several else "one tensor"
        raise Refused(f"choice {name}={path}", f"it holds {', '.join(held)}", f"give a file with {want}")
    return next(iter(held.values()))


def pairs(given: Iterable[str]) -> dict[str, str]:
    """Parse `name=value` words."""
    out = {}
    for part in given:
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise Refused(f"choice {part!r}", "it is not name=value", "write for example --choice site=resid_post.6")
        out[name.strip()] = value.strip()
    return out


def _file(path: str) -> Path:
    return (None if Path(path).exists() else zoo.dictionary(path)) or Path(path)


def spelled(refusal: Refused, path: str, options: bool) -> Refused:
    """Return the same refusal with the choices of a format as the command line takes them."""
    choice, format = ("--choice ", "--format ") if options else (f"{path}?", f"{path}?format=")

    def word(w: Word) -> str | Word:
        if not isinstance(w, Keyword) or w.of:
            return w
        value = "…" if w.value is ... else w.value
        return f"{format}{value}" if w.name == "format" else f"{choice}{w.name}={value}"

    return refusal.said(word)


def open_named(flags: Mapping[str, Any], given: Mapping[str, Any]) -> Dictionary:
    """Open the dictionary that the flags of a subject mean, where the model is."""
    (named,) = flags.values()
    found = open_dictionary(named)
    wide = torch.promote_types(found.dtype, torch.float32)  # stored in half, computed in single precision
    return found.to(given["model"].device if "model" in given else "cpu", wide)


def random_latents(model: Model, seed: int, n: int = 24, site: str = "resid_post.1") -> Dictionary:
    """Make a dictionary of random latents of a site d_model wide, about half of them active on a token."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, model.shape.d_model, generator=g), dim=1)
    return autoencoder(site, rows, 0.5 * rows, torch.zeros(n), torch.zeros(model.shape.d_model), Relu())


HELP = "a sparse dictionary: a file or folder, or miniworld/NAME; with choices: FILE?site=resid_post.6"


def _subject(name: str, help: str, seed: int) -> Subject:
    """Register a subject that is one dictionary, named on the command line."""
    flag = Flag(name, str, REQUIRED, help)
    return register(Subject(name, Dictionary, (flag,), open_named, lambda given: random_latents(given["model"], seed)))


DICTIONARY = _subject("dictionary", HELP, 24)
SECOND = _subject("second", f"the dictionary to compare with: {HELP.removeprefix('a sparse dictionary: ')}", 25)
