"""Families of predicates over the tokens of a corpus, of which rules are made.

Every family gives each token a code; a literal of the family holds where the code has one value. Within a context,
codes look back only, as the model does, and special tokens count as tokens.

token · previous token · token before that · bigram · suffix (three letters) · class (digits, capitals, …) · repeated
(a token, or a bigram, that the context had before) · position · document (a token that the document holds)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cutaway.features.store.corpus import CODED, COUNTED, SCORE
from cutaway.features.store.feature_store import FeatureStore
from cutaway.features.store.latents import StoredLatents

CLASSES = ("white space", "digits", "punctuation", "capitals", "a capital first", "small letters")
REPEATED = ("a new token", "a token that the context had before", "a pair of tokens that the context had before")
_LAST = 8  # positions from here on are one
_SUFFIX = 3


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens of a store whose codes are kept, one row each; what families are computed from.

    Attributes:
        ids: token ids of all contexts, −1 in padding.
        rows: places of the tokens that count and have codes.
        held_out: True for those of documents that are held out for scores.
        document: document of each.
        strings: text of every token id.
    """

    ids: np.ndarray  # [context, position]
    rows: np.ndarray
    held_out: np.ndarray
    document: np.ndarray
    strings: list[str]

    @classmethod
    def of(cls, store: FeatureStore) -> Corpus:
        """Read the corpus of a store."""
        ids, flags, document = (store.column(n).numpy() for n in ("ids", "flags", "document"))
        rows = np.flatnonzero((flags & (COUNTED | CODED)).ravel() == COUNTED | CODED)
        most = int(ids.max(initial=0)) + 1
        held_out = flags.ravel()[rows] & SCORE > 0
        return cls(ids, rows, held_out, document.ravel()[rows], store.vocabulary(most))

    def row_of(self, places: np.ndarray) -> np.ndarray:
        """Return the rows of some places in the corpus."""
        return np.searchsorted(self.rows, places)

    def active(self, known: StoredLatents, latent: int) -> np.ndarray:
        """Return True for the rows on which a latent is active."""
        out = np.zeros(len(self.rows), dtype=bool)
        out[self.row_of(known.codes(latent)[0].numpy())] = True
        return out

    @cached_property
    def previous(self) -> np.ndarray:
        """The token before each, −1 at the beginning of a context."""
        return _shifted(self.ids, 1)

    @cached_property
    def presence(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents by number (from 0, of each row), and the pairs of a document and a token that it holds."""
        number = np.unique(self.document, return_inverse=True)[1]
        pairs = np.unique(number.astype(np.int64) * len(self.strings) + self.ids.ravel()[self.rows])
        return number, pairs // len(self.strings), pairs % len(self.strings)

    def codes(self, family: str) -> np.ndarray:
        """Return the code of every row in a family that is not `document`."""
        return FAMILIES[family].codes(self)[self.rows] if family != "document" else self.presence[0]


@dataclass(frozen=True)
class Family:
    """A family of predicates.

    Attributes:
        codes: gives every place of the corpus its code.
        says: a literal in words, given how tokens are written.
    """

    codes: Callable[[Corpus], np.ndarray]
    says: Callable[[Corpus, list[int]], str]


def _shifted(ids: np.ndarray, by: int) -> np.ndarray:
    out = np.full_like(ids, -1)
    out[:, by:] = ids[:, :-by]
    return out


def _pairs(c: Corpus) -> np.ndarray:
    pair = c.previous.astype(np.int64) * len(c.strings) + c.ids
    return np.where(c.previous >= 0, pair, -1)


def _seen(codes: np.ndarray) -> np.ndarray:
    """Return True where a code stood earlier in its row."""
    out = np.zeros(codes.shape, dtype=bool)
    order = np.argsort(codes, axis=1, kind="stable")
    inorder = np.take_along_axis(codes, order, 1)
    again = np.zeros_like(out)
    again[:, 1:] = inorder[:, 1:] == inorder[:, :-1]
    np.put_along_axis(out, order, again, 1)
    return out & (codes >= 0)


def _of_strings(code: Callable[[str], int]) -> Callable[[Corpus], np.ndarray]:
    def codes(c: Corpus) -> np.ndarray:
        table = np.array([*(code(s) for s in c.strings), -1], dtype=np.int64)
        return table[c.ids].ravel()

    return codes


def token_class(text: str) -> int:
    """Return the number in `CLASSES` of a token's class."""
    t = text.strip()
    if not t:
        return 0
    if t.isdigit():
        return 1
    if not any(letter.isalnum() for letter in t):
        return 2
    if t.isupper() and len(t) > 1:
        return 3
    return 4 if t[0].isupper() else 5


def _suffix(text: str) -> int:
    """Return the last three letters of a word of five or more as one number; −1 for shorter words."""
    t = text.strip()
    if len(t) <= _SUFFIX + 1:
        return -1
    total = 0
    for letter in t[-_SUFFIX:]:
        total = total << 21 | ord(letter)
    return total


def _spelled(code: int) -> str:
    return "".join(chr(code >> 21 * i & 0x1FFFFF) for i in reversed(range(_SUFFIX)))


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _tokens(c: Corpus, codes: list[int]) -> str:
    return _either(["the beginning of a context" if i < 0 else quoted(c.strings[i]) for i in codes])


def quoted(text: str) -> str:
    """Return a token in quotation marks, its white space visible."""
    return f"“{text.replace(chr(10), '↵')}”"


def _bigrams(c: Corpus, codes: list[int]) -> str:
    both = [(*divmod(i, len(c.strings)),) for i in codes]
    return _either([quoted(c.strings[a] + c.strings[b]) for a, b in both])


FAMILIES: dict[str, Family] = {
    "token": Family(lambda c: c.ids.ravel(), lambda c, x: f"the token is {_tokens(c, x)}"),
    "previous": Family(lambda c: c.previous.ravel(), lambda c, x: f"after {_tokens(c, x)}"),
    "before": Family(lambda c: _shifted(c.ids, 2).ravel(), lambda c, x: f"two tokens after {_tokens(c, x)}"),
    "bigram": Family(lambda c: _pairs(c).ravel(), lambda c, x: f"at the end of {_bigrams(c, x)}"),
    "suffix": Family(
        _of_strings(_suffix),
        lambda c, x: f"the word ends in {_either([quoted(_spelled(i)) if i >= 0 else 'few letters' for i in x])}",
    ),
    "class": Family(_of_strings(token_class), lambda c, x: f"the token is {_either([CLASSES[i] for i in x])}"),
    "repeated": Family(
        lambda c: np.where(_seen(_pairs(c)), 2, _seen(c.ids)).astype(np.int64).ravel(),
        lambda c, x: f"{_either([REPEATED[i] for i in x])}",
    ),
    "position": Family(
        lambda c: np.tile(np.minimum(np.arange(c.ids.shape[1]), _LAST), len(c.ids)),
        lambda c, x: f"at position {_either([f'{i}' if i < _LAST else f'{i} or later' for i in x])}",
    ),
    "document": Family(lambda c: c.ids.ravel(), lambda c, x: f"in documents that hold {_tokens(c, x)}"),
}
