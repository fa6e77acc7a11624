"""Safe output on stdout and stderr: whatever their encoding, width and state, nothing ends in a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, Literal

from cutaway.core.json_lines import written
from cutaway.core.refuse import Refused

_WIDTH = 80
_LIGHT = ("7", *map(str, range(9, 16)))  # numbers of light colours


def prepare() -> None:
    """Make letters that stdout and stderr do not have become question marks, and a width of nothing the usual one.

    Raises:
        Refused: stdout is closed.
    """
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    if not os.environ.get("COLUMNS", "1").strip("0"):  # a terminal that does not know its width says 0
        os.environ["COLUMNS"] = str(_WIDTH)
    if sys.stdout is None:
        raise Refused("writing the answer", "stdout is closed", "leave it open, or send it to a file: > FILE")


def ground() -> Literal["light", "dark"]:
    """Return the ground of the terminal as COLORFGBG tells it ("0;15" is black on white); dark where nothing does."""
    return "light" if os.environ.get("COLORFGBG", "").rpartition(";")[2] in _LIGHT else "dark"


def as_json(data: Any) -> str:
    """Return the data as one line of JSON that stdout can hold as it is: other letters are escaped where it is not
    UTF-8.
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "").replace("_", "")
    return written(data, ascii_only=encoding != "utf8") + "\n"


def tell(text: str) -> None:
    """Write to stderr, if it is there."""
    try:
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
    except OSError:
        abandon(sys.stderr)


def abandon(stream: Any) -> None:
    """Give up a stream whose reader is gone or whose disk is full; what is left in it goes nowhere."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError, AttributeError):  # a stream that is not a file
        return


def ordered(words: Sequence[str]) -> list[str]:
    """Return a command line in which a text may begin with a hyphen: `-- "-5 plus 3 is"` may stand before flags, or
    nothing.

    Words behind `--` are texts up to the next flag, the first in any case. A word with a hyphen first that cannot be a
    flag (it has a space) is the text of the flag before it, or one by itself.
    """
    out, texts, rest = list[str](), list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            texts += rest[:1]
            rest = rest[1:]
            while rest and not rest[0].startswith("-"):
                texts.append(rest.pop(0))
        elif word.startswith("-") and " " in word.partition("=")[0]:
            if out and out[-1].startswith("--") and "=" not in out[-1] and out[-1] != "--json":
                out[-1] += f"={word}"
            else:
                texts.append(word)
        else:
            out.append(word)
    return [*out, "--", *texts] if texts else out
