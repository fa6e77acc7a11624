"""TransformerLens' own tests run through the import aliases: how many of those that pass there pass here.

Both sides run the same files with the same seeded models (`bench.compat.hub`) in place of published ones, so that tests
of the published weights' values fail on both and do not count. The tests are fetched for the check and never committed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.compat.notebooks import snapshot
from bench.compat.subjects import TEST_MODELS, TESTS, VERSIONS
from bench.frame import ROOT, Row, finish, options, quiet

BAR = 0.9


def main() -> int:
    """Run every file on both sides, print what fails only here, and write a row each."""
    parser = options(__doc__)
    parser.add_argument("words", nargs="*", help="only files of TESTS with one of these in their name")
    parser.add_argument("--tests", type=Path, required=True, help="folder of the fetched tests")
    parser.add_argument("--hub", type=Path, required=True, help="cache made by bench.compat.hub")
    parser.add_argument("--extra", help="folder of packages that the tests import and an environment may lack")
    parser.add_argument("--records", type=Path, help="folder that keeps both sides' outcomes; theirs are read again")
    parser.add_argument("--kept", action="store_true", help="read ours again, too, where they are there")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records, rows = chosen.records or Path(folder), list[Row]()
        records.mkdir(parents=True, exist_ok=True)
        models = {name: str(snapshot(chosen.hub / "full", where)) for name, where in TEST_MODELS.items()}
        for file in [f"{version}/{file}" for file in TESTS for version in VERSIONS]:
            left_out = chosen.words and not any(word in file for word in chosen.words)
            if left_out or not (chosen.tests / file).exists():
                continue
            kept = records / f"{file.replace('/', '.')}.json"
            if not kept.exists():
                run(chosen.python_b, file, kept, chosen, [])
            own = kept.with_suffix(".ours.json")
            if not (chosen.kept and own.exists()):
                run(sys.executable, file, own, chosen, ["--models", json.dumps(models)])
            rows.append(row(file, *(json.loads(path.read_text("utf-8")) for path in (kept, own))))
    held = sum(round(r.value * int(r.unit.split()[1])) for r in rows)
    count = sum(int(r.unit.split()[1]) for r in rows)
    rows.append(Row("all files", round(held / max(count, 1), 4), f"of {count} tests that pass there", BAR, "min"))
    return finish("compat_tests", rows, write=not chosen.no_write, label=chosen.label)


def run(python: str, file: str, kept: Path, chosen: Any, more: Sequence[str]) -> None:
    """Run the tests of a file in a process of their own, and write each one's outcome and error."""
    version, _, path = file.partition("/")
    folder = (chosen.tests / version).resolve()
    call = [python, "-m", "pytest", "-q", "--noconftest", "-p", "bench.compat.plugin", "-p", "no:cacheprovider"]
    call += ["--rootdir", ".", "-c", "/dev/null", "--extra", chosen.extra or "", "--record", str(kept.resolve())]
    call += [*more, path]
    environment = quiet() | {"HF_HUB_CACHE": str(chosen.hub.resolve() / "full"), "PYTHONPATH": f"{ROOT}:{folder}"}
    kept.write_text("{}")  # what stands there if the process dies
    with kept.with_suffix(".txt").open("w") as out:
        subprocess.run(call, cwd=folder, env=environment, stdout=out, stderr=out)


def row(file: str, theirs: dict[str, tuple[str, str]], ours: dict[str, tuple[str, str]]) -> Row:
    """Return the share of the tests that pass there which pass here, and print the others."""
    passing = [name for name, (outcome, _) in theirs.items() if outcome == "passed"]
    crashed = next(
        (why for name, (outcome, why) in ours.items() if outcome == "failed" and "::" not in name), "not run"
    )
    failing = {n: ours.get(n, ("", crashed))[1] for n in passing if ours.get(n, ("", ""))[0] != "passed"}
    for name, why in failing.items():
        print(f"  {name}: {why}")
    held = len(passing) - len(failing)
    return Row(file, round(held / max(len(passing), 1), 4), f"of {len(passing)} tests that pass there")


if __name__ == "__main__":
    sys.exit(main())
