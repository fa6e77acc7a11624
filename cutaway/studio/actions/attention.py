"""Attention of a prompt: the largest weights of each query, a tile of queries at a time."""

from __future__ import annotations

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.studio.messages import Attended, Attention, HeadLooks, Token
from cutaway.studio.session import Session


def attention(session: Session, request: Attention) -> Attended:
    """Return where each query of a tile looks, in one head of a layer or in all.

    Raises:
        Refused: a layer or head that the model does not have, or a tile behind the prompt.
    """
    model = session.model
    (place,) = model.places([Address("pattern", request.layer, request.head)])
    tokens = model.tokens([request.prompt])
    ids = tokens.ids[0].tolist()
    if request.start >= len(ids):
        raise Refused(f"a tile from {request.start} on", f"the prompt has {len(ids)} tokens", "begin at 0")
    queries = slice(request.start, request.start + request.count)
    pattern = model.capture(tokens, [place], logits=False)[str(place.place)][0, :, queries].float().cpu()
    weights, keys = pattern.topk(min(request.top, len(ids)), -1)
    heads = range(len(pattern)) if request.head is None else [request.head]
    return Attended(
        tokens=[Token(id=i, text=t) for i, t in zip(ids, model.text.token_texts(ids), strict=True)],
        start=request.start,
        heads=[_looks(h, keys[h].tolist(), weights[h].tolist()) for h in heads],
    )


def _looks(head: int, keys: list[list[int]], weights: list[list[float]]) -> HeadLooks:
    """Return the weights of a head that are not zero, as behind a query."""
    some = [[(k, round(w, 5)) for k, w in zip(*row, strict=True) if w > 0] for row in zip(keys, weights, strict=True)]
    return HeadLooks(
        head=head, keys=[[k for k, _ in row] for row in some], weights=[[w for _, w in row] for row in some]
    )
