"""Does a probe generalise once the latents of a concept that it should not read are ablated?

SHIFT (Marks et al. 2024, arXiv:2403.19647), at the site that a dictionary writes. Of labelled texts two concepts count:
the intended one, y, and an unintended one, z. A logistic probe of y reads the mean of the site over the tokens of a
text. It is fitted on ambiguous texts, those with y = z, where it cannot tell them apart, and judged on other texts, as
many of each of the four groups.

* Unintended latents are those that are named, or else the `most` of largest effect among those whose effect on the
  probe goes with words: effect_i = (w · d_i) (mean of latent i with z − without), over the ambiguous texts; once
  `words` are deleted from the texts, at least half of it is gone. No text is used on which y and z differ.
* Ablated latents stand at their mean m over the ambiguous texts: x − Σ (f_i − m_i) d_i; all else, errors included, is
  as it was. (The paper's zeros give the refitted probe the same numbers, and move the kept one's threshold.)
* `accuracy`, `worst`: over all four groups, and in that with the least, for the probe as it was fitted (`kept`) and one
  that is fitted anew on the changed ambiguous texts (`refitted`).
* `reading`: the share of the probe that reads z, |l_z| / (|l_z| + |l_y|): l_z is the mean difference of its logit with
  and without z at equal y, l_y that with and without y at equal z.
* Rows: `nothing` changed; `SHIFT`; `words deleted` from all texts; `LEACE` and `mean projection` of z, which are fitted
  on texts of all groups with labels of z, more than SHIFT is told; `balanced`: a probe fitted on texts of all groups.
* Control (null): as many random latents, of those that are active on the ambiguous texts.
* Intervals: 95 %, over held-out texts; that of `worst` is of the group alone, not of the choice of the group.
* Known failures: words may do as well as latents (T. Hua 2025), which is why they stand beside; latents are judged by
  words alone, and a concept that has none must be named by its latents. One site is changed, not all before it.
* Cost: two forwards per text, without and with words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, share_interval
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.evidence import encode_evidence
from cutaway.dictionaries.evaluation.geometry import decoder_rows
from cutaway.dictionaries.evaluation.probing import pooled
from cutaway.dictionaries.evaluation.reading import of_texts
from cutaway.dictionaries.norms import FixedNorm
from cutaway.dictionaries.transforms import fold
from cutaway.interventions.erasure import leace, mean_projection
from cutaway.interventions.probes import logistic
from cutaway.models.model import Model
from cutaway.tasks.labelled import Labelled

ROWS = ("nothing", "SHIFT", "words deleted", "LEACE", "mean projection", "balanced")
PROBES = ("kept", "refitted")
_STRENGTH = 0.1  # of probes: the inverse of their L2 penalty
_LEAST = 8  # texts of each group
_WITH_WORDS = 0.5  # share of a latent's effect that goes with the words


@dataclass(frozen=True, kw_only=True)
class Shift(Result, kind="dictionary_shift"):
    """Held-out accuracy of a probe by what is changed about its texts, for probes kept and refitted.

    Attributes:
        accuracy: share of texts that are right, all groups alike.
        worst: the same in the group that has the least.
        group: the same in each group.
        reading: share of the probe's differences of logits that goes with the unintended concept.
        effect: effect of the ablated latents on the probe, in logits.
        with_words: share of each effect that goes with the words.
    """

    accuracy: Float[Tensor, "row probe"]
    accuracy_interval: Float[Tensor, "row probe bound"]
    accuracy_null: Float[Tensor, "row probe sample"]
    worst: Float[Tensor, "row probe"]
    worst_interval: Float[Tensor, "row probe bound"]
    worst_null: Float[Tensor, "row probe sample"]
    group: Float[Tensor, "row probe group"]
    reading: Float[Tensor, "row probe"]
    reading_null: Float[Tensor, "row probe sample"]
    effect: Float[Tensor, "latent"]
    with_words: Float[Tensor, "latent"]


@dataclass(frozen=True)
class Means:
    """Means over the tokens of texts: of the site, and of the latents of its dictionary."""

    site: Float[Tensor, "text width"]
    latents: Float[Tensor, "text latent"]


@method(
    answers="Does a probe generalise once the latents of a concept that it should not read are ablated?",
    paper="Marks et al. 2024, arXiv:2403.19647",
    cost="2 * (texts + bytes // 64) * F",
    control="random_latents",
    rung="interventional",
)
def shift(
    model: Model,
    dictionary: Dictionary,
    labelled: Labelled,
    /,
    *,
    intended: str | None = None,
    unintended: str | None = None,
    words: tuple[str, ...] = (),
    latents: tuple[int, ...] = (),
    most: int = 20,
    samples: int = 20,
    seed: int = 0,
) -> Shift:
    """Ablate latents of an unintended concept under a probe, beside other ways to make it generalise.

    Args:
        intended: the concept that the probe is to read [default: the first one].
        unintended: the concept that goes with it in the texts it is fitted on [default: the second one].
        words: words that show the unintended concept [default: its name].
        latents: latents to ablate [default: those whose effect on the probe goes with the words].
        most: most latents that are ablated, where none are named.
        samples: number of draws of random latents.
        seed: of the split of the texts, and of random latents.

    Raises:
        Refused: a concept that the texts do not have, a group of too few texts, words in none of them, no latent that
            goes with the words, or a dictionary whose latents add something else to each token.
    """
    y, z = _concepts(labelled, intended, unintended)
    shown = labelled.shown.cpu()
    words = words or (labelled.concepts[z],)
    deleted = tuple(without(t, words) for t in labelled.texts)
    if deleted == labelled.texts:
        why = "no text holds them"
        raise Refused(Keyword("words", list(words)), why, "name words that show the unintended concept")
    site, folded = dictionary.writes[0], fold(dictionary)
    if len(dictionary.writes) > 1 or not all(isinstance(n, FixedNorm) for n in folded.writing.values()):
        why = "what a latent adds to the site is not one direction of one site"
        raise Refused(f"SHIFT over {dictionary!r}", why, "use an autoencoder or transcoder of one site")
    plain, bare = (means(model, folded, texts) for texts in (labelled.texts, deleted))
    groups = [f"{a}{labelled.concepts[y]}, {b}{labelled.concepts[z]}" for a in ("not ", "") for b in ("not ", "")]
    rows = decoder_rows(folded, site).cpu()
    found = shift_of(
        plain, bare, rows, shown[:, y], shown[:, z], latents=latents, most=most, samples=samples, seed=seed
    )
    about = {"intended": labelled.concepts[y], "unintended": labelled.concepts[z], "words": list(words), "site": site}
    return Shift(**{**vars(found), "labels": found.labels | {"group": groups}, "record": {**found.record, **about}})


def shift_of(
    plain: Means,
    bare: Means,
    rows: Float[Tensor, "latent width"],
    y: Bool[Tensor, "text"],
    z: Bool[Tensor, "text"],
    *,
    latents: Sequence[int] = (),
    most: int = 20,
    samples: int = 20,
    seed: int = 0,
) -> Shift:
    """Do the same with what was read of texts.

    Args:
        plain: means over the tokens of each text.
        bare: the same without the words.
        rows: what one unit of each latent adds to the site.
        y: True where a text shows the intended concept.
        z: True where it shows the unintended one.
        latents: as `shift`.
        most: as `shift`.
        samples: as `shift`.
        seed: as `shift`.

    Raises:
        Refused: a group of too few texts, a latent that is not there, or none that goes with the words.
    """
    g = generator(seed)
    group = 2 * y.long() + z.long()
    balanced, test = _split(group, g)
    ambiguous = balanced[y[balanced] == z[balanced]]
    first = _Probe.fitted(plain.site[ambiguous], y[ambiguous])
    chosen, effect, share = _unintended(plain, bare, rows, first, z, ambiguous, latents, most)

    def judged(fit: Tensor, held_out: Tensor) -> Float[Tensor, "probe text"]:
        return torch.stack([p.logit(held_out) for p in (first, _Probe.fitted(fit, y[ambiguous]))])

    def ablated(some: Tensor) -> Float[Tensor, "probe text"]:
        f = plain.latents[:, some]
        left = plain.site - (f - f[ambiguous].mean(0)) @ rows[some]
        return judged(left[ambiguous], left[test])

    logit = {
        "nothing": judged(plain.site[ambiguous], plain.site[test]),
        "SHIFT": ablated(chosen),
        "words deleted": judged(bare.site[ambiguous], bare.site[test]),
    }
    for name, fit in (("LEACE", leace), ("mean projection", mean_projection)):
        erase = fit(plain.site[balanced], z[balanced])
        logit[name] = judged(erase(plain.site[ambiguous]), erase(plain.site[test]))
    logit["balanced"] = _Probe.fitted(plain.site[balanced], y[balanced]).logit(plain.site[test]).expand(2, -1)
    active = plain.latents[ambiguous].abs().sum(0) > 0
    active[chosen] = False
    others = active.nonzero()[:, 0]
    if len(others) < len(chosen):
        why = f"{len(others)} other latents are active on these texts, fewer than the {len(chosen)} ablated ones"
        raise Refused("random latents for SHIFT", why, "ablate fewer")
    drawn = [others[torch.randperm(len(others), generator=g)[: len(chosen)]] for _ in range(samples)]
    counts = {"ambiguous": len(ambiguous), "balanced": len(balanced), "held out": len(test)}
    return _result(logit, torch.stack([ablated(some) for some in drawn]), group[test], (chosen, effect, share), counts)


def means(model: Model, dictionary: Dictionary, texts: Sequence[str]) -> Means:
    """Return what a probe and a dictionary read of texts, over all tokens but special ones.

    Raises:
        Refused: a text without a token.
    """
    sites = tuple(dict.fromkeys((*dictionary.reads, *dictionary.writes)))
    evidence = of_texts(model, sites, texts)
    assert evidence.sequence is not None
    found, groups = evidence.sequence.unique(return_inverse=True)
    if len(found) != len(texts):
        missing = next(i for i in range(len(texts)) if i not in found)
        raise Refused(f"text {missing}: {texts[missing]!r}", "no token of it is left", "leave it out")
    groups = groups.cpu()
    x = evidence.of(dictionary.writes[0]).float().cpu()
    count = torch.bincount(groups)[:, None]
    site = torch.zeros(len(found), x.shape[1]).index_add_(0, groups, x) / count
    return Means(site, pooled(encode_evidence(dictionary, evidence).code, groups))


def without(text: str, words: Sequence[str]) -> str:
    """Return a text without some words, in capitals or small letters, and without the white space before each."""
    either = "|".join(re.escape(w.strip()) for w in words)
    return re.sub(rf"\s*(?<!\w)(?:{either})(?!\w)", "", text, flags=re.IGNORECASE).strip()


@dataclass(frozen=True)
class _Probe:
    """A logistic probe in the coordinates of the site."""

    weight: Float[Tensor, "width"]
    bias: float

    @classmethod
    def fitted(cls, x: Float[Tensor, "text width"], y: Bool[Tensor, "text"]) -> _Probe:
        scaler, probe = logistic(x, y, _STRENGTH)
        weight = torch.from_numpy(probe.coef_[0] / scaler.scale_)
        return cls(weight, float(probe.intercept_[0] - weight @ torch.from_numpy(scaler.mean_)))

    def logit(self, x: Float[Tensor, "text width"]) -> Float[Tensor, "text"]:
        return (x.double() @ self.weight + self.bias).float()


def _concepts(labelled: Labelled, intended: str | None, unintended: str | None) -> tuple[int, int]:
    """Return the columns of both concepts."""
    names = list(labelled.concepts)
    for option, name in (("intended", intended), ("unintended", unintended)):
        if name is not None and name not in names:
            raise Refused(Keyword(option, name), f"the texts are labelled with {', '.join(names)}", "name one of these")
    y = 0 if intended is None else names.index(intended)
    left = [i for i in range(len(names)) if i != y]
    if not left or intended == unintended is not None:
        why = f"the texts are labelled with {', '.join(names)}, and the probe must read another one"
        raise Refused("an unintended concept", why, "label the texts with two concepts that go together")
    return y, left[0] if unintended is None else names.index(unintended)


def _split(group: Int[Tensor, "text"], g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return texts to fit on and others to judge on, as many of each of the four groups.

    Raises:
        Refused: a group has too few.
    """
    sizes = torch.bincount(group, minlength=4)
    if int(sizes.min()) < _LEAST:
        why = f"of the four groups that two concepts make, they have {', '.join(map(str, sizes.tolist()))}"
        raise Refused(
            "SHIFT on these texts", why, f"give at least {_LEAST} texts of each, also where only one is shown"
        )
    half = int(sizes.min()) // 2
    rows = [(group == i).nonzero()[:, 0] for i in range(4)]
    mixed = [r[torch.randperm(len(r), generator=g)] for r in rows]
    return torch.cat([r[:half] for r in mixed]), torch.cat([r[half : 2 * half] for r in mixed])


