"""What a training step of a dictionary costs: tokens a second of CPU time and peak memory, beside SAELens and sparsify.

d 768, 16384 latents, k 32, batches of 4096 tokens, float32 weights, one thread. A step is all that the tool's trainer
does with a batch: forward, losses, gradients, optimiser, schedules, norms, and the count of silent latents. SAELens is
its `SAETrainer.step`, sparsify its `Trainer.fit` with its default optimiser (signum) around a model that returns the
activations; both as they come, without `dictionaries.kernels.precision`, which cutaway's plan chooses by
measurement ("auto"). AuxK is on by default in cutaway and SAELens and off in sparsify; no latent is silent yet, but in
the row that says so. "Exact" selects in float32, "bfloat16" takes candidates from a bfloat16 product and ranks their
float32 values.

The roofline is a plain float32 product of the encoder's shape, the quicker of PyTorch's two libraries, timed in the
same process after each step. ReLU and JumpReLU steps are measured with half of the latents active, as at the start,
and with 32 active, as later; SAELens is dense in both. The cross-layer transcoder has 3 layers of d 256. Memory is
what the resident set of a fresh process grows by at its peak in building the trainer and three steps.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from bench import trainers
from bench.frame import ROOT, Row, Subject, finish, options, pythons, quiet, serve, spent
from bench.growth import grown
from bench.trainers import Job

CORE = Job("topk", 768, 16384, 32, 4096)
SMALL = replace(CORE, tokens=1024)
CROSS = Job("clt topk", 256, 4096, 16, 1024)
ACTIVE = 32
PEERS = {"saelens": ("SAELens {}", "b"), "sparsify": ("sparsify {}", "b")}
OURS = {"cutaway": "exact selection", "cutaway_bfloat16": "bfloat16 selection"}
UNIT = "tokens/s"
ROOFLINE = 45.0  # per cent


@dataclass(frozen=True)
class Work:
    """A measured step: who does it, and the least ratio of ours to each peer."""

    words: str
    job: Job
    subjects: tuple[str, ...] = ("cutaway",)
    least: dict[tuple[str, str], float] = field(default_factory=dict)
    silent: int = 0
    narrow: bool = False


CORE_BARS = {
    ("cutaway", "saelens"): 7.0,
    ("cutaway", "sparsify"): 1.9,
    ("cutaway_bfloat16", "saelens"): 10.0,
    ("cutaway_bfloat16", "sparsify"): 2.7,
}
WORKS = {
    "topk": Work("TopK step", CORE, (*OURS, *PEERS), CORE_BARS),
    "silent": Work("TopK step with AuxK, a quarter silent", SMALL, ("cutaway", "saelens"), silent=CORE.latents // 4),
    "relu": Work("ReLU step, half active", replace(SMALL, gate="relu"), ("cutaway", "saelens")),
    "relu_late": Work(f"ReLU step, {ACTIVE} active", replace(SMALL, gate="relu"), narrow=True),
    "jumprelu": Work("JumpReLU step, half active", replace(SMALL, gate="jumprelu"), ("cutaway", "saelens")),
    "jumprelu_late": Work(f"JumpReLU step, {ACTIVE} active", replace(SMALL, gate="jumprelu"), narrow=True),
    "clt": Work("cross-layer transcoder, TopK 16, 3 × 4096 latents", CROSS),
    "clt_late": Work(
        f"cross-layer transcoder, JumpReLU, {ACTIVE} active, 3 × 4096 latents", replace(CROSS, gate="clt jumprelu"),
        narrow=True,
    ),
    **{f"F{n}": Work(f"growth: {n} latents, k 32", replace(CORE, latents=n)) for n in (2048, 4096, 8192, 16384)},
    **{f"k{k}": Work(f"growth: 16384 latents, k {k}", replace(CORE, k=k)) for k in (8, 16, 32, 64)},
}  # fmt: skip
SAME_AS = {"relu_late": "relu", "jumprelu_late": "jumprelu"}  # a dense peer's step does not depend on what is active
Times = dict[tuple[str, str], list[dict[str, float]]]


def main() -> int:
    """Measure every subject in rounds that take turns, and write the rows."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--work", choices=[*WORKS, "memory"], action="append", help="only this (nothing is written)")
    chosen = parser.parse_args()
    interpreters = pythons(chosen, {name: environment for name, (_, environment) in PEERS.items()})
    interpreters["cutaway_bfloat16"] = interpreters["cutaway"]
    wanted = chosen.work or [*WORKS, "memory"]
    times, about = measure(interpreters, [w for w in wanted if w in WORKS], chosen.rounds)
    rows = [row for work in WORKS if work in wanted for row in rows_of(work, times, about)]
    if "memory" in wanted:
        rows += memory({n: peak_of(p, n) for n, p in interpreters.items()}, about)
    return finish("training", rows, write=not (chosen.no_write or chosen.work), label=chosen.label)


def measure(interpreters: dict[str, str], works: list[str], rounds: int) -> tuple[Times, dict[str, Any]]:
    """CPU and wall seconds of every step, subjects taking turns; and what the subjects say of themselves."""
    times: Times = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, python in interpreters.items():
            running[name] = Subject(python, "bench.training", "--subject", name)
            stack.callback(running[name].close)
        for work in works:
            for _ in range(rounds):
                for name in WORKS[work].subjects:
                    if name in running:
                        done = running[name].ask(work=work)
                        print(work, name, done, file=sys.stderr, flush=True)
                        times.setdefault((work, name), []).append(done)
        return times, {name: subject.about for name, subject in running.items()}


