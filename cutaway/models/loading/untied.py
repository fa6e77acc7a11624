"""A copy of a model whose unembedding has a weight of its own, so that a change of the embedding leaves it alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from cutaway.core import repeat as again
from cutaway.core.repeat import Made
from cutaway.models.loading.provenance import look
from cutaway.models.model import Model


def untied(model: Model) -> Model:
    """Return a copy with the same outputs whose embedding and unembedding are two weights, also in files.

    A model that has two already is returned as it is.
    """
    embedding, output = model.hf.get_input_embeddings(), model.hf.get_output_embeddings()
    if output is None or output.weight is not embedding.weight:
        return model
    hf = deepcopy(model.hf)
    untie(hf)
    copy = Model(hf, model.tokenizer, f"{model.name} (untied)", model.world, disabled=model.disabled)
    how = again.made("model", model)
    no_flags = how.no_flags or "no flag says an untied copy"
    made = Made("ca.models.untied(model)", {}, no_flags, how.no_python, {"model": how.python})
    copy.made = made.of(copy, look)
    return copy


def untie(hf: Any) -> None:
    """Give the unembedding a weight of its own."""
    head, embed = hf.get_output_embeddings(), hf.get_input_embeddings()
    if head is not None and head.weight is embed.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        hf.config.tie_word_embeddings = False
