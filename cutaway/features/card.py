"""The card of a latent: where it fires and how strongly, what it writes, what it is like, and what ablating it does.

* `window`: activations around the largest examples and around random ones of each octave, with the tokens; the names of
  the examples say between which quantiles of the active tokens an octave lies, exactly (`q0.55–0.93`); a star marks
  documents that are held out for scores.
* `density` with its interval (Wilson); `histogram` of the active tokens; `quantile` of |activation|: exact, with the
  interval of its order statistics, where all codes are in the store, else from the histogram, with the ends of the bin.
* `raises`, `lowers`: direct effects on logits. Null: those of the same rank of random directions.
* `neighbour`: cosines with other decoder rows. Null: those of the same rank of random directions.
* `together`: the share of the latent's tokens on which a partner is active. Null: the share of other latents' tokens,
  latents of like density.
* `swap`: the change of the activation where the token at a peak is exchanged for near neighbours (`swaps`), as a share
  of it: 0 is unchanged, −1 is silent. Null: random tokens there.
* `change`: what ablating it does on examples. Null: other latents of like density, each on its own examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.record import counting, machine, versions
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, quantiles, wilson
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features import effects, swaps
from cutaway.features.rules.families import quoted
from cutaway.features.store.corpus import SCORE
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import Example, StoredLatents
from cutaway.features.store.tally import LEAST, edges
from cutaway.models.model import Model

SHARES = (0.1, 0.5, 0.9, 0.99)
_AROUND = (8, 5)  # tokens in front of an example and behind it that are shown
Part = tuple[dict[str, Any], dict[str, list[Any]], dict[str, str]]  # fields, their labels, reasons
_UNITS = {
    **dict.fromkeys(("window", "activation", "quantile"), "activation"),
    **dict.fromkeys(("density", "histogram", "together"), "share of tokens"),
    **dict.fromkeys(("raises", "lowers"), "standard deviations over the vocabulary"),
    "neighbour": "cosine",
    "swap": "share of the activation",
    "change": "as named",
    "loss": "nats per token",
    "logit": "logits",
}


@dataclass(frozen=True, kw_only=True)
class FeatureCard(Result, kind="feature_card"):
    """The card of one latent.

    Attributes:
        window: activations around examples; NaN beyond the context. Its labels are the tokens.
        activation: the activation of each example.
        density: share of tokens on which it is active.
        histogram: share of its active tokens by |activation|.
        quantile: quantiles of |activation| where it is active.
        together: share of its tokens on which partners are active.
        raises: effects on the logits that it raises most.
        lowers: effects on the logits that it lowers most.
        neighbour: cosines with the most similar decoder rows.
        swap: changes of its activation where its peak token is exchanged.
        change: changes by its ablation.
        latent: number of the latent.
        dictionary: name of its dictionary in the store.
        said: its label, if it has one.
    """

    page = ("histogram", "quantile", "raises", "lowers", "neighbour", "together", "swap", "change")

    window: Float[Tensor, "example offset"]
    activation: Float[Tensor, "example"]
    density: Float[Tensor, ""]
    density_interval: Float[Tensor, "bound"]
    histogram: Float[Tensor, "bucket"]
    quantile: Float[Tensor, "share"]
    quantile_interval: Float[Tensor, "share bound"]
    together: Float[Tensor, "partner"] | None
    together_interval: Float[Tensor, "partner bound"] | None
    together_null: Float[Tensor, "partner sample"] | None
    raises: Float[Tensor, "raised"] | None
    raises_null: Float[Tensor, "raised sample"] | None
    lowers: Float[Tensor, "lowered"] | None
    lowers_null: Float[Tensor, "lowered sample"] | None
    neighbour: Float[Tensor, "neighbours"] | None
    neighbour_null: Float[Tensor, "neighbours sample"] | None
    swap: Float[Tensor, "swapped"] | None = None
    swap_interval: Float[Tensor, "swapped bound"] | None = None
    swap_null: Float[Tensor, "swapped sample"] | None = None
    change: Float[Tensor, "measure"] | None
    change_interval: Float[Tensor, "measure bound"] | None
    change_null: Float[Tensor, "measure sample"] | None
    latent: int
    dictionary: str
    said: str


@torch.no_grad()
def card(
    store: FeatureStore,
    latent: int,
    model: Model | None = None,
    source: Dictionary | None = None,
    *,
    dictionary: str | None = None,
    examples: int = 6,
    tokens: int = 8,
    contexts: int = 6,
    samples: int = 4,
    seed: int = 0,
) -> FeatureCard:
    """Make the card of a latent. Without the model and the dictionary, fields that need them are left out.

    Args:
        store: the store.
        latent: number of the latent.
        model: the model that was harvested.
        source: the dictionary that was harvested.
        dictionary: its name in the store, where there are several.
        examples: number of the largest examples that are shown, beside the random ones.
        tokens: number of raised tokens, lowered tokens and neighbours, of latents and of a peak token.
        contexts: number of examples on which the latent is ablated and its peak token is exchanged; 0 for none.
        samples: number of random directions and tokens, and of other latents that are ablated.
        seed: of both.

    Raises:
        Refused: no such latent, one that never fires, or another model or dictionary than was harvested.
    """
    known, g = store.latents(dictionary), generator(seed)
    if not int(known.count[known.check(latent)]):
        why = f"it is active on none of {known.tokens:,} tokens"
        raise Refused(f"the card of latent {latent}", why, "harvest more tokens, or look at another")
    store.check(known, model, source)
    others = effects.of_like_density(known, latent, samples, g)
    with counting() as spent:
        parts = [
            _examples(store, known, latent, examples),
            _numbers(store, known, latent),
            _partners(known, latent, others),
        ]
        parts += [_logits(model, source, latent, tokens, samples, g), _neighbours(source, latent, tokens, samples, g)]
        parts += [_swaps(store, known, model, source, latent, (tokens, contexts, samples), g)]
        parts += [_changes(store, known, model, source, latent, (tokens, contexts), others)]
    fields, labels, reasons = {}, {"bound": BOUNDS}, {}
    for more, names, why in parts:
        fields, labels, reasons = fields | more, labels | names, reasons | why
    said = store.meta.labels(known.name, latent)
    return FeatureCard(
        **fields,
        latent=latent,
        dictionary=known.name,
        said="; ".join(f"{x.text} ({x.source})" for x in said),
        labels=labels,
        units=_UNITS,
        reasons=reasons,
        record={
            "method": "features.card",
            "answers": f"What does latent {latent} of {known.name} do?",
            "control": "random_directions_and_latents",
            "subjects": {"store": store.identity()},
            "options": {"examples": examples, "tokens": tokens, "contexts": contexts, "samples": samples},
            "seed": seed,
            "cost": {"forwards": spent.forwards, "backwards": spent.backwards, "seconds": spent.seconds},
            "versions": versions(),
            "machine": machine(),
        },
    )


def _examples(store: FeatureStore, known: StoredLatents, latent: int, most: int) -> Part:
    chosen = [*known.top(latent)[:most], *known.sampled(latent)]
    before = min(_AROUND[0], chosen[0].before)
    offsets = range(-before, min(_AROUND[1], len(chosen[0].window) - 1 - chosen[0].before) + 1)
    window, words, names = torch.full((len(chosen), len(offsets)), torch.nan), list[list[str]](), list[str]()
    for i, e in enumerate(chosen):
        context = store.context(e.context)
        there = int((context["ids"] >= 0).sum())
        inside = [o for o in offsets if 0 <= e.position + o < there]
        columns = torch.tensor(inside) + before
        window[i, columns] = e.window[torch.tensor(inside) + e.before]
        texts = store.texts(context["ids"][torch.tensor(inside) + e.position])
        words.append([texts[inside.index(o)] if o in inside else "" for o in offsets])
        names.append(_name(known, latent, e, i, bool(int(context["flags"][e.position]) & SCORE)))
    fields = {"window": window, "activation": torch.tensor([e.value for e in chosen])}
    why = "single examples have no interval and no null"
    labels = {"example": names, "offset": [f"{o:+d}".replace("-", "−") if o else "0" for o in offsets], "window": words}
    return fields, labels, {"window": why, "activation": why}


def _name(known: StoredLatents, latent: int, e: Example, rank: int, held_out: bool) -> str:
    half = "*" if held_out else ""
    if e.octave is None:
        return f"{e.value:.3g} #{rank + 1}{half}"
    low, high = known.band(latent, e.octave)
    return f"{e.value:.3g} q{low:.2f}–{high:.2f}{half}"


def _numbers(store: FeatureStore, known: StoredLatents, latent: int) -> Part:
    """Return density, histogram and quantiles."""
    histogram, ends = known.tensors["histogram"][latent].double(), edges()
    kept = histogram.nonzero()[:, 0]
    bins = torch.arange(int(kept[0]), int(kept[-1]) + 1)
    quantile, bounds = _quantiles(store, known, latent)
    fields = {
        "density": known.density[latent],
        "density_interval": known.density_interval()[latent],
        "histogram": (histogram[bins] / histogram.sum()).float(),
        "quantile": quantile,
        "quantile_interval": bounds,
    }
    names = [f"{float(ends[b]):.3g}–{float(ends[b + 1]):.3g}" for b in bins.tolist()]
    reasons = {"density": "its null is another latent's density", "histogram": "of all tokens that were harvested"}
    return fields, {"bucket": names, "share": [f"{q:g}" for q in SHARES]}, reasons | {"quantile": "it has no null"}


def _quantiles(store: FeatureStore, known: StoredLatents, latent: int) -> tuple[Tensor, Tensor]:
    """Return quantiles with intervals: of order statistics where all codes are there, else the ends of bins."""
    if store.manifest["counts"]["coded"] < store.counted:
        ends = known.quantile(latent, torch.tensor(SHARES))
        return (ends.clamp_min(2.0**LEAST).log().mean(1)).exp(), ends
    return quantiles(known.codes(latent)[1].abs(), SHARES)


def _partners(known: StoredLatents, latent: int, others: Sequence[int]) -> Part:
    rows, own = known.partners(latent), known.paired(latent)
    names = ("together", "together_interval", "together_null")
    if not rows:
        return dict.fromkeys(names), {}, {"together": "no latent fires with it on three tokens"}
    shares = torch.tensor([n / own for _, n, _ in rows])
    bounds = torch.tensor([wilson(n, own) for _, n, _ in rows])
    places = [known.codes(j)[0] for j, *_ in rows]
    null = [[float(torch.isin(known.codes(i)[0], p).float().mean()) for i in others] for p in places]
    return (
        dict(zip(names, (shares, bounds, torch.tensor(null)), strict=True)),
        {"partner": [f"latent {j}" for j, *_ in rows]},
        {},
    )


def _logits(
    model: Model | None, source: Dictionary | None, latent: int, tokens: int, samples: int, g: torch.Generator
) -> Part:
    nothing: dict[str, Any] = dict.fromkeys(("raises", "raises_null", "lowers", "lowers_null"))
    if model is None or source is None:
        return nothing, {}, dict.fromkeys(("raises", "lowers"), "the model and the dictionary were not given")
    try:
        own = effects.writes_to_logits(model, source, latent)
        chance = torch.randn(samples, len(own), generator=g).to(own)
        found = effects.logit_effects(model, torch.cat([own[None], chance])).cpu()
    except Refused as refusal:
        return nothing, {}, dict.fromkeys(("raises", "lowers"), refusal.why)
    high, low = found.topk(tokens, 1), found.topk(tokens, 1, largest=False)
    fields = {
        "raises": high.values[0],
        "raises_null": high.values[1:].T.contiguous(),
        "lowers": low.values[0],
        "lowers_null": low.values[1:].T.contiguous(),
    }
    names = [_distinct(model.text.token_texts(x.indices[0])) for x in (high, low)]
    why = "it is of the weights alone"
    return fields, {"raised": names[0], "lowered": names[1]}, {"raises": why, "lowers": why}


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, those that stand there twice with a number."""
    return [n if n not in names[:i] else f"{n} ({i + 1})" for i, n in enumerate(names)]


