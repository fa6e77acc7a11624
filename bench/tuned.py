"""What is learned in the same time: error on a truth toy, each tool at the learning rate that suits it best.

The Zipf toy of `cutaway.dictionaries.benchmarks` (1024 features, width 256), 2048 latents, TopK with k 16, 600 steps
of 1024 new tokens. All see the same tokens, and train at four learning rates, then at further ones, each a factor of
two away, until the best of each tool has a worse one on both sides; the best counts. Warm-up is one per cent; cutaway
and SAELens let the rate fall over the last fifth, sparsify (with Adam) over the whole run, as its trainer does. The
fraction of variance unexplained is of 8192 tokens that nobody was trained on. Steps are those of `bench.training`.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import Any

from bench import trainers
from bench.frame import Row, Subject, finish, options, pythons, serve
from bench.trainers import Job
from bench.training import PEERS

JOB = Job("topk", 256, 2048, 16, 1024, steps=600, adam=True)
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
FURTHER = 4  # rates tried beyond them
LEAST = 0.99  # of a peer's error over ours: within one per cent, or better
HELD_OUT = 8192


def main() -> int:
    """Train every subject at every rate, and write the rows."""
    chosen = options(__doc__).parse_args()
    interpreters = pythons(chosen, {name: environment for name, (_, environment) in PEERS.items()})
    errors: dict[str, dict[float, float]] = {}
    versions: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, python in interpreters.items():
            running[name] = Subject(python, "bench.tuned", "--subject", name)
            stack.callback(running[name].close)
            versions[name] = running[name].about["version"]
        for name, subject in running.items():
            found = errors.setdefault(name, {})
            for _ in range(len(RATES) + FURTHER):
                rate = following(found)
                if rate is None:
                    break
                found[rate] = subject.ask(rate=rate)["fvu"]
                print(name, rate, found[rate], file=sys.stderr, flush=True)
    return finish("tuned", rows(errors, versions), write=not chosen.no_write, label=chosen.label)


def following(found: dict[float, float]) -> float | None:
    """The rate to try next: one of the first, or one beyond the best where that is at the end; None if it is inside."""
    for rate in RATES:
        if rate not in found:
            return rate
    at, tried = best(found)[0], sorted(found)
    return at / 2 if at == tried[0] else at * 2 if at == tried[-1] else None


def rows(errors: dict[str, dict[float, float]], versions: dict[str, str]) -> list[Row]:
    """The best error of ours beside that of each peer."""
    rate, value = best(errors["cutaway"])
    row = Row("FVU on the Zipf toy", round(value, 5), f"of the variance, rate {rate:g}")
    found = []
    for name, (says, _) in PEERS.items():
        if name in errors:
            rate, value = best(errors[name])
            found.append(row.against(f"{says.format(versions[name])}, rate {rate:g}", round(value, 5), LEAST))
    return found or [row]


def best(errors: dict[float, float]) -> tuple[float, float]:
    """The rate with the smallest error, and that error."""
    rate = min(errors, key=lambda r: errors[r])
    return rate, errors[rate]


def trained(name: str, job: Job) -> float:
    """The error of a subject on new tokens after its run."""
    from cutaway.dictionaries.benchmarks import zipf_toy

    truth = zipf_toy(d=job.d)
    batches = truth.batches(job.tokens, seed=1)
    trainer = trainers.make(name, job, batches.batch(0)[0])
    for n in range(job.steps):
        trainer.step(batches.batch(n)[0])
    x = truth.batches(HELD_OUT, seed=2).batch(0)[0]
    return float((x - trainer.rebuilt(x)).pow(2).sum() / (x - x.mean(0)).pow(2).sum())


def serve_subject(name: str) -> None:
    """Serve one subject's runs."""

    def answer(rate: float) -> dict[str, Any]:
        return {"fvu": trained(name, replace(JOB, rate=rate))}

    serve({"version": trainers.release(name)}, answer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(sys.argv[2])
    else:
        sys.exit(main())
