"""Answers as the model has them: with a space or joined, where the text before them does not say which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cutaway.core.record import note
from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.models.spacing import forms
from cutaway.models.tokens import batch
from cutaway.tasks.answers import next_tokens, token_rows
from cutaway.tasks.pair import Pair

_CLEARLY = math.log(2.0)  # how much likelier the other form must be than the usual one
_ALONE = "("  # a mark that merges with no letter
_Scores = tuple[float, float]


def settled(model: Model, pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """Return the pairs with answers spelled as the model has them.

    Of both forms of an answer the usual one is taken, unless the other is more than twice as likely in the model; the
    foil, and all other continuations, take the same form. The `notes` of a record say what the model was asked.
    """
    unsure = [i for i, p in enumerate(pairs) if len(forms(p.clean, p.answer, p.joined)) > 1]
    ways = [forms(pairs[i].clean, pairs[i].answer) for i in unsure]
    chosen = dict(zip(unsure, likelier(model, [pairs[i].clean for i in unsure], ways), strict=True))
    return tuple(_written(p, chosen.get(i)) for i, p in enumerate(pairs))


def spelled(model: Model, prompt: str, answers: Sequence[str], joined: bool = False) -> list[str]:
    """Return answers as they follow one prompt: the first decides, as in `settled`, and the others take its form."""
    if not answers:
        return []
    ways = forms(prompt, answers[0], joined)
    first = ways[0] if len(ways) == 1 else likelier(model, [prompt], [ways])[0]
    return [first, *(_alike(forms(prompt, a, joined), first) for a in answers[1:])]


def likelier(model: Model, prompts: Sequence[str], ways: Sequence[tuple[str, ...]]) -> list[str]:
    """Of two forms of each prompt's continuation the first, unless the second is more than twice as likely.

    A form of several tokens is as likely as all of them together. One that merges with the end of its prompt counts as
    the tokens that it is by itself: what the model says after the prompt as it is.

    Raises:
        Refused: the model's logits are no numbers.
    """
    usual, other = (_tokens(model, prompts, [w[k] for w in ways]) for k in (0, 1))
    out = [w[0] for w in ways]
    ids = {i: (a, b) for i, (a, b) in enumerate(zip(usual, other, strict=True)) if a and b and a != b}
    scores = _log_probabilities(model, {i: prompts[i] for i in ids}, ids) if ids else {}
    for i, (a, b) in scores.items():
        out[i] = ways[i][b > a + _CLEARLY]
    _tell(prompts, ways, out, scores)
    return out


def _tokens(model: Model, prompts: Sequence[str], texts: Sequence[str]) -> list[list[int] | None]:
    """Return the tokens that each text adds to its prompt, or, where it merges with that, what it is after another
    mark.
    """
    found = next_tokens(model, prompts, texts)
    merged = [i for i, ids in enumerate(found) if ids is None]
    for i, ids in zip(merged, next_tokens(model, [_ALONE] * len(merged), [texts[i] for i in merged]), strict=True):
        found[i] = ids
    return found


def _log_probabilities(
    model: Model, prompts: Mapping[int, str], ids: Mapping[int, tuple[list[int], list[int]]]
) -> dict[int, _Scores]:
    """Of each form the log-probability of all its tokens; of one that its first token rules out, of that token."""
    first = model.run_last(list(prompts.values())).float().log_softmax(-1)
    if bool(first.isnan().any()):
        why = "the model's logits after it are no numbers, so it does not say which form of an answer is likelier"
        raise Refused(f"prompt {next(iter(prompts.values()))!r}", why, "use bfloat16 or float32")
    found = {i: [float(row[form[0]]) for form in ids[i]] for i, row in zip(prompts, first, strict=True)}
    later, places = list[list[int]](), list[tuple[int, int, int]]()
    rows = dict(zip(prompts, token_rows(model, list(prompts.values())), strict=True))
    for i, pair in ids.items():
        sure = max((s for s, form in zip(found[i], pair, strict=True) if len(form) == 1), default=-math.inf)
        for k, form in enumerate(pair):
            if len(form) > 1 and found[i][k] > sure - _CLEARLY:
                later += [[*rows[i], *form[:n]] for n in range(1, len(form))]
                places += [(i, k, token) for token in form[1:]]
    if later:
        after = model.run_last(batch(later)).float().log_softmax(-1)
        for (i, k, token), row in zip(places, after, strict=True):
            found[i][k] += float(row[token])
    return {i: (a, b) for i, (a, b) in found.items()}


def _written(pair: Pair, answer: str | None) -> Pair:
    """Return a pair whose texts follow the prompt as they are, if any of them does not follow it in the usual way."""
    if pair.joined:
        return pair
    like = answer or pair.follows(pair.answer)
    new = {"answer": like, "foil": _alike(forms(pair.clean, pair.foil), like)}
    sets = {r: tuple(_alike(forms(pair.clean, a), like) for a in getattr(pair, r)) for r in ("answers", "foils")}
    given = [pair.answer, pair.foil, *pair.answers, *pair.foils]
    if [*new.values(), *sets["answers"], *sets["foils"]] == [pair.follows(a) for a in given]:
        return pair
    return replace(pair, **new, **sets, joined=True)


def _alike(ways: tuple[str, ...], like: str) -> str:
    """Return the form that begins as another answer does, with or without white space."""
    return next((w for w in ways if w[0].isspace() == like[0].isspace()), ways[0])


def _tell(
    prompts: Sequence[str], ways: Sequence[tuple[str, ...]], out: Sequence[str], scores: Mapping[int, _Scores]
) -> None:
    for space in (True, False):
        mine = [i for i in scores if out[i][0].isspace() == space]
        if mine:
            i = mine[0]
            p, other = (math.exp(s) for s in (scores[i] if out[i] == ways[i][0] else scores[i][::-1]))
            instead = ways[i][out[i] == ways[i][0]]
            many = f"{'spaced' if space else 'joined'} so in {len(mine)} of {len(out)} prompts"
            note(
                f"the model was asked which form of an answer follows: after {prompts[i][-20:]!r} it is {out[i]!r} "
                f"(p {p:.2g}), not {instead!r} (p {other:.2g}); {many}"
            )
