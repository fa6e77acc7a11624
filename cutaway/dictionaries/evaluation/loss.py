"""How much of what a model can do survives when a dictionary stands in for its activations?

The model runs clean, with the dictionary spliced in, and with the same sites ablated: by zero, and by their mean over
the same tokens. With CE the next-token cross-entropy and KL the divergence from the clean prediction, both in nats,

    CE recovered (a) = (CE_a − CE_spliced) / (CE_a − CE_clean)      KL recovered (a) = 1 − KL_spliced / KL_a

for each ablation a. Recovery against zero ablation flatters (zero is far from anything the model knows), so both stand
side by side, with ΔCE = CE_spliced − CE_clean. Special tokens are neither spliced nor ablated, and what is predicted at
them does not count. A dictionary that reads a site after one that it writes (a crosscoder of several layers) cannot be
spliced into one forward: it and what it is compared with stand in as reconstructions of the clean run, every site
replaced in a second one (Gao et al. 2024, arXiv:2406.04093 ask what a model loses in this way). Intervals: over
sequences.

Control: random dictionaries (`null`), and principal components and the like as dictionaries (`control`), spliced in the
same way on contexts that none of them was fitted on. Cost: 5 forwards and one more for each dictionary in `null` and
`control`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.progress import advance
from cutaway.core.refuse import Refused
from cutaway.core.stats import ratio_interval
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.controls import controls, random_dictionaries
from cutaway.dictionaries.evaluation.evidence import Evidence, encode_evidence
from cutaway.dictionaries.evaluation.scores import Score, Scores, collect
from cutaway.dictionaries.splice import Splice, SpliceWrite, late_reads
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.edit import Edit, as_edits
from cutaway.models.edits.library import Ablate, Replace
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.tokens import batch as batch_of
from cutaway.models.vocabulary import special_ids

ABLATIONS = ("zero", "mean")
_OF_THE_MODEL: tuple[str, ...] = ("CE clean", "CE zero-ablated", "CE mean-ablated")  # the same whatever the dictionary


@dataclass(frozen=True, eq=False)
class Only(Edit):
    """Another edit, at the marked tokens only; for whole forwards of just these prompts."""

    edit: Edit
    keep: Bool[Tensor, "batch position"] = field(repr=False)

    @property
    def address(self) -> Address | str:  # type: ignore[override]
        return self.edit.address

    @property
    def positions(self) -> tuple[int, ...] | None:  # type: ignore[override]
        return self.edit.positions

    @property
    def begins(self) -> Address:
        return self.edit.begins

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        keep = self.keep.to(x.device).reshape(*self.keep.shape, *[1] * (x.ndim - 2))
        return torch.where(keep, self.edit.apply(x, frame), x)


@method(
    answers="How much of what a model can do survives when a dictionary stands in for its activations?",
    paper="Gao et al. 2024, arXiv:2406.04093",
    cost="sequences * (10 + samples) * F",
    control="random_dictionary",
    rung="interventional",
)
@torch.no_grad()
def loss_recovered(
    model: Model,
    dictionary: Dictionary,
    evidence: Evidence,
    /,
    *,
    sequences: int = 32,
    samples: int = 2,
    seed: int = 0,
) -> Scores:
    """Splice a dictionary into the model on held-out contexts, against zero and mean ablation.

    Args:
        sequences: number of contexts, none of which has tokens that controls were fitted on.
        samples: number of random dictionaries that make the null.
        seed: seed of the random dictionaries.

    Raises:
        Refused: evidence without its text, no context free of fitted tokens, or a dictionary that cannot be spliced.
    """
    fit, rest = evidence.parted()
    tokens, special = unfitted(fit, rest, sequences)
    l0 = encode_evidence(dictionary, fit).l0
    null = random_dictionaries(dictionary, fit, samples, seed, l0)
    return splice_loss(model, dictionary, tokens, special=special, null=null, control=controls(dictionary, fit, l0))


def unfitted(fit: Evidence, rest: Evidence, sequences: int) -> tuple[Tokens, Bool[Tensor, "batch position"]]:
    """Return contexts of which no token was fitted on, and where their special tokens are.

    Raises:
        Refused: the evidence does not know its text, or all contexts were fitted on.
    """
    if fit.text is None or fit.context is None or rest.context is None:
        why = "the evidence does not know the contexts that it was read from"
        raise Refused("the loss", why, "use read_evidence of the model")
    chosen = sorted(set(rest.context.tolist()) - set(fit.context.tolist()))[:sequences]
    if not chosen:
        raise Refused("the loss", "no context is free of tokens that controls were fitted on", "give more text")
    tokens = batch_of([fit.text.contexts[n].tolist() for n in chosen], pad=fit.text.pad)
    return tokens, torch.isin(tokens.ids, fit.text.special)


def splice_loss(
    model: Model,
    dictionary: Dictionary,
    prompts: str | Sequence[str] | Tensor | Tokens,
    *,
    special: Bool[Tensor, "batch position"] | None = None,
    null: Sequence[Dictionary] = (),
    control: Mapping[str, Dictionary] | None = None,
    batch: int = 16,
) -> Scores:
    """Measure the cross-entropy and KL of a model with a dictionary spliced in, against zero and mean ablation.

    Args:
        model: the model whose sites the dictionary writes.
        dictionary: what is spliced in.
        prompts: the sequences, as texts, ids or tokens.
        special: tokens that are left alone; the tokenizer's special ones if not given.
        null: random dictionaries, spliced in the same way.
        control: other dictionaries by name.
        batch: sequences a forward.

    Raises:
        Refused: an encoder, no prediction that counts, or a dictionary that cannot be spliced: it is of several models,
            or its code of a token depends on other tokens.
    """
    if not model.family.causal:
        raise Refused(f"the loss of {model.name}", "an encoder predicts no next token", "use a causal language model")
    if dictionary.models:
        why = f"its sites name models ({', '.join(dictionary.models)}), and a splice is into one model"
        raise Refused(f"the loss with {dictionary!r}", why, "judge it by its activations alone")
    tokens = model.tokens(prompts)
    ids = tokens.ids
    left = torch.isin(ids, special_ids(model.tokenizer).to(ids.device)) if special is None else special.to(ids.device)
    keep = tokens.mask & ~left
    others = {f"null {i}": d for i, d in enumerate(null)} | dict(control or {})
    run = _Run(model, tokens, keep, batch, [dictionary, *others.values()])
    n = run.count
    if int(n.sum()) == 0:
        raise Refused("loss recovered", "no prediction counts in these prompts", "give sequences of several tokens")
    rows = _scores(run, 0)
    beside = {name: _scores(run, i + 1) for i, name in enumerate(others)}
    found = [
        s
        if s.name in _OF_THE_MODEL
        else s.against(
            [b[i] for k, b in beside.items() if k.startswith("null ")],
            {k: b[i] for k, b in beside.items() if not k.startswith("null ")},
        )
        for i, s in enumerate(rows)
    ]
    record = {
        "predictions": int(n.sum()),
        "sequences": len(tokens),
        "special tokens left alone": int((tokens.mask & left).sum()),
        "interval": "95 % over sequences",
        "dictionary": dictionary.fingerprint(),
        "model": model.identity(),
    }
    if run.twice:
        record["splice"] = "every site replaced by its reconstruction of the clean run: it reads after it writes"
    reasons: dict[str, str] = dict.fromkeys(_OF_THE_MODEL, "of the model alone: no null")
    reasons |= dict.fromkeys((s.name for s in found), "one sequence") if len(tokens) < 2 else {}
    return collect(found, record, reasons)


class _Run:
    """Sums of cross-entropy and KL by sequence for every variant: clean, ablated by zero and mean, dictionaries."""

    def __init__(self, model: Model, tokens: Tokens, keep: Tensor, batch: int, dictionaries: Sequence[Dictionary]):
        self.model, self.tokens, self.keep = model, tokens, keep
        sites = list(dict.fromkeys(w for d in dictionaries for w in d.writes))
        self.twice = any(late_reads(dictionaries[0], w) for w in dictionaries[0].writes)
        parts = [list(range(i, min(i + batch, len(tokens)))) for i in range(0, len(tokens), batch)]
        means = self._means(sites, parts)
        n, variants = len(tokens), 2 + len(dictionaries)
        self.clean = torch.zeros(n, dtype=torch.double)
        self.count = torch.zeros(n, dtype=torch.double)
        self.ce = torch.zeros(variants, n, dtype=torch.double)
        self.kl = torch.zeros(variants, n, dtype=torch.double)
        done = len(parts)
        for part in parts:
            some, kept = tokens.rows(part), keep[part]
            edits = [[Only(Ablate(s), kept) for s in dictionaries[0].writes]]
            edits.append([Only(Ablate(s, "mean", means[s]), kept) for s in dictionaries[0].writes])
            edits += (
                self._replaced(dictionaries, some, kept) if self.twice else [_spliced(d, kept) for d in dictionaries]
            )
            counted = kept[:, :-1] & some.mask[:, 1:]
            clean = self._logs(some, ())
            self.count[part] = counted.sum(1).double().cpu()
            self.clean[part] = _cross_entropy(clean, some, counted)
            for v, change in enumerate(edits):
                logs = self._logs(some, change)
                self.ce[v, part] = _cross_entropy(logs, some, counted)
                kl = (clean.exp() * (clean - logs)).nan_to_num(0.0).sum(-1)
                self.kl[v, part] = (kl * counted).double().sum(1).cpu()
            done += 1
            advance(done, 2 * len(parts))

    def _means(self, sites: Sequence[str], parts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return the mean of every site over the tokens that count, of all prompts."""
        total: dict[str, Tensor] = {}
        for done, part in enumerate(parts):
            acts = self.model.capture(self.tokens.rows(part), sites, logits=False)
            for s in sites:
                total[s] = total.get(s, torch.tensor(0.0)) + acts[s][self.keep[part]].double().sum(0).cpu()
            advance(done + 1, 2 * len(parts))
        return {s: (t / max(int(self.keep.sum()), 1)).float() for s, t in total.items()}

    def _replaced(self, dictionaries: Sequence[Dictionary], some: Tokens, keep: Tensor) -> list[list[Edit]]:
        """For each dictionary, every site that it writes as it reconstructs the clean run."""
        if any(g.whole_batch for d in dictionaries for g in d.gates):
            why = "its code of a token depends on the other tokens of the batch"
            raise Refused(f"reconstructions of {dictionaries[0]!r}", why, "give its BatchTopK gate a threshold")
        reads = list(dict.fromkeys(r for d in dictionaries for r in d.reads))
        acts = self.model.capture(some, reads, logits=False)
        outs = [d.forward({r: acts[r].to(d.device) for r in d.reads}) for d in dictionaries]
        return [[Only(Replace(s, y), keep) for s, y in out.items()] for out in outs]

    def _logs(self, some: Tokens, edits: Sequence[Edit]) -> Float[Tensor, "batch position token"]:
        return self.model.run(some, edits)[:, :-1].float().log_softmax(-1)


