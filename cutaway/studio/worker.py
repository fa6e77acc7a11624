"""The worker: a process that holds one model and does what the studio asks, one thing after another.

It reads lines of JSON from its standard input and writes lines of JSON to its standard output:

    → {"id": 7, "action": "run", "arguments": {…}}
    ← {"id": 7, "progress": [3, 10]}           any number of times
    ← {"id": 7, "done": …}      or {"id": 7, "refused": {"what": …, "why": …, "instead": …}, "memory": false}

The studio ends it by closing its input, and cancels what it does by ending it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from cutaway.core.progress import listening

_EVERY = 0.15  # seconds between two reports of progress


def main(arguments: list[str] | None = None) -> int:
    """Serve requests until the input ends; the one argument is `Setting` as JSON."""
    setting = json.loads((sys.argv[1:] if arguments is None else arguments)[0])
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print goes to stderr, not between the lines

    from cutaway.studio.folder import Folder

    folder = Folder(Path(setting["folder"]), {n: Path(p) for n, p in setting["files"].items()})
    os.chdir(folder.empty)

    from cutaway.studio.actions.about import hello
    from cutaway.studio.session import Session

    session = Session(folder, setting["name"], setting["source"], setting["others"])
    _write(out, {"id": 0, **answering(partial(hello, session))})
    for line in sys.stdin:
        request = json.loads(line)
        with listening(_reporter(out, request["id"])):
            said = answering(partial(session.do, request["action"], request["arguments"], request.get("job")))
        _write(out, {"id": request["id"], **said})
    return 0


def answering(work: Callable[[], Any]) -> dict[str, Any]:
    """Do some work and return the last line about it."""
    from cutaway.core.json_lines import finite
    from cutaway.core.out_of_memory import is_out_of_memory
    from cutaway.core.refuse import Refused

    try:
        return {"done": finite(work())}
    except Refused as refusal:
        return {"refused": refusal.as_dict(), "memory": is_out_of_memory(refusal)}
    except Exception as error:
        if is_out_of_memory(error):
            what, why, instead = "memory", "it is not enough", "use a shorter prompt, fewer pairs or a smaller model"
            return {"refused": {"what": what, "why": why, "instead": instead}, "memory": True}
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
        return {"refused": {"what": "an error", "why": why, "instead": "this is a defect: report it"}, "defect": True}


def _reporter(out: TextIO, number: int) -> Callable[[float, float], None]:
    last = [0.0]

    def report(done: float, total: float) -> None:
        now = time.monotonic()
        if now - last[0] >= _EVERY:
            last[0] = now
            _write(out, {"id": number, "progress": [done, total]})

    return report


def _write(out: TextIO, data: dict[str, Any]) -> None:
    out.write(json.dumps(data, ensure_ascii=True) + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main())
