"""Tokens of a model: texts to ids and back, as TransformerLens makes them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.compat.transformer_lens import utils
from cutaway.compat.transformer_lens.config import HookedTransformerConfig


class Tokenisation:
    """The methods of a model that know its tokenizer."""

    cfg: HookedTransformerConfig
    tokenizer: Any

    def set_tokenizer(self, tokenizer: Any, default_padding_side: str | None = None) -> None:
        """Use a copy of a tokenizer that puts the beginning of text in front, with padding where it has none."""
        if default_padding_side not in (None, "left", "right"):
            raise AssertionError(f"padding_side must be 'right', 'left' or 'None', got {default_padding_side}")
        self.tokenizer = t = copy.deepcopy(tokenizer)
        t.padding_side = default_padding_side or "right"
        if t.bos_token is not None and not (self.cfg.original_architecture or "").startswith("Olmo"):
            t.add_bos_token = True
        self.cfg.tokenizer_prepends_bos = len(t.encode("")) > 0
        t.eos_token = t.eos_token or "<|endoftext|>"
        t.pad_token, t.bos_token = t.pad_token or t.eos_token, t.bos_token or t.eos_token
        if self.cfg.d_vocab == -1:
            self.cfg.d_vocab = max(t.get_vocab().values()) + 1
        if self.cfg.d_vocab_out == -1:
            self.cfg.d_vocab_out = self.cfg.d_vocab

    def _side(self, padding_side: str | None) -> str:
        return padding_side or (self.tokenizer.padding_side if self.tokenizer is not None else "right")

    def _bos(self, prepend_bos: bool | None) -> bool:
        return self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos

    def to_tokens(
        self, input, prepend_bos=None, padding_side=None, move_to_device=True, truncate=True
    ) -> Int[Tensor, "batch pos"]:
        """Return the token ids of a text, or of several, padded."""
        t, prepend = self.tokenizer, self._bos(prepend_bos)
        if t is None:
            raise AssertionError("Cannot use to_tokens without a tokenizer")
        if prepend and not self.cfg.tokenizer_prepends_bos:
            input = t.bos_token + input if isinstance(input, str) else [t.bos_token + text for text in input]
        before, t.padding_side = t.padding_side, self._side(padding_side)
        limit = {"truncation": True, "max_length": self.cfg.n_ctx} if truncate else {}
        try:
            ids = t(input, return_tensors="pt", padding=True, **limit)["input_ids"]
            if not prepend and self.cfg.tokenizer_prepends_bos:
                ids = utils.get_tokens_with_bos_removed(t, ids)
        finally:
            t.padding_side = before
        return ids.to(self.cfg.device) if move_to_device else ids

    def to_string(self, tokens: Any) -> str | list[str]:
        """Return the text of token ids, or of each row of them."""
        tokens = tokens if isinstance(tokens, Tensor) else torch.tensor(tokens)
        if tokens.ndim > 2:
            raise ValueError(f"Invalid shape passed in: {tokens.shape}")
        decode = self.tokenizer.batch_decode if tokens.ndim == 2 else self.tokenizer.decode
        return decode(tokens, clean_up_tokenization_spaces=False)

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None, padding_side: str | None = None) -> Any:
        """Return the text of every token: of a text, of ids, or of each of several."""
        if isinstance(input, list):
            return [self.to_str_tokens(one, prepend_bos, padding_side) for one in input]
        if isinstance(input, str):
            ids: Any = self.to_tokens(input, prepend_bos, padding_side)[0]
        elif isinstance(input, Tensor | np.ndarray):
            ids = input.squeeze()
            ids = ids[None] if ids.ndim == 0 else ids
            if ids.ndim != 1:
                raise AssertionError(f"Invalid tokens input to to_str_tokens, has shape: {ids.shape}")
        else:
            raise ValueError(f"Invalid input type to to_str_tokens: {type(input)}")
        texts = self.tokenizer.batch_decode([[int(i)] for i in ids], clean_up_tokenization_spaces=False)
        return texts[: len(ids)]  # of no ids, transformers makes one empty text

    def to_single_token(self, string: str) -> int:
        """Return the id of a text that is one token."""
        token = self.to_tokens(string, prepend_bos=False).squeeze()
        if token.shape:
            raise AssertionError(f"Input string: {string} is not a single token!")
        return int(token.item())

    def to_single_str_token(self, int_token: int) -> str:
        """Return the text of one id."""
        if not isinstance(int_token, int):
            raise AssertionError(f"{int_token!r} is no token id")
        return self.to_str_tokens(torch.tensor([int_token]))[0]

    def get_token_position(self, single_token, input, mode="first", prepend_bos=None, padding_side=None) -> int:
        """Return where a token stands in a text or in ids: its first or last place."""
        ids = self.to_tokens(input, prepend_bos, padding_side) if isinstance(input, str) else torch.as_tensor(input)
        ids = ids.squeeze(0) if ids.ndim == 2 else ids
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        found = (ids == wanted).nonzero().flatten()
        if not len(found):
            raise AssertionError(f"The token {single_token!r} does not occur in the prompt")
        if mode not in ("first", "last"):
            raise ValueError(f"mode must be 'first' or 'last', not {mode}")
        return int(found[0 if mode == "first" else -1])
