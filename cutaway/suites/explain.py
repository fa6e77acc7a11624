"""Why did the model go on with one word and not another?

One sentence is made a task (a counterfactual of equal length is proposed, siblings of the same form give intervals),
and five methods are asked: what it predicts, where along depth the answer appears, which components write it, which
positions and heads carry it, and whether those heads carry it together (on siblings that did not choose them).
Claims are then read off the numbers (`suites.claims`). An answer that the model hardly prefers is called so first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway import lenses, patching, tasks
from cutaway.core.finite import finite
from cutaway.core.record import counting
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.interventions.paired_runs import Direction, difference
from cutaway.models.dry import planned
from cutaway.models.model import Model
from cutaway.suites.claims import MATERIAL, claims_of, share, standing_out
from cutaway.suites.explanation import Doubt, Explanation, Own, Predictions, Results, Verdict
from cutaway.tasks.answers import next_tokens
from cutaway.tasks.bound import Bound
from cutaway.tasks.pair import Pair
from cutaway.tasks.replacements import usual
from cutaway.tasks.task import Task

Effort = Literal["quick", "normal", "thorough"]


@dataclass(frozen=True)
class Scale:
    """An amount of work.

    Attributes:
        siblings: how many sentences of the form are measured; as many more test the heads together.
        samples: random steps that make a cell's null.
        cells: how many cells of a sweep are measured exactly, chosen by first-order estimates, and how many random ones
            make the null of the residual stream; 0 measures every cell, each with its null.
        steps: steps of the search in a circuit's certificate; 0 for no search.
    """

    siblings: int
    samples: int
    cells: int
    steps: int


EFFORTS: dict[str, Scale] = {"quick": Scale(6, 1, 12, 0), "normal": Scale(8, 1, 24, 0), "thorough": Scale(8, 3, 0, 10)}
_CIRCUIT = 32  # sentences of the form of which half choose a circuit and half judge it
_HELD = 2  # sentences apart from those that chose the heads, below which nothing is claimed of the heads together
_HARDLY = 2.0  # times as likely as the next word, below which an answer is hardly preferred
_LARGE = 20_000_000  # parameters beyond which the default effort is normal


def explain(
    model: Model,
    prompt: str,
    *,
    target: str | None = None,
    foil: str | None = None,
    corrupt: str | None = None,
    effort: Effort | None = None,
    graph: Dictionary | Literal["neurons"] | None = None,
    circuit: bool = False,
    seed: int = 0,
    step: Callable[[str], None] = lambda text: None,
    each: Callable[[Explanation], None] = lambda found: None,
) -> Explanation:
    """Ask every method about one sentence.

    Args:
        model: a causal language model.
        prompt: the sentence; its next word is the question.
        target: the answer; the model's own prediction if not given.
        foil: the wrong answer; the best other answer after the counterfactual if not given.
        corrupt: the counterfactual sentence, if you have one.
        effort: how many siblings, samples and cells (`EFFORTS`). `thorough` measures every cell, which models of up to
            20 M parameters get by default; larger ones get `normal`, where first-order estimates choose what is
            measured.
        graph: transcoders of the MLPs, or "neurons", over which the sentence's attribution graph is traced and tested;
            none if not given.
        circuit: find the edges between heads and MLPs that carry the answer on half of 32 sentences of the form, and
            judge them on the other half (`suites.discovered`).
        seed: of every random choice.
        step: called with a line of text at each stage of the work.
        each: called with the explanation so far, whenever a result is new.

    Raises:
        Refused: no counterfactual of equal length, an answer of no token, an unreadable model, what `graphs.trace`
            refuses, or a circuit of a sentence that has no others of its form.
    """
    if not 0 <= seed < 1 << 63:
        raise Refused(f"seed {seed}", "it is outside 0 to 2**63 − 1", "use a small whole number")
    large = sum(p.numel() for p in model.hf.parameters()) > _LARGE
    scale = EFFORTS[effort or ("normal" if large else "thorough")]
    with finite("explain", model.dtype), counting() as spent:
        step("looking for a counterfactual")
        one = tasks.from_sentence(model, prompt, target, foil, corrupt=corrupt, seed=seed)
        words = _words(model, one.pairs[0])
        bound = one.bind(model)
        first = _first_tokens(model, bound) if bound.clean.tails else words
        clean, corrupted = (model.run_last(t)[0].float() for t in (bound.clean, bound.corrupt))
        doubt = _doubt(model, one, words[0], clean, corrupted) if target is None else None
        predictions, verdicts = _predictions(model, one, clean, corrupted), tuple(_verdicts(one))
        difference(one, *(model.measure(t, bound.measure).float() for t in (bound.clean, bound.corrupt)))

        def so_far(siblings: int, found: dict[str, Result], own: dict[str, Result]) -> Explanation:
            results = cast(Results, {"predictions": predictions, **found})
            claims = tuple(claims_of(words, results, foil is None and corrupt is None, first))
            pair, alone = one.pairs[0], cast(Own, dict(own))
            about = (model.name, pair.clean, *words, pair.corrupt, one.corruption, siblings)
            return Explanation(*about, results, alone, claims, verdicts, doubt, spent)

        sides = _sides(model, one, seed) if circuit else ()
        each(so_far(0, {}, {}))
        form = tasks.with_siblings(model, one, 2 * scale.siblings, seed)
        many = form.take(scale.siblings)
        held = replace(form, pairs=form.pairs[len(many) :]) if len(form) >= len(many) + _HELD else None
        found, own = dict[str, Result](), dict[str, Result]()
        for _ in _measure(model, one, many, held, scale, seed, step, found, own):
            each(so_far(len(many) - 1, found, own))
        for _ in _further(model, one, sides, graph, scale, seed, step, found, own):
            each(so_far(len(many) - 1, found, own))
    return so_far(len(many) - 1, found, own)


def _measure(
    model: Model,
    one: Task,
    many: Task,
    held: Task | None,
    scale: Scale,
    seed: int,
    step: Callable[[str], None],
    found: dict[str, Result],
    own: dict[str, Result],
) -> Iterator[None]:
    """Fill `found` and `own`, what is asked most first, and stop after each result."""
    rest: Any = {"samples": scale.samples, "seed": seed}

    def sweep(site: str, direction: Direction = "denoise") -> Result:
        """Measure every cell, or those that first-order estimates choose."""
        if not scale.cells:
            return patching.activation(model, many, site=(site,), direction=direction, **rest)
        chosen: Any = {"audit": scale.cells, "exact_null": True}
        return patching.attribution(model, many, site=(site,), direction=direction, **chosen, **rest)

    def streams(task: Task) -> Result:
        """Measure every cell of the residual stream, whose steps are too large for estimates."""
        return patching.activation(model, task, site=("resid_pre",), null_cells=scale.cells, **rest)

    step("exchanging heads with the counterfactual")
    found["heads"] = sweep("z")
    yield
    step("exchanging the residual stream with the counterfactual")
    found["resid_pre"] = streams(many)
    yield
    heads = found["heads"].top(6) if planned() is not None else standing_out(found["heads"], most=6)
    if held is not None and heads and 2 * len(heads) <= model.shape.n_layers * model.shape.n_heads:
        step("exchanging the found heads together, in other sentences")
        named = tuple(f"{r['layer']}.{r['head']}" for r in heads)
        sets = max(10, 5 * scale.samples)
        found["together"] = patching.group(model, held, heads=named, samples=sets, seed=seed)
        yield
    step("reading the residual stream at every depth")
    found["depth"] = lenses.logit_lens(model, many, samples=2 * scale.samples, seed=seed)
    found["grid"] = lenses.lens_grid(model, one, **rest)
    yield
    bound = many.bind(model)
    if not bool((bound.answers == bound.foils).any()):  # of several tokens, the first may be the same
        step("splitting the answer into its components")
        found["writers"] = lenses.direct_attribution(model, many, samples=20, seed=seed)
        own["writers"] = lenses.direct_attribution(model, one, samples=20, seed=seed)
        found["neurons"] = lenses.direct_attribution(model, many, neurons=True, samples=10, seed=seed)
        yield
    step("exchanging what heads and sublayers write, in both directions")
    found["heads_noise"] = sweep("z", "noise")
    found |= {site: sweep(site) for site in ("attn_out", "mlp_out")}
    own["resid_pre"] = streams(one)
    yield


def _further(
    model: Model,
    one: Task,
    sides: Sequence[Task],
    units: Dictionary | Literal["neurons"] | None,
    scale: Scale,
    seed: int,
    step: Callable[[str], None],
    found: dict[str, Result],
    own: dict[str, Result],
) -> Iterator[None]:
    """Fill `found` and `own` with what is asked on request, and stop after each."""
    if sides:
        step("finding the edges that carry it, and judging them on other sentences")
        found |= _circuit(model, sides, scale, seed)
        yield
    if units is not None:
        own |= _traced(model, one, units, seed, step)
        yield


def _sides(model: Model, one: Task, seed: int) -> tuple[Task, Task]:
    """Return sentences of the form that choose a circuit, and others that judge it.

    Raises:
        Refused: there are too few.
    """
    form = tasks.with_siblings(model, one, _CIRCUIT, seed)
    if len(form) < 2 * _HELD:
        why = "no other sentences of its form were found, on which it would be judged"
        raise Refused(f"circuit of {one.pairs[0].clean!r}", why, ("leave out ", Keyword("circuit", True)))
    half = len(form) // 2
    return form.take(half), replace(form, pairs=form.pairs[half:])


def _circuit(model: Model, sides: Sequence[Task], scale: Scale, seed: int) -> dict[str, Result]:
    """Return a circuit of the sentence's form, its share of the answer in other sentences, and its certificate."""
    from cutaway.suites.discovered import discover

    found = discover(model, *sides, steps=scale.steps, seed=seed)
    return {"circuit": found.graph, "carried": found.carried, "certificate": found.certificate}


