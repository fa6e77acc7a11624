"""Which tokens count: special tokens and high-norm sinks are masked, by a rule that is stated and counted.

A token is special if its id is one of the tokenizer's special tokens. It is a sink if, at any site that is read, its
norm exceeds `sinks` times the median norm at that site, taken over the real tokens of the first contexts that are not
special. (Attention sinks carry norms of ten to a hundred times the usual: Sun et al. 2024, arXiv:2402.17762.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.refuse import Keyword, Refused
from cutaway.models.vocabulary import special_ids

CALIBRATION = 32  # contexts behind the medians


@dataclass(frozen=True)
class Masking:
    """Choice of the tokens to mask.

    Attributes:
        special: True to mask special tokens.
        sinks: mask tokens whose norm exceeds this many medians; None masks no token for its norm.
        drop: True to leave masked tokens out of batches.
    """

    special: bool = True
    sinks: float | None = 10.0
    drop: bool = True


MASKING = Masking()


@dataclass
class MaskRule:
    """A masking fitted to a tokenizer and a model.

    Attributes:
        masking: the choice.
        special: ids of the special tokens.
        thresholds: largest norm of an unmasked token, by address.
        counts: tokens seen and masked so far, by reason.
    """

    masking: Masking
    special: Int[Tensor, "id"]
    thresholds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))

    def learn(self, seen: Iterable[tuple[Int[Tensor, "token"], Mapping[str, Tensor]]]) -> None:
        """Set the thresholds from the first tokens and their activations."""
        if self.masking.sinks is None:
            return
        norms: dict[str, list[Tensor]] = {}
        for ids, acts in seen:
            usual = ~torch.isin(ids, self.special.to(ids.device))
            for a, x in acts.items():
                norms.setdefault(a, []).append(norm(x[usual]))
        medians = {a: torch.cat(n) for a, n in norms.items()}
        if any(len(n) == 0 for n in medians.values()):
            raise Refused(
                "sinks",
                "the first contexts hold special tokens only",
                ("give other documents, or ", Keyword("sinks", None)),
            )
        self.thresholds = {a: self.masking.sinks * float(n.median()) for a, n in medians.items()}

    def mask(self, ids: Int[Tensor, "token"], acts: Mapping[str, Tensor]) -> Bool[Tensor, "token"]:
        """Which tokens count; what does not is counted here, sinks only where they are not special.

        Raises:
            Refused: an activation is not a finite number.
        """
        special = torch.isin(ids, self.special.to(ids.device))
        sink = torch.zeros_like(special)
        for a, x in acts.items():
            size = norm(x)
            if not bool(size.isfinite().all()):
                bad = int((~size.isfinite()).sum())
                why = f"{bad} of {len(size)} tokens have no finite norm there"
                raise Refused(f"activations at {a}", why, "load the model in float32 or bfloat16, or mend it")
            if a in self.thresholds:
                sink |= size > self.thresholds[a]
        mask = ~sink
        if self.masking.special:
            mask &= ~special
        seen = {
            "tokens": len(ids),
            "special": int(special.sum()),
            "sinks": int((sink & ~special).sum()),
            "masked": int((~mask).sum()),
        }
        for name, n in seen.items():
            self.counts[name] += n
        return mask

    def as_dict(self) -> dict[str, Any]:
        """Return the rule in words, with thresholds and counts, for records."""
        words = [f"ids {self.special.tolist()}"] if self.masking.special else []
        if self.masking.sinks is not None:
            words.append(f"norm above {self.masking.sinks:g} × the median of the first contexts (about {CALIBRATION})")
        return {
            "masked": words,
            "dropped": self.masking.drop,
            "thresholds": dict(self.thresholds),
            "counts": dict(self.counts),
        }


COUNTED = ("contexts", "padding", "tokens", "special", "sinks", "masked")


def rule(masking: Masking, tokenizer: Any) -> MaskRule:
    """Return the rule of a masking for one tokenizer (None: no token is special).

    Raises:
        Refused: a factor for sinks that is not above 1.
    """
    if masking.sinks is not None and not masking.sinks > 1:
        raise Refused(
            Keyword("sinks", masking.sinks), "tokens of usual norm would be masked", "use a factor such as 10"
        )
    return MaskRule(masking, special_ids(tokenizer))


def norm(x: Float[Tensor, "token width"]) -> Float[Tensor, "token"]:
    """Norm of each token's activation, in float32 at least."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
