"""How the residual sweep grows with layers, positions, prompts and width; what it costs in bfloat16, and its memory.

Growth: GPT-2's shape at 12 layers, d 256 (heads of 64), 16384 tokens, one prompt of 16 tokens, and from there one size
at a time; a naive sweep would be as many plain forwards (of the same prompts) as there are cells. bfloat16: GPT-2
small's shape; errors are means over cells, against float32 arithmetic on the same rounded weights, in roundings of the
largest logit. Memory: what the resident set of a fresh process grows by at its peak (`VmHWM`, reset before), large
blocks handed back at once (`MALLOC_MMAP_THRESHOLD_`), over the same for one plain forward of as many whole prompts as
the sweep has rows in its largest batch; GPT-2 small's shape, 15 tokens. Random weights, one thread.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.frame import ROOT, Row, finish, options, quiet, ratios, spent, summary
from bench.works import UNIT

BASE = {"layers": 12, "positions": 16, "prompts": 1, "width": 256}
POINTS = {
    "layers": (3, 6, 12, 24),
    "positions": (8, 16, 32, 64),
    "prompts": (1, 2, 4, 8),
    "width": (128, 256, 512, 1024),
}
SMALL = {"layers": 12, "positions": 15, "prompts": 1, "width": 768, "vocabulary": 50257}
SWEEPS = {
    "resid": "residual sweep",
    "heads": "head-output sweep",
    "by_position": "head × position sweep, every 4th head",
}
MEMORY_BAR = 1.5
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # large blocks are handed back
EVERY = 8  # one cell in so many is also run by itself, in bfloat16


def main() -> int:
    """Measure growth, bfloat16 and memory, and write the rows."""
    import torch

    chosen = options(__doc__, rounds=4).parse_args()
    torch.set_num_threads(1)
    rows = [*growth(chosen.rounds), *bfloat16(chosen.rounds), *(memory(w, chosen.rounds) for w in SWEEPS)]
    return finish("growth", rows, write=not chosen.no_write, label=chosen.label)


def build(layers: int, positions: int, prompts: int, width: int, vocabulary: int = 16384) -> Any:
    """A seeded random model, and clean and corrupt prompts as ids."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import cutaway as ca

    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = vocabulary - 1
        config = GPT2Config(
            n_layer=layers, n_embd=width, n_head=max(1, width // 64), vocab_size=vocabulary, bos_token_id=last,
            eos_token_id=last,
        )  # fmt: skip
        hf: Any = GPT2LMHeadModel(config).eval().requires_grad_(False)
        ids = torch.randint(last, (2, prompts, positions))
    model = ca.load(hf, check=False)
    return model, model.tokens(ids[0]), model.tokens(ids[1])


def job(name: str, model: Any, clean: Any, corrupt: Any) -> tuple[Callable[[], Any], list[Any]]:
    """A sweep as a call, and its variants."""
    from cutaway.core.address import Address
    from cutaway.models.edits.library import Replace
    from cutaway.models.sweep.executor import sweep

    layers, heads, positions = range(model.shape.n_layers), range(model.shape.n_heads), range(clean.ids.shape[1])
    site, places = {
        "resid": ("resid_pre", [Address("resid_pre", i, None, p) for i in layers for p in positions]),
        "heads": ("z", [Address("z", i, h) for i in layers for h in heads]),
        "by_position": ("z", [Address("z", i, h, p) for i in layers for h in heads[::4] for p in positions]),
    }[name]

    def variants() -> list[Any]:
        acts = model.capture(clean, site, logits=False)
        return [[Replace(a, acts[str(a)])] for a in places]

    return lambda: sweep(model, corrupt, variants(), difference), variants()


def difference(logits: Any, prompt: Any) -> Any:
    """The metric."""
    return logits[:, 7] - logits[:, 9]


def forward(model: Any, ids: Any) -> Callable[[], Any]:
    """The plain forward of some prompts."""
    import torch

    @torch.no_grad()
    def plain() -> Any:
        return model.hf(ids, use_cache=False).logits

    return plain


def growth(rounds: int) -> list[Row]:
    """Two rows a point: plain forwards, and CPU seconds."""
    found: dict[tuple[str, int], tuple[list[tuple[float, float]], list[float]]] = {}
    for axis, sizes in POINTS.items():
        for size in sizes:
            model, clean, corrupt = build(**{**BASE, axis: size})
            found[axis, size] = compare(model, clean, corrupt, rounds)
    rows = []
    for (axis, size), (pairs, seconds) in found.items():
        at = {**BASE, axis: size}
        work = f"residual sweep, {size} {axis}: {at['layers'] * at['positions']} cells"
        low, middle, high = (round(q, 4) for q in statistics.quantiles(seconds, n=4))
        rows += [summary(work, pairs, UNIT), Row(f"{work}, time", middle, "s CPU", quartiles=(low, high))]
    return rows


def compare(
    model: Any, clean: Any, corrupt: Any, rounds: int, calls: int = 5
) -> tuple[list[tuple[float, float]], list[float]]:
    """Ratios of the residual sweep to the plain forward (the mean of some calls), and its CPU seconds."""
    run, _ = job("resid", model, clean, corrupt)
    plain = forward(model, corrupt.ids)
    seconds: list[float] = []

    def several() -> None:
        for _ in range(calls):
            plain()

    run()
    pairs = ratios(several, {"sweep": lambda: seconds.append(spent(run)[0])}, rounds)["sweep"]
    return [(calls * cpu, calls * wall) for cpu, wall in pairs], seconds


def bfloat16(rounds: int) -> list[Row]:
    """What the sweep costs there, and how far it is from exact arithmetic, beside one run a variant."""
    from copy import deepcopy

    import torch

    import cutaway as ca
    from cutaway.models.sweep.executor import sweep

    exact, clean, corrupt = build(**SMALL)
    half = ca.load(deepcopy(exact.hf).bfloat16(), check=False)
    cost = summary("bfloat16: residual sweep, 12 layers × 15 positions", compare(half, clean, corrupt, rounds)[0], UNIT)
    same = ca.load(deepcopy(half.hf).float(), check=False)  # the rounded weights, computed exactly
    variants = job("resid", half, clean, corrupt)[1][::EVERY]
    wide = [[type(e)(e.where, e.value.float()) for e in v] for v in variants]
    swept, wanted = sweep(half, corrupt, variants, difference), alone(same, corrupt, wide)
    rounding = torch.finfo(torch.bfloat16).eps * float(same.run_last(corrupt).abs().max())
    errors = [float((x.float() - wanted).abs().mean()) / rounding for x in (swept, alone(half, corrupt, variants))]
    row = Row("bfloat16: error of the sweep", round(errors[0], 4), "roundings")
    return [cost, row.against("one run a variant", round(errors[1], 4), 0.67)]


def alone(model: Any, corrupt: Any, variants: list[Any]) -> Any:
    """Every variant as a run of its own."""
    import torch

    rows = torch.arange(len(corrupt))
    return torch.stack([difference(model.run_last(corrupt, v), rows).float() for v in variants])


def memory(work: str, rounds: int) -> Row:
    """Peak memory of a sweep over that of the plain forward of its largest batch, each in a process of its own."""
    found: dict[str, list[list[float]]] = {"sweep": [], "plain": []}
    for _ in range(rounds):
        for which in found:
            command = [sys.executable, "-m", "bench.growth", "--peak", work, which]
            done = subprocess.run(command, cwd=ROOT, env={**quiet(), **AT_ONCE}, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            found[which].append(json.loads(done.stdout.splitlines()[-1]))
    shares = [s[1] / p[1] for s, p in zip(found["sweep"], found["plain"], strict=True)]
    low, middle, high = (round(q, 4) for q in statistics.quantiles(shares, n=4))
    plain = statistics.median(p[1] for p in found["plain"]) / 2**20
    says = f"peak memory of the {SWEEPS[work]}, {found['plain'][0][0]:.0f} rows at once: plain {plain:.0f} MiB"
    return Row(says, middle, "× plain batch", MEMORY_BAR, quartiles=(low, high))


def peak(work: str, which: str, sizes: dict[str, int] | None = None) -> tuple[int, int]:
    """Rows in the largest batch of a sweep, and the bytes by which this process grows at most in it, or in the plain
    forward of as many rows."""
    import torch

    torch.set_num_threads(1)
    model, clean, corrupt = build(**(sizes or SMALL))
    run, _ = job(work, model, clean, corrupt)
    seen: list[int] = []
    handle = model.hf.transformer.h[-1].register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    run()  # also what a process needs only once
    handle.remove()
    plain = forward(model, corrupt.ids.repeat(max(seen), 1))
    call = run if which == "sweep" else plain
    call()
    return max(seen), grown(call)


def grown(call: Callable[[], Any]) -> int:
    """Bytes by which the resident set grows at its peak during a call."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    clear.write_text("5")  # the peak starts again from here
    before = _resident(status, "VmRSS")
    call()
    return _resident(status, "VmHWM") - before


def _resident(status: Path, key: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(json.dumps(peak(sys.argv[2], sys.argv[3])))
    else:
        sys.exit(main())
