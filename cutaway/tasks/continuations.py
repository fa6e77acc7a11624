"""Answers of several tokens: answer and foil stand behind their prompt in one forward, and all their tokens count.

A metric of one next token has a form for them, under the same name: of log-probabilities of whole continuations, each
token predicted after those before it. For one token the two forms are the same number, for a logit difference is the
difference of log-probabilities. A model that keeps the two continuations apart is taken at its word only after it has
been compared with runs of each alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.record import note
from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.models.access import taps
from cutaway.models.access.forward import all_logits
from cutaway.models.access.reading import Continued, Measure, Seen
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, batch, continued
from cutaway.tasks.pair import Pair
from cutaway.tasks.readouts import Readout

_APART = {torch.float32: 2e-3, torch.float64: 2e-3}  # nats of rounding between the two ways; else `_COARSE`
_COARSE = 0.3
Values = Float[Tensor, "batch"]


def log_probs(read: Continued) -> Float[Tensor, "batch continuation"]:
    """Return the log-probability of each continuation behind each prompt: of all its tokens, one after the other."""
    return torch.stack([said.where(given, 0.0).sum(1) for said, _, given in _steps(read)], dim=1)


def said_after(model: Model, prompts: Sequence[str], ids: Sequence[int]) -> Float[Tensor, "prompt"]:
    """Return the log-probability of one continuation after each prompt."""
    tokens = continued(model.tokens(list(prompts)), [[ids]] * len(prompts))
    reads = _WHOLE["log_prob"].reading

    def first(seen: Seen, prompt: Tensor) -> Tensor:
        assert seen.continuations is not None
        return log_probs(seen.continuations)[:, 0]

    return model.measure(tokens, Measure(first, reads))


def logit_diff(read: Continued, answers: Tensor, foils: Tensor, reference: Tensor | None = None) -> Values:
    """Log-probability of the answer minus that of the foil."""
    both = log_probs(read)
    return both[:, 0] - both[:, 1]


def log_prob(read: Continued, answers: Tensor, foils: Tensor, reference: Tensor | None = None) -> Values:
    """Log-probability of the answer."""
    return log_probs(read)[:, 0]


def prob(read: Continued, answers: Tensor, foils: Tensor, reference: Tensor | None = None) -> Values:
    """Return the probability of the answer."""
    return log_probs(read)[:, 0].exp()


def prob_diff(read: Continued, answers: Tensor, foils: Tensor, reference: Tensor | None = None) -> Values:
    """Return the probability of the answer minus that of the foil."""
    both = log_probs(read).exp()
    return both[:, 0] - both[:, 1]


def accuracy(read: Continued, answers: Tensor, foils: Tensor, reference: Tensor | None = None) -> Values:
    """1 where every token of the answer is the top prediction after those before it, else 0."""
    _, first, given = next(iter(_steps(read)))
    return (first | ~given).all(1).to(read.logits.dtype)


def kl(read: Continued, answers: Tensor, foils: Tensor, reference: Tensor | None = None) -> Values:
    """Minus KL(reference ‖ prediction) after the prompt's last token."""
    assert reference is not None
    target = reference.float().log_softmax(-1)
    return -(target.exp() * (target - read.logits[:, 0].float().log_softmax(-1))).sum(-1)


_WHOLE: dict[str, Readout] = {
    row.name: replace(row, reads="logits", continuations=True, needs_reference=row.name == "kl")
    for row in (
        Readout("logit_diff", logit_diff, "nats", True, "log-probability of the answer minus that of the foil"),
        Readout("log_prob", log_prob, "nats", True, "log-probability of the answer"),
        Readout("prob", prob, "probability", True, "probability of the answer"),
        Readout("prob_diff", prob_diff, "probability", True, "probability of the answer minus that of the foil"),
        Readout("accuracy", accuracy, "share", False, "whether all tokens of the answer are the top predictions"),
        Readout("kl", kl, "−nats", True, "minus the KL divergence from the clean run's prediction"),
    )
}


def of_several_tokens(row: Readout, what: str = "") -> Readout:
    """Return the form of a readout that measures answers of several tokens; one of activations is itself.

    Raises:
        Refused: it is of one next token and has no such form.
    """
    if row.continuations or not (row.last_logits or row.whole_answer):
        return row
    if row.name not in _WHOLE or row.whole_answer:
        why = "it reads one next token" if row.last_logits else "it runs prompts with the answer alone behind them"
        raise Refused(
            f"metric {row.name!r} of {what or 'answers of several tokens'}",
            why,
            (f"use {', '.join(_WHOLE)}, or ", Code("task.narrow(model)"), ", which takes the first token that differs"),
        )
    return _WHOLE[row.name]