def _traced(
    model: Model, one: Task, units: Dictionary | Literal["neurons"], seed: int, step: Callable[[str], None]
) -> dict[str, Result]:
    """Return the main part of the sentence's attribution graph, and what removing its units does."""
    from cutaway import graphs

    step("tracing the sentence through features")
    main = graphs.prune(graphs.trace(model, one, units, seed=seed))
    step("removing the largest features of its graph")
    return {"graph": main, "removed": graphs.validate(model, one, units, seed=seed)}


def _predictions(
    model: Model, one: Task, clean: Float[Tensor, "token"], corrupt: Float[Tensor, "token"], n: int = 8
) -> Predictions:
    """Return the likeliest words after both prompts, given the logits of each."""
    bound, clean, corrupt = one.bind(model), clean.softmax(-1), corrupt.softmax(-1)
    ids = clean.topk(min(n, len(clean))).indices
    asked = torch.stack([bound.answers[0], bound.foils[0]])
    if bound.clean.tails:  # words of several tokens stand behind those that may come next
        prob, ahead = (
            torch.stack(
                [model.measure(t, bound.measured_by(name, model).measure).float() for t in (bound.clean, bound.corrupt)]
            )
            for name in ("prob", "prob_diff")
        )
        whole = torch.cat([prob, prob - ahead], 1).cpu()
        labels = [
            *_distinct(model.text.token_texts(ids)),
            *(_seen(w) for w in (one.pairs[0].answer, one.pairs[0].foil)),
        ]
        shares = torch.cat([torch.stack([clean[ids], corrupt[ids]]).cpu(), whole], 1)
        answer, foil = len(ids), len(ids) + 1
    else:
        ids = torch.cat([ids, asked[~torch.isin(asked, ids)]])
        answer, foil = (int((ids == i).nonzero()) for i in asked)
        shares, labels = torch.stack([clean[ids], corrupt[ids]]).cpu(), _distinct(model.text.token_texts(ids))
    return Predictions(
        probability=shares[0],
        after_corrupt=shares[1],
        labels={"token": labels},
        units={"probability": "probability", "after_corrupt": "probability"},
        answer=answer,
        foil=foil,
        rank=int((clean > float(shares[0, answer])).sum()),
        reasons={"probability": "the model's own probabilities of one sentence"},
        record={"control": "the corrupt sentence", "corrupt": bound.corrupt.texts[0]},
    )


