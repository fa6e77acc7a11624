"""TransformerLens' own tests run through the import aliases: how many of those that pass there pass here.

Both sides run the same files with the same seeded models (`bench.compat.hub`) in place of published ones, so that tests
of the published weights' values fail on both and do not count. The tests are fetched for the check and never committed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.compat.notebooks import snapshot
from bench.compat.subjects import TEST_MODELS, TESTS, VERSIONS
from bench.compat.values import EXTRA
from bench.frame import ROOT, Row, finish, options, quiet

BAR = 0.9
Outcome = tuple[str, str]  # "passed", "failed" or "skipped", and the error


def main() -> int:
    """Run the tests on both sides, print what fails only here, and write a row for each file."""
    parser = options(__doc__)
    parser.add_argument("versions", nargs="*", help=f"of {', '.join(VERSIONS)}; all by default")
    parser.add_argument("--tests", type=Path, required=True, help="folder of the fetched tests")
    parser.add_argument("--hub", type=Path, required=True, help="cache made by bench.compat.hub")
    parser.add_argument("--extra", help=f"{EXTRA} of packages that the tests import and an environment may lack")
    parser.add_argument("--records", type=Path, help="folder that keeps both sides' outcomes; theirs are read again")
    parser.add_argument("--kept", action="store_true", help="read ours again, too, where they are there")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records, rows = chosen.records or Path(folder), list[Row]()
        records.mkdir(parents=True, exist_ok=True)
        models = {name: str(snapshot(chosen.hub / "full", where)) for name, where in TEST_MODELS.items()}
        for version in chosen.versions or VERSIONS:
            theirs, ours = (records / f"{version}.{side}.json" for side in ("theirs", "ours"))
            if not theirs.exists():
                run(chosen.python_b, version, theirs, chosen, [])
            if not (chosen.kept and ours.exists()):
                run(sys.executable, version, ours, chosen, ["--models", json.dumps(models)])
            rows += compared(version, *(json.loads(path.read_text("utf-8")) for path in (theirs, ours)))
    return finish("compat_tests", rows, write=not chosen.no_write, label=chosen.label)


def run(python: str, version: str, kept: Path, chosen: Any, more: Sequence[str]) -> None:
    """Run the tests of a version in a process of their own, and write each one's outcome and error."""
    folder = (chosen.tests / version).resolve()
    files = [file for file in TESTS if (folder / file).exists()]
    call = [python, "-m", "pytest", "-q", "--noconftest", "-p", "bench.compat.plugin", "-p", "no:cacheprovider"]
    call += [
        "--continue-on-collection-errors",
        "--rootdir",
        ".",
        "-c",
        "/dev/null",
        "--extra",
        chosen.extra or "",
        "--record",
        str(kept.resolve()),
    ]
    environment = quiet() | {"HF_HUB_CACHE": str(chosen.hub.resolve() / "full"), "PYTHONPATH": f"{ROOT}:{folder}"}
    kept.write_text("{}")  # what stands there if the process dies
    with kept.with_suffix(".txt").open("w") as out:
        subprocess.run([*call, *more, *files], cwd=folder, env=environment, stdout=out, stderr=out)


def compared(version: str, theirs: Mapping[str, Outcome], ours: Mapping[str, Outcome]) -> list[Row]:
    """Return a row for each file, and one for all, of the tests that pass there; print those that fail only here."""
    passing = [name for name, (outcome, _) in theirs.items() if outcome == "passed"]
    held = Counter(file_of(name) for name in passing if ours.get(name, ("", ""))[0] == "passed")
    for name in passing:
        if ours.get(name, ("", ""))[0] != "passed":
            print(f"  {version} {name}: {(ours.get(name) or ours.get(file_of(name), ('', 'not run')))[1]}")
    rows = [
        Row(f"{version} {file}", round(held[file] / count, 4), f"of {count} tests that pass there")
        for file, count in Counter(file_of(name) for name in passing).items()
    ]
    share = round(held.total() / max(len(passing), 1), 4)
    return [*rows, Row(f"{version}, all", share, f"of {len(passing)} tests that pass there", BAR, "min")]


def file_of(name: str) -> str:
    """Return the file of a test."""
    return name.partition("::")[0]


if __name__ == "__main__":
    sys.exit(main())
