"""What a sweep costs: activation patching over every layer and position, or every head, in plain forwards.

GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, one clean and one corrupt prompt of 15 tokens, one
thread. A sweep patches the residual stream at each of 12 × 15 places, or the output of each of 144 heads at all
positions, and returns a logit difference for each; the clean run that gives the values is part of the work. Every
ratio is to the bare transformers forward of one prompt, measured beside it in the same process.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.frame import Row, Subject, finish, options, serve, summary
from bench.frame import ratios as measure

UNIT = "× plain forward"
LAYERS, HEADS, POSITIONS = 12, 12, 15
ANSWER, FOIL = 7, 9
WORDS = {
    "resid": f"residual sweep, {LAYERS} layers × {POSITIONS} positions",
    "heads": f"head-output sweep, {LAYERS * HEADS} heads",
}
#: our own bar in plain forwards, and the least ratio to the peer's own way of doing it
BARS = {"resid": 31.0, "heads": 30.0}
PEERS = {"transformer_lens": "transformer-lens"}
Job = Callable[[], Any]


def main() -> int:
    """Measure every subject in rounds that take turns, and write the rows."""
    parser = options(__doc__, rounds=4)
    chosen = parser.parse_args()
    pythons = {"cutaway": sys.executable} | (dict.fromkeys(PEERS, chosen.python_a) if chosen.python_a else {})
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return finish("sweeps", compare(folder, pythons, chosen.rounds), write=not chosen.no_write)


def save(folder: str) -> None:
    """Seeded random weights and two prompts, for every subject alike."""
    import torch
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(bos_token_id=50256, eos_token_id=50256))
        ids = torch.randint(50256, (2, POSITIONS))
    model.save_pretrained(folder)
    save_file({"ids": ids}, Path(folder, "ids.safetensors"))


def compare(folder: str, pythons: dict[str, str], rounds: int) -> list[Row]:
    """One row a sweep and peer."""
    with contextlib.ExitStack() as stack:
        running = {}
        for name, python in pythons.items():
            running[name] = Subject(python, "bench.sweeps", "--subject", name, folder)
            stack.callback(running[name].close)
        found: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in running}
        for _ in range(rounds):
            for name, subject in running.items():
                for work, ratios in subject.ask(pairs=1).items():
                    found[name].setdefault(work, []).extend(ratios)
    rows = []
    for work, pairs in found["cutaway"].items():
        row = summary(WORDS[work], pairs, UNIT, BARS[work])
        theirs = {n: summary(work, f[work], UNIT).value for n, f in found.items() if n != "cutaway" and work in f}
        rows += [row.beside(f"{PEERS[n]} {running[n].about['version']}", v) for n, v in theirs.items()] or [row]
    return rows


def prepare(name: str, folder: str) -> tuple[str, Job, dict[str, Job]]:
    """Version, plain forward and sweeps of a subject."""
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    ids = load_file(Path(folder, "ids.safetensors"))["ids"]
    bare = GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)

    @torch.no_grad()
    def plain() -> Any:
        return bare(ids[:1], use_cache=False).logits

    release, jobs = SUBJECTS[name](bare, ids)
    return release, plain, jobs


def cutaway(hf: Any, ids: Any) -> tuple[str, dict[str, Job]]:
    """The executor, as every patching method uses it."""
    import cutaway as ca
    from cutaway.core.address import Address
    from cutaway.models.edits import Replace
    from cutaway.models.executor import sweep

    model = ca.load(hf, check=False)
    clean, corrupt = model.tokens(ids[:1]), model.tokens(ids[1:])

    def metric(logits: Any, prompt: Any) -> Any:
        return logits[:, ANSWER] - logits[:, FOIL]

    def patch(site: str, places: list[Address]) -> Any:
        acts = model.capture(clean, site, logits=False)
        return sweep(model, corrupt, [[Replace(a, acts[str(a)])] for a in places], metric)

    cells = [Address("resid_pre", i, None, p) for i in range(LAYERS) for p in range(POSITIONS)]
    heads = [Address("z", i, h) for i in range(LAYERS) for h in range(HEADS)]
    return ca.__version__, {"resid": lambda: patch("resid_pre", cells), "heads": lambda: patch("z", heads)}


def transformer_lens(hf: Any, ids: Any) -> tuple[str, dict[str, Job]]:
    """TransformerLens's own patching helpers over its bridge."""
    import torch
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    bridge: Any = TransformerBridge.boot_transformers(hf.config.name_or_path, hf_model=hf)

    def metric(logits: Any) -> Any:
        return logits[0, -1, ANSWER] - logits[0, -1, FOIL]

    @torch.no_grad()
    def run(helper: Any) -> Any:
        _, cache = bridge.run_with_cache(ids[:1])
        return helper(bridge, ids[1:], cache, metric)

    return version("transformer-lens"), {
        "resid": lambda: run(patching.get_act_patch_resid_pre),
        "heads": lambda: run(patching.get_act_patch_attn_head_out_all_pos),
    }


SUBJECTS = {"cutaway": cutaway, "transformer_lens": transformer_lens}


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    release, plain, jobs = prepare(name, folder)
    for _ in range(5):
        plain()

    def answer(pairs: int) -> dict[str, Any]:
        return measure(lambda: [plain() for _ in range(5)], jobs, pairs)

    if name == "cutaway":
        answer(1)  # warm-up
    serve({"version": release}, lambda pairs: {w: [(5 * c, 5 * t) for c, t in r] for w, r in answer(pairs).items()})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    else:
        sys.exit(main())
