"""The second moment of keys: how much a change of the matrix costs on ordinary text.

C = E[k kᵀ], uncentred, over the tokens of texts at the place that the matrix reads; one pass of a stream, in float64.
A few keys per dimension suffice (arXiv:2506.04226); the published 100,000 documents are not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

from cutaway.core.refuse import Refused
from cutaway.editing.places import Layer
from cutaway.models.model import Model
from cutaway.models.moments import Moments
from cutaway.streams.live import LiveStream
from cutaway.streams.masks import Masking
from cutaway.streams.packing import Packing
from cutaway.streams.sources import Documents, from_texts
from cutaway.tasks.prompts import Prompts

_CONTEXT = 128
_WINDOW = 4096  # tokens


def key_moments(model: Model, layers: Sequence[int], documents: Documents) -> dict[int, Moments]:
    """Return the moments, with covariance, of the keys of some layers over all documents, in one pass.

    Raises:
        Refused: fewer tokens than two.
    """
    places = {layer: str(Layer(model, layer).reads) for layer in dict.fromkeys(layers)}
    stream = LiveStream(
        model,
        documents,
        list(places.values()),
        packing=Packing(min(_CONTEXT, model.shape.context)),
        masking=Masking(sinks=None),
        window=_WINDOW,
    )
    found = {layer: Moments(stream.widths[a], covariance=True) for layer, a in places.items()}
    for batch in stream:
        for layer, a in places.items():
            found[layer].update(batch.acts[a])
    if any(m.count < 2 for m in found.values()):
        raise Refused("the second moment of keys", "the texts have fewer than two tokens", "give more texts")
    return found


def of_texts(model: Model, layers: Sequence[int], texts: Prompts) -> dict[int, Moments]:
    """Return the moments of the keys of some layers over texts."""
    return key_moments(model, layers, from_texts(list(texts), texts.name))
