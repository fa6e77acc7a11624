"""How often does a behaviour happen under each form of intervention on a direction, and at what cost?

Where texts without the behaviour have another component than 0, setting it to 0 may bring the behaviour about. So forms
are compared, on texts of groups that the direction was not found on (`directions.select` leaves half of them); means
come from the others. A behaviour happens where the completion of `new` tokens, greedily generated, has one of some
words; `foils` say what should stand there instead. Of several vectors of a direction the first is meant.

* `share[form, class]`: of the completions that show the behaviour, on texts with the concept and without; `interval`:
  Wilson's. `other[form, class]`: of those with a foil, so that a flip is told from a breakdown.
* Forms: `none`; `add` and `subtract` the vector at its address; `zero`: the component ablated at every block's input
  and every output of attention and MLP (Arditi et al. 2024, arXiv:2406.11717); `per_layer`: the same with a difference
  of means of each block's own input; `affine`: the component set to the mean of texts without the concept, from its
  address on (Marshall et al. 2024, arXiv:2411.09003); `mean`: set to the mean half way between the classes; `weights`:
  orthogonal weights, of an untied copy if embeddings are tied. All act at all positions.
* Cost: `kept`: the share of texts without the concept whose likeliest next token stays (Wilson's); `kl`: KL(plain ‖
  edited) there, in nats; `perplexity` of their own tokens, as a multiple of the plain one.
* `component[class, place, quantile]`: the texts' components along the unit direction where they are read, and
  `zero[place]`: where zero lies between the means of the texts without (0) and with the concept (1). Near 0, ablation
  to zero suffices; elsewhere affine. `finding` says which forms suffice.
* Control: random directions of the same lengths in the place of all vectors (`null`, `other_null`, `kept_null` …).
* Known failures: words of a completion are no judge of what it says: read some. With fewer than 30 texts Wilson's
  interval of no success reaches beyond 0.1.
* Equivalences (tests): with one new token `share` is that of the likeliest next token; `zero` and `weights` are the
  same projection, by hooks and by weights.
* Cost in forwards: of each held-out text, a completion per form and direction, and two forwards more if it is without
  the concept; of the other texts two. For what a form costs on other texts, see `directions.steer`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt, ratio_interval, share_interval
from cutaway.directions.behaviour import as_prompts, divergence, streams_at, unseen
from cutaway.directions.direction import Direction
from cutaway.directions.forms import FORMS, Basis, Form
from cutaway.interventions.span_losses import continued, span_losses
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.rewrites import rewritten
from cutaway.models.loading.untied import untied
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.labelled import Labelled

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_GONE = 0.05  # share of completions that is as good as none


@dataclass(frozen=True, kw_only=True)
class Interventions(Result, kind="interventions"):
    """Shares of completions with a behaviour by form of intervention, and what each form costs.

    Attributes:
        share: of completions with the behaviour, on texts with the concept and without.
        interval: 95 %, Wilson's.
        null: the same with random directions.
        other: share of completions with a foil.
        other_interval: 95 %, Wilson's.
        other_null: the same with random directions.
        kept: share of texts without the concept whose likeliest next token stays.
        kept_interval: 95 %, Wilson's.
        kept_null: the same with random directions.
        kl: from their plain next token to the edited one, in nats.
        kl_interval: 95 %, over texts.
        kl_null: the same with random directions.
        perplexity: of their own tokens, as a multiple of the plain one.
        perplexity_interval: 95 %, over texts.
        perplexity_null: the same with random directions.
        component: quantiles of the texts' components along the unit direction.
        zero: the place of zero between the means of the texts without (0) and with the concept (1).
        finding: what suffices, in words.
    """

    page = ("other", "kl", "perplexity")
    share: Float[Tensor, "form class"]
    interval: Float[Tensor, "form class bound"]
    null: Float[Tensor, "form class sample"]
    other: Float[Tensor, "form class"]
    other_interval: Float[Tensor, "form class bound"]
    other_null: Float[Tensor, "form class sample"]
    kept: Float[Tensor, "form"]
    kept_interval: Float[Tensor, "form bound"]
    kept_null: Float[Tensor, "form sample"]
    kl: Float[Tensor, "form"]
    kl_interval: Float[Tensor, "form bound"]
    kl_null: Float[Tensor, "form sample"]
    perplexity: Float[Tensor, "form"]
    perplexity_interval: Float[Tensor, "form bound"]
    perplexity_null: Float[Tensor, "form sample"]
    component: Float[Tensor, "class place quantile"]
    zero: Float[Tensor, "place"]
    finding: str


@method(
    answers="How often does a behaviour happen under each form of intervention on a direction, and at what cost?",
    paper="Arditi et al. 2024, arXiv:2406.11717; Marshall et al. 2024, arXiv:2411.09003",
    cost="texts * (2 + (1 + new) * form * (1 + samples)) * F",
    control="random_directions",
    rung="interventional",
)
def intervene(
    model: Model,
    labelled: Labelled,
    direction: Direction,
    /,
    *,
    words: tuple[str, ...] = ("sorry",),
    foils: tuple[str, ...] = ("sure",),
    forms: tuple[str, ...] = tuple(FORMS),
    strength: float = 1.0,
    new: int = 1,
    chat: bool = True,
    samples: int = 4,
    seed: int = 0,
) -> Interventions:
    """Intervene on a direction in several forms, and count how often held-out completions show a behaviour.

    Args:
        words: words, or beginnings of several words, of which a completion with the behaviour has one.
        foils: words of completions that show the opposite.
        forms: forms of intervention.
        strength: factor of the vector that is added or subtracted.
        new: number of tokens of a completion.
        chat: put each text into the chat template, where the model has one, as what the user says.
        samples: number of random directions.
        seed: of the random directions, and of the halves where the direction does not say its groups.

    Raises:
        Refused: a direction of another width or site, one class only, no text of a group that the direction was not
            found on, an unknown form, a model that predicts no next token, or weights that cannot be orthogonalised.
    """
    check_predicts(model)
    if wrong := [f for f in forms if f not in FORMS]:
        raise Refused(Keyword("forms", wrong[0]), "there is no such form", f"use {', '.join(FORMS)}")
    c = labelled.concept(direction.name if direction.name in labelled.concepts else None)
    y, texts = labelled.shown[:, c].cpu(), as_prompts(model, labelled.texts, chat)
    test = unseen(labelled, y, direction, seed)
    tokens, position = model.tokens(texts), int(direction.record.get("position", -1))
    fit = (~test).nonzero()[:, 0].tolist()
    basis = Basis.of(model, direction, tokens.rows(fit), y[fit], position, strength)
    shown, bare = ([texts[i] for i in (test & (y == k)).nonzero()[:, 0].tolist()] for k in (True, False))
    trial = _Trial(model, shown, bare, _pattern("words", words), _pattern("foils", foils), new)
    bases, names = [basis, *basis.drawn(samples, seed)], ["none", *forms]
    plain = [trial.run(Form(), basis)] * len(bases)
    fields: dict[str, Any] = _fields([plain, *([trial.run(FORMS[f], b) for b in bases] for f in forms)])
    x = streams_at(model, tokens.rows(test.nonzero()[:, 0].tolist()), basis.places, [position])[0]
    along = x @ normalize(basis.vector, dim=0)  # [place, text]
    classes = (along[:, y[test]], along[:, ~y[test]])
    high, low = (v.mean(1) for v in classes)
    zero = -low / (high - low)
    return Interventions(
        **fields,
        component=torch.stack([v.quantile(torch.tensor(_QUANTILES), dim=1).T for v in classes]),
        zero=zero,
        finding=_finding(names, fields["share"], float(zero[0])),
        labels={
            "form": names,
            "class": ["with", "without"],
            "place": list(map(str, basis.places)),
            "quantile": list(_QUANTILES),
            "bound": BOUNDS,
        },
        units=dict.fromkeys(("share", "other"), "share of completions")
        | {"kept": "share of texts", "kl": "nats", "perplexity": "ratio", "component": "activation"},
        neutral={"kept": 1.0},
        reasons=dict.fromkeys(("component", "zero"), "a description of the texts")
        | one_prompt(min(len(shown), len(bare)), "share", "other", "kept", "kl", "perplexity"),
        record={"texts": {"means": len(fit), "with": len(shown), "without": len(bare)}, "position": position},
    )


def _pattern(option: str, words: Sequence[str]) -> re.Pattern[str]:
    if not all(w.strip() for w in words):
        raise Refused(Keyword(option, ",".join(words)), "a word is missing", "name one: sorry")
    return re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(w.strip()) for w in words)})(?!\w)", re.I)


@dataclass(frozen=True)
class _Run:
    """Outcome of a form: completions that have a word or a foil, per class, and the costs of each text."""

    share: tuple[Float[Tensor, "with"], Float[Tensor, "without"]]
    other: tuple[Float[Tensor, "with"], Float[Tensor, "without"]]
    kept: Float[Tensor, "without"]
    kl: Float[Tensor, "without"]
    loss: Float[Tensor, "without sum"]


@dataclass(frozen=True)
class _Trial:
    """The texts of both classes, and the words that are looked for.

    Attributes:
        model: the model.
        shown: texts with the concept.
        bare: texts without it.
        words: finds the behaviour.
        foils: finds its opposite.
        new: the number of tokens of a completion.
    """

    model: Model
    shown: list[str]
    bare: list[str]
    words: re.Pattern[str]
    foils: re.Pattern[str]
    new: int

    @cached_property
    def plain(self) -> Float[Tensor, "without token"]:
        """Log-probabilities of the next token of the texts without the concept, without edits."""
        return self.model.run_last(self.bare).float().cpu().log_softmax(-1)

    @cached_property
    def untied(self) -> Model:
        """The model with an embedding whose rewrites leave the unembedding alone."""
        return untied(self.model)

    def run(self, form: Form, basis: Basis) -> _Run:
        """Complete all texts under a form, and measure its costs."""
        if form.rewrites is None:
            return self._run(self.model, form.edits(basis))
        with rewritten(self.untied, *form.rewrites(basis, self.untied)) as changed:
            return self._run(changed, [])

    def _run(self, model: Model, edits: list[Edit]) -> _Run:
        said = model.generate([*self.shown, *self.bare], self.new, edits=edits)
        tokens = model.tokens(self.bare)
        logits = sweep(model, tokens, [edits], lambda x, prompt: x.float())[0].cpu()
        return _Run(
            self._hits(self.words, said),
            self._hits(self.foils, said),
            (self.plain.argmax(-1) == logits.argmax(-1)).float(),
            divergence(self.plain, logits),
            span_losses(model, tokens, continued, [edits])[0, :, 0],
        )

    def _hits(self, pattern: re.Pattern[str], said: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = torch.tensor([float(pattern.search(s) is not None) for s in said])
        return found[: len(self.shown)], found[len(self.shown) :]


def _fields(runs: Sequence[Sequence[_Run]]) -> dict[str, Tensor]:
    """Return every field but the components, of runs by form and direction, of which the first is the real one."""
    out: dict[str, Tensor] = _shares("share", "", runs) | _shares("other", "other_", runs)
    for name, interval in (("kept", share_interval), ("kl", lambda x: mean_interval(x, within=(0.0, torch.inf)))):
        each = torch.stack([torch.stack([getattr(r, name) for r in row]) for row in runs])  # [form, direction, text]
        out |= {name: each[:, 0].mean(-1), f"{name}_interval": interval(each[:, 0].T)}
        out[f"{name}_null"] = each[:, 1:].mean(-1)
    loss, _, count = torch.stack([torch.stack([r.loss for r in row]) for row in runs]).unbind(-1)
    rise = loss - loss[:1, :1]
    ratio = (rise.sum(-1) / count.sum(-1)).exp()
    out |= {"perplexity": ratio[:, 0], "perplexity_null": ratio[:, 1:].contiguous()}
    return out | {"perplexity_interval": ratio_interval(rise[:, 0].T, count[:, 0].T).exp()}


def _shares(name: str, prefix: str, runs: Sequence[Sequence[_Run]]) -> dict[str, Tensor]:
    """Return the share of hits by form and class, with Wilson's interval and null."""
    shares = torch.tensor([[[float(hits.mean()) for hits in getattr(r, name)] for r in row] for row in runs])
    bounds = torch.stack([torch.stack([share_interval(hits) for hits in getattr(row[0], name)]) for row in runs])
    null = shares[:, 1:].transpose(1, 2).contiguous()
    return {name: shares[:, 0], f"{prefix}interval": bounds, f"{prefix}null": null}


def _finding(names: Sequence[str], share: Float[Tensor, "form class"], zero: float) -> str:
    """Say in a sentence which forms suffice, and where zero lies."""
    if float(share[0, 0]) <= _GONE:
        return f"the behaviour hardly happens without edits ({float(share[0, 0]):.0%}): there is nothing to remove"
    enough = [n for n, s in zip(names[1:], share[1:], strict=True) if float(s.max()) <= _GONE]
    side = "on the side of the behaviour" if zero > 0.5 else "on the other side"
    return f"what suffices to remove it: {', '.join(enough) or 'no form'}; zero lies {side} ({zero:.2f})"
