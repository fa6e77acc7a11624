"""The text side of a model: words as tokens, tokens as words, and the most likely next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.models.spacing import word_ids
from cutaway.models.tokens import Tokens, running_texts


class Prediction(NamedTuple):
    """A candidate for the next token."""

    text: str
    probability: float
    id: int


def special_ids(tokenizer: Any) -> Int[Tensor, "id"]:
    """Return the ids of a tokenizer's special tokens, in order; without a tokenizer no token is special."""
    ids = getattr(tokenizer, "all_special_ids", None) or ()
    return torch.tensor(sorted(set(ids)), dtype=torch.long)


@dataclass(frozen=True)
class Vocabulary:
    """Words and tokens of one model, as `model.text`.

    Attributes:
        tokenizer: the model's tokenizer, or None.
        tokens: turns prompts into tokens on the model's device.
        last_logits: runs tokens and returns the logits after the last token of each prompt [batch token].
    """

    tokenizer: Any
    tokens: Callable[..., Tokens]
    last_logits: Callable[[Tokens], Tensor]

    def token_id(self, word: str) -> int:
        """Return the single token that `word` becomes when it continues a prompt.

        Raises:
            Refused: the word is several tokens, or none.
        """
        ids = self.word_ids(word)
        if len(ids) != 1:
            parts = " + ".join(repr(p) for p in self.token_texts(ids)) or "nothing"
            raise Refused(f"word {word!r}", f"it is {len(ids)} tokens here: {parts}", "choose a word that is one token")
        return ids[0]

    def word_ids(self, word: str) -> list[int]:
        """Return the tokens that `word` becomes after other words, with a leading space where the tokenizer wants one.

        Raises:
            Refused: the word is empty or not text, or the model has no tokenizer.
        """
        return word_ids(self.tokenizer, word)

    def token_texts(self, ids: Sequence[int] | Tensor, running: bool = False) -> list[str]:
        """Return the display string of each token id.

        Args:
            ids: token ids.
            running: decode the ids as one running text, so that each string keeps its spaces.
        """
        items = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if self.tokenizer is None:
            return [str(i) for i in items]
        return running_texts(self.tokenizer, items) if running else [self.tokenizer.decode([i]) for i in items]

    def predict(self, prompt: str | Tokens | Tensor, k: int = 5) -> list[Prediction]:
        """Return the `k` most likely next tokens of one prompt, the likeliest first.

        Raises:
            Refused: several prompts, or `k` outside the vocabulary.
        """
        tokens = self.tokens(prompt)
        if len(tokens) != 1:
            raise Refused(f"{len(tokens)} prompts", "predictions are of one prompt", "predict one prompt at a time")
        probabilities = self.last_logits(tokens)[0].float().softmax(-1)
        if not 1 <= k <= len(probabilities):
            raise Refused(f"k={k}", f"the vocabulary has {len(probabilities)} tokens", "ask for at least one of them")
        values, ids = (x.tolist() for x in probabilities.topk(k))
        return [Prediction(*row) for row in zip(self.token_texts(ids), values, ids, strict=True)]
