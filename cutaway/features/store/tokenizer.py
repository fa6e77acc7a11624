"""The tokenizer of a model, kept in a store as text, so that its tokens are read without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cutaway.models.model import Model


class StoredTokenizer:
    """The tokenizer of a store, without the model."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_file(str(path))

    def decode(self, ids: list[int], **options: Any) -> str:
        """Return the text of token ids."""
        return self.inner.decode(ids, skip_special_tokens=False)

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""
        return self.inner.encode(text, add_special_tokens=False).ids


def tokenizer_text(model: Model) -> str | None:
    """Return a model's tokenizer as the text of `tokenizer.json`; None if it is of another kind, or there is none."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    return None if backend is None else backend.to_str()