def _neighbours(source: Dictionary | None, latent: int, most: int, samples: int, g: torch.Generator) -> Part:
    nothing: dict[str, Any] = dict.fromkeys(("neighbour", "neighbour_null"))
    if source is None:
        return nothing, {}, {"neighbour": "the dictionary was not given"}
    rows, first = effects.decoder_rows(source, latent)
    own = latent - first
    cosine = rows @ rows[own]
    cosine[own] = -torch.inf
    found = cosine.topk(min(most, len(rows) - 1))
    chance = torch.nn.functional.normalize(torch.randn(samples, rows.shape[1], generator=g).to(rows), dim=1)
    null = (rows @ chance.T).topk(len(found.values), 0).values
    fields = {"neighbour": found.values.cpu(), "neighbour_null": null.cpu()}
    names = [f"latent {i + first}" for i in found.indices.tolist()]
    return fields, {"neighbours": names}, {"neighbour": "it is of the weights alone"}


def _swaps(
    store: FeatureStore,
    known: StoredLatents,
    model: Model | None,
    source: Dictionary | None,
    latent: int,
    sizes: tuple[int, int, int],
    g: torch.Generator,
) -> Part:
    nothing: dict[str, Any] = dict.fromkeys(("swap", "swap_interval", "swap_null"))
    tokens, contexts, samples = sizes
    if model is None or source is None or contexts < 1:
        return nothing, {}, {"swap": "no model ran"}
    examples = known.top(latent)[:contexts]
    try:
        change, chance, near = swaps.swapped(model, store, source, latent, examples, tokens, samples, g)
    except Refused as refusal:
        return nothing, {}, {"swap": refusal.why}
    fields = {
        "swap": change.mean(0),
        "swap_interval": mean_interval(change),
        "swap_null": chance.mean(0).expand(len(swaps.KINDS), -1).contiguous(),
    }
    peak = store.context(examples[0].context)["ids"][examples[0].position]
    words = [quoted(t) for t in model.text.token_texts([int(peak), *near[:2]])]
    names = [f"{swaps.KINDS[0]}, {words[0]} → {', '.join(words[1:])}", *swaps.KINDS[1:]]
    return fields, {"swapped": names}, {} if len(change) > 1 else {"swap": "one example"}


def _changes(
    store: FeatureStore,
    known: StoredLatents,
    model: Model | None,
    source: Dictionary | None,
    latent: int,
    sizes: tuple[int, int],
    others: Sequence[int],
) -> Part:
    nothing: dict[str, Any] = dict.fromkeys(("change", "change_interval", "change_null"))
    tokens, contexts = sizes
    if model is None or source is None or contexts < 1:
        return nothing, {}, {"change": "no model ran"}

    def changed(i: int) -> Tensor:
        try:
            own = effects.logit_effects(model, effects.writes_to_logits(model, source, i)[None])
            raised = own[0].topk(tokens).indices
        except Refused:
            raised = None
        return effects.ablated(model, store, source, i, effects.chosen_examples(known, i, contexts), raised)

    try:
        each = changed(latent)
        null = torch.stack([changed(i).nanmean(0) for i in others], 1)
    except Refused as refusal:
        return nothing, {}, {"change": refusal.why}
    whole = each[each.isfinite().all(1)] if bool(each[:, 1].isfinite().all()) else each
    fields = {"change": whole.nanmean(0), "change_interval": mean_interval(whole), "change_null": null}
    return fields, {"measure": effects.MEASURES}, {} if len(whole) > 1 else {"change": "one example"}
