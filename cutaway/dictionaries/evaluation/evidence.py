"""Evidence: held-out activations on which dictionaries are judged, and the runs of dictionaries over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.record import hash_tensors
from cutaway.core.refuse import NoTokens, Refused
from cutaway.core.repeat import Made
from cutaway.dictionaries.code import SparseCode, concat_tokens
from cutaway.dictionaries.dictionary import Dictionary

PART = 4096  # tokens encoded at a time
GROUPS = 256  # units that are resampled at most
FEW = 20  # with fewer sequences than this their contexts are the units
ANY = "acts"  # the name of activations that come without the name of a site
_EACH = ("sequence", "ids", "position", "context")  # what may be known of each token


@dataclass(frozen=True, eq=False)
class Text:
    """Text that evidence was read from.

    Attributes:
        contexts: ids of each context by its number, with the special tokens and sinks that evidence leaves out.
        special: ids of special tokens.
        pad: id that pads contexts of several lengths.
        record: model, documents and packing, ready for JSON.
    """

    contexts: dict[int, Int[Tensor, "position"]]
    special: Int[Tensor, "token"]
    pad: int
    record: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Evidence:
    """Activations by site, one row per token; special tokens are not among them.

    `sequence` numbers the sequence (document) of each token: tokens of one sequence are resampled together, or those of
    one `context` where fewer than 20 sequences fill more contexts than that. `position` is a token's place in its
    context (in its sequence, where contexts are not known); `ids` is the token itself, and `truth` the true code, where
    is known. `text` is what it was read from.
    """

    acts: dict[str, Float[Tensor, "token _"]]
    sequence: Int[Tensor, "token"] | None = None
    ids: Int[Tensor, "token"] | None = None
    position: Int[Tensor, "token"] | None = None
    truth: SparseCode | None = None
    context: Int[Tensor, "token"] | None = None
    text: Text | None = None
    made: Made | None = field(default=None, repr=False)

    def __post_init__(self):
        sizes = {s: len(x) for s, x in self.acts.items()}
        sizes |= {n: len(t) for n in (*_EACH, "truth") if (t := getattr(self, n)) is not None}
        if len(set(sizes.values())) != 1:
            raise Refused("evidence", f"its parts have different numbers of tokens: {sizes}", "give the same tokens")
        if not len(self):
            raise Refused("evidence", "it has no tokens", "give at least one")

    def __len__(self) -> int:
        return len(next(iter(self.acts.values()), ()))

    @classmethod
    def gather(cls, source: Iterable[Any], tokens: int) -> Evidence:
        """Gather the first `tokens` tokens of a source without its special tokens.

        A source gives tensors [token, width]; mappings from sites to them; pairs of a tensor and its true code (as a
        `Truth`); or the batches of a stream, whose mask is true where a token counts.

        Raises:
            Refused: the source ends before any token.
        """
        parts, held = [], 0
        for item in source:
            part = _part(item)
            if part is None:
                continue
            parts.append(part if held + len(part) <= tokens else part.rows(torch.arange(tokens - held)))
            held += len(parts[-1])
            if held >= tokens:
                break
        if not parts:
            raise NoTokens("evidence from a source", "it gave no tokens", "give a source with tokens that count")
        return parts[0] if len(parts) == 1 else _joined(parts)

    def rows(self, chosen: Int[Tensor, "chosen"]) -> Evidence:
        """Return the evidence of some tokens."""
        given = {n: t[chosen] for n in _EACH if (t := getattr(self, n)) is not None}
        truth = None if self.truth is None else self.truth.rows(chosen)
        return Evidence({s: x[chosen] for s, x in self.acts.items()}, truth=truth, text=self.text, **given)

    def identity(self) -> dict[str, Any]:
        """Return sites, tokens and a hash of the activations, and the text where it is known."""
        origin = {} if self.text is None else self.text.record
        return {"sites": list(self.acts), "tokens": len(self), "hash": hash_tensors(self.acts), **origin}

    def sizes(self) -> dict[str, int]:
        """Return the number of tokens, for costs."""
        return {"tokens": len(self)}

    @cached_property
    def units(self) -> tuple[str, Int[Tensor, "token"]]:
        """Resampling unit of the bootstrap: its name, and the index of each token's unit (from 0)."""
        if self.sequence is None:
            return "single tokens", torch.arange(len(self))
        one = self.sequence.unique(return_inverse=True)[1].cpu()
        if self.context is None or int(one.max()) + 1 >= FEW:
            return "sequences", one
        two = self.context.unique(return_inverse=True)[1].cpu()
        return ("contexts", two) if int(two.max()) > int(one.max()) else ("sequences", one)

    def parted(self, share: float = 0.25) -> tuple[Evidence, Evidence]:
        """Split into a first part to fit controls on and the rest to judge on; no unit (sequence, context) is in both.

        Raises:
            Refused: there is one unit only.
        """
        unit = self.units[1]
        cut = max(1, round(share * (int(unit.max()) + 1)))
        first = unit < cut
        if bool(first.all()):
            what = "evidence of one sequence" if self.context is None else "text that fills one context"
            why = "controls are fitted on its first part, and nothing is left to judge on"
            raise Refused(what, why, "give more text, or shorter contexts")
        return self.rows(first.nonzero().squeeze(1)), self.rows((~first).nonzero().squeeze(1))

    @cached_property
    def groups(self) -> Int[Tensor, "token"]:
        """The unit of resampling of each token (from 0), or neighbours where there are more than 256 units."""
        unit = self.units[1]
        count = int(unit.max()) + 1
        return unit if count <= GROUPS else unit * GROUPS // count

    def of(self, site: str) -> Float[Tensor, "token _"]:
        """Return the activations of a site; activations without a name stand for any.

        Raises:
            Refused: the site is missing.
        """
        if site in self.acts:
            return self.acts[site]
        if set(self.acts) == {ANY}:
            return self.acts[ANY]
        raise Refused(f"evidence at {site}", f"there are activations of {', '.join(self.acts)}", "capture that site")

    def sites(self, names: Iterable[str]) -> dict[str, Float[Tensor, "token _"]]:
        """Return the activations of several sites."""
        return {s: self.of(s) for s in names}

    @property
    def how(self) -> str:
        """Units that the intervals are over, in words."""
        count, shown = int(self.units[1].max()) + 1, int(self.groups.max()) + 1
        if count == shown:
            return f"95 % over {count} {self.units[0]}"
        return f"95 % over {shown} groups of {self.units[0]}"


