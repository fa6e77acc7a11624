"""What methods cost on real models, as a user starts them: a command in a process of its own.

Needs the folders that `make real` makes (`--folder`). Every command runs on one thread. `explain` takes one sentence;
the other methods take 16 prompts of SmolLM2's capitals (in pairs, where they compare two), or the repeated random
tokens that they draw themselves, and their defaults. CPU seconds are those of the whole process (imports and load
included), memory is its peak, and the first line is the wall time until a result is on the screen. Beside them stands
the same process with a plain forward in place of the method; its first round also checks the model, which later loads
remember. How the main job grows with the model is seen on four: the bundled one, the two real ones, and 1.1 billion
seeded weights in bfloat16, in the shape of TinyLlama with SmolLM2's words.
"""

from __future__ import annotations

import json
import os
import pty
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.frame import RESULTS, ROOT, Row, finish, options, quiet

SETS = ROOT / "tests" / "real" / "sets"
SENTENCE = {"smollm2": "The capital of France is", "gemma3": "The capital of France is"}
#: model → bars on the main job: CPU seconds, peak memory in GiB
EXPLAIN = {"smollm2": (40.0, 2.5), "gemma3": (60.0, None)}
BUNDLED, SEEDED = "miniworld", "1.1B seeded, bfloat16"
FIRST_LINE = 5.0
METHOD = 60.0  # CPU seconds that any other method may take at its default
PROMPTS = 16
#: methods that take pairs of prompts → further options, where one has no default
PAIRED = {
    "lenses logit_lens": "",
    "lenses lens_grid": "",
    "lenses direct_attribution": "",
    "lenses accumulated_residual": "",
    "lenses source_attribution": "",
    "lenses token_relevance": "",
    "heads roles": "",
    "neurons importance": "",
    "patching activation": "",
    "patching activation --site z": "--site z",
    "patching ablate": "",
    "patching attribution": "",
    "patching attribution_star": "",
    "patching relevance": "",
    "patching path": "",
    "patching causal_trace": "",
    "patching knockout": "",
    "patching knockout_curve": "",
    "patching interactions": "",
    "patching self_repair": "",
    "patching group": "--heads 23.4,29.1,23.5",
    "graphs trace": "",
    "graphs validate": "",
    "graphs supernodes": "",
}
#: methods that take prompts
PROMPTED = tuple(
    f"neurons {name}"
    for name in (
        "card --neuron 24.115",
        "composition",
        "frequency",
        "polysemanticity",
        "statistics",
        "triggers",
        "values",
    )
)
#: methods that take the model alone, or sequences of their own → further options
ALONE = {
    "heads classify": "",
    "heads confirm": "--repeats 16",
    "heads card": "--head 23.4",
    "heads retrieval": "",
    "heads function_vectors": "--concepts capital,plural --prompts 8",
    "heads stream": "",
    "heads successor": "",
    "weights circuits": "--heads 23.4",
    "weights composition": "",
    "weights connections": "",
    "weights distances": "",
    "weights spectra": "",
    "geometry concepts": "",
}
PLAIN = """
import sys, torch, cutaway as ca
model = ca.load(sys.argv[1])
task = ca.tasks.from_jsonl(sys.argv[2])
with torch.no_grad():
    model.run_last([p.clean for p in task.pairs])
print("done")
"""


