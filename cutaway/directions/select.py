"""Which one direction, ablated everywhere, stops a behaviour, and brings it about where it is added?

Each candidate is the difference of the means of a block's inputs between texts with the concept and without, at a
position behind the instruction (Arditi et al. 2024, arXiv:2406.11717). It is found on some groups of texts, and its
effects are measured on others; half of the groups stay unseen, for `directions.intervene`. The behaviour begins with
one of some words; its score is log p − log(1 − p) of their first tokens together.

* `bypass[position, layer]`: the score on texts with the concept while the component along the candidate is ablated at
  every block's input and every output of attention and MLP, at all positions; small is good.
* `induce`: the score on texts without it while the candidate is added at its layer, at all positions.
* `kl`: KL(plain ‖ ablated) of the next token on texts without the concept, in nats: what ablation costs.
* Filters: kl ≤ 0.1, induce ≥ 0 and layer < 0.8 · layers (`passes`). Of those that pass the least `bypass` is selected.
* `interval` of each: 95 %, over texts. Positions are those whose tokens all prompts share at their end, or the last.
* Control: random directions, ablated everywhere (the same draws for all candidates), and added with the candidate's
  length (`null`, `induce_null`, `kl_null`).
* Known failures: where the two classes have the same tokens, as in layer 0, the difference is zero; the record names
  those candidates. Ablation sets the component to zero, which may lie on the behaviour's side: then nothing passes
  although one direction carries it, see `directions.intervene`. A small model decides late, in layers that the third
  filter leaves out (`depth=1`). A behaviour may take more than one direction (arXiv:2502.17420).
* Equivalences (tests): the scores are those of one prompt at a time under the edits of `direction.at(…).project_out()`
  and `direction.add()`.
* Cost: of each text that effects are measured on, a forward per candidate and ablation, and one per addition from its
  layer on; of the others one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.record import note
from cutaway.core.refuse import Refused
from cutaway.core.stats import BOUNDS, generator, mean_interval
from cutaway.directions.behaviour import as_prompts, common_end, divergence, first_tokens, log_odds, streams_at
from cutaway.directions.selected import SelectedDirection
from cutaway.interventions.probes import folds
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add, Project
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.labelled import Labelled

_KL, _INDUCE = 0.1, 0.0  # the most and the least that pass
_EVERYWHERE = ("resid_pre", "attn_out", "mlp_out")
_NAMED = 8  # candidates without a difference that a note names


@method(
    answers="Which one direction, ablated everywhere, stops a behaviour, and brings it about where it is added?",
    paper="Arditi et al. 2024, arXiv:2406.11717",
    cost="texts * (1 + (samples + position * layer * (3 + samples) / 2) / 2) * F",
    control="random_directions",
    rung="interventional",
)
def select(
    model: Model,
    labelled: Labelled,
    /,
    *,
    words: tuple[str, ...] = ("sorry",),
    layers: tuple[int, ...] = (),
    last: int = 0,
    depth: float = 0.8,
    chat: bool = True,
    concept: str | None = None,
    samples: int = 2,
    seed: int = 0,
) -> SelectedDirection:
    """Find candidate directions of a behaviour, and select one by its effects on groups it was not found on.

    Args:
        words: words that the behaviour begins with; their first tokens count.
        layers: blocks whose inputs give candidates; none means all.
        last: number of last positions; 0 means as many as all prompts share.
        depth: share of the layers, of which only those before it are selected.
        chat: put each text into the chat template, where the model has one, as what the user says.
        concept: the concept whose texts show the behaviour; None means the first.
        samples: number of random directions.
        seed: of the division into groups, and of the random directions.

    Raises:
        Refused: one class or one group only, empty or too short texts, no candidate with a difference, or a model that
            predicts no next token.
    """
    check_predicts(model)
    c = labelled.concept(concept)
    y, group = labelled.shown[:, c].cpu(), labelled.group_of
    seen, fit, test = _divided(y, group, seed)
    prompts = as_prompts(model, labelled.texts, chat)
    tokens = model.tokens(prompts)
    trial = _Trial(
        model,
        [prompts[i] for i in test[y[test]]],
        [prompts[i] for i in test[~y[test]]],
        first_tokens(model, prompts[0], words),
        list(layers) or list(range(model.shape.n_layers)),
        list(range(-last, 0)) or list(common_end(tokens)),
    )
    x = streams_at(model, tokens.rows(fit.tolist()), [f"resid_pre.{i}" for i in trial.layers], trial.positions)
    one, other = x[:, :, y[fit]].mean(2), x[:, :, ~y[fit]].mean(2)
    vector = one - other
    same = _warn(vector, trial)
    measured: dict[str, Any] = trial.measured(vector, samples, seed)
    midpoint = (normalize(vector, dim=-1) * (one + other)).sum(-1) / 2
    early = torch.tensor([i < depth * model.shape.n_layers for i in trial.layers])
    passes = (measured["kl"] <= _KL) & (measured["induce"] >= _INDUCE) & early
    return SelectedDirection(
        **measured,
        passes=passes,
        vector=vector,
        midpoint=midpoint,
        concept=labelled.concepts[c],
        family=model.family.name,
        best=trial.best(measured["bypass"], passes),
        groups=tuple(dict.fromkeys(labelled.names[i] for i in seen)),
        labels={"position": trial.positions, "layer": trial.layers, "class": ["with", "without"], "bound": BOUNDS},
        units=dict.fromkeys(("bypass", "induce", "plain"), "log odds") | {"kl": "nats", "vector": "activation"},
        reasons={"plain": "the run without edits"}
        | dict.fromkeys(("passes", "vector", "midpoint"), "found on other texts than the effects"),
        record={
            "texts": {"found on": len(fit), "with": len(trial.shown), "without": len(trial.bare)},
            **({"zero difference": same} if same else {}),
        },
    )


def _divided(
    y: Bool[Tensor, "text"], group: Int[Tensor, "text"], seed: int
) -> tuple[Int[Tensor, "seen"], Int[Tensor, "fit"], Int[Tensor, "test"]]:
    """Return the texts that are used at all, and of them those that candidates are found and tried on, by group."""
    seen = folds(y, group, most=2, seed=seed)[0][0]
    fit, test = folds(y[seen], group[seen], most=4, seed=seed)[0]
    return seen, seen[fit], seen[test]


@dataclass(frozen=True)
class _Trial:
    """The prompts, words and places that candidates are tried on.

    Attributes:
        model: the model.
        shown: prompts with the concept.
        bare: prompts without it.
        ids: first tokens of the behaviour.
        layers: the layers of candidates.
        positions: their positions, from the end.
    """

    model: Model
    shown: list[str]
    bare: list[str]
    ids: Int[Tensor, "first"]
    layers: list[int]
    positions: list[int]

    def measured(self, vector: Float[Tensor, "position layer d_model"], samples: int, seed: int) -> dict[str, Tensor]:
        """Return every effect of every candidate, with its interval and null; NaN where the classes do not differ."""
        there = vector.any(-1)
        found = vector[there]
        g = generator(seed)
        drawn = normalize(torch.randn(samples, vector.shape[-1], generator=g), dim=-1)
        ablated = [self._ablated(v) for v in (*found, *drawn)]
        at = there.nonzero()[:, 1].tolist()
        added = [self._added(v, i) for v, i in zip(found, at, strict=True)]
        added += [self._added(u * v.norm(), i) for v, i in zip(found, at, strict=True) for u in drawn]
        n = len(found)
        shown = sweep(self.model, self.model.tokens(self.shown), [[], *ablated], self._score).float().cpu()
        tokens = self.model.tokens(self.bare)
        own = self.model.run_last(tokens).float().log_softmax(-1)

        def both(logits: Tensor, prompt: Tensor) -> Tensor:
            return torch.stack([log_odds(logits, self.ids), divergence(own[prompt], logits)], -1)

        score, kl = sweep(self.model, tokens, [[], *ablated, *added], both).float().cpu().unbind(-1)
        induced = score[1 + len(ablated) :]
        parts = {
            "": ("bypass", shown[1 : 1 + n], shown[1 + n :].mean(1).expand(n, -1)),
            "induce_": ("induce", induced[:n], induced[n:].mean(1).reshape(n, samples)),
            "kl_": ("kl", kl[1 : 1 + n], kl[1 + n : 1 + len(ablated)].mean(1).expand(n, -1)),
        }
        out: dict[str, Tensor] = {
            "plain": torch.stack([shown[0].mean(), score[0].mean()]),
            "plain_interval": torch.stack([mean_interval(shown[0]), mean_interval(score[0])]),
        }
        for prefix, (name, each, null) in parts.items():
            within = (0.0, torch.inf) if name == "kl" else (-torch.inf, torch.inf)
            out[name] = _placed(each.mean(1), there)
            out[f"{prefix}interval"] = _placed(mean_interval(each.T, within=within), there)
            out[f"{prefix}null"] = _placed(null, there)
        return out

    def best(self, bypass: Float[Tensor, "position layer"], passes: Bool[Tensor, "position layer"]) -> tuple[int, ...]:
        """Return position and layer of the least bypass that passes; nothing if none does."""
        if not bool(passes.any()):
            note("no candidate passes all filters")
            return ()
        p, i = divmod(int(bypass.where(passes, torch.inf).argmin()), len(self.layers))
        return self.positions[p], self.layers[i]

    def _score(self, logits: Tensor, prompt: Tensor) -> Float[Tensor, "row"]:
        return log_odds(logits, self.ids)

    def _ablated(self, v: Float[Tensor, "d_model"]) -> list[Edit]:
        return [Project(a, v[None]) for a in self.model.places(_EVERYWHERE)]

    def _added(self, v: Float[Tensor, "d_model"], layer: int) -> list[Edit]:
        return [Add(Address("resid_pre", layer=layer), v)]


def _placed(
    values: Float[Tensor, "some *rest"], there: Bool[Tensor, "position layer"]
) -> Float[Tensor, "position layer *rest"]:
    """Return values of the candidates with a difference at their places, NaN elsewhere."""
    out = torch.full((*there.shape, *values.shape[1:]), torch.nan)
    out[there] = values
    return out


def _warn(vector: Float[Tensor, "position layer d_model"], trial: _Trial) -> list[str]:
    """Tell readers of candidates without a difference, and return their names.

    Raises:
        Refused: no candidate has one.
    """
    same = [f"resid_pre.{trial.layers[i]}@{trial.positions[p]}" for p, i in (~vector.any(-1)).nonzero().tolist()]
    if len(same) == vector[..., 0].numel():
        why = "the two classes have the same stream at all positions and layers"
        raise Refused("candidate directions", why, "read deeper layers, or other positions")
    if same:
        more = f" and {len(same) - _NAMED} more" if len(same) > _NAMED else ""
        note(f"zero difference: the two classes are the same at {', '.join(same[:_NAMED])}{more}")
    return same
