"""A small harvest: a random model, two dictionaries, sentences, and the activations of all of it by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cutaway as ca
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import Relu, TopK
from cutaway.dictionaries.transforms import autoencoder, one_block
from cutaway.features import FeatureStore, Keep, harvest
from cutaway.models.model import Model
from cutaway.streams import Masking, Packing, from_texts
from tests.conformance import subjects

WIDTH = 16
PACKING = Packing(WIDTH, across=False, rows=4)
MASKING = Masking(sinks=None)
KEEP = Keep(top=5, samples=2, window=7, partners=3)


@cache
def model() -> Model:
    """A model that nobody trained."""
    return subjects.random_llama()


@cache
def dictionaries() -> dict[str, Dictionary]:
    """Latents of which a fifth is active, the last one never; and a transcoder of a fixed number."""
    g = torch.Generator().manual_seed(3)
    rows, others = (torch.nn.functional.normalize(torch.randn(24, 32, generator=g), dim=1) for _ in range(2))
    acts = model().capture(texts()[:8], "resid_post.1")
    seen = acts["resid_post.1"][acts.tokens.mask] @ rows.T
    bias = -seen.quantile(0.8, dim=0)
    bias[-1] = -1e4
    some = autoencoder("resid_post.1", rows, rows, bias, torch.zeros(32), Relu())
    few = one_block({"mlp_in.0": others}, {"mlp_out.0": rows}, torch.zeros(24), {"mlp_out.0": torch.zeros(32)}, TopK(3))
    return {"some": some, "few": few}


@cache
def texts() -> list[str]:
    """Random words, 60 documents; no end of a document is short, so no two contexts are alike."""
    g, words = torch.Generator().manual_seed(0), [*subjects.NAMES, *subjects.PLACES, *subjects.THINGS]
    lengths = torch.randint(7, 14, (60,), generator=g) + 15 * torch.randint(0, 3, (60,), generator=g)
    return [" ".join(words[i] for i in torch.randint(len(words), (n,), generator=g)) for n in lengths.tolist()]


def made(out: Path, documents: Any = None, **options: Any) -> FeatureStore:
    """The store of the sentences."""
    given: dict[str, Any] = {"packing": PACKING, "masking": MASKING, "keep": KEEP, **options}
    return harvest(model(), dictionaries(), from_texts(documents or texts()), out, **given)


@dataclass(frozen=True)
class Brute:
    """Contexts with their activations, each context alone through the model."""

    ids: list[list[int]]
    codes: dict[str, torch.Tensor]  # [context, position, latent], 0 where masked or padded


@cache
def brute() -> Brute:
    """Every sentence cut into contexts by hand, with a beginning-of-text token before each."""
    tokenizer, ids = subjects.tokenizer(), list[list[int]]()
    for text in texts():
        own = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids.append(own[:WIDTH])
        rest = own[WIDTH:]
        while rest:
            ids.append([0, *rest[: WIDTH - 1]])
            rest = rest[WIDTH - 1 :]
    codes = {n: torch.zeros(len(ids), WIDTH, d.n_latents) for n, d in dictionaries().items()}
    for i, row in enumerate(ids):
        for name, d in dictionaries().items():
            acts = model().capture(torch.tensor([row]), list(d.reads), logits=False)
            codes[name][i, : len(row)] = d.encode({s: acts[s][0] for s in d.reads}).dense()
            codes[name][i, 0] = 0  # the beginning-of-text token is masked
    return Brute(ids, codes)


def found(code: torch.Tensor, store: FeatureStore) -> torch.Tensor:
    """The same with the contexts that the store has, in its order."""
    ids = [tuple(row) for row in brute().ids]
    own = [tuple(i for i in row if i >= 0) for row in store.column("ids").tolist()]
    return code[[ids.index(row) for row in own]]


WORDS = [*subjects.NAMES, *subjects.PLACES, *subjects.THINGS]


def documents(seed: int, more: tuple[str, ...] = (), n: int = 40) -> list[str]:
    """Random words of several lengths; in a corpus with `more`, those words take a third of the places."""
    g = np.random.default_rng(seed)
    drawn = [g.choice(WORDS, g.integers(9, 30)) for _ in range(n)]
    return [" ".join(g.choice(more) if more and g.random() < 1 / 3 else w for w in d) for d in drawn]


def of_tokens(out, written: list[str], share: float = 0.95) -> FeatureStore:
    """The store of a dictionary with a latent for each word, active on its token alone."""
    m = model()
    rows = m.hf.model.embed_tokens.weight.detach()[[m.text.token_id(w) for w in WORDS]]
    unit = torch.nn.functional.normalize(rows, dim=1)
    d = autoencoder("resid_pre.0", unit, unit, -share * rows.norm(dim=1), torch.zeros(32), Relu())
    return harvest(m, d, from_texts(written), out, packing=PACKING, masking=MASKING, keep=KEEP)


__all__ = ["KEEP", "MASKING", "PACKING", "WIDTH", "WORDS", "brute", "ca", "dictionaries", "documents", "found", "made",
           "model", "of_tokens", "texts"]  # fmt: skip
