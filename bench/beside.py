"""One call of cutaway beside the same call of TransformerLens, each in a process and an environment of its own."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager

from bench.frame import Row, Subject, finish, options, pythons, summary
from bench.sweeps import CLOSE, save

UNIT = "× plain forward"


@contextmanager
def started(
    module: str, chosen: Namespace, environment: str = "a", **sizes: int
) -> Iterator[tuple[str, dict[str, Subject]]]:
    """Start the subjects of a benchmark on one seeded model; yield the model's folder and the subjects by name.

    The model has GPT-2 small's shape, but for the `sizes` of its configuration that are given.
    """
    running = dict[str, Subject]()
    with tempfile.TemporaryDirectory() as folder:
        save(folder, **sizes)
        try:
            for name, python in pythons(chosen, {"transformer_lens": environment}).items():
                running[name] = Subject(python, module, "--subject", name, folder)
            yield folder, running
        finally:
            for subject in running.values():
                subject.close()


def plain_forwards(name: str, doc: str | None, work: str, rounds: int, least: float, bar: float | None = None) -> int:
    """Measure both subjects of `bench.{name}` in rounds that take turns, and write the row."""
    chosen = options(doc, rounds=rounds).parse_args()
    row = beside_plain(name, chosen, work, least, bar)
    return finish(name, [row], write=not chosen.no_write, label=chosen.label)


def beside_plain(name: str, chosen: Namespace, work: str, least: float, bar: float | None = None, **sizes: int) -> Row:
    """Measure both subjects of `bench.{name}` on one model in rounds that take turns; return the row.

    A subject answers with `ratios` to a plain forward measured beside it, and with the `values` that the call returned.
    """
    with started(f"bench.{name}", chosen, **sizes) as (_, running):
        found: dict[str, list[tuple[float, float]]] = {subject: [] for subject in running}
        for n in range(chosen.rounds):
            values = {}
            for key, subject in running.items():
                done = subject.ask(first=n)
                found[key] += map(tuple, done["ratios"])
                values[key] = done["values"]
            far = max(abs(a - b) for theirs in values.values() for a, b in zip(values["cutaway"], theirs, strict=True))
            if far > CLOSE:
                raise SystemExit(f"subjects return other numbers: they differ by up to {far:.2g}")
        release = {key: subject.about["version"] for key, subject in running.items()}
    row = summary(work, found.pop("cutaway"), UNIT, bar)
    for key, pairs in found.items():
        row = row.against(f"transformer-lens {release[key]}", summary(work, pairs, UNIT).value, least)
    return row