def _unintended(
    plain: Means, bare: Means, rows: Tensor, probe: _Probe, z: Tensor, on: Tensor, latents: Sequence[int], most: int
) -> tuple[Int[Tensor, "latent"], Float[Tensor, "latent"], Float[Tensor, "latent"]]:
    """Return the latents to ablate, their effects on the probe, and the shares of these that go with the words."""
    show = z[on]
    gap, left = (x.latents[on][show].mean(0) - x.latents[on][~show].mean(0) for x in (plain, bare))
    effect = (rows.double() @ probe.weight).float() * gap
    share = torch.where(gap == 0, 0.0, 1 - left / gap)
    if latents:
        if not 0 <= min(latents) <= max(latents) < len(gap):
            raise Refused(Keyword("latents", list(latents)), f"there are {len(gap)}", "name latents from 0 on")
        chosen = torch.tensor(sorted(set(latents)))
    else:
        order = effect.abs().argsort(descending=True, stable=True)
        chosen = order[(share[order] >= _WITH_WORDS) & (effect[order] != 0)][:most].sort().values
    if not len(chosen):
        why = "there is none with half of its effect on the probe gone where the words are deleted"
        raise Refused("latents that go with the words", why, "name the latents, or other words")
    return chosen, effect[chosen], share[chosen]


