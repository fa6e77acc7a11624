"""Three lenses on a real model, on text that they have not seen: `python -m tools.real_lenses`.

It trains a tuned lens and estimates a Jacobian lens of SmolLM2-135M-Instruct on the text of `tools.real_dictionary`,
both in `runs/real/lenses`, where a stopped run goes on; measures per layer how far they and the logit lens are from the
model's own predictions on other files, and whether a swap of two capitals along their directions swaps the answer; and
publishes both in docs/real.md. It takes long on one thread; `--tokens` and `--contexts` make it shorter.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import cutaway as ca
from bench.frame import machine
from cutaway.lenses.swap import SwapCurve
from cutaway.lenses.tuned_lens import TunedCurve
from tests.real import sets
from tools import real, real_dictionary, real_studies

MODEL = "smollm2"
TOKENS, CONTEXTS, CONTEXT, HELD, WIDTH, PROMPTS, SKIPPED = 20_000, 6, 128, 32, 96, 24, 16


def main() -> None:
    """Fit, judge, keep the numbers, and write the page."""
    parser = real.options(__doc__)
    parser.add_argument("--out", type=Path, default=real.RUNS / "lenses", help="where lenses are kept")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the tuned lens")
    parser.add_argument("--contexts", type=int, default=CONTEXTS, help=f"of {CONTEXT} tokens, of the Jacobian lens")
    chosen = parser.parse_args()
    found = measured(chosen.folder / MODEL, chosen.out, chosen.tokens, chosen.contexts)
    real.publish(found, real_studies.LENSES, write=not chosen.no_write)


def measured(folder: Path, out: Path, tokens: int, contexts: int) -> dict[str, Any]:
    """Fit both lenses, or go on with them, and judge all three."""
    out.mkdir(parents=True, exist_ok=True)
    about, path = real_dictionary.written(out / "train.jsonl", "train"), out / "train.jsonl"
    given = ("--model", folder, "--text", path, "--threads", 1)
    real_dictionary.tell("lenses", "train", *given, "--tokens", tokens, "--context", WIDTH, "--out", out / "tuned")
    real_dictionary.tell("lenses", "estimate", *given, "--tokens", contexts * CONTEXT, "--context", CONTEXT, "--batch",
                         CONTEXT, "--out", out / "jacobian")  # fmt: skip
    model = ca.load(folder)
    tuned, jacobian = ca.lenses.open_lens(out / "tuned"), ca.lenses.open_jacobian_lens(out / "jacobian")
    prompts, size = held_out(model), {"each_position": True, "samples": 1}
    curves = {
        "tuned": ca.lenses.tuned_lens(model, prompts, tuned, **size),
        "Jacobian": ca.lenses.jacobian_lens(model, prompts, jacobian, **size),
    }
    task, lenses = sets.task(model, "fact_capital", PROMPTS, skip=SKIPPED), {"tuned": tuned, "Jacobian": jacobian}
    lenses = {"logit": ca.lenses.identity_lens(model)} | lenses
    swaps = {name: ca.lenses.swap(model, task, lens, samples=4) for name, lens in lenses.items()}
    # the step of a lens is short where its two directions are alike: is that all that one lacks?
    swaps["logit, twice the step"] = ca.lenses.swap(model, task, lenses["logit"], strength=2.0, samples=4)
    return {
        "model": real.MODELS[MODEL], "tokens": tokens, "contexts": contexts, "context": CONTEXT,
        "held out": len(prompts), "prompts": len(task), "text": about, "depth": curves["tuned"].labels["layer"],
        "KL": distances(curves), "swap": {name: swapped(found) for name, found in swaps.items()},
        "error": rounded(curves["Jacobian"].error), "same position": rounded(curves["Jacobian"].same_position),
        "machine": machine(),
    }  # fmt: skip


def held_out(model: ca.Model) -> list[str]:
    """Beginnings of files that no lens was fitted on, all of the same length in tokens."""
    texts = (model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in real_dictionary.texts("test"))
    return [model.tokenizer.decode(ids[:WIDTH]) for ids in islice((t for t in texts if len(t) >= WIDTH), HELD)]


def distances(curves: dict[str, TunedCurve]) -> dict[str, Any]:
    """KL(model ‖ lens) in nats by lens and depth, each with its interval over files."""
    found = {n: (c.divergence, c.divergence_interval) for n, c in curves.items()}
    one = curves["tuned"]
    found = {"logit": (one.logit_divergence, one.logit_divergence_interval)} | found
    return {n: {"value": rounded(kl), "interval": rounded(interval)} for n, (kl, interval) in found.items()}


def swapped(found: SwapCurve) -> dict[str, Any]:
    """The share of prompts whose output swaps, by depth, with its interval and the most that random changes swap."""
    chance = found.success_null.max(1).values
    return {
        "value": rounded(found.success), "interval": rounded(found.success_interval), "chance": rounded(chance),
        "effect": rounded(found.effect),
    }  # fmt: skip


def rounded(x: Any) -> Any:
    """Numbers with four digits, as lists; what else stands in lists and by names stays."""
    x = x.tolist() if hasattr(x, "tolist") else x
    if isinstance(x, dict):
        return {name: rounded(v) for name, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


if __name__ == "__main__":
    main()
