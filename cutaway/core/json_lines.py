"""JSON lines: one JSON value a line, each line with its number, strictly as JSON has it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.core.text import check_encodable

_BLANK = " \t\r\n"
_UNSAFE = re.compile("[\ud800-\udfff\u0085\u2028\u2029]")  # no UTF-8, or ends of a line to some readers


def written(data: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    """Return the data as JSON on one line to every reader: half surrogates and what some take for an end of a line are
    escaped.
    """
    text = json.dumps(data, ensure_ascii=ascii_only, indent=indent)
    return _UNSAFE.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


def finite(data: Any) -> Any:
    """Return JSON-ready data with null for each number that JSON does not have."""
    match data:
        case float() if not math.isfinite(data):
            return None
        case dict():
            return {str(k): finite(v) for k, v in data.items()}
        case list() | tuple():
            return [finite(v) for v in data]
    return data


def numbered(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 file that are not empty, each with its number from 1 on.

    Only a line feed ends a line: U+2028, U+0085 and a form feed may stand inside a text. A byte order mark is skipped.

    Raises:
        OSError: the file cannot be opened.
        UnicodeDecodeError: it is not UTF-8.
    """
    with Path(path).open(encoding="utf-8-sig", newline="\n") as lines:
        yield from ((n, text) for n, line in enumerate(lines, 1) if (text := line.strip(_BLANK)))


def parsed(line: str, where: str, instead: str) -> Any:
    """Return the value that one line holds.

    Raises:
        Refused: it is not JSON (NaN and Infinity are not), gives a key twice, or holds half of a surrogate pair; in
            the refusal `where` names the line and `instead` says what to write.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(k for n, k in enumerate(keys) if k in keys[:n])
            raise Refused(where, f"it gives {twice!r} twice, so one of the two would be lost", "leave one of them out")
        return dict(pairs)

    def no_number(name: str) -> Any:
        raise Refused(where, f"it is not JSON: {name} is no number there", instead)

    try:
        value = json.loads(line, object_pairs_hook=unique, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        why = "its brackets are nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Refused(where, f"it is not JSON: {why}", instead) from error
    if "\\u" in line:  # a file read as UTF-8 holds halves only where they are escaped
        for text in _texts(value):
            check_encodable(text, where)
    return value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for v in value.values():
            yield from _texts(v)
    elif isinstance(value, list):
        for v in value:
            yield from _texts(v)
