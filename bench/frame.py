"""The frame of every benchmark: interleaved timing, subjects in processes of their own, rows, files, bars.

Only the standard library is needed here (torch is imported inside functions), because peers' environments run it too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
ENVIRONMENTS = tuple(sorted(p.stem for p in (ROOT / "bench" / "envs").glob("*.txt")))


@dataclass(frozen=True)
class Row:
    """One measured value. `bar` is what it must keep to (at most for `max`, at least for `min`), if anything.

    `peer_value` is what the peer got for the same work, `ratio` how many times better ours is (above 1: ours is).
    `least` is a bar on that ratio. `quartiles` are those of the repeats behind a median; `wall` is the same value by
    the wall clock.
    """

    work: str
    value: float
    unit: str
    bar: float | None = None
    sense: Literal["max", "min"] = "max"
    peer: str | None = None
    ratio: float | None = None
    peer_value: float | None = None
    quartiles: tuple[float, float] | None = None
    wall: float | None = None
    least: float | None = None

    @property
    def kept(self) -> bool | None:
        """Whether every bar of the row is kept; None without one."""
        held = []
        if self.bar is not None:
            held.append(self.value <= self.bar if self.sense == "max" else self.value >= self.bar)
        if self.least is not None and self.ratio is not None:
            held.append(self.ratio >= self.least)
        return all(held) if held else None

    def against(self, peer: str, value: float, least: float | None = None) -> Row:
        """Return the same row with what a peer got and the ratio to it."""
        better = value / self.value if self.sense == "max" else self.value / value
        found = {"peer": peer, "peer_value": value, "ratio": round(better, 3), "least": least}
        return Row(**{**asdict(self), **found})


# --- timing


def ratios(
    plain: Callable[[], Any], jobs: Mapping[str, Callable[[], Any]], pairs: int, first: int = 0
) -> dict[str, list[tuple[float, float]]]:
    """For each job, `pairs` ratios (process CPU time, wall time) of one call to one of the plain work beside it.

    The two calls of a pair follow each other, in alternating order (`first` is the number of the first pair), so what
    else the machine does falls on both. An unmeasured plain call stands before each pair: what the job before it left
    in caches would fall on one only.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for n in range(first, first + pairs):
        for name, job in jobs.items():
            plain()
            if n % 2:
                b, a = spent(job), spent(plain)
            else:
                a, b = spent(plain), spent(job)
            found[name].append((b[0] / a[0], b[1] / a[1]))
    return found


def spent(job: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of this process and wall seconds that a call took."""
    cpu, wall = time.process_time(), time.perf_counter()
    job()
    return time.process_time() - cpu, time.perf_counter() - wall


def summary(work: str, pairs: Sequence[tuple[float, float]], unit: str, bar: float | None = None) -> Row:
    """The row of a job measured by `ratios`: its median, with quartiles."""
    cpu = [c for c, _ in pairs]
    low, _, high = statistics.quantiles(cpu, n=4)
    wall = statistics.median(w for _, w in pairs)
    return Row(work, round(statistics.median(cpu), 4), unit, bar, quartiles=(round(low, 4), round(high, 4)),
               wall=round(wall, 4))  # fmt: skip


# --- subjects in processes of their own


class Subject:
    """A process that prepares some jobs once and measures them when asked, so that rounds can be interleaved."""

    def __init__(self, python: str, module: str, *arguments: str):
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  (closed by `close`)
        self.process = subprocess.Popen(
            [python, "-m", module, *arguments], cwd=ROOT, env=quiet(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.about = self._answer()

    def ask(self, **question: Any) -> Any:
        """One round: the question goes as a line of JSON, and so does the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.errors.close()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.errors.seek(0)
        told = self.errors.read()[-2000:]
        self.close()
        raise SystemExit(f"{self.process.args} ended:\n{told}")


def serve(about: Mapping[str, Any], answer: Callable[..., Mapping[str, Any]]) -> None:
    """The other end of `Subject`: answer each line on stdin with one on stdout."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)


def quiet() -> dict[str, str]:
    """This process's environment, offline, on one thread, without warnings."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    silent = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **one_thread, **offline, **silent}


def rename_tokenizer(folder: str | Path) -> None:
    """Enter a saved tokenizer under the name of its class that older transformers know."""
    path = Path(folder, "tokenizer_config.json")
    about = json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(about), "utf-8")


# --- rows and files


def machine() -> dict[str, Any]:
    """The machine and versions, as far as timings depend on them."""
    return {
        "cpu": _from_file("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory": _from_file("/proc/meminfo", "MemTotal") or "unknown",
        "threads": 1,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "float32 products": f"{product_rate():.0f} GFLOP/s",
        "date": datetime.date.today().isoformat(),
    }


def product_rate(size: int = 1024, repeats: int = 5) -> float:
    """Giga floating-point operations a CPU second of a float32 product in PyTorch, on one thread: the median of some.

    Ratios between tools depend on it: what is no product (selection, sorting, copying) weighs more where it is high.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(i)) for i in range(2))
        a @ b
        seconds = statistics.median(spent(lambda: a @ b)[0] for _ in range(repeats))
    finally:
        torch.set_num_threads(threads)
    return 2e-9 * size**3 / max(seconds, 1e-9)


def _from_file(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def finish(name: str, rows: Sequence[Row], write: bool = True, label: str = "") -> int:
    """Print the rows, write `bench/results/<name>.json`; the exit code is 1 if a bar is missed.

    With a `label`, which names another machine or a busy one, the results stand beside the first ones, in
    `<name>.<label>.json`.
    """
    print(table(rows))
    if write:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"machine": machine(), "rows": [asdict(r) for r in rows]}, indent=1, ensure_ascii=False)
        (RESULTS / f"{name}{label and '.'}{label}.json").write_text(text + "\n", encoding="utf-8")
    missed = {(r.work, r.peer) for r in rows if r.kept is False}
    print(f"{len(missed)} bars missed" if missed else "every bar kept")
    return 1 if missed else 0


def table(rows: Sequence[Row]) -> str:
    """The rows as text, in columns."""
    cells = [("work", "value", "quartiles", "bar", "", "peer", "ratio")]
    for r in rows:
        bar = "" if r.bar is None else f"{'≤' if r.sense == 'max' else '≥'} {r.bar:g}"
        spread = "" if r.quartiles is None else f"{r.quartiles[0]:.3f}–{r.quartiles[1]:.3f}"
        peer = "" if r.peer is None else f"{r.peer}: {r.peer_value:.3g}"
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}" + ("" if r.least is None else f" (≥ {r.least:g})")
        state = {None: "", True: "kept", False: "MISSED"}[r.kept]
        cells.append((r.work, f"{r.value:.4g} {r.unit}", spread, bar, state, peer, ratio))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def options(description: str | None, **numbers: int) -> argparse.ArgumentParser:
    """The command line that benchmarks share."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    for name in ENVIRONMENTS:
        says = f"python of environment {name.upper()} (bench/envs/{name}.txt), for its peers"
        parser.add_argument(f"--python-{name}", metavar="PATH", help=says)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--label", default="", help="name of another machine, whose results stand beside the first")
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    return parser


def pythons(chosen: argparse.Namespace, environments: Mapping[str, str]) -> dict[str, str]:
    """The python of cutaway and of every peer (name → environment) whose environment is there."""
    given = {name: getattr(chosen, f"python_{env}") for name, env in environments.items()}
    return {"cutaway": sys.executable} | {name: python for name, python in given.items() if python}
