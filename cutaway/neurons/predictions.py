"""Predictions at some places of prompts: their entropy and distance from the unigram distribution, as they are and with
the final norm's scale, or their component along that distribution, as without an edit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.anatomy.norms import Norm, wide
from cutaway.models.anatomy.unembedding import Unembedding, readable
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens

MEASURES = ["KL to unigram", "entropy"]
MEDIATORS = ["final norm's scale", "unigram component"]


def way_of(model: Model) -> Unembedding:
    """Return the way from the last stream to the logits.

    Raises:
        Refused: logits cannot be read off a stream.
    """
    return readable(model.anatomy, f"frequency neurons of {model.name}")


def read_out(model: Model, x: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest token"]:
    """Return the logits of the last stream."""
    way = way_of(model)
    return way.logits(way.read(x.to(model.dtype))).float()


@dataclass(frozen=True)
class Predictions:
    """Predictions at some places of prompts, as they are and with what they had without an edit.

    Attributes:
        places: the places.
        log_p: the log unigram distribution.
        scale: the final norm's divisor there without an edit.
        along: the logits' component along the centred log unigram distribution there.
    """

    model: Model
    places: Int[Tensor, "prompt place"]
    log_p: Float[Tensor, "token"]
    scale: Float[Tensor, "prompt place"]
    along: Float[Tensor, "prompt place"]

    @staticmethod
    def of(
        model: Model, tokens: Tokens, places: Int[Tensor, "prompt place"], log_p: Float[Tensor, "token"]
    ) -> Predictions:
        """Run the prompts without an edit."""
        none = torch.zeros(places.shape)
        first = Predictions(model, places, log_p, none, none)
        found = model.measure(tokens, Measure(first.parts, first.reads)).float().cpu()
        return replace(first, scale=found[..., 0], along=found[..., 1])

    @property
    def reads(self) -> Reads:
        """The part of a forward that is read: the last stream."""
        return Reads(last_logits=False, places=(Address("resid_post", self.model.shape.n_layers - 1),))

    def parts(self, seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row place part"]:
        """Return the final norm's divisor and the logits' component along the log unigram distribution."""
        norm, out = self._norm(), list[Tensor]()
        for some, _, _ in self._rows(seen, prompt):
            scale = norm.scale(some) if norm is not None else some.new_ones(len(some))
            out.append(torch.stack([scale, read_out(self.model, some) @ self._unigram(some)], -1))
        return torch.stack(out)

    def measures(self, seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row number"]:
        """Return KL(prediction ‖ unigram) and entropy, mean over each row's places: as they are, with the scale held
        and with the component held.
        """
        out = list[Tensor]()
        for some, real, row in self._rows(seen, prompt):
            logits, u = read_out(self.model, some), self._unigram(some)
            away = self.along[row].to(u) - logits @ u
            paths = (logits, self._with_scale(some, self.scale[row]), logits + away[:, None] * u)
            out.append(torch.stack([self._mean(x, real) for x in paths]).flatten())
        return torch.stack(out)

    def _rows(self, seen: Seen, prompt: Int[Tensor, "row"]) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Yield the stream at the places of each row, which of them there are, and the number of its prompt."""
        assert seen.activations is not None
        x = seen.activations[str(self.reads.places[0])]
        for row, stream, front in zip(prompt.tolist(), x, seen.activations.tokens.column(0).tolist(), strict=True):
            at = self.places[row].to(x.device)
            yield stream[front + at.clamp_min(0)], at >= 0, row

    def _with_scale(
        self, x: Float[Tensor, "place d_model"], scale: Float[Tensor, "place"]
    ) -> Float[Tensor, "place token"]:
        """Return the logits with the final norm's divisor held."""
        norm, way = self._norm(), way_of(self.model)
        if norm is None:
            return read_out(self.model, x)

        def held(y: Tensor) -> Tensor:
            return (norm.linear(wide(y), scale.to(y.device)) + norm.bias).to(y)

        return way.logits(way.read(x.to(self.model.dtype), held)).float()

    def _mean(self, logits: Float[Tensor, "place token"], real: Bool[Tensor, "place"]) -> Float[Tensor, "measure"]:
        log_q = logits.log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1)
        both = torch.stack([-(log_q.exp() * self.log_p.to(log_q)).sum(-1) - entropy, entropy], -1)
        return (both * real[:, None]).sum(0) / real.sum()

    def _norm(self) -> Norm | None:
        final = self.model.anatomy.top("final")
        return self.model.anatomy.norm(final) if final is not None else None

    def _unigram(self, like: Tensor) -> Float[Tensor, "token"]:
        u = self.log_p - self.log_p.mean()
        return (u / u.norm().clamp_min(1e-30)).to(like.device)
