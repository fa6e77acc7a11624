"""What the tests of this room share: a tiny model, a small tokenizer, and the brute-force way to activations."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from cutaway.models.model import Model
from cutaway.models.tokens import batch
from tests.models.common import model
from tests.models.tiny import V

SITES = ["resid_pre.1", "z.1", "mlp_post.0"]


class Letters:
    """A tokenizer with a token a letter; `bos` 1 and `eos` 2 are special, letters begin at 10."""

    pad_token_id = 0
    unk_token_id = None

    def __init__(self, bos: bool = True, eos: bool = True):
        self.bos_token_id = 1 if bos else None
        self.eos_token_id = 2 if eos else None
        self.all_special_ids = [0, *([1] if bos else []), *([2] if eos else [])]

    def decode(self, ids: list[int]) -> str:
        """Letters, and special tokens as <1>."""
        return "".join(f"<{i}>" if i < 10 else chr(97 + i - 10) for i in ids)

    def __call__(self, texts: list[str] | str, **options: Any) -> dict[str, Any]:
        if isinstance(texts, str):  # a prompt; this tokenizer puts nothing before it
            return {"input_ids": self([texts], add_special_tokens=False, verbose=False)["input_ids"][0]}
        assert options == {"add_special_tokens": False, "verbose": False}
        return {"input_ids": [[10 + (ord(c) - 97) % 80 for c in t] for t in texts]}


@cache
def lettered(name: str = "llama", dtype: torch.dtype = torch.float32) -> Model:
    """A tiny model that reads letters."""
    return Model(model(name, dtype).hf, Letters(), name)


def texts(n: int, seed: int = 0) -> list[str]:
    """Words of 1 to 30 letters."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (n,), generator=g).tolist()
    return ["".join(chr(97 + int(i)) for i in torch.randint(26, (k,), generator=g)) for k in lengths]


def ids(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows of random token ids without special tokens."""
    return torch.randint(10, V, (rows, width), generator=torch.Generator().manual_seed(seed))


def brute(m: Model, rows: list[list[int]], site: str) -> torch.Tensor:
    """Activations of every token of some contexts: each context alone, the whole model, heads flattened."""
    return torch.cat([m.capture(batch([r]), site)[site][0].flatten(1) for r in rows])
