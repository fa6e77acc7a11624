"""What composition scores of all pairs of heads cost, in CPU seconds and memory.

GPT-2 small's shape (144 heads, d 768), random weights, one thread, Q-, K- and V-composition of 144 × 144 pairs.
cutaway's call is the method as users call it, with z-scores, eight drawn rotations of every pair, and record.
TransformerLens' is `all_composition_scores` of each of the three modes, over its bridge in compatibility mode. Memory
is what the process's peak grows by in the first call, before which one forward has run; both must return the same
scores.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.beside import started
from bench.frame import Row, finish, options, serve, spent

TIME = "composition of 144 × 144 pairs, three modes: CPU time"
MEMORY = "composition of 144 × 144 pairs, three modes: memory"
CLOSE, LEAST, MOST = 1e-4, 10.0, 1024.0


def main() -> int:
    """Measure both subjects in rounds that take turns, and write the rows."""
    chosen = options(__doc__, rounds=5).parse_args()
    with started("bench.composition", chosen) as (folder, running):
        compare(folder, [*running])
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(chosen.rounds):
            for name, subject in running.items():
                seconds[name].append(subject.ask()["seconds"])
        about = {name: subject.about for name, subject in running.items()}
    low, middle, high = statistics.quantiles(seconds["cutaway"], n=4)
    rows = [
        Row(TIME, round(middle, 3), "s", quartiles=(round(low, 3), round(high, 3))),
        Row(MEMORY, round(about["cutaway"]["mebibytes"]), "MiB", MOST),
    ]
    if "transformer_lens" in about:
        peer = f"transformer-lens {about['transformer_lens']['version']}"
        rows = [
            rows[0].against(peer, round(statistics.median(seconds["transformer_lens"]), 2), LEAST),
            rows[1].against(peer, round(about["transformer_lens"]["mebibytes"])),
        ]
    return finish("composition", rows, write=not chosen.no_write, label=chosen.label)


def compare(folder: str, names: list[str]) -> None:
    """Stop where the subjects return other scores."""
    from safetensors.torch import load_file

    ours, *others = (load_file(Path(folder, f"{name}.scores.safetensors"))["scores"] for name in names)
    for theirs in others:
        far = float((ours.nan_to_num() - theirs).abs().max())
        if far > CLOSE:
            raise SystemExit(f"subjects return other scores: they differ by up to {far:.2g}")


def cutaway(folder: str) -> Callable[[], Any]:
    """The method on all heads."""
    import cutaway as ca

    model = ca.load(folder, check=False)
    model.run_last("t1 t2 t3")
    return lambda: ca.weights.composition(model).score


def transformer_lens(folder: str) -> Callable[[], Any]:
    """TransformerLens' own function, once a mode."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge.boot_transformers(folder)
    bridge.enable_compatibility_mode()
    bridge(torch.tensor([[1, 2, 3]]))

    @torch.no_grad()
    def run() -> Any:
        return torch.stack([bridge.all_composition_scores(m).scores.flatten(2).flatten(0, 1) for m in "QKV"])

    return run


def peak() -> float:
    """The most mebibytes that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    run = {"cutaway": cutaway, "transformer_lens": transformer_lens}[name](folder)
    before = peak()
    save_file({"scores": run().contiguous()}, Path(folder, f"{name}.scores.safetensors"))
    release = version("cutaway" if name == "cutaway" else "transformer-lens")
    serve({"version": release, "mebibytes": peak() - before}, lambda: {"seconds": spent(run)[0]})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    else:
        sys.exit(main())
