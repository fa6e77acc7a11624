"""What the two models can do, and cannot: shares of prompts with Wilson intervals, beside what was measured before.

*top-1*: the answer is the likeliest next token. *pair*: it beats the foil. *flip*: after the corrupt prompt the foil
beats the answer. *Δ*: logit(answer) − logit(foil), or, where several continuations are right, how much more
probability they have than the wrong ones.
"""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.stats import wilson
from cutaway.tasks.answers import next_tokens
from tests.real import sets
from tests.real.written import mean, share

#: set → model → top-1, pair and flip as measured with plain transformers on other draws of the same templates, and on
#: how many prompts; None where nobody measured it
BEFORE = {
    "fact_capital": (136, {"smollm2": (0.66, 1.00, 0.99), "gemma3": (0.50, 1.00, 1.00)}),
    "fact_language": (96, {"smollm2": (0.54, 0.98, 0.97), "gemma3": (0.84, 0.98, 0.99)}),
    "fact_country": (100, {"smollm2": (0.58, 0.97, 0.94), "gemma3": (0.60, 0.99, 0.99)}),
    "ioi": (96, {"smollm2": (0.94, 0.96, 0.99), "gemma3": (0.96, 1.00, 1.00)}),
    "induction_words": (60, {"smollm2": (0.85, 1.00, 1.00), "gemma3": (0.93, 1.00, 1.00)}),
    "copy": (86, {"smollm2": (0.99, 1.00, 0.99), "gemma3": (1.00, 1.00, 1.00)}),
    "docstring": (50, {"smollm2": (0.96, 0.96, None), "gemma3": (0.98, 0.98, None)}),
    "gender": (104, {"smollm2": (0.72, 0.88, 0.88), "gemma3": (1.00, 1.00, 1.00)}),
    "agreement": (120, {"smollm2": (0.19, 0.94, 0.99), "gemma3": (0.25, 0.95, 1.00)}),
    "greater_than": (80, {"smollm2": (0.46, 1.00, 0.99), "gemma3": (0.69, 1.00, 0.90)}),
    "icl_function": (198, {"smollm2": (0.60, 0.94, 0.97), "gemma3": (0.91, 0.99, 1.00)}),
    "sentiment": (110, {"smollm2": (0.08, 0.97, 0.94), "gemma3": (0.00, 0.95, 0.95)}),
    "addition1": (36, {"smollm2": (0.83, 0.94, 1.00), "gemma3": (0.67, 0.94, 0.92)}),
    "addition2": (120, {"smollm2": (0.51, None, None), "gemma3": (0.25, None, None)}),
    "successor": (62, {"smollm2": (None, 1.00, None), "gemma3": (None, 1.00, None)}),
}
SECTION = "behaviours"


def measured(model: ca.Model, lines: list[dict]) -> dict[str, torch.Tensor]:
    """top-1, pair, flip and Δ of every line."""
    pairs = [sets.pair(row) for row in lines]
    answers, foils = (
        _ids(model, lines, [[*row.get(f"{role}s", [row[role]])] for row in lines]) for role in ("answer", "foil")
    )
    first = torch.tensor([next_tokens(model, [p.clean], [p.follows(p.answer)])[0][0] for p in pairs])
    logits = run(model, [p.clean for p in pairs] + [p.corrupt for p in pairs])
    clean, corrupt = logits[: len(pairs)], logits[len(pairs) :]
    many = answers.shape[1] > 1
    odds = _mass if many else _logit
    delta, other = (odds(x, answers) - odds(x, foils) for x in (clean, corrupt))
    return {"top-1": clean.argmax(-1) == first, "pair": delta > 0, "flip": other < 0, "Δ": delta}


def _ids(model: ca.Model, lines: list[dict], words: list[list[str]]) -> torch.Tensor:
    """First tokens of the continuations of each line, −1 where there are no more."""
    pairs = [sets.pair(row) for row in lines]
    flat = [(p.clean, sets.continued(p, w)) for p, ws in zip(pairs, words, strict=True) for w in ws]
    found = iter(next_tokens(model, [t for t, _ in flat], [w for _, w in flat]))
    rows = [[next(found)[0] for _ in ws] for ws in words]
    width = max(map(len, rows))
    return torch.tensor([r + [-1] * (width - len(r)) for r in rows])


def run(model: ca.Model, prompts: list[str]) -> torch.Tensor:
    """Last logits of every prompt; a text that comes twice runs once, and like lengths run together."""
    texts = sorted(dict.fromkeys(prompts), key=len)
    found: dict[str, torch.Tensor] = {}
    for at in range(0, len(texts), 16):
        part = texts[at : at + 16]
        found |= dict(zip(part, model.run_last(part), strict=True))
    return torch.stack([found[p] for p in prompts])


def _logit(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, ids)[:, 0]


def _mass(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(-1).gather(1, ids.clamp_min(0)) * (ids >= 0)).sum(1)


def write(results, what: str, got: dict[str, torch.Tensor]) -> None:
    shares = {m: share(got[m]) for m in ("top-1", "pair", "flip")}
    results.row(SECTION, what, len(got["Δ"]), **shares, Δ=mean(got["Δ"]))


@pytest.mark.parametrize("behaviour", BEFORE)
def test_behaviour_is_as_measured(model, name, results, behaviour):
    got = measured(model, sets.rows(behaviour))
    write(results, behaviour, got)
    n, before = BEFORE[behaviour]
    for measure, value in zip(("top-1", "pair", "flip"), before[name], strict=True):
        if value is not None:
            low, high = share(got[measure])["interval"]
            least, most = wilson(round(value * n), n)
            assert low <= most, (measure, low, high, value)
            assert high >= least, (measure, low, high, value)


def test_labels_without_a_meaning_are_not_learned(model, results):
    """A negative case: with `foo` and `bar` for the classes, eight examples teach neither model which is which."""
    lines = sets.spread("icl_labels", 24)
    words = {"positive": "foo", "negative": "bar"}
    renamed = [{k: _renamed(v, words) for k, v in row.items()} for row in lines]
    got = measured(model, renamed)
    write(results, "icl_labels, foo and bar", got)
    low, high = share(got["pair"])["interval"]
    assert low <= 0.5 <= high, (low, high)


def _renamed(text: str, words: dict[str, str]) -> str:
    for word, other in words.items():
        text = text.replace(word, other)
    return text


def test_random_tokens_are_repeated(model, results):
    """Forty random tokens twice: the second time most are foreseen, the first time none."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (8, 40), generator=g)
    begin = model.tokens("a").ids[:, :-1].expand(8, -1)  # the tokenizer's own beginning, if it has one
    whole = torch.cat([begin, ids, ids], dim=1)
    said = torch.cat([model.run(row[None])[:, :-1].argmax(-1) for row in whole]) == whole[:, 1:]
    later, first = said[:, -39:], said[:, begin.shape[1] : begin.shape[1] + 39]
    results.row("induction", "next token foreseen", 8 * 39, **{
        "second time": share(later.flatten()), "first time": share(first.flatten())})  # fmt: skip
    assert float(later.float().mean()) > 0.4
    assert float(first.float().mean()) < 0.05
