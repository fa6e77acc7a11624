"""Circuits of five behaviours of miniworld: what they carry on prompts that did not choose them.

Each circuit is the first edges by `circuits.eap_ig`: of 1, 2, 3, 5, 7.5, 10 and 15 % of all 1,108 edges the smallest
that carry 0.9 of the answer on the prompts on which they were scored (`suites.discovered`). What is reported comes
from other prompts, none of which is among the first: the share of the answer with all other edges cut, in brackets
its interval; the most that a random circuit with as many edges between each two sites of each two layers carries, of
ten; and the certificate, with a search of 20 steps from each of 4 starts. A level in numbers: 3 is A, 2 B, 1 C and 0
none. The prompts of the two sides are halves of 64 (`successor`: of its 70), drawn by another seed than the one on
which settings were tried.
"""

from __future__ import annotations

from typing import Any

from bench.frame import Row, finish, options

TASKS, BAR, MOST, SEED, PROMPTS = ("ioi", "greater_than", "induction", "successor", "facts"), 0.85, 0.15, 0, 64
LEVELS = {"none": 0, "C": 1, "B": 2, "B and C": 2, "A": 3}


def main() -> int:
    """Find and judge a circuit of every behaviour, and write the rows."""
    import torch

    chosen = options(__doc__, steps=20).parse_args()
    torch.set_num_threads(1)
    rows = [row for name in TASKS for row in rows_of(name, discovered(name, chosen.steps))]
    return finish("world_circuits", rows, write=not chosen.no_write, label=chosen.label)


def discovered(name: str, steps: int) -> Any:
    """The circuit of one behaviour."""
    import cutaway as ca
    from cutaway.suites.discovered import discover

    model = ca.load("miniworld")
    one, other = ca.tasks.load(name, model, n=PROMPTS, seed=SEED).split(0.5)
    assert not {p.clean for p in one} & {p.clean for p in other}
    return discover(model, one, other, steps=steps)


def rows_of(name: str, found: Any) -> list[Row]:
    """What was measured of one circuit."""
    carried, certificate = found.carried, found.certificate
    low, high = carried.interval[0].tolist()
    values = {
        "share of all edges": (found.size, MOST, "max", None),
        "share of the answer carried": (float(carried.faithfulness[0]), BAR, "min", (low, high)),
        "the same, best of ten random circuits": (float(carried.null[0].max()), None, "max", None),
        "certificate level": (LEVELS[certificate.level], None, "min", None),
        "the same, best of four random circuits": (max(LEVELS[x] for x in certificate.null_levels), None, "max", None),
        "the same, exchanged answers": (LEVELS[certificate.shuffled_level], None, "max", None),
        "worst deviation found": (float(certificate.deviation[-1]), None, "max", certificate.interval[-1].tolist()),
    }
    print(name, {k: v[0] for k, v in values.items()}, flush=True)
    return [
        Row(f"{name}: {what}", round(value, 4), "", bar, sense, quartiles=_ends(spread))
        for what, (value, bar, sense, spread) in values.items()
    ]


def _ends(spread: Any) -> tuple[float, float] | None:
    return (round(spread[0], 4), round(spread[1], 4)) if spread else None


if __name__ == "__main__":
    raise SystemExit(main())