def _cross_entropy(logs: Tensor, some: Tokens, counted: Tensor) -> Float[Tensor, "batch"]:
    each = -logs.gather(-1, some.ids[:, 1:, None]).squeeze(-1)
    return torch.where(counted, each, 0.0).double().sum(1).cpu()


def _spliced(d: Dictionary, keep: Tensor) -> list[Edit]:
    return [Only(e, keep) if isinstance(e, SpliceWrite) else e for e in as_edits(Splice(d))]


def _scores(run: _Run, which: int) -> list[Score]:
    ce, kl, n, clean = run.ce[2 + which], run.kl[2 + which], run.count, run.clean

    def ratio(name: str, above: Tensor, below: Tensor, unit: str = "") -> Score:
        low, high = ratio_interval(above, below).tolist()
        value = float(above.sum() / below.sum()) if float(below.sum()) != 0 else math.nan
        return Score(name, value, (low, high), unit)

    found = [
        ratio("CE clean", clean, n, "nats a token"),
        ratio("CE spliced", ce, n, "nats a token"),
        ratio("ΔCE", ce - clean, n, "nats a token"),
        ratio("KL spliced", kl, n, "nats a token"),
    ]
    for a, name in enumerate(ABLATIONS):
        found += [
            ratio(f"CE {name}-ablated", run.ce[a], n, "nats a token"),
            ratio(f"CE recovered ({name})", run.ce[a] - ce, run.ce[a] - clean),
            ratio(f"KL recovered ({name})", run.kl[a] - kl, run.kl[a]),
        ]
    return found
