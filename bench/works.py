"""Sweeps that `bench.sweeps` measures: their shapes, their bars and the least ratio to each peer."""

from __future__ import annotations

from dataclasses import dataclass, field

UNIT = "× plain forward"
LAYERS, HEADS, POSITIONS, DRAWS, WINDOW = 12, 12, 15, 10, 3
SUBJECT = (2, 3, 4)
ANSWER, FOIL = 7, 9
CELLS = LAYERS * POSITIONS
NAIVE = CELLS * DRAWS + DRAWS + 1


@dataclass(frozen=True)
class Work:
    """A sweep: how many numbers it returns, its bar, and the least ratio to each peer.

    A unit is `per` plain forwards; `calls` are timed together where one is short.
    """

    words: str
    cells: int
    bar: float | None = None
    least: dict[str, float] = field(default_factory=dict)
    unit: str = UNIT
    per: float = 1.0
    calls: int = 1


WORKS = {
    "resid": Work(
        f"residual sweep, {LAYERS} layers × {POSITIONS} positions", CELLS, 31.0,
        {"transformer_lens": 6.5, "hooked_transformer": 10.0, "nnsight": 3.0, "textbook": 25.0},
    ),
    "heads": Work(
        f"head-output sweep, {LAYERS * HEADS} heads", LAYERS * HEADS, 30.0,
        {"transformer_lens": 5.0, "hooked_transformer": 8.0},
    ),
    "by_position": Work(
        f"head × position sweep, {LAYERS * HEADS} × {POSITIONS}", HEADS * CELLS, 330.0, {"transformer_lens": 7.0}
    ),
    "attribution": Work(
        "attribution patching, all nodes", LAYERS * HEADS + CELLS, 2.8, {"transformer_lens": 1.0}, calls=5
    ),
    "attribution_called": Work(
        "the same as `patching.attribution(audit=0)`, with null, intervals and record", LAYERS * HEADS + CELLS, calls=5
    ),
    "trace": Work(
        f"causal trace, windows of {WINDOW}, {DRAWS} noises", CELLS * DRAWS, 0.35, {"nnsight": 3.0},
        "× naive count", NAIVE,
    ),
}  # fmt: skip