def rows_of(work: str, times: Times, about: dict[str, Any]) -> list[Row]:
    """The rows of one work: for each of our forms one a peer, or one alone; and the roofline."""
    w, found = WORKS[work], []
    several = len([n for n in w.subjects if n in OURS]) > 1
    for ours in (n for n in w.subjects if n in OURS and (work, n) in times):
        words = f"{w.words}, {OURS[ours]}" if several else w.words
        row = speed(f"{words}, batch {w.job.tokens}", w.job, times[work, ours])
        compared = [
            row.against(PEERS[p][0].format(about[p]["version"]), speed("", w.job, times[at, p]).value,
                       w.least.get((ours, p)))
            for p in PEERS if (at := SAME_AS.get(work, work), p) in times
        ]  # fmt: skip
        found += compared or [row]
        if several:
            found.append(roofline(f"{words}: share of the float32 roofline", times[work, ours], ours == "cutaway"))
    return found


def speed(words: str, job: Job, times: list[dict[str, float]]) -> Row:
    """Tokens a second of CPU time."""
    low, middle, high = quartiles([job.tokens / t["cpu"] for t in times])
    wall = statistics.median(job.tokens / t["wall"] for t in times)
    return Row(words, middle, UNIT, sense="min", quartiles=(low, high), wall=round(wall, 1))


def roofline(words: str, times: list[dict[str, float]], barred: bool) -> Row:
    """How much of the time the product alone would have taken, in per cent."""
    low, middle, high = quartiles([100 * t["product"] / t["cpu"] for t in times])
    return Row(words, middle, "%", ROOFLINE if barred else None, "min", quartiles=(low, high))


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return round(low, 1), round(middle, 1), round(high, 1)


# --- memory


def memory(peaks: dict[str, float], about: dict[str, Any]) -> list[Row]:
    """The rows of peak memory, in MiB."""
    found = []
    for ours in OURS:
        row = Row(f"peak memory, {OURS[ours]}", round(peaks[ours], 1), "MiB")
        compared = [
            row.against(PEERS[p][0].format(about[p]["version"]), round(peaks[p], 1), 1.0) for p in PEERS if p in peaks
        ]
        found += compared or [row]
    return found


def peak_of(python: str, name: str) -> float:
    """Peak growth of a fresh process, in MiB."""
    command = [python, "-m", "bench.training", "--peak", name]
    done = subprocess.run(command, cwd=ROOT, env=quiet(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1]) / 2**20


def peak(name: str, job: Job = CORE) -> int:
    """Bytes by which this process grows at most in building a trainer and three steps."""
    tiny = replace(job, d=32, latents=256, k=4, tokens=64)
    steps(name, tiny)()  # what a process needs only once
    return grown(steps(name, job))


def steps(name: str, job: Job) -> Callable[[], None]:
    """The work whose memory is measured; the data is there before."""
    data = trainers.batch(job, 1)

    def run() -> None:
        trainer = trainers.make(name, job, data)
        for _ in range(3):
            trainer.step(data)

    return run


# --- subjects


def serve_subject(name: str) -> None:
    """Serve one subject's measurements."""
    made: dict[str, Any] = {}

    def answer(work: str) -> dict[str, Any]:
        if work not in made:
            made.clear()
            made[work] = Measured(name, WORKS[work])
        return made[work].once()

    import torch

    torch.set_num_threads(1)
    serve({"version": trainers.release(name)}, answer)


class Measured:
    """A trainer that is asked for one step at a time."""

    def __init__(self, name: str, work: Work):
        self.work, self.ours = work, name in OURS
        self.data = [trainers.batch(work.job, seed) for seed in (1, 2)]
        self.trainer = trainers.make(name, work.job, self.data[0])
        if work.narrow and self.trainer.narrow is not None:
            self.trainer.narrow(self.data[0], ACTIVE)
        self.number = 0
        self._step()

    def once(self) -> dict[str, Any]:
        """CPU and wall seconds of a step, and of the product alone."""
        cpu, wall = spent(self._step)
        told = {"cpu": cpu, "wall": wall, "notes": self.trainer.notes}
        if self.ours and self.work is WORKS["topk"]:
            told["product"] = product(self.work.job)
        return told

    def _step(self) -> None:
        if self.work.silent and self.trainer.silence is not None:
            self.trainer.silence(self.work.silent)
        self.number += 1
        self.trainer.step(self.data[self.number % 2])


def product(job: Job) -> float:
    """CPU seconds of the encoder's product in float32, by the quicker library."""
    import torch

    from cutaway.dictionaries.kernels.precision import Choice, products

    x, w = torch.randn(job.tokens, job.d), torch.randn(job.latents, job.d)
    out = torch.zeros(job.tokens, job.latents)
    seconds = []
    for onednn in (False, True):
        with products(Choice(onednn=onednn)):
            seconds.append(spent(lambda: torch.mm(x, w.T, out=out))[0])
    return min(seconds)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(sys.argv[2])
    elif sys.argv[1:2] == ["--peak"]:
        print(json.dumps(peak(sys.argv[2])))
    else:
        sys.exit(main())
