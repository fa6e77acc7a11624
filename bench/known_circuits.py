"""How near methods that score edges come to circuits that are known: fifteen compiled programs, 32 prompts each.

AUROC against the edges that an exchange of clean and corrupt text can find (`suites.known_circuits`); the ceiling is
that of the exact effects of which this truth is made, which is 1 everywhere. Each row is the mean over programs, with
the lowest and the highest in brackets. Edges outside a program have no effect at all, so any trace ranks above them;
with noise on all weights (standard deviation .003) they have effects of their own. In `learned` models, whose circuits
nobody knows, a row is the share of the answer that the first fifth of the edges carries on other prompts; random
circuits have as many edges between each two sites of each two layers, and the highest is the mean of the best of 16.
"""

from __future__ import annotations

from typing import Any

from bench.frame import Row, finish, options

NOISE, BARS = 0.003, {"exact": 1.0, "eap_ig": 0.9}


def main() -> int:
    """Hold all methods against all programs, and write the rows."""
    import torch

    from cutaway.suites.known_circuits import known_circuits
    from cutaway.suites.learned_circuits import learned_circuits

    chosen = options(__doc__, prompts=32).parse_args()
    torch.set_num_threads(1)
    rows = compiled(known_circuits(n=chosen.prompts), "", BARS)
    rows += compiled(known_circuits(n=chosen.prompts, noise=NOISE), ", with noise", {})
    rows += learned(learned_circuits(n=chosen.prompts))
    return finish("known_circuits", rows, write=not chosen.no_write, label=chosen.label)


def compiled(board: Any, how: str, bars: dict[str, float]) -> list[Row]:
    """AUROC of every method, and of random scores; bars hold for the lowest program."""
    names, rows = board.labels["method"], list[Row]()
    for name, own, ends in zip(names, board.auroc.T, board.interval.transpose(0, 1), strict=True):
        rows.append(spread(f"{name}{how}", own))
        if name in bars:
            share = float((own / board.ceiling).min())
            rows.append(Row(f"{name}{how}: share of the ceiling, lowest", round(share, 4), "", bars[name], "min"))
        if name == "acdc":
            rows.append(
                Row(f"{name}{how}: lower end of its interval over edges, lowest", _rounded(ends[:, 0].min()), "")
            )
    return [*rows, spread(f"random scores{how}", board.null.mean(1))]


def learned(board: Any) -> list[Row]:
    """What the first fifth of the edges carries, by every method and of random circuits."""
    at = board.labels["share"].index("0.2")
    names, found = board.labels["method"], board.faithfulness[:, :, at]
    rows = [spread(f"learned: {name}", own) for name, own in zip(names, found.T, strict=True)]
    chance = board.null[:, at]
    ends = _rounded(chance.min()), _rounded(chance.amax(1).mean())
    return [*rows, Row("learned: random circuits", _rounded(chance.mean()), "", sense="min", quartiles=ends)]


def spread(work: str, values: Any) -> Row:
    """The mean over programs, with the lowest and the highest."""
    ends = _rounded(values.min()), _rounded(values.max())
    return Row(work, _rounded(values.mean()), "", sense="min", quartiles=ends)


def _rounded(x: Any) -> float:
    return round(float(x), 4)


if __name__ == "__main__":
    raise SystemExit(main())
