"""Heads and neurons that four operations need, of all that a real model has: `python -m tools.real_arithmetic`.

It runs `cutaway neurons arithmetic` on SmolLM2-135M-Instruct: every one of its 270 heads is removed in the problems of
every operation, and the key heads of each operation in the problems of all. The result is kept in
`runs/real/arithmetic`, where a stopped run goes on, and published in docs/real.md. It takes about 20 minutes of one
core; `--prompts` makes it shorter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cutaway as ca
from cutaway.neurons.arithmetic import OPERATIONS, ArithmeticStudy
from tests.real.written import Results, measure
from tools import real, real_dictionary

MODEL, SECTION = "smollm2", "arithmetic, of all heads"
PROMPTS, SHOTS, KEY_HEADS, SIZE, SAMPLES, NULL_CELLS = 16, 4, 3, 10, 4, 6


def main() -> None:
    """Run the study, keep the numbers, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=real.RUNS, help="where the model is")
    parser.add_argument("--out", type=Path, default=real.RUNS / "arithmetic", help="where it is kept")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="problems of each operation")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / "arithmetic.safetensors"
    real_dictionary.tell(
        "neurons", "arithmetic", "--model", chosen.folder / MODEL, "--operations", ",".join(OPERATIONS), "--prompts",
        chosen.prompts, "--shots", SHOTS, "--key-heads", KEY_HEADS, "--sizes", SIZE, "--samples", SAMPLES,
        "--null-cells", NULL_CELLS, "--resume", chosen.out / "resume", "--out", path)  # fmt: skip
    found = ca.open(path)
    assert isinstance(found, ArithmeticStudy)
    write(Results(real.ARITHMETIC), found)
    real.PAGE.write_text(real.page(), "utf-8")
    print(f"wrote {real.ARITHMETIC.relative_to(real.ROOT)} and {real.PAGE.relative_to(real.ROOT)}")


def write(results: Results, found: ArithmeticStudy) -> None:
    """Write the rows of every operation: untouched, without each key head and all of them, and its neurons masked."""
    names, n = found.labels["operation"], int(found.record["split"].split()[-1])
    null = found.null[found.null.isfinite()]
    results.row(SECTION, f"random steps at {NULL_CELLS} heads of each", n, change={
        "value": float(null.mean()), "range": [float(null.min()), float(null.max())]})  # fmt: skip
    for i, name in enumerate(names):
        before = dict(zip(("probability", "top-1"), ({"value": float(x)} for x in found.untouched[i]), strict=True))
        results.row(SECTION, f"{name}: untouched", n, **before)
        for r, head in enumerate(found.labels["key"][i]):
            alone = measure(found.key[i, r], found.key_interval[i, r], found.key_null[i, r])
            results.row(SECTION, f"{name}: without head {head}", n, **{f"change of {name}": alone})
        parts = {
            f"change of {other}": measure(found.shared[i, o], found.shared_interval[i, o], found.shared_null[i, o])
            for o, other in enumerate(names)
        }
        results.row(SECTION, f"{name}: without its {KEY_HEADS} key heads", n, **parts)
        masked = measure(found.masked[i, 0, 0], found.masked_interval[i, 0, 0], found.masked_null[i, 0, 0])
        results.row(SECTION, f"{name}: without the first {SIZE} neurons", n, probability=masked)
    results.write()


if __name__ == "__main__":
    main()
