"""Cells of public notebooks run side by side: the original packages in their environment, and cutaway's façades.

Every cell runs in both, with the same seeds and the same seeded models (`bench.compat.hub`). What it leaves — each new
or changed variable that is a tensor, an array, a number, a text or a container of those, its last value, what it
prints and what it gives to a plotting library — must be the same: numbers to 1e-4 (of a tensor's largest value, where
that is above 1), texts word by word, drawings (HTML) only by being there. A cell counts if it runs in the original
environment and leaves something there, or fails only here. Cells that differ only by what the table of docs/compat.md
says are counted apart, with the row.

The notebooks are fetched for the check and never committed; `NOTEBOOKS` says what is looked for in the folder.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.compat.subjects import NOTEBOOKS, Notebook
from bench.compat.values import EXTRA, differences, same_text
from bench.frame import ROOT, Row, finish, options, quiet

STATES = ("equal", "differs", "failed here", "deliberate difference", "nothing to compare", "fails there")


@dataclass
class Outcome:
    """The cells of one notebook by state, and why the ones that are not equal are not."""

    states: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def count(self, *states: str) -> int:
        """Return how many cells are in any of the states."""
        return sum(state in states for state in self.states.values())

    @property
    def comparable(self) -> int:
        """How many cells there are to compare."""
        return self.count("equal", "differs", "failed here")


def main() -> int:
    """Run the chosen notebooks, print what differs, and write a row each."""
    parser = options(__doc__, limit=300)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NOTEBOOKS)}; all by default")
    parser.add_argument("--notebooks", type=Path, required=True, help="folder of the fetched notebooks")
    parser.add_argument("--hub", type=Path, required=True, help="cache made by bench.compat.hub")
    parser.add_argument("--extra", help=f"{EXTRA} of packages that cells import and an environment may lack")
    parser.add_argument("--records", type=Path, help="folder that keeps both sides' records; theirs are read again")
    parser.add_argument("--kept", action="store_true", help="read ours again, too, where they are there")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records, rows = chosen.records or Path(folder), list[Row]()
        for name in chosen.names or NOTEBOOKS:
            notebook = NOTEBOOKS[name]
            python = getattr(chosen, f"python_{notebook.environment}")
            if python is None or not (chosen.notebooks / notebook.file).exists():
                print(f"{name}: left out, for its file or --python-{notebook.environment} is missing")
                continue
            found = compared(name, notebook, python, records / name, chosen)
            rows.append(row(name, notebook, found))
            for number, state in found.states.items():
                if state not in ("equal", "nothing to compare"):
                    print(f"  {name} cell {number}: {state}: {found.reasons[number][:400]}")
    return finish("notebooks", rows, write=not chosen.no_write, label=chosen.label)


def row(name: str, notebook: Notebook, found: Outcome) -> Row:
    """Return the share of comparable cells that are equal, and the counts behind it."""
    counts = ", ".join(f"{found.count(state)} {state}" for state in STATES)
    shapes = f"; {notebook.said}" if notebook.said else ""
    apart = sorted({r for n, r in found.reasons.items() if found.states[n] == "deliberate difference"})
    shapes += f"; deliberate: {'; '.join(apart)}" if apart else ""
    work = f"{name} ({notebook.origin}): of {len(found.states)} cells {counts}{shapes}"
    share = found.count("equal") / max(found.comparable, 1)
    return Row(work, round(share, 4), "of comparable cells", notebook.bar, "min")


# --- both sides


def compared(name: str, notebook: Notebook, python: str, records: Path, chosen: Any) -> Outcome:
    """Run a notebook on both sides, unless the record of theirs is there, and return how its cells compare."""
    records.mkdir(parents=True, exist_ok=True)
    sources, path = records / "sources.json", chosen.notebooks / notebook.file
    sources.write_text(json.dumps(list(cells(path, notebook.edits))), "utf-8")
    named = {key: str(snapshot(chosen.hub / notebook.hub, where)) for key, where in notebook.models.items()}
    if not (records / "theirs" / "record.json").exists():
        one_side(python, sources, records / "theirs", path, notebook.hub, chosen)
    if not (chosen.kept and (records / "ours" / "record.json").exists()):
        ours = ["--cutaway", "--models", json.dumps(named)]
        one_side(sys.executable, sources, records / "ours", path, notebook.hub, chosen, *ours)
    ours, theirs = (json.loads((records / side / "record.json").read_text("utf-8")) for side in ("ours", "theirs"))
    outcome = Outcome()
    for number, (here, there) in enumerate(zip(ours, theirs, strict=True)):
        values = [valued(records / side, number, cell) for side, cell in (("ours", here), ("theirs", there))]
        outcome.states[number], outcome.reasons[number] = judged(here, there, *values, notebook.deliberate)
    return outcome


def one_side(python: str, sources: Path, folder: Path, path: Path, hub: str, chosen: Any, *more: str) -> None:
    """Run the cells in a process of their own, its errors in a file beside the record."""
    call = [python, "-m", "bench.compat.cells", str(sources), str(folder), "--file", str(path.resolve())]
    call += ["--limit", str(chosen.limit), *(["--extra", chosen.extra] if chosen.extra else []), *more]
    folder.mkdir(parents=True, exist_ok=True)
    environment = quiet() | {
        "MPLBACKEND": "Agg",
        "HF_HUB_CACHE": str(chosen.hub.resolve() / hub),
        "PYTHONPATH": str(ROOT),
    }
    with (folder / "errors.txt").open("w") as errors:
        subprocess.run(call, cwd=ROOT, env=environment, stderr=errors, stdout=errors, check=True)


def snapshot(hub: Path, name: str) -> Path:
    """Return the folder of a repository in the cache."""
    return next((hub / f"models--{name.replace('/', '--')}" / "snapshots").iterdir())


def cells(path: Path, edits: Mapping[str, str]) -> Iterator[str]:
    """Yield the code cells of a notebook, or of a script cut at `# %%`, edited, magics left out."""
    from cutaway.compat.notebook import code_cells, without_lines

    text = path.read_text("utf-8")
    sources = code_cells(path).values() if path.suffix == ".ipynb" else re.split("^# %%.*$", text, flags=re.MULTILINE)
    for source in sources:
        for old, new in edits.items():
            source = source.replace(old, new)
        yield without_lines(source, False)[0]


# --- what is compared


def valued(folder: Path, number: int, cell: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves that a cell left, the values of tensors in place."""
    from safetensors.torch import load_file

    tensors = load_file(folder / f"cell{number}.safetensors")
    return {p: leaf | {"values": tensors[p]} if p in tensors else leaf for p, leaf in cell["values"].items()}


def judged(
    here: dict[str, Any],
    there: dict[str, Any],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    deliberate: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """Return the state of a cell, and why."""
    if there["error"]:
        return "fails there", there["error"]
    if here["error"]:
        return "failed here", here["error"]
    if not theirs and not there["stdout"].strip():
        return "nothing to compare", ""
    found = list(differences(ours, theirs))
    if not same_text(here["stdout"], there["stdout"]):
        found.append(f"printed here {here['stdout'][-200:]!r}; there {there['stdout'][-200:]!r}")
    if not found:
        return "equal", ""
    rows = [next((row for words, row in (deliberate or {}).items() if re.match(words, one)), None) for one in found]
    others = [one for one, row in zip(found, rows, strict=True) if row is None]
    return ("differs", others[0]) if others else ("deliberate difference", str(rows[0]))


if __name__ == "__main__":
    sys.exit(main())