def main() -> int:
    """Measure each command in fresh processes."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "real", help="where `make real` put the models")
    parser.add_argument(
        "--work", action="append", help="only work whose name contains this text, the other rows stay; may be repeated"
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        pairs = Path(home) / "capitals.jsonl"
        pairs.write_text(
            "\n".join(map(json.dumps, capitals(PROMPTS, chosen.folder / "smollm2" / "tokenizer.json"))), "utf-8"
        )
        jobs = commands(chosen.folder, pairs, Path(home) / "seeded")
        if chosen.work:
            jobs = {name: words for name, words in jobs.items() if any(part in name for part in chosen.work)}
        if any(name.startswith(SEEDED) for name in jobs):
            # in a process of its own: the peak of those started later would count this one's memory
            make = (
                "import sys; from pathlib import Path; from bench.real import seeded; seeded(*map(Path, sys.argv[1:]))"
            )
            given = [str(Path(home) / "seeded"), str((chosen.folder / "smollm2").resolve())]
            subprocess.run([sys.executable, "-c", make, *given], cwd=ROOT, check=True)
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in jobs}
        for _ in range(chosen.rounds):
            for name, words in jobs.items():
                found[name].append(measured(words, home))
                print(f"{name}: {found[name][-1][0]:.1f} CPU s", file=sys.stderr, flush=True)
    rows = [row for name, runs in found.items() for row in rows_of(name, runs)]
    if chosen.work and not chosen.no_write:
        rows = beside(rows, RESULTS / f"real{chosen.label and '.'}{chosen.label}.json")
    return finish("real", rows, write=not chosen.no_write, label=chosen.label)


def beside(rows: Sequence[Row], file: Path) -> list[Row]:
    """Return the rows of a file, those measured again in the place of the old ones."""
    new = {row.work: row for row in rows}
    old = [Row(**row) for row in json.loads(file.read_text("utf-8"))["rows"]] if file.is_file() else []
    return [new.pop(row.work, row) for row in old] + list(new.values())


def capitals(n: int, tokenizer: Path) -> list[dict[str, str]]:
    """Return pairs of prompts about capitals of one token each, in the layout that `--task` reads."""
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(tokenizer))
    rows = [json.loads(line) for line in (SETS / "fact_capital.jsonl").read_text("utf-8").splitlines()]
    rows = [r for r in rows if r["corrupt"] is not None]
    rows = [r for r in rows if all(len(words.encode(f" {r[k]}").ids) == 1 for k in ("answer", "foil"))][:n]
    kept = {"clean": "prompt", "corrupt": "corrupt", "answer": "answer", "foil": "foil", "subject": "subject"}
    return [{new: r[old] for new, old in kept.items() if r.get(old)} for r in rows]


def seeded(folder: Path, words: Path) -> None:
    """Write a folder of 1.1 billion seeded weights with another model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(words)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def commands(folder: Path, pairs: Path, large: Path) -> dict[str, list[str]]:
    """Return the words of every command by the name of its work."""
    run = [sys.executable, "-m", "cutaway"]
    out = {f"{m}: a plain forward": [sys.executable, "-c", PLAIN, str(folder / m), str(pairs)] for m in EXPLAIN}
    out |= {f"{m}: explain": [*run, "explain", SENTENCE[m], "--model", str(folder / m)] for m in EXPLAIN}
    out[f"{BUNDLED}: explain"] = [*run, "explain"]
    out[f"{SEEDED}: explain"] = [*run, "explain", SENTENCE["smollm2"], "--model", str(large)]
    prompts = pairs.with_suffix(".txt")
    prompts.write_text("\n".join(json.loads(line)["clean"] for line in pairs.read_text("utf-8").splitlines()), "utf-8")
    given = [(name, f"--task {pairs} {more}") for name, more in PAIRED.items()]
    given += [(name, f"{' '.join(name.split()[2:])} --prompts {prompts}") for name in PROMPTED] + list(ALONE.items())
    for name, more in given:
        words = [*name.split()[:2], "--model", str(folder / "smollm2"), *shlex.split(more)]
        out[f"smollm2: {name}"] = [*run, *words]
    return out


def measured(words: Sequence[str], home: str) -> tuple[float, float, float]:
    """Return CPU seconds, peak memory in GiB, and wall seconds to the first line, of a fresh process at a terminal."""
    start, first = time.perf_counter(), float("nan")
    screen, side = pty.openpty()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(words, cwd=ROOT, env=quiet() | {"HOME": home}, stdout=side, stderr=errors)
        os.close(side)
        while shown := _read(screen):
            if shown.strip() and first != first:
                first = time.perf_counter() - start
        os.close(screen)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            raise SystemExit(f"{shlex.join(words)}\n{errors.read()[-2000:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20, first


def _read(screen: int) -> bytes:
    """Return what was written next; nothing at the end, which Linux tells by an error."""
    try:
        return os.read(screen, 1 << 16)
    except OSError:
        return b""


def rows_of(name: str, runs: Sequence[tuple[float, float, float]]) -> list[Row]:
    """Return the rows of one command: medians with quartiles, beside their bars."""
    model, _, work = name.partition(": ")
    main = work == "explain"
    barred = work != "a plain forward" and model not in (BUNDLED, SEEDED)
    seconds, memory = EXPLAIN[model] if main and barred else (METHOD if barred else None, None)
    rows = [_row(f"{name}, whole process", [r[0] for r in runs], "CPU s", seconds)]
    rows.append(_row(f"{name}, peak memory", [r[1] for r in runs], "GiB", memory))
    return rows + (
        [_row(f"{name}, until the first line", [r[2] for r in runs], "s", FIRST_LINE if barred else None)]
        if main
        else []
    )


def _row(work: str, values: Sequence[float], unit: str, bar: float | None) -> Row:
    middle = round(statistics.median(values), 3)
    if len(values) < 2:
        return Row(work, middle, unit, bar)
    low, _, high = statistics.quantiles(values, n=4)
    return Row(work, middle, unit, bar, quartiles=(round(low, 3), round(high, 3)))


if __name__ == "__main__":
    raise SystemExit(main())