def stand_behind(
    model: Model, pairs: Sequence[Pair], sides: Sequence[Tokens], rows: tuple[list[list[int]], list[list[int]]]
) -> tuple[Tokens, ...]:
    """Return prompts with their pairs' answers and foils behind them, as continuations; `rows` are their tokens.

    Raises:
        Refused: one of the two is a beginning of the other, or the model does not keep the two apart.
    """
    for pair, answer, foil in zip(pairs, *rows, strict=True):
        short = min(len(answer), len(foil))
        if answer[:short] == foil[:short]:
            what = f"answer {pair.answer!r} and foil {pair.foil!r} of the prompt {pair.clean!r}"
            raise Refused(
                what, "one is a beginning of the other, so that saying the longer says both", "give another foil"
            )
        if pair.answers or pair.foils:
            why = "sets of answers count by the next token's probability, and an answer here is several tokens"
            raise Refused(f"answers and foils of {pair.clean!r}", why, "give one answer and one foil")
    out = tuple(continued(t, list(zip(*rows, strict=True))) for t in sides)
    for t in out:
        if t.ids.shape[1] > model.shape.context:
            what = f"a prompt with its answer and foil, {t.ids.shape[1]} tokens"
            raise Refused(what, f"the model takes {model.shape.context}", "shorten it")
    _check_apart(model, out[0])
    longest = max(len(r) for side in rows for r in side)
    note(
        f"answers and foils of up to {longest} tokens, each by the log-probability of all its tokens, one after the "
        "other; edits at positions are made in the prompts alone, edits without one at these tokens too"
    )
    return out


def _check_apart(model: Model, tokens: Tokens) -> None:
    """Compare the longest prompt's continuations beside each other with each alone, once per length."""
    longest = tokens.mask.sum(1)
    i, width = int(longest.argmax()), int(longest.max())
    off = model.anatomy.remember(("continuations", width, tokens.side), lambda: _error(model, tokens.row(i)))
    allowed = _APART.get(model.dtype, _COARSE)
    if not off <= allowed:
        raise Refused(
            f"two continuations of {tokens.texts[i]!r} in {model.name}",
            f"beside each other their log-probabilities are {off:.2g} nats off those of runs of each alone",
            (
                "measure the answer alone by ",
                Keyword("metric", "sequence_log_prob", of="task"),
                ", or let ",
                Code("task.narrow(model)"),
                " take the first token that differs",
            ),
        )


def _error(model: Model, one: Tokens) -> float:
    """Return the largest difference in nats between continuations beside each other and alone."""
    ids, at, found = one.ids[0].tolist(), int(one.lengths[0]), list[Tensor]()
    with model.edited(), taps.asleep(model.anatomy), torch.no_grad():
        beside = all_logits(model.anatomy, one)[0].float().log_softmax(-1)
        prompt, start = ids[:at], at
        for n in one.tails[0]:
            tail = ids[start : start + n]
            t = batch([[*prompt, *tail]], side=one.side).to(one.ids.device)
            alone = all_logits(model.anatomy, t)[0].float().log_softmax(-1)
            columns = [at - 1, *range(start, start + n - 1)]
            said = torch.stack([beside[c, x] for c, x in zip(columns, tail, strict=True)])
            want = torch.stack([alone[at - 1 + k, x] for k, x in enumerate(tail)])
            found.append((said - want).abs().max())
            start += n
    return float(torch.stack(found).max())


def _steps(read: Continued) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return, for each continuation, its tokens' log-probabilities, where they are the top prediction, and where
    there are any [batch step].
    """
    tokens, logits = read.tokens, read.logits
    device = logits.device
    counts, last = torch.tensor(tokens.tails, device=device), tokens.last.to(device)[:, None]
    rows, out, start = torch.arange(len(logits), device=device)[:, None], [], torch.zeros_like(last)
    for n in range(counts.shape[1]):
        steps = torch.arange(int(counts[:, n].max()), device=device)
        given = steps < counts[:, n, None]
        before = torch.where(steps == 0, 0, start + steps).clamp_max(
            logits.shape[1] - 1
        )  # counted from the prompt's last
        columns = (last + 1 + start + steps).clamp_max(tokens.ids.shape[1] - 1)
        said, ids = logits[rows, before].float().log_softmax(-1), tokens.ids.to(device)[rows, columns][..., None]
        chosen = said.gather(-1, ids)
        others = said.scatter(-1, ids, float("-inf")).amax(-1)
        out.append((chosen[..., 0], chosen[..., 0] > others, given))
        start = start + counts[:, n, None]
    return out