def _first_tokens(model: Model, bound: Bound) -> tuple[str, str]:
    """Return the first tokens of an answer and a foil of several, which is what lenses read."""
    answer, foil = model.text.token_texts(torch.stack([bound.answers[0], bound.foils[0]]))
    return _seen(answer), _seen(foil)


def _distinct(texts: list[str]) -> list[str]:
    """Return the words as they are read; where two read the same, with the space before them."""
    seen = [_seen(t) for t in texts]
    told = [t if seen.count(t) == 1 else whole.replace(" ", "␣") for t, whole in zip(seen, texts, strict=True)]
    return [t if told.count(t) == 1 else f"{t}·{n}" for n, t in enumerate(told)]


def _doubt(
    model: Model, one: Task, answer: str, clean: Float[Tensor, "token"], corrupt: Float[Tensor, "token"]
) -> Doubt | None:
    """Say by how much an answer is ahead where that is little, and name the word that depends on the counterfactual.

    That is the likely word whose probability falls most, if the answer's own falls less; else the foil is the next one.
    """
    clean, corrupt = clean.log_softmax(-1), corrupt.log_softmax(-1)
    own, falls = int(one.bind(model).answers[0]), clean - corrupt
    found = usual(model, one.pairs[0].clean, clean.topk(min(20, len(clean))).indices.tolist())
    rivals = {i: t for i, t in found.items() if i != own}
    if not rivals or float(clean[own] - clean[next(iter(rivals))]) > math.log(_HARDLY):
        return None
    named = [f"“{_seen(t)}” {share(float(clean[i].exp()))}" for i, t in list(rivals.items())[:3]]
    text = f"“{answer}” is hardly preferred: {share(float(clean[own].exp()))} against {', '.join(named)}"
    likely = [i for i in rivals if float(clean[own] - clean[i]) < math.log(10) and rivals[i].strip()]
    most = max(likely, key=lambda i: float(falls[i]), default=None)
    if most is not None and float(falls[most]) > max(MATERIAL, float(falls[own])):
        return Doubt(text, {"target": rivals[most].strip()})
    first = next((t.strip() for t in rivals.values() if t.strip() and t.strip().lower() != answer.lower()), None)
    return Doubt(text, {"foil": first} if first is not None else {})


