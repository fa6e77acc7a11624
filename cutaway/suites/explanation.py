"""An explanation of one prediction: results, claims read off them, and the verdict of a known truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Required, TypedDict

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

if TYPE_CHECKING:
    from cutaway.circuits.certify import Certificate
    from cutaway.circuits.faithfulness import Faithfulness
    from cutaway.core.graph import Graph
    from cutaway.graphs.validate import GraphValidation

UNSUPPORTED = "Not claimed, because interval or control do not support it"
#: what a claim is about → the result that it reads, and the methods that make it
BEHIND = {
    "the depth": ("depth", ("lenses.logit_lens",)),
    "the writers": ("writers", ("lenses.direct_attribution",)),
    "the positions": ("resid_pre", ("patching.activation",)),
    "the heads": ("heads", ("patching.attribution", "patching.activation")),
    "the heads together": ("together", ("patching.group",)),
    "the circuit": ("carried", ("circuits.faithfulness",)),
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
    """Results of each method over the sentence and its siblings, as far as they were made.

    `heads`, `heads_noise`, `attn_out` and `mlp_out` hold estimates, with exact effects at some cells, unless every cell
    was measured; `together` is there only if heads stood out, `circuit`, `carried` and `certificate` only if a circuit
    was asked for.
    """

    predictions: Required[Predictions]
    heads: Effects
    heads_noise: Effects
    resid_pre: Effects
    attn_out: Effects
    mlp_out: Effects
    together: GroupEffect
    depth: LensCurve
    grid: LensGrid
    writers: DirectAttribution
    neurons: DirectAttribution
    circuit: Graph
    carried: Faithfulness
    certificate: Certificate


class Own(TypedDict, total=False):
    """The same on the sentence alone, where that is worth a look; and, if it was asked for, the main part of its
    attribution graph, with what the answer loses where the largest units are removed.
    """

    writers: DirectAttribution
    resid_pre: Effects
    graph: Graph
    removed: GraphValidation


@dataclass(frozen=True)
class Claim:
    """A sentence of the report.

    Attributes:
        about: the result that it is about.
        text: the sentence.
        control: its control, in words.
        supported: True if the effect differs from the control.
        method: the method whose numbers it reads; empty where it reads the model's predictions alone.
    """

    about: str
    text: str
    control: str
    supported: bool
    method: str = ""

    @property
    def rung(self) -> Rung:
        """The rung of the method behind the claim, whose words it may use; a claim without one is observational."""
        return METHODS[self.method].rung if self.method else "observational"


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
    """Everything `explain` found so far.

    Attributes:
        model: the name of the model.
        prompt: the sentence.
        answer: the word that is explained.
        foil: the word that it is compared with.
        corrupt: the counterfactual sentence.
        corruption: how it came about, in words.
        siblings: the number of further sentences of the same form.
        results: what the methods found over the sentence and its siblings.
        own: the same on the sentence alone.
        claims: what the numbers support, and what they do not.
        verdicts: comparisons with the known truth, where there is one.
        doubt: says that the answer is hardly preferred.
        spent: forwards, backwards and seconds.
    """

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
    def complete(self) -> bool:
        """True if every method was asked; False if the work was interrupted."""
        return "resid_pre" in self.own

    @property
    def summary(self) -> list[str]:
        """The supported claims as prose, with what could not be supported said last."""
        failed = [c.about for c in self.claims if not c.supported]
        lines = [f"{c.text} ({c.control})." for c in self.claims if c.supported]
        lines = [self.doubt.text, *lines] if self.doubt is not None else lines
        return lines + ([f"{UNSUPPORTED}: {', '.join(failed)}."] if failed else [])
