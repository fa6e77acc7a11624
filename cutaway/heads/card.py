"""What does one head do, from its weakest looks to its hardest?

The page of one head. One forward over a text gives its scores of every type (`heads.classify`, the same numbers), and
what it looks at, sequence by sequence. A query's strength is the largest attention that it gives to a key other than
the first token; queries are ranked by it, as in HeadVis (Luger et al. 2026, transformer-circuits.pub), for the hardest
looks alone flatter any description.

* `score[type]`, `claimed[type]`, `raises[type]`: those of `heads.classify` over all heads, for this one.
* `effect[span]`: rise of the loss, in nats, without the head, at tokens that were said before and elsewhere
  (`heads.confirm`, the same numbers). The head is put at its mean z over the tokens, first and special ones left in
  place. `effect_interval`: 95 %, over sequences that have such tokens.
* `matched[decile, keys]`: the share of a decile's queries whose most attended key is one that a type looks at; last,
  of no type. `interval`s: 95 %, over sequences. A description that holds in the tenth decile only is one of tails.
* `strength[decile]`: the mean strength of its queries.
* `attention[example]`: single looks, evenly spaced within every decile; the labels have the decile and the context,
  the query in ⟦ ⟧ and the key in ⟨ ⟩.
* `looks[context, place]`: attention around the key and up to the query of the hardest looks of single sequences, with
  their tokens. `pattern[q_pos, k_pos]`: the pattern in front of the hardest.
* `distance[bucket]`: attention by distance to all keys but the first, averaged over each sequence's queries, then over
  sequences.
* `writes[pair]`: the token attended to and the token written for which the output circuit is strongest, promoted or
  suppressed, in standard deviations over the vocabulary. A source's value is that which the head reads in the text,
  averaged by attention. `bare[bare_pair]` has the values of bare embeddings: the full OV circuit (Elhage et al. 2021).
* `same[circuit]`: mean strength of a source with itself: copying. `interval`: over sources.
* Control: random other heads of the layer removed, if there are any (`effect`; the record says how they are matched);
  keys shuffled (`score`), drawn (`matched`) or moved (`distance`) among those that a query may look at; values turned
  at random in the head's own space, so that what it writes keeps its size (`writes`, `bare`); targets of other sources
  (`same`).
* Assumption: the text is what the head is for. Sources are the 256 tokens of the text that it attends to most.
* Known failures: the key of largest attention is not all that is looked at. Attention is no effect, and a head that
  others stand in for has a small `effect`. The strongest of many pairs are rare tokens whose vectors training hardly
  moved; late heads of trained models no longer read bare embeddings. Queries of one sequence are no independent
  examples. A sequence that is there twice counts once.
* Cost: four forwards and one a random head, those without a head from its layer on, and products of sources ×
  vocabulary, a block at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Call, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, DECILES, deciles, mean_interval, of_each_decile, one_prompt, ratio_interval
from cutaway.heads.classify import HeadTypes, scored
from cutaway.heads.confirm import SPANS, few_such, spans
from cutaway.heads.looks import KEYS, NONE, WINDOW, Looks, Window
from cutaway.heads.losses import without
from cutaway.heads.types import TYPES, check_least
from cutaway.heads.written import Written, bare_values, toward, written
from cutaway.models import circuits
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.repeats import Repeats

IN_TEXT, BARE = "as read in the text", "bare embeddings"
#: places of a context that are shown: around the key, then up to the query
AROUND = [*(("key", i) for i in range(-3, 4)), *(("query", i) for i in range(-5, 1))]
_SOURCES = 256  # most tokens of the text whose outputs are read
_BEFORE = 8  # tokens of a context that are shown before key and query
Part = tuple[dict[str, Any], dict[str, list[Any]], dict[str, str]]  # fields, their labels, reasons
_CONTROLS = {
    "effect": "random_sets",
    "matched": "random_keys",
    "distance": "moved_looks",
    **dict.fromkeys(("writes", "bare"), "turned_values"),
    "same": "exchanged_targets",
}
_UNITS = {
    **dict.fromkeys(("score", "strength", "attention", "looks", "pattern", "distance"), "attention"),
    **dict.fromkeys(("raises", "writes", "bare", "same"), "standard deviations over the vocabulary"),
    "matched": "share of queries",
    **dict.fromkeys(("effect", "effect_interval", "effect_null"), "nats"),
}


@dataclass(frozen=True, kw_only=True)
class HeadCard(Result, kind="head_card"):
    """The page of one attention head.

    Attributes:
        score: the mean attention to a type's keys.
        claimed: 1 for a type that the head is of.
        raises: how far the head raises the tokens at a type's keys; None where it cannot be read.
        effect: rise of the loss without the head.
        matched: queries of a decile whose most attended key a type looks at.
        strength: the mean of the largest attention of a decile's queries.
        attention: the largest attention of single queries; the labels have their contexts.
        looks: attention around the key and up to the query; the labels have the tokens.
        pattern: attention among the tokens in front of the hardest look.
        distance: attention by distance, without that to the first token.
        writes: strongest pairs of a token attended to and a token written; None where they cannot be read.
        bare: the same with bare embeddings.
        same: mean strength of a token with itself; NaN where it cannot be read.
    """

    page = ("effect", "matched", "strength", "attention", "looks", "distance", "writes")

    score: Float[Tensor, "type"]
    interval: Float[Tensor, "type bound"]
    null: Float[Tensor, "type sample"]
    claimed: Float[Tensor, "type"]
    effect: Float[Tensor, "span"]
    effect_interval: Float[Tensor, "span bound"]
    effect_null: Float[Tensor, "span sample"]
    matched: Float[Tensor, "decile keys"]
    matched_interval: Float[Tensor, "decile keys bound"]
    matched_null: Float[Tensor, "decile keys sample"]
    strength: Float[Tensor, "decile"]
    strength_interval: Float[Tensor, "decile bound"]
    attention: Float[Tensor, "example"]
    looks: Float[Tensor, "context place"]
    pattern: Float[Tensor, "q_pos k_pos"]
    distance: Float[Tensor, "bucket"]
    distance_interval: Float[Tensor, "bucket bound"]
    distance_null: Float[Tensor, "bucket sample"]
    same: Float[Tensor, "circuit"]
    same_interval: Float[Tensor, "circuit bound"]
    same_null: Float[Tensor, "circuit sample"]
    raises: Float[Tensor, "type"] | None
    raises_interval: Float[Tensor, "type bound"] | None
    raises_null: Float[Tensor, "type sample"] | None
    writes: Float[Tensor, "pair"] | None
    writes_null: Float[Tensor, "pair sample"] | None
    bare: Float[Tensor, "bare_pair"] | None
    bare_null: Float[Tensor, "bare_pair sample"] | None
    head: str

    def named(self) -> list[str]:
        """Return the types that the head is claimed to be of, the largest scores first."""
        at = [t for t in self.score.argsort(descending=True).tolist() if self.claimed[t] > 0]
        return [self.labels["type"][t] for t in at]


@method(
    answers="What does one head do, from its weakest looks to its hardest?",
    paper="Luger et al. 2026, transformer-circuits.pub/2026/headvis",
    cost="prompts * (4 + sample) * F",
    control="shuffled_keys",
    rung="interventional",
)
@torch.no_grad()
def card(
    model: Model,
    prompts: Prompts | Repeats,
    /,
    *,
    head: str = "",
    examples: int = 2,
    contexts: int = 6,
    pairs: int = 8,
    least: float = 0.3,
    samples: int = 8,
    seed: int = 0,
) -> HeadCard:
    """Make the page of one head.

    Args:
        head: the head, as `layer.head`: `23.4`.
        examples: how many looks of every decile are shown.
        contexts: how many sequences show their hardest look.
        pairs: how many pairs that the head promotes are shown, and as many that it suppresses.
        least: attention that a head must give to a type's keys to be claimed.
        samples: how many draws make each null.
        seed: of the draws.

    Raises:
        Refused: not one head, or what `heads.classify` refuses.
    """
    check_least("card", least)
    place = _one(model, head)
    tokens = prompts.bind(model)
    looks = Looks(model, tokens, place, max(contexts, 1), samples, seed)
    types = scored(model, tokens, TYPES, least, False, samples, seed, looks.watching())
    parts = [_deciles(looks), _distances(looks), _examples(model, tokens, looks, max(examples, 1))]
    parts += [_windows(model, tokens, looks), _outputs(model, place, looks, pairs, samples, seed)]
    effects, said = _effects(model, tokens, place, samples, seed)
    return _result(place, types, looks, [*parts, effects], said)


def _one(model: Model, head: str) -> Address:
    form = "write one as layer.head, such as 3.1; heads.classify finds heads"
    if not head:
        raise Refused("the page of no head", "it is about one head", form)
    found = circuits.heads(model, [head])
    if len(found) != 1:
        raise Refused(Call("card", {"head": head}), f"these are {len(found)} heads", form)
    return found[0]


def _result(place: Address, types: HeadTypes, looks: Looks, parts: Sequence[Part], said: dict[str, str]) -> HeadCard:
    fields, labels, reasons = _types(types.select(layer=place.layer, head=place.unit or 0))
    for more, names, why in parts:
        fields, labels, reasons = fields | more, labels | names, reasons | why
    lone = one_prompt(len(looks.found), "score", "matched", "strength", "distance")
    return HeadCard(
        head=f"{place.layer}.{place.unit}",
        **fields,
        labels=labels | {"bound": BOUNDS},
        units=_UNITS,
        reasons=lone | reasons,
        record={
            "queries": sum(len(r.strength) for r in looks.found),
            "sequences": len(looks.found),
            "controls": _CONTROLS,
            "claimed": [n for n, c in zip(labels["type"], fields["claimed"].tolist(), strict=True) if c > 0],
        }
        | said,
    )


def _types(types: HeadTypes) -> Part:
    names = ("score", "interval", "null", "claimed", "raises", "raises_interval", "raises_null")
    fields = {n: None if (x := getattr(types, n)) is None else x[:, 0, 0] for n in names}
    mine = [*types.labels["type"], "score", "raises"]
    return fields, {"type": types.labels["type"]}, {n: why for n, why in types.reasons.items() if n in mine}


def _effects(model: Model, tokens: Tokens, place: Address, samples: int, seed: int) -> tuple[Part, dict[str, str]]:
    """Return what removing the head does to the loss of every sequence, each once, and how it was removed."""
    once, name = tokens.rows(sorted({*tokens.firsts()})), f"{place.layer}.{place.unit}"
    found = without(model, once, {name: [place]}, spans, "mean", samples, seed, "")
    few = {span: few_such(n) for span, n in zip(SPANS, (found.count > 0).sum(0).tolist(), strict=True) if n < 2}
    why = {"effect": found.why.get(name, "tokens that no two sequences have say so")} if few or found.why else {}
    fields = {part: found.fields[part][:, 0] for part in ("effect", "effect_interval", "effect_null")}
    words = {"left in place": found.said["left in place"], "removed": found.said.get(name, "nothing")}
    return (fields, {"span": SPANS}, few | why), words


def _deciles(looks: Looks) -> Part:
    """Return strength and matches by decile; sums of every sequence make the intervals."""
    every = torch.cat([r.strength for r in looks.found])
    decile = deciles(every).split([len(r.strength) for r in looks.found])
    shape = (len(looks.found), DECILES)
    number, strength = torch.zeros(shape), torch.zeros(shape)
    matched = torch.zeros(*shape, len(KEYS) + 1)
    chance = torch.zeros(DECILES, len(KEYS) + 1, looks.samples)
    for i, (r, at) in enumerate(zip(looks.found, decile, strict=True)):
        number[i].index_add_(0, at, torch.ones(len(at)))
        strength[i].index_add_(0, at, r.strength)
        matched[i].index_add_(0, at, r.matches.T.float())
        chance.index_add_(0, at, r.chance.permute(2, 1, 0).float())
    total = number.sum(0)
    below = number[..., None].expand_as(matched)
    fields = {
        "matched": matched.sum(0) / total[:, None],
        "matched_interval": ratio_interval(matched, below, within=(0.0, 1.0)),
        "matched_null": chance / total[:, None, None],
        "strength": strength.sum(0) / total,
        "strength_interval": ratio_interval(strength, number, within=(0.0, 1.0)),
    }
    names = [str(i + 1) for i in range(DECILES)]
    few = f"{int(total.sum())} queries fill {int((total > 0).sum())} of {DECILES} deciles"
    empty = {name: few for name, n in zip(names, total.tolist(), strict=True) if not n}
    why = {"strength": "deciles are ranks of the head's own looks, which have no control"}
    return fields, {"decile": names, "keys": [*(row.name for row in KEYS), NONE]}, why | empty


def _distances(looks: Looks) -> Part:
    each = torch.stack([r.distance for r in looks.found])
    null = torch.stack([r.shifted for r in looks.found]).mean(0).T
    fields = {"distance": each.mean(0), "distance_null": null.contiguous()}
    return fields | {"distance_interval": mean_interval(each, within=(0.0, 1.0))}, {"bucket": looks.buckets}, {}


def _examples(model: Model, tokens: Tokens, looks: Looks, number: int) -> Part:
    """Return looks at evenly spaced ranks of every decile, the hardest first."""
    every = torch.cat([r.strength for r in looks.found])
    where = [(r.sequence, q + 1, int(k)) for r in looks.found for q, k in enumerate(r.key.tolist())]
    found = of_each_decile(every, number)
    names = [f"{decile}: {_context(model, tokens, *where[at])}" for decile, at in found]
    fields = {"attention": every[[at for _, at in found]]}
    return fields, {"example": names}, {"attention": "single looks have no interval"}


def _context(model: Model, tokens: Tokens, sequence: int, query: int, key: int) -> str:
    """Return the text around key and query as one line, the query in ⟦ ⟧ and the key in ⟨ ⟩."""
    texts = _texts(model, tokens, sequence)
    first = max(0, query - _BEFORE)
    if key >= first - 2:
        first = min(first, max(0, key - 3))
        return _joined(texts, first, query, query, key)
    return _joined(texts, max(0, key - 3), key + 1, query, key) + " … " + _joined(texts, first, query, query, key)


def _joined(texts: Sequence[str], first: int, last: int, query: int, key: int) -> str:
    marks = {key: "⟨{}⟩", query: "⟦{}⟧"} if key != query else {query: "⟦⟨{}⟩⟧"}
    return "".join(marks.get(i, "{}").replace("{}", texts[i]) for i in range(first, last + 1))


def _texts(model: Model, tokens: Tokens, sequence: int) -> list[str]:
    return model.text.token_texts(tokens.ids[sequence][tokens.mask[sequence]], running=True)


def _windows(model: Model, tokens: Tokens, looks: Looks) -> Part:
    """Return the hardest looks of single sequences: attention, with tokens, around the key and up to the query."""
    shown, words = torch.full((len(looks.windows), len(AROUND)), math.nan), list[list[str]]()
    for i, w in enumerate(looks.windows):
        texts = _texts(model, tokens, w.sequence)
        at = [p if 0 <= (p := getattr(w, end) + step) <= w.query else None for end, step in AROUND]
        words.append(["" if p is None else texts[p] for p in at])
        shown[i] = torch.tensor([math.nan if p is None else float(w.row[p]) for p in at])
    hardest = looks.windows[0]
    texts = _texts(model, tokens, hardest.sequence)[max(0, hardest.query + 1 - WINDOW) : hardest.query + 1]
    labels = {
        "context": [_context(model, tokens, *_place(w)) for w in looks.windows],
        "place": [end + (f"{step:+d}".replace("-", "−") if step else "") for end, step in AROUND],
        "looks": words,
        "q_pos": texts,
        "k_pos": texts,
    }
    alone = "single looks have no interval"
    return {"looks": shown, "pattern": looks.pattern}, labels, {"looks": alone, "pattern": alone}


def _place(w: Window) -> tuple[int, int, int]:
    return w.sequence, w.query, w.key


def _outputs(model: Model, place: Address, looks: Looks, pairs: int, samples: int, seed: int) -> Part:
    """Return the strongest pairs of both circuits, and what sources do to themselves."""
    order = looks.mass.argsort(stable=True, descending=True)[:_SOURCES]
    order = order[looks.mass[order] > 0]
    fields: dict[str, Any] = dict.fromkeys(("writes", "writes_null", "bare", "bare_null"))
    fields |= {"same": torch.full((2,), math.nan), "same_interval": torch.full((2, 2), math.nan)}
    fields["same_null"] = torch.full((2, samples), math.nan)
    labels: dict[str, list[Any]] = {"circuit": [IN_TEXT, BARE]}
    strongest = "the strongest of many pairs, which have no interval over sequences"
    reasons = {"writes": strongest, "bare": strongest}
    ids = looks.ids[order]
    for i, (name, axis) in enumerate((("writes", "pair"), ("bare", "bare_pair"))):
        try:
            if not len(order):
                raise Refused("tokens attended to", "it attends to first and special tokens alone", "give other texts")
            away = toward(model, place)
            if name == "writes" and looks.value is None:
                raise Refused("values", "values have no place of their own in this model", "see the bare embeddings")
            values = bare_values(model, place, ids) if looks.value is None or i else _mean_values(looks, order)
            got = written(values, ids, away, pairs, samples, seed)
        except Refused as refusal:
            reasons |= {name: refusal.why, labels["circuit"][i]: refusal.why}
            continue
        fields |= {name: got.strength, f"{name}_null": got.null}
        fields["same"][i], fields["same_null"][i] = got.own.mean(), got.own_null
        fields["same_interval"][i] = mean_interval(got.own)
        labels[axis] = _pairs(model, ids, got)
    if len(order) == 1:
        reasons["same"] = "one token"
    return fields, labels, reasons


def _mean_values(looks: Looks, order: Tensor) -> Float[Tensor, "source d_head"]:
    assert looks.value is not None
    return looks.value[order] / looks.mass[order, None]


def _pairs(model: Model, ids: Tensor, got: Written) -> list[str]:
    sources, targets = (model.text.token_texts(x) for x in (ids[got.source], got.target))
    return [f"{a} → {b}" for a, b in zip(sources, targets, strict=True)]
