"""Attention of one prompt or two: the largest weights of each query, a tile of queries at a time."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.studio.actions.prompts import apart, tokens_of
from cutaway.studio.messages import Attended, Attention, HeadLooks, Looked
from cutaway.studio.session import Session


def attention(session: Session, request: Attention) -> Attended:
    """Return where each query of a tile looks, in one head of a layer or in all; of two prompts also the difference.

    Raises:
        Refused: a layer or head that the model does not have, or a tile behind the prompt.
    """
    first, pattern = _looked(session, request, request.prompt)
    if request.start >= len(first.tokens):
        raise Refused(f"a tile from {request.start} on", f"the prompt has {len(first.tokens)} tokens", "begin at 0")
    found = {"tokens": first.tokens, "heads": first.heads, "start": request.start}
    if not request.other:
        return Attended(**found)
    second, other = _looked(session, request, request.other)
    why = apart(first.tokens, second.tokens)
    return Attended(**found, other=second, apart=why, difference=[] if why else _looks(request, pattern - other))


def _looked(session: Session, request: Attention, prompt: str) -> tuple[Looked, Float[Tensor, "head query key"]]:
    """Return the attention of a prompt: its largest weights, and all of them."""
    model = session.model
    (place,) = model.places([Address("pattern", request.layer, request.head)])
    tokens = model.tokens([prompt])
    queries = slice(request.start, request.start + request.count)
    pattern = model.capture(tokens, [place], logits=False)[str(place.place)][0, :, queries].float().cpu()
    return Looked(tokens=tokens_of(model, tokens), heads=_looks(request, pattern)), pattern


def _looks(request: Attention, pattern: Float[Tensor, "head query key"]) -> list[HeadLooks]:
    """Return the weights of each head that are largest by their size and not zero, as behind a query."""
    keys = pattern.abs().topk(min(request.top, pattern.shape[-1]), -1).indices
    weights = pattern.gather(-1, keys)
    heads = range(len(pattern)) if request.head is None else [request.head]
    found = []
    for h in heads:
        rows = zip(keys[h].tolist(), weights[h].tolist(), strict=True)
        some = [[(k, round(w, 5)) for k, w in zip(*row, strict=True) if w] for row in rows]
        found.append(
            HeadLooks(head=h, keys=[[k for k, _ in r] for r in some], weights=[[w for _, w in r] for r in some])
        )
    return found
