"""Windows of a corpus: every context cut into pieces of equal length, each of one half of the documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cutaway.features.store.corpus import CODED, COUNTED, SCORE
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import StoredLatents

WIDTH = 24  # tokens
LEVELS = 10  # of activation that a language model is shown


@dataclass(frozen=True, eq=False)
class Window:
    """A window with what one latent does in it.

    Attributes:
        number: number of the window in the corpus.
        document: number of its document.
        tokens: text of each token.
        values: |activation| on each.
        counted: True for tokens that count.
    """

    number: int
    document: int
    tokens: list[str]
    values: np.ndarray
    counted: np.ndarray

    @property
    def active(self) -> np.ndarray:
        """True for tokens on which the latent is active."""
        return self.values > 0

    def levels(self, largest: float) -> list[int]:
        """Return min(10, ⌊10 |x| / largest⌋) of each token, as OpenAI's explainer has it."""
        return [min(LEVELS, int(LEVELS * v / largest)) for v in self.values]

    def marked(self, chosen: Sequence[int] | np.ndarray = ()) -> str:
        """Return the text, chosen tokens in « »."""
        held = set(np.asarray(chosen, dtype=int).tolist())
        return "".join(f"«{t}»" if i in held else t for i, t in enumerate(self.tokens)).replace("\n", "↵")


class Windows:
    """All windows of a store whose tokens have codes and are of one half; those of both halves are left out.

    Attributes:
        explain: numbers of windows of documents to explain with.
        score: numbers of windows of documents to score on.
    """

    def __init__(self, store: FeatureStore, width: int = WIDTH):
        self.store, self.width = store, width
        self.rows = -(-store.width // width)  # windows of a context
        flags, documents = (self._cut(store.column(n), fill) for n, fill in (("flags", 0), ("document", -1)))
        self.counted = flags & (COUNTED | CODED) == COUNTED | CODED  # [window offset]
        held_out = flags & SCORE > 0
        some, own = self.counted.any(1), np.where(self.counted, documents, -1).max(1)
        self.documents = own
        alone = np.where(self.counted, documents, own[:, None]).min(1) == own
        half = (held_out & self.counted).any(1)
        self.explain, self.score = np.flatnonzero(some & alone & ~half), np.flatnonzero(some & alone & half)

    def values(self, known: StoredLatents, latent: int) -> dict[int, np.ndarray]:
        """Return |activation| [offset] of the windows in which a latent is active."""
        place, value = (t.numpy() for t in known.codes(latent))
        context, position = np.divmod(place, self.store.width)
        number, offset = context * self.rows + position // self.width, position % self.width
        out: dict[int, np.ndarray] = {}
        for n, o, v in zip(number.tolist(), offset.tolist(), np.abs(value).tolist(), strict=True):
            out.setdefault(n, np.zeros(self.width))[o] = v
        return out

    def window(self, number: int, values: dict[int, np.ndarray]) -> Window:
        """Return a window with the activations of a latent."""
        context, first = number // self.rows, number % self.rows * self.width
        ids = self.store.context(context)["ids"][first : first + self.width]
        ids = ids[ids >= 0]
        own = values.get(number, np.zeros(self.width))[: len(ids)]
        return Window(number, int(self.documents[number]), self.store.texts(ids), own, self.counted[number][: len(ids)])

    def _cut(self, column: torch.Tensor, fill: int) -> np.ndarray:
        padded = torch.nn.functional.pad(column, (0, self.rows * self.width - column.shape[1]), value=fill)
        return padded.reshape(-1, self.width).numpy()
