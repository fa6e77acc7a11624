"""An explanation of one prediction: results, claims read off them, and the verdict of a known truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Required, TypedDict

from jaxtyping import Float
from torch import Tensor

from cutaway.core.method import METHODS
from cutaway.core.record import Cost
from cutaway.core.result import Result
from cutaway.core.rung import Rung
from cutaway.interventions.effects import Effects
from cutaway.lenses.direct_attribution import DirectAttribution
from cutaway.lenses.lens_grid import LensGrid
from cutaway.lenses.logit_lens import LensCurve
from cutaway.patching.group import GroupEffect

UNSUPPORTED = "Not claimed, because interval or control do not support it"
#: what a claim is about → the method whose numbers it reads
BEHIND = {
    "the depth": "lenses.logit_lens",
    "the writers": "lenses.direct_attribution",
    "the positions": "patching.activation",
    "the heads": "patching.activation",
    "the heads together": "patching.group",
}


@dataclass(frozen=True, kw_only=True)
class Predictions(Result, kind="predictions"):
    """The most likely next words, and the same words after the corrupt prompt.

    Attributes:
        probability: the probability of each word after the clean prompt.
        after_corrupt: the same after the corrupt prompt.
        answer: the index of the answer among the words.
        foil: the index of the foil.
        rank: the number of words that are likelier than the answer.
    """

    probability: Float[Tensor, "token"]
    after_corrupt: Float[Tensor, "token"]
    answer: int
    foil: int
    rank: int


class Results(TypedDict, total=False):
    """Results of each method over the sentence and its siblings; `together` only if heads stood out."""

    predictions: Required[Predictions]
    depth: Required[LensCurve]
    grid: Required[LensGrid]
    writers: Required[DirectAttribution]
    neurons: Required[DirectAttribution]
    resid_pre: Required[Effects]
    attn_out: Required[Effects]
    mlp_out: Required[Effects]
    heads: Required[Effects]
    heads_noise: Required[Effects]
    together: GroupEffect


class Own(TypedDict):
    """The same on the sentence alone, where that is worth a look."""

    writers: DirectAttribution
    resid_pre: Effects


@dataclass(frozen=True)
class Claim:
    """A sentence of the report.

    Attributes:
        about: the result that it is about.
        text: the sentence.
        control: its control, in words.
        supported: True if the effect differs from the control.
    """

    about: str
    text: str
    control: str
    supported: bool

    @property
    def rung(self) -> Rung:
        """The rung of the method behind the claim, whose words it may use; a claim without one is observational."""
        return METHODS[BEHIND[self.about]].rung if self.about in BEHIND else "observational"


@dataclass(frozen=True)
class Doubt:
    """An answer that is hardly the likeliest, and the options of the contrast that a reader may mean."""

    text: str
    instead: dict[str, str]


@dataclass(frozen=True)
class Verdict:
    """A comparison with the known truth.

    Attributes:
        text: the verdict in words.
        agrees: True or False, or None if the truth is not known.
        detail: the truth, in words.
    """

    text: str
    agrees: bool | None
    detail: str


@dataclass(frozen=True)
class Explanation:
    """Everything `explain` found. `own` are the results on the sentence alone, `results` those over its siblings."""

    model: str
    prompt: str
    answer: str
    foil: str
    corrupt: str
    corruption: str
    siblings: int
    results: Results
    own: Own
    claims: tuple[Claim, ...]
    verdicts: tuple[Verdict, ...]
    doubt: Doubt | None = None
    spent: Cost = field(default_factory=Cost)

    @property
    def summary(self) -> list[str]:
        """The supported claims as prose, with what could not be supported said last."""
        failed = [c.about for c in self.claims if not c.supported]
        lines = [f"{c.text} ({c.control})." for c in self.claims if c.supported]
        lines = [self.doubt.text, *lines] if self.doubt is not None else lines
        return lines + ([f"{UNSUPPORTED}: {', '.join(failed)}."] if failed else [])
