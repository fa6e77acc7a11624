"""The model card, produced by a run: each behaviour on held-out prompts, beside an untrained model on the same prompts.

An answer is right when every one of its tokens is the likeliest (greedy exact match). Intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from cutaway.core.stats import wilson
from cutaway.zoo.miniworld.behaviours import ROWS, Behaviour, random_tokens
from cutaway.zoo.miniworld.world import DATA, World

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

    from cutaway.zoo.miniworld.prompts import Prompt

GREATER_BAR: Final = 0.90  # probability difference; Hanna et al. 2023 measure 0.817 on GPT-2 small


@dataclass(frozen=True, slots=True)
class Query:
    """A prompt in token ids, its answer and, where it has one, the foil."""

    ids: list[int]
    answer: list[int]
    foil: list[int] | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """Answer of the model to one query, scored."""

    right: bool
    difference: float  # logit of the answer minus logit of the foil, at the first token where they differ
    last: Tensor  # logits at the last token of the prompt


def encode(tokenizer: Tokenizer, prompt: Prompt) -> Query:
    """Return the token ids of a prompt, its answer and its foil (read in the context of the clean prompt)."""
    ids = tokenizer.encode(prompt.clean).ids
    answer = tokenizer.encode(prompt.clean + prompt.answer).ids[len(ids) :]
    return Query(ids, answer, tokenizer.encode(prompt.clean + prompt.foil).ids[len(ids) :])


@torch.no_grad()
def ask(model: torch.nn.Module, queries: Sequence[Query], batch: int = 64) -> list[Scored]:
    """Return the outcome of every query, computed in batches of one length."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, query in enumerate(queries):
        by_length[len(query.ids) + len(query.answer)].append(i)
    out: dict[int, Scored] = {}
    for members in by_length.values():
        for start in range(0, len(members), batch):
            chunk = members[start : start + batch]
            rows = torch.tensor([queries[i].ids + queries[i].answer for i in chunk])
            logits = model(input_ids=rows, use_cache=False).logits.float()
            out |= {i: _outcome(queries[i], row) for i, row in zip(chunk, logits, strict=True)}
    return [out[i] for i in range(len(queries))]


def _outcome(query: Query, logits: Tensor) -> Scored:
    start = len(query.ids) - 1
    guessed = logits[start : start + len(query.answer)].argmax(-1).tolist()
    difference = float("nan")
    for k, (a, f) in enumerate(zip(query.answer, query.foil or (), strict=False)):
        if a != f:
            difference = float(logits[start + k, a] - logits[start + k, f])
            break
    return Scored(guessed == query.answer, difference, logits[start])


def _greater(outcomes: Sequence[Scored], rows: Sequence[Prompt], tokenizer: Tokenizer) -> tuple[list[bool], float]:
    """For each prompt, True if the likeliest token is a later year; and the mean of p(later) − p(not later)."""
    years = torch.tensor([tokenizer.token_to_id(f"{y:02d}") for y in range(100)])
    right, differences = [], []
    for outcome, prompt in zip(outcomes, rows, strict=True):
        later = years[prompt.meta["start"] + 1 :]
        p = outcome.last.softmax(-1)
        right.append(bool((later == outcome.last.argmax()).any()))
        differences.append(float(p[later].sum() - p[years[: prompt.meta["start"] + 1]].sum()))
    return right, sum(differences) / len(differences)


def _row(
    row: Behaviour, models: dict[str, Any], tokenizer: Tokenizer, world: World, n: int, seed: int
) -> dict[str, Any]:
    if row.sampler == "random_tokens":
        rows: list[Prompt] = []
        queries = [Query(ids, [answer]) for ids, answer in random_tokens(tokenizer.get_vocab_size(), n, seed)]
    else:
        rows = row.prompts(world, n, seed)
        queries = [encode(tokenizer, p) for p in rows]
    out: dict[str, Any] = {"name": row.name, "held_out": row.held_out, "n": len(queries), "bar": row.bar}
    for name, model in models.items():
        outcomes = ask(model, queries)
        right = [o.right for o in outcomes]
        if row.sampler == "greater_than":
            right, out[f"{name}_probability_difference"] = _greater(outcomes, rows, tokenizer)
        low, high = wilson(sum(right), len(right))
        out[name] = {"accuracy": sum(right) / len(right), "low": low, "high": high}
        if rows:
            out[name]["logit_difference"] = sum(o.difference for o in outcomes) / len(outcomes)
    out["passed"] = None if row.bar is None else out["model"]["accuracy"] >= row.bar
    if row.sampler == "greater_than":
        out["passed"] = out["passed"] and out["model_probability_difference"] >= GREATER_BAR
    return out


