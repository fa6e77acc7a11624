"""What looking costs: one forward with nothing, one site, 36 sites and every site captured, over the plain forward.

`small` is GPT-2 small's shape (12 layers, d 768, 50257 tokens, 64 positions), `tiny` the same depth at d 64 and 16
positions, where Python is all the cost. Random weights, one prompt, no cache, no gradients, logits always computed.
Every ratio is to the bare transformers forward measured beside it, in the same process.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench import subjects
from bench.frame import Row, Subject, finish, options, pythons, serve, summary
from bench.frame import ratios as measure

UNIT = "× plain forward"
PEERS = {"transformer_lens": "transformer-lens", "nnsight": "nnsight"}
WORDS = {
    "none": "nothing captured",
    "one": "one site",
    "some": "36 sites",
    "every": "every site",
    "touched": "every site, every value looked at",
}


@dataclass(frozen=True)
class Shape:
    """A model's sizes, the prompt's length, pairs of calls in one round, and the bars."""

    sizes: dict[str, int]
    positions: int
    pairs: int
    bars: dict[str, float]


SHAPES = {
    "tiny": Shape(
        {"n_layer": 12, "n_embd": 64, "n_head": 4, "vocab_size": 512, "n_positions": 64}, 16, 40,
        {"none": 1.02, "one": 1.1, "every": 2.3},
    ),
    "small": Shape({}, 64, 5, {"none": 1.01, "one": 1.03, "every": 1.2}),
}  # fmt: skip


def main() -> int:
    """Measure every subject in rounds that take turns, and write the rows."""
    parser = options(__doc__, rounds=8)
    parser.add_argument("--shape", choices=[*SHAPES], action="append", help="only this shape (nothing is written)")
    chosen = parser.parse_args()
    rows: list[Row] = []
    for shape in chosen.shape or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            save(shape, folder)
            rows += compare(shape, folder, pythons(chosen, dict.fromkeys(PEERS, "a")), chosen.rounds)
    return finish("capture", rows, write=not (chosen.no_write or chosen.shape), label=chosen.label)


def save(shape: str, folder: str) -> None:
    """Seeded random weights and one prompt, for every subject alike."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = SHAPES[shape].sizes
    last = sizes.get("vocab_size", 50257) - 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=last, eos_token_id=last))
        ids = torch.randint(last, (1, SHAPES[shape].positions))
    model.save_pretrained(folder)
    save_file({"ids": ids}, Path(folder, "ids.safetensors"))


def compare(shape: str, folder: str, interpreters: dict[str, str], rounds: int) -> list[Row]:
    """The rows of one shape."""
    with contextlib.ExitStack() as stack:
        running = {}
        for name, python in interpreters.items():
            running[name] = Subject(python, "bench.capture", "--subject", name, folder)
            stack.callback(running[name].close)
        found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in running}
        for _ in range(rounds):
            for name, subject in running.items():
                for work, ratios in subject.ask(pairs=SHAPES[shape].pairs).items():
                    found[name].setdefault(work, []).extend(ratios)
    rows = []
    for work, pairs_ in found["cutaway"].items():
        row = summary(f"{shape}: {WORDS[work]}", pairs_, UNIT, SHAPES[shape].bars.get(work))
        theirs = {n: summary(work, f[work], UNIT).value for n, f in found.items() if n != "cutaway" and work in f}
        compared = [row.against(f"{PEERS[n]} {running[n].about['version']}", value) for n, value in theirs.items()]
        rows += compared or [row]
    return rows


def subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    version, plain, jobs = subjects.prepare(name, folder)
    measure(plain, jobs, pairs=3)  # warm-up
    serve({"version": version}, lambda pairs: measure(plain, jobs, pairs))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        subject(*sys.argv[2:4])
    else:
        sys.exit(main())