def _verdicts(one: Task) -> list[Verdict]:
    """Compare the answer with the known truth."""
    truth, answer = one.truth, one.pairs[0].answer.strip()
    if truth is None:
        return []
    if truth.answer is None:
        return [Verdict("no known truth for this answer", None, truth.note)]
    said = truth.answer.lower() == answer.lower()
    return [Verdict("agrees with the known truth" if said else "contradicts the known truth", said, truth.note)]


def _words(model: Model, pair: Pair) -> tuple[str, str]:
    """Answer and foil as they are; in the case in which the sentences write them, if that is the same token."""
    written = {w.lower(): w for w in re.findall(r"\w+", f"{pair.corrupt} {pair.clean}")}
    said = [_seen(w) for w in (pair.answer, pair.foil)]
    forms = [w.replace(w.strip(), written.get(w.strip().lower(), w.strip())) for w in (pair.answer, pair.foil)]
    rows = [next_tokens(model, [pair.clean] * 2, texts) for texts in ((pair.answer, pair.foil), forms)]
    same = [a == b for a, b in zip(*rows, strict=True)]
    answer, foil = (f.strip() if one and f.strip() else t for t, f, one in zip(said, forms, same, strict=True))
    return answer, foil


def _seen(text: str) -> str:
    """Return a word without the space before it; invisible text is written as Python writes it."""
    return text.strip() if text.strip() and text.strip().isprintable() else repr(text)