def _result(
    logit: Mapping[str, Float[Tensor, "probe text"]],
    random: Float[Tensor, "sample probe text"],
    group: Int[Tensor, "text"],
    ablated: tuple[Tensor, Tensor, Tensor],
    counts: Mapping[str, int],
) -> Shift:
    """Return the result of probes' logits on held-out texts, by what was changed and of random latents."""
    every = torch.stack([logit[r] for r in ROWS])
    right, chance = (((x > 0) == (group >= 2)).float() for x in (every, random))
    of = [right[..., group == i] for i in range(4)]
    each = torch.stack([x.mean(-1) for x in of], -1)  # [row probe group]
    spread = torch.stack([share_interval(x.movedim(-1, 0)) for x in of], 2)  # [row probe group bound]
    lowest = each.argmin(-1)
    null = torch.stack([chance[..., group == i].mean(-1) for i in range(4)], -1).amin(-1)
    shape = (len(ROWS), len(PROBES), len(random))
    chosen, effect, share = ablated
    return Shift(
        accuracy=right.mean(-1),
        accuracy_interval=share_interval(right.movedim(-1, 0)),
        accuracy_null=chance.mean(-1).T.expand(shape).contiguous(),
        worst=each.amin(-1),
        worst_interval=spread.gather(2, lowest[..., None, None].expand(-1, -1, 1, 2))[:, :, 0],
        worst_null=null.T.expand(shape).contiguous(),
        group=each,
        reading=_reading(every, group),
        reading_null=_reading(random, group).T.expand(shape).contiguous(),
        effect=effect,
        with_words=share,
        labels={
            "row": list(ROWS),
            "probe": list(PROBES),
            "bound": BOUNDS,
            "latent": list(map(str, chosen.tolist())),
            "group": ["neither", "unintended", "intended", "both"],
        },
        units=dict.fromkeys(("accuracy", "worst", "group", "reading", "with_words"), "share") | {"effect": "logits"},
        reasons={
            "reading": "a ratio of means; `accuracy` has an interval",
            "group": "`worst` has that of the least",
            "effect": "of the texts that the probe is fitted on",
            "with_words": "of the texts that the probe is fitted on",
        },
        record={
            "texts": dict(counts),
            "ablated": chosen.tolist(),
            "interval": f"95 %, Wilson, over {counts['held out']} held-out texts, and over those of the worst group",
            "null": f"{len(chosen)} random latents that are active, ablated",
        },
    )


def _reading(logit: Float[Tensor, "*cell text"], group: Int[Tensor, "text"]) -> Float[Tensor, "*cell"]:
    """Return the share of a probe's differences that goes with the unintended concept."""
    none, z, y, both = (logit[..., group == i].mean(-1) for i in range(4))
    of_z, of_y = ((z + both - none - y).abs(), (y + both - none - z).abs())
    return of_z / (of_z + of_y)
