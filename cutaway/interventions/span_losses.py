"""Loss and accuracy at spans of tokens, under edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens

#: takes the tokens of some rows and the number of each row's prompt, and returns for each span the columns whose next
#: token belongs to it
Spans = Callable[[Tokens, Int[Tensor, "row"]], Sequence[Bool[Tensor, "row column"]]]


def span_losses(
    model: Model, tokens: Tokens, spans: Spans, edits: Sequence[Sequence[Edit]]
) -> Float[Tensor, "variant prompt span sum"]:
    """Return, under each list of edits, three sums over each prompt's tokens of every span: losses in nats, tokens
    that are likeliest, and tokens.
    """
    measure = Measure(partial(_sums, spans), Reads(last_logits=False, places=(Address("logits"),)))
    return sweep(model, tokens, edits, measure).float().cpu().unflatten(-1, (-1, 3))


def continued(tokens: Tokens, prompt: Int[Tensor, "row"]) -> list[Bool[Tensor, "row column"]]:
    """Return the span of whole texts: the columns behind which another token of the text stands."""
    return [tokens.mask & tokens.mask.roll(-1, 1)]


def _sums(spans: Spans, seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row column"]:
    """Return loss, hits and number of the tokens of each span."""
    assert seen.activations is not None
    tokens, logits = seen.activations.tokens, seen.activations["logits"]
    x, y = logits[:, :-1].float(), tokens.ids.roll(-1, 1)[:, :-1, None].to(logits.device)
    loss, hit = x.logsumexp(-1) - x.gather(-1, y)[..., 0], (x.argmax(-1) == y[..., 0]).float()
    where = [m[:, :-1].to(loss) for m in spans(tokens, prompt)]
    return torch.stack([(v * m).sum(-1) for m in where for v in (loss, hit, torch.ones_like(loss))], -1)
