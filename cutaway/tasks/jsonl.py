"""Tasks from a file: one JSON object a line, with the keys of a `Pair`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cutaway.core.json_lines import numbered, parsed
from cutaway.core.refuse import Refused, nearest
from cutaway.core.repeat import Made, called
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task, made

_NEEDED = ("clean", "corrupt", "answer", "foil")
_TEXTS = (*_NEEDED, "subject", "group")
_LISTS = ("answers", "foils")
_KEYS = (*_TEXTS, *_LISTS, "joined")
_READ: dict[str, Callable[[Any], Any]] = {k: tuple if k in _LISTS else lambda value: value for k in _KEYS}
_EXAMPLE = (
    '{"clean": "The capital of Norway is", "corrupt": "The capital of Japan is", "answer": "Oslo", "foil": "Tokyo"}'
)


def from_jsonl(
    path: str | Path,
    *,
    n: int | None = None,
    metric: str = "logit_diff",
    corruption: str = "",
    name: str | None = None,
) -> Task:
    """Return the task written in a JSON-lines file: all of its pairs, or the first `n`.

    Each line has `clean`, `corrupt`, `answer` and `foil`, and may have `subject`, `group`, `answers`, `foils` (lists)
    and `joined` (the answer goes on with the prompt's last word). Empty lines are skipped.

    Raises:
        Refused: the file cannot be read, or a line (named by its number) is broken.
    """
    file = f"file {str(path)!r}"
    try:
        pairs = tuple(_pair(line, f"line {i} of {str(path)!r}") for i, line in numbered(path))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(file, f"it cannot be read as text: {error}", "give a .jsonl file in UTF-8") from error
    if not pairs:
        raise Refused(file, "it has no lines", f"write one pair a line: {_EXAMPLE}")
    if n is not None and not 1 <= n <= len(pairs):
        why = f"the file has {len(pairs)} pairs" if n > 0 else "there would be no prompts"
        raise Refused(f"{n} pairs of {file}", why, f"ask for 1 to {len(pairs)}")
    whole = str(Path(path).absolute())
    told = {"n": n, "metric": metric if metric != "logit_diff" else None, "corruption": corruption or None}
    flags = {"": whole if whole.endswith(".jsonl") and name is None else name or Path(path).stem, **told}
    if flags[""] != whole:
        flags["path"] = whole
    how = Made(called("ca.tasks.from_jsonl", repr(whole), **told, name=name), flags)
    options = {"path": str(path)} | ({} if n is None else {"n": n})
    return made(Task(name or Path(path).stem, pairs[:n], metric, corruption, options=options), how)


def _pair(line: str, where: str) -> Pair:
    data = parsed(line, where, f"write one pair a line: {_EXAMPLE}")
    if not isinstance(data, dict):
        raise Refused(where, f"it is a {type(data).__name__}, not an object", f"write one pair a line: {_EXAMPLE}")
    if missing := [k for k in _NEEDED if k not in data]:
        raise Refused(where, f"it has no {', '.join(map(repr, missing))}", f"write one pair a line: {_EXAMPLE}")
    for key, value in data.items():
        _check(key, value, where)
    try:
        return Pair(**{k: read(data[k]) for k, read in _READ.items() if k in data})
    except Refused as refusal:
        raise Refused(f"{where}: {refusal.what}", *refusal.args[1:]) from None


def _check(key: str, value: Any, where: str) -> None:
    if key not in _KEYS:
        near = nearest(key, _KEYS)
        why = f"a pair has no key {key!r}" + (f"; did you mean {near}?" if near else "")
        raise Refused(where, why, f"use {', '.join(_KEYS)}")
    if key in _TEXTS:
        right = isinstance(value, str) or (key == "subject" and value is None)
    elif key in _LISTS:
        right = isinstance(value, list) and all(isinstance(v, str) for v in value)
    else:
        right = isinstance(value, bool)
    if not right:
        kind = "text" if key in _TEXTS else "a list of texts" if key in _LISTS else "true or false"
        raise Refused(where, f"{key!r} is {value!r}, not {kind}", f"write one pair a line: {_EXAMPLE}")
