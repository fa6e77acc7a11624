"""Latents on a text of yours: the code of every token, and what the dictionary misses of it.

`error` is ‖x − x̂‖² / ‖x − b‖² of each token over all sites that are written: the share of its distance from the
dictionary's bias that the code does not explain; 0 is a perfect reconstruction, 1 is that of no latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.models.vocabulary import special_ids


@dataclass(frozen=True)
class ReadText:
    """A text as latents read it.

    Attributes:
        tokens: its tokens.
        words: the text of each.
        special: True at special tokens.
        code: the code of every token.
        error: the share of each token that the code does not explain.
    """

    tokens: Tokens
    words: list[str]
    special: Bool[Tensor, "token"]
    code: SparseCode
    error: Float[Tensor, "token"]


@torch.no_grad()
def read_text(model: Model, source: Dictionary, text: str) -> ReadText:
    """Run a text and encode every token.

    Args:
        model: the model.
        source: a dictionary of its sites.
        text: the text.
    """
    tokens = model.tokens(text)
    acts = model.capture(tokens, list(dict.fromkeys([*source.reads, *source.writes])), logits=False)
    flat = {s: x.flatten(0, 1).flatten(1).to(source.device) for s, x in acts.items()}
    code = source.encode({s: flat[s] for s in source.reads})
    decoded = source.decode(code, {s: flat[s] for s in source.reads})
    made = {source.writes[0]: decoded} if isinstance(decoded, Tensor) else decoded
    missed = sum((flat[s] - made[s]).float().square().sum(1) for s in source.writes)
    whole = sum((flat[s] - source.b_dec[s]).float().square().sum(1) for s in source.writes)
    ids = tokens.ids.flatten()
    return ReadText(
        tokens,
        model.text.token_texts(ids, running=True),
        torch.isin(ids.cpu(), special_ids(model.tokenizer)),
        code.to("cpu"),
        (torch.as_tensor(missed) / torch.as_tensor(whole).clamp_min(1e-30)).cpu(),
    )