def card(
    model: str | Path | torch.nn.Module = DATA, n: int = 300, seed: int = 2026, rows: Sequence[Behaviour] = ROWS
) -> dict[str, Any]:
    """Measure a miniworld model and its untrained control on held-out prompts.

    Args:
        model: folder of an exported model, or a live one (then tokenizer and world are the shipped ones).
        n: prompts per behaviour, at most.
        seed: of the prompts.
        rows: which behaviours.
    """
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    folder = DATA if isinstance(model, torch.nn.Module) else Path(model)
    if not isinstance(model, torch.nn.Module):
        model = cast("torch.nn.Module", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        control = LlamaForCausalLM(model.config)  # type: ignore[arg-type]
    models = {"model": model.eval(), "control": control.eval()}
    tokenizer, world = Tokenizer.from_file(str(folder / "tokenizer.json")), World.load(folder / "world.json")
    measured = [_row(row, models, tokenizer, world, n, seed) for row in rows]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": tokenizer.get_vocab_size(),
        "seed": seed,
        "prompts_per_behaviour": n,
        "behaviours": measured,
        "missed": [row["name"] for row in measured if row["passed"] is False],
    }


def _number(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.2f}"


def render(measured: dict[str, Any], training: dict[str, Any] | None = None) -> str:
    """Return the card as Markdown."""
    lines = [
        "# miniworld: model card",
        "",
        f"Written by `cutaway.zoo.miniworld.card`, not by hand. {measured['parameters']:,} parameters, vocabulary "
        f"{measured['vocabulary']:,}, prompts of seed {measured['seed']}. Right = every token of the answer is the "
        "likeliest one. Control = an untrained model of the same architecture on the same prompts. "
        "Intervals: Wilson, 95 %.",
        "",
    ]
    if training:
        lines += [
            f"Training: {training['steps']:,} steps, {training['tokens'] / 1e6:.1f} M tokens, "
            f"{training['minutes']:.0f} minutes on {training['threads']} processor thread(s), final loss "
            f"{training['loss']:.3f} nats a token. {training.get('note', '')}".rstrip(),
            "",
        ]
    lines += [
        "| behaviour | held out from training | n | right | interval | control | logit difference | bar | |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in measured["behaviours"]:
        model, control = row["model"], row["control"]
        bar = "" if row["bar"] is None else f"{row['bar']:.2f}"
        verdict = {True: "pass", False: "**miss**", None: ""}[row["passed"]]
        lines.append(
            f"| {row['name']} | {row['held_out']} | {row['n']} | {model['accuracy']:.3f} | "
            f"{model['low']:.3f}–{model['high']:.3f} | {control['accuracy']:.3f} | "
            f"{_number(model.get('logit_difference', math.nan))} | {bar} | {verdict} |"
        )
    for row in measured["behaviours"]:
        if "model_probability_difference" in row:
            mine, control = row["model_probability_difference"], row["control_probability_difference"]
            lines += [
                "",
                f"Greater-than: probability of later minus not later years {mine:.3f} (control {control:.3f}, bar "
                f"{GREATER_BAR:.2f}).",
            ]
    missed = measured["missed"]
    lines += ["", f"Bars missed: {', '.join(missed) if missed else 'none'}.", ""]
    return "\n".join(lines)


def write(folder: str | Path = DATA, training: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Measure the model in `folder` and write `card.json` and `CARD.md` beside it."""
    folder = Path(folder)
    measured = card(folder, **options)
    if training:
        measured["training"] = training
    (folder / "card.json").write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "CARD.md").write_text(render(measured, training), encoding="utf-8")
    return measured