@dataclass(frozen=True, eq=False)
class EncodedEvidence:
    """Run of a dictionary over evidence: its code, and its reconstruction of every site it writes."""

    dictionary: Dictionary
    evidence: Evidence
    code: SparseCode
    output: dict[str, Float[Tensor, "token _"]]

    @cached_property
    def l0(self) -> float:
        """Mean number of active latents per token; negative ones count."""
        return float(self.code.counts().double().mean())


@torch.no_grad()
def encode_evidence(dictionary: Dictionary, evidence: Evidence) -> EncodedEvidence:
    """Run a dictionary over evidence, a part of the tokens at a time, where its weights are; what comes out is held
    in main memory.

    Raises:
        Refused: the evidence lacks a site that the dictionary reads.
    """
    acts, n = evidence.sites(dictionary.reads), len(evidence)
    codes, outs = [], []
    for first in range(0, n, PART):
        part = {s: x[first : first + PART].to(dictionary.device) for s, x in acts.items()}
        code = dictionary.encode(part)
        out = dictionary.decode(code, part)
        codes.append(code.to("cpu"))
        named = out if isinstance(out, Mapping) else {dictionary.writes[0]: out}
        outs.append({s: y.cpu() for s, y in named.items()})
    output = {s: torch.cat([o[s] for o in outs]) for s in dictionary.writes}
    return EncodedEvidence(dictionary, evidence, concat_tokens(codes), output)


def same_tokens(a: EncodedEvidence, b: EncodedEvidence) -> None:
    """Refuse runs over different numbers of tokens, whose firing cannot be compared.

    Raises:
        Refused: the numbers differ.
    """
    if len(a.evidence) != len(b.evidence):
        raise Refused(
            "two dictionaries on other tokens", "firing cannot be compared", "encode the same evidence with both"
        )


def _part(item: Any) -> Evidence | None:
    match item:
        case Tensor():
            return Evidence({ANY: item}) if len(item) else None
        case Mapping():
            return Evidence(dict(item)) if len(next(iter(item.values()), ())) else None
        case (Tensor() as x, SparseCode() as code):
            return Evidence({ANY: x}, truth=code)
    acts = {ANY: item.acts} if isinstance(item.acts, Tensor) else dict(item.acts)
    part = Evidence(acts, item.document, item.ids, item.position, context=item.context)
    kept = item.mask.nonzero().squeeze(1)
    return part.rows(kept) if len(kept) else None


def _joined(parts: list[Evidence]) -> Evidence:
    first = parts[0]
    given: dict[str, Any] = {
        n: torch.cat([getattr(p, n) for p in parts]) for n in _EACH if getattr(first, n) is not None
    }
    if first.truth is not None:
        given["truth"] = concat_tokens([p.truth for p in parts if p.truth is not None])
    return replace(first, acts={s: torch.cat([p.acts[s] for p in parts]) for s in first.acts}, **given)
