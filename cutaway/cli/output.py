"""Results to files and back: the suffix of `--out` says whether numbers, a figure or a page is written."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import cutaway
from cutaway.cli.processes import is_main_process
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cutaway.core.outcome import Outcome
    from cutaway.core.result import Result

RESULT = ".safetensors"
WRITES = {RESULT: "the result", ".png": "a figure", ".svg": "a figure", ".html": "a page"}
OUT_HELP = "file to save in: the result (.safetensors), a figure (.png, .svg) or a page (.html)"


def check_out(out: Path | None, kinds: Iterable[type] = ()) -> None:
    """Refuse a file that `save` could not write of outcomes of these kinds, before anything is computed.

    Raises:
        Refused: another suffix, or a picture of what has none.
    """
    from cutaway.core.result import Result

    other = next((k.__name__ for k in kinds if not issubclass(k, Result)), None)
    if out is not None and other is not None and out.suffix.lower() != RESULT:
        raise Refused(f"--out {out}", f"a {other.lower()} has no picture", f"give a file that ends in {RESULT}")
    if out is not None and out.suffix.lower() not in WRITES:
        why = f"its suffix {out.suffix!r} says nothing of what to write" if out.suffix else "it has no suffix"
        raise Refused(f"--out {out}", why, f"use one of {', '.join(f'{s} ({w})' for s, w in WRITES.items())}")


def save(result: Outcome, out: Path, field: str | None = None) -> None:
    """Write a result as the file's suffix says; of several processes, the first one does. `field` is what is drawn.

    Raises:
        Refused: another suffix, no such field, or a file that cannot be written.
    """
    from cutaway.core.result import Result

    check_out(out, [type(result)])
    if not is_main_process():
        return
    suffix = out.suffix.lower()
    if suffix == RESULT or not isinstance(result, Result):
        result.save(out)
    elif suffix == ".html":
        save_report([result], out, field)
    else:
        from cutaway.core.files import write_bytes
        from cutaway.views.spec import checked

        content = io.BytesIO()
        stamp = {"Date": None} if suffix == ".svg" else None  # the same result gives the same file
        result.plot(checked(result, field)).savefig(content, format=suffix[1:], dpi=160, metadata=stamp)
        write_bytes(out, content.getvalue())


def save_report(results: Sequence[Result], out: Path, field: str | None = None) -> None:
    """Write one page of several results, a section each; of several processes, the first one does.

    Raises:
        Refused: no such field, or a file that cannot be written.
    """
    from cutaway.views.page import Section, Show, report
    from cutaway.views.spec import checked, valued
    from cutaway.views.wording import spoken

    if not is_main_process():
        return
    names = [str(r.record.get("method", r.kind)) for r in results]
    sections = []
    for name, result in zip(names, results, strict=True):
        shown, empty = valued(result) if field is None else ([checked(result, field)], [])
        prose = [f"Without a value here: {', '.join(map(spoken, empty))}."] if empty else []
        heading = name if len(results) > 1 else "Result"
        question = str(result.record.get("answers", ""))
        sections.append(Section(heading, question, prose, shows=[Show(result, each) for each in shown]))
    report(names[0] if len(names) == 1 else f"{len(names)} results", sections, out)


def open_result(file: Path) -> Result:
    """Open the result saved in a file.

    Raises:
        Refused: not a result; for a sparse dictionary, the refusal says what else can be done with it.
    """
    try:
        return cutaway.open(file)
    except Refused as refusal:
        if not _is_dictionary(file):
            raise
        why = "it holds a sparse dictionary, which is no result"
        raise Refused(
            f"file {str(file)!r}", why, f"judge it with: {shlex.join(['cutaway', 'dict', 'eval', str(file)])}"
        ) from refusal


def _is_dictionary(file: Path) -> bool:
    from cutaway.dictionaries.formats import detect

    try:
        return file.exists() and bool(detect(file))
    except Refused:
        return False
