"""Which words does the last position read on the way to the answer, and at which depth?

Attention knockout (Geva et al. 2023, arXiv:2304.14767): in a window of layers, the last position may not attend to a
group of source positions (their scores become −∞, the others share the attention), and the answer's probability is
read.

* Sources: `subject` (where a pair names none, the tokens that its corruption changes), `last` (the last position
  itself), `other` (all the rest), and `first` (the first token alone, which is in one of the others too, since much
  attention rests there without meaning).
* `effect` [source layer] = (p_blocked − p_clean) / p_clean of the answer, mean over prompts: −1 is all of it.
  `difference` is the change of the task's metric.
* `window` layers around each are blocked, [l − w // 2, l − w // 2 + w), always beside layer l alone (`single`). The
  paper's window is about a fifth of the depth.
* `extraction` [update layer]: the share of prompts in which what attention (or the MLP) writes at the last position,
  read by the final norm's linear part and the unembedding, says the answer before every other token (§6 of the paper);
  `extraction_foil` is the same for the foil, as its control; the record gives the share with any such layer.
* `extraction_blocked` [source layer]: the same of attention while that layer alone may not read the source.
* `interval` and `…_interval`: 95 %, over prompts. Control (`null`): as many random positions before the last are
  blocked, outside of the source itself where enough are left.
* Known failures: the share of attention that was blocked goes to the other sources, which changes them too; a blocked
  source may still arrive through positions in between; relative change favours prompts with an improbable answer; and
  attention that writes the answer only in several layers together is no extraction.
* Equivalences (tests): a window of all layers is one cut in every layer; blocking equals renormalised attention.
* Cost: one position of one forward a cell, window and sample, from the first blocked layer on, and equal cuts once
  (short prompts have few random positions); without reuse of keys and values (padding, other families) one forward.
  Extraction: one forward a cell, of its layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.record import count
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, share_interval
from cutaway.interventions.grid import window_of
from cutaway.interventions.spans import subject_or_changed
from cutaway.models.access.reading import Seen
from cutaway.models.dry import some
from cutaway.models.edits.library import Knockout
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.sweep.partial_forward import entered
from cutaway.models.sweep.plan import logit_rows
from cutaway.tasks.bound import Bound
from cutaway.tasks.readouts import READOUTS
from cutaway.tasks.task import Task

SOURCES = ("subject", "other", "last", "first")
UPDATES = ("attention", "mlp")
Positions = tuple[int, ...]
Sources = tuple[Positions, ...]  # of each group, in the order of SOURCES


@dataclass(frozen=True, kw_only=True)
class Knockouts(Result, kind="knockouts"):
    """Losses of the last position when it may not attend to a group of positions in a window of layers."""

    effect: Float[Tensor, "source layer"]
    interval: Float[Tensor, "source layer bound"]
    null: Float[Tensor, "source layer sample"]
    single: Float[Tensor, "source layer"]
    single_interval: Float[Tensor, "source layer bound"]
    difference: Float[Tensor, "source layer"]
    difference_interval: Float[Tensor, "source layer bound"]
    extraction: Float[Tensor, "update layer"]
    extraction_interval: Float[Tensor, "update layer bound"]
    extraction_foil: Float[Tensor, "update layer"]
    extraction_foil_interval: Float[Tensor, "update layer bound"]
    extraction_blocked: Float[Tensor, "source layer"]
    extraction_blocked_interval: Float[Tensor, "source layer bound"]
    clean: Float[Tensor, "prompt"]
    clean_probability: Float[Tensor, "prompt"]


@method(
    answers="Which words does the last position read on the way to the answer, and at which depth?",
    paper="Geva et al. 2023, arXiv:2304.14767",
    cost="prompts * ((5 + source) * F + (2 + samples) * source * (layer + 2 + (window or layer / 5)) / 2 * P)",
    control="random_edges",
    rung="interventional",
)
def knockout(model: Model, task: Task, /, *, window: int = 0, samples: int = 4, seed: int = 0) -> Knockouts:
    """Block attention from groups of positions to the last one, layer window by layer window.

    Args:
        window: how many layers are blocked together, centred on each; 0 is a fifth of the depth.
        samples: how many random groups of the same size make the null of each cell.
        seed: of the random groups.

    Raises:
        Refused: a prompt without a subject or without any other token, or an answer that has no probability.
    """
    bound = task.bind(model)
    groups, says = source_groups(bound)
    layers = [a.layer for a in model.places("scores") if a.layer is not None]
    width = window or max(1, round(len(layers) / 5))
    clean = model.measure(bound.clean, bound.measure_with("prob", model)).cpu()
    if not bool((clean[:, 1] > 0).all()):
        raise Refused("knockout", "an answer has no probability to lose", "use a wider dtype or other prompts")
    got = _blocked(model, bound, groups, layers, width, samples, seed)  # [kind source layer prompt 2]
    change = got - clean
    relative, difference = change[..., 1] / clean[:, 1], change[0, ..., 0]
    said, silent = extraction(model, bound, layers), _unread(model, bound, groups, layers)
    ever = dict(zip(UPDATES, said[0].nan_to_num().amax(1).mean(-1).tolist(), strict=True))
    rates = {"extraction": said[0], "extraction_foil": said[1], "extraction_blocked": silent}
    measured_rates: dict[str, Any] = {name: x.mean(-1) for name, x in rates.items()}
    measured_rates |= {f"{name}_interval": share_interval(x.movedim(-1, 0)) for name, x in rates.items()}
    intervals = [mean_interval(x.movedim(-1, 0)) for x in (relative[0], relative[1], difference)]
    share = "share of the answer's probability"
    return Knockouts(
        effect=relative[0].mean(-1),
        interval=intervals[0],
        null=relative[2:].mean(-1).movedim(0, -1).clone(),
        single=relative[1].mean(-1),
        single_interval=intervals[1],
        difference=difference.mean(-1),
        difference_interval=intervals[2],
        **measured_rates,
        clean=clean[:, 0].clone(),
        clean_probability=clean[:, 1].clone(),
        labels={"source": list(SOURCES), "update": list(UPDATES), "layer": layers, "bound": BOUNDS},
        units={
            **dict.fromkeys(("effect", "interval", "null", "single", "single_interval"), share),
            **dict.fromkeys(("difference", "difference_interval", "clean"), bound.unit),
            **{name + end: "share of prompts" for name in rates for end in ("", "_interval")},
        },
        record={
            "window": width,
            "subject": says,
            "blocked": "edges to the last position",
            "sign": "negative is less answer",
            "least probability": float(clean[:, 1].min()),
            "extraction in any layer": ever,
        },
        reasons=one_prompt(len(bound), "effect", "single", "difference"),
    )


def source_groups(bound: Bound) -> tuple[list[Sources], str]:
    """Return the positions of each group in each prompt, and what `subject` means here.

    Raises:
        Refused: a prompt in which a group would be empty.
    """
    subject, says = subject_or_changed(bound)
    starts, found = bound.clean.column(0).tolist(), list[Sources]()
    for i, length in enumerate(bound.clean.lengths.tolist()):
        last = length - 1
        named = tuple(c - starts[i] for c in subject[i].nonzero()[:, 0].tolist() if c - starts[i] != last)
        other = tuple(p for p in range(last) if p not in named)
        if not named or not other:
            missing = "no subject before its last token" if not named else "only its subject before the last token"
            raise Refused(f"knockout on {bound.pairs[i].clean!r}", f"the prompt has {missing}", "use longer prompts")
        found.append((named, other, (last,), (0,)))
    return found, says


def _blocked(
    model: Model, bound: Bound, groups: list[Sources], layers: list[int], window: int, samples: int, seed: int
) -> Float[Tensor, "kind source layer prompt 2"]:
    """Metric and probability under every cut: windows, single layers, then the random samples."""
    g, kinds = generator(seed), 2 + samples
    out = torch.empty(kinds, len(SOURCES), len(layers), len(bound), 2)
    for part, chosen, sources in _alike(bound, groups):
        cuts, length = list[tuple[Positions, tuple[int, ...]]](), int(part.clean.lengths[0])
        for kind in range(kinds):
            for keys in sources:
                for i in layers:
                    cut = keys if kind < 2 else _random(keys, length, g)
                    cuts.append((cut, (i,) if kind == 1 else tuple(window_of(i, window, layers))))
        several = {cut: n for n, cut in enumerate(dict.fromkeys(cuts))}  # groups drawn at random are often alike
        variants = [[Knockout(Address("pattern", j), (-1,), keys) for j in over] for keys, over in several]
        got = sweep(model, part.clean, variants, part.measure_with("prob", model)).cpu()
        each = got[[several[cut] for cut in cuts]]
        out[:, :, :, chosen] = each.reshape(kinds, len(SOURCES), len(layers), len(chosen), 2)
    return out


def _alike(bound: Bound, groups: list[Sources]) -> Iterator[tuple[Bound, list[int], Sources]]:
    """Yield prompts whose groups lie at the same positions, without padding, so that keys and values can be reused."""
    alike: dict[tuple[tuple[int, ...], Sources], list[int]] = {}
    layout = {i: n for n, rows in bound.clean.by_length().items() for i in rows}
    for i, sources in enumerate(groups):
        alike.setdefault((layout[i], sources), []).append(i)
    for (_, sources), chosen in alike.items():
        yield bound.rows(chosen).buckets()[0], chosen, sources


def _random(keys: Positions, length: int, g: torch.Generator) -> Positions:
    """As many positions before the last, outside of `keys` where enough are left there."""
    rest = [p for p in range(length - 1) if p not in keys]
    pool = rest if len(rest) >= len(keys) else list(range(length - 1))
    return tuple(sorted(pool[i] for i in torch.randperm(len(pool), generator=g)[: len(keys)].tolist()))


def extraction(model: Model, bound: Bound, layers: list[int]) -> Float[Tensor, "role update layer prompt"]:
    """Mark where the attention, and the MLP, of each layer writes the answer (or the foil) more than any other token.

    Values are 1 or 0, and NaN where a layer has no MLP.
    """
    sites = ["attn_out", *(["mlp_out"] if model.sites()["mlp_out"].startswith("read") else [])]
    there = [a for a in model.places(sites) if a.layer in layers]
    acts = model.capture(bound.clean, there, logits=False)
    out = torch.full((2, len(UPDATES), len(layers), len(bound)), torch.nan)
    u, n = torch.tensor([[sites.index(a.site), layers.index(a.layer or 0)] for a in there]).T
    out[:, u, n] = _said(model, bound, torch.stack([acts[f"{a}@-1"].float() for a in there]))
    return out


def _unread(
    model: Model, bound: Bound, groups: list[Sources], layers: list[int]
) -> Float[Tensor, "source layer prompt"]:
    """Mark where each layer's attention writes the answer although this layer may not read a source."""
    written = torch.zeros(len(SOURCES), len(layers), len(bound), model.shape.d_model)
    for part, chosen, sources in _alike(bound, groups):
        entering = model.capture(part.clean, [f"resid_pre.{i}" for i in layers], logits=False)
        for n, i in some(list(enumerate(layers))):
            with entered(model, i, entering[f"resid_pre.{i}"]):
                for s, keys in enumerate(sources):
                    cut = Knockout(Address("pattern", i), (-1,), keys)
                    acts = model.capture(part.clean, f"attn_out.{i}", cut, logits=False)
                    count(forwards=-len(part) * i / model.shape.n_layers)  # the blocks that passed the stream through
                    written[s, n, chosen] = acts[f"attn_out.{i}@-1"].float().cpu()
    return _said(model, bound, written.flatten(0, 1))[0].unflatten(0, written.shape[:2])


def _said(model: Model, bound: Bound, x: Float[Tensor, "update prompt d_model"]) -> Float[Tensor, "role update prompt"]:
    """Return 1 if an update ranks the answer (or the foil) first, else 0.

    It is read through the final norm's linear part (its scale does not change an order) and the unembedding.
    """
    right = replace(bound, readout=READOUTS["accuracy"])
    wrong = replace(
        right, answers=right.foils, foils=right.answers, answer_sets=right.foil_sets, foil_sets=right.answer_sets
    )
    final, w = model.anatomy.top("final"), model.weights.unembed.detach().float()
    rows, prompt = x.flatten(0, 1).float().to(w.device), torch.arange(len(bound), device=w.device).repeat(len(x))
    if final is not None:
        rows = model.anatomy.norm(final).linear(rows, torch.ones(len(rows), device=rows.device))
    ranked = list[Tensor]()
    size = logit_rows(model)
    for part, who in zip(rows.split(size), prompt.split(size), strict=True):
        seen = Seen(part @ w)
        ranked.append(torch.stack([b.measure(seen, who) for b in (right, wrong)]))
    return torch.cat(ranked, 1).unflatten(1, x.shape[:2]).cpu()
