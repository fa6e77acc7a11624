"""Documents packed into contexts of one length, with cursors from which packing goes on exactly.

A document becomes its ids, after a beginning-of-text token (`bos` is `document` or `both`) and before an end-of-text
token (`eos`). Contexts are filled with documents one after the other, or, with `across=False`, hold a piece of one
document only. With `bos` `context` or `both` every context begins with the token; where a document that has its own
begins there too, it is there once. Nothing is left out: what does not fill a context is padded, and padding is masked.
Attention is not cut at document boundaries; `document` and `position` say where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cutaway.core.record import hash_tensors
from cutaway.core.refuse import Keyword, Refused
from cutaway.streams.sources import Document, Documents, TokenRows

BOS = ("auto", "both", "context", "document", "none")
_DOCUMENTS = 64  # tokenised in one call: tokenizers work on many at once


@dataclass(frozen=True)
class Packing:
    """Packing of documents into contexts of one length.

    `bos="auto"` is `both` where the tokenizer has a beginning-of-text token; where it has none, documents end with its
    end-of-text token instead; and ids that came as ids are taken as they are.

    Attributes:
        context: tokens per context.
        bos: begin contexts, documents or both with the beginning-of-text token.
        eos: True to end documents with the end-of-text token.
        across: True to let a document continue in the next context and several share one.
        rows: contexts that go through the model at once.
    """

    context: int = 128
    bos: str = "auto"
    eos: bool = False
    across: bool = True
    rows: int = 8

    def resolved(self, tokenizer: Any, documents: Documents) -> Packing:
        """Return the same packing with `auto` decided.

        Raises:
            Refused: sizes that are too small, or a token that the tokenizer does not have.
        """
        if self.context < 2 or self.rows < 1:
            raise Refused(f"contexts of {self.context} × {self.rows}", "that is too small", "use at least 2 × 1")
        if self.bos not in BOS:
            raise Refused(Keyword("bos", self.bos), "it is no policy", f"use {', '.join(BOS)}")
        has_bos, has_eos = (getattr(tokenizer, f"{n}_token_id", None) is not None for n in ("bos", "eos"))
        new = self
        if self.bos == "auto":
            text = not isinstance(documents, TokenRows)
            new = replace(
                self, bos="both" if text and has_bos else "none", eos=self.eos or (text and has_eos and not has_bos)
            )
        for wanted, has, name in ((new.bos != "none", has_bos, "bos"), (new.eos, has_eos, "eos")):
            if wanted and not has:
                asked, other = (new.bos, "none") if name == "bos" else (True, False)
                why = f"the tokenizer has no {name} token, or there is none"
                raise Refused(Keyword(name, asked), why, ("use ", Keyword(name, other)))
        return new


PACKING = Packing()


@dataclass(frozen=True)
class Cursor:
    """Start of the next context: token `token` of document `document`, whose hash is `digest`."""

    document: int = 0
    token: int = 0
    context: int = 0
    epoch: int = 0
    digest: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the cursor as JSON-ready data."""
        return asdict(self)


@dataclass(frozen=True)
class Contexts:
    """Some contexts as a padded batch, with their cursor and that of the next; `document` is −1 in padding."""

    ids: Int[Tensor, "row position"]
    real: Bool[Tensor, "row position"]
    document: Int[Tensor, "row position"]
    cursor: Cursor
    after: Cursor


class Packer:
    """Contexts of documents, from any cursor on; `others` are tokenizers that must give the same ids."""

    def __init__(self, documents: Documents, tokenizer: Any, packing: Packing, others: Sequence[Any] = ()):
        self.documents, self.tokenizer, self.others = documents, tokenizer, others
        if any(_special(o) != _special(tokenizer) for o in others):
            raise _apart("their tokenizers have other special tokens")
        self.packing = packing.resolved(tokenizer, documents)
        self.bos = getattr(tokenizer, "bos_token_id", None) if self.packing.bos != "none" else None
        self.eos = getattr(tokenizer, "eos_token_id", None) if self.packing.eos else None
        pads = (getattr(tokenizer, f"{n}_token_id", None) for n in ("pad", "eos", "bos"))
        self.pad = next((p for p in pads if p is not None), 0)

    @property
    def beginning(self) -> str:
        """The token that contexts begin with, in words, with a note if the tokenizer does not begin prompts so."""
        if self.bos is None:
            return "no beginning-of-text token is put"
        where = {"both": "contexts and documents begin", "context": "contexts begin", "document": "documents begin"}
        own = self.tokenizer("a")["input_ids"][:1] == [self.bos]
        said = f"{where[self.packing.bos]} with {self.tokenizer.decode([self.bos])!r}"
        return said if own else f"{said}, which the tokenizer itself does not put before a prompt: capture(…, bos=True)"

    def contexts(self, cursor: Cursor, epochs: int | None = 1) -> Iterator[Contexts]:
        """Yield the contexts from a cursor on, `rows` at a time (fewer at the end of an epoch); `epochs=None` never
        ends.

        Raises:
            Refused: the documents are not those that the cursor was made for, or there is none.
        """
        while epochs is None or cursor.epoch < epochs:
            rows, epoch = self._rows(cursor), cursor.epoch
            held = list(islice(rows, self.packing.rows))
            if not held and cursor.context == 0:
                raise Refused(f"documents of {self.documents.identity()}", "there is no token in them", "give some")
            cursor = replace(Cursor(), epoch=epoch + 1, context=cursor.context)
            while held:
                following = list(islice(rows, self.packing.rows))
                cursor = (
                    following[0].cursor if following else Cursor(context=held[-1].cursor.context + 1, epoch=epoch + 1)
                )
                yield _stacked(held, cursor)
                held = following

    def _rows(self, cursor: Cursor) -> Iterator[_Row]:
        """Yield one context after another; a row is emitted when it is full, or must not take more."""
        row = _Row(self, cursor)
        for number, digest, ids in self._sequences(cursor):
            at = cursor.token if number == cursor.document else 0
            while at < len(ids):
                at += row.take(number, at, ids, digest)
                if row.full or (at == len(ids) and not self.packing.across):
                    yield row
                    row = _Row(self, replace(cursor, context=row.cursor.context + 1))
        if row.filled:
            yield row

    def _sequences(self, cursor: Cursor) -> Iterator[tuple[int, str, Tensor]]:
        """Yield the number, hash and ids of the documents from the cursor's on."""
        first = [self.bos] if self.packing.bos in ("document", "both") else []
        last = [self.eos] if self.packing.eos else []
        found, number = self.documents.read(cursor.document), cursor.document
        while some := list(islice(found, _DOCUMENTS)):
            for ids in self._tokenized(some):
                digest = hash_tensors({"ids": ids})
                if number == cursor.document and cursor.digest not in ("", digest):
                    why = f"document {number} is not the one that it was made for"
                    raise Refused("a cursor", why, "give the documents of then, or begin anew")
                yield number, digest, torch.cat([ids.new_tensor(first), ids, ids.new_tensor(last)])
                number += 1
        if number == cursor.document and cursor.digest:
            raise Refused("a cursor", f"there is no document {number}", "give the documents of then, or begin anew")

    def _tokenized(self, some: list[Document]) -> Iterator[Tensor]:
        texts = [d for d in some if isinstance(d, str)]
        if texts and self.tokenizer is None:
            raise Refused("texts", "this model was loaded without a tokenizer", "give token ids")
        options = {"add_special_tokens": False, "verbose": False}
        found = self.tokenizer(texts, **options)["input_ids"] if texts else []
        if any(texts and other(texts, **options)["input_ids"] != found for other in self.others):
            raise _apart("their tokenizers make other ids of the same text")
        of_texts = iter(found)
        for d in some:
            yield torch.as_tensor(next(of_texts) if isinstance(d, str) else d, dtype=torch.long)


class _Row:
    """A context being filled."""

    def __init__(self, packer: Packer, cursor: Cursor):
        self.packer, self.cursor, self.filled = packer, cursor, 0
        width = packer.packing.context
        self.ids = torch.full((1, width), packer.pad)
        self.document = torch.full((1, width), -1)

    @property
    def full(self) -> bool:
        """True if it has no room left."""
        return self.filled == self.ids.shape[1]

    def take(self, number: int, at: int, ids: Tensor, digest: str) -> int:
        """Fill in what there is room for of a document from token `at` on; returns how many tokens that is."""
        policy = self.packer.packing.bos
        if self.filled == 0:
            self.cursor = replace(self.cursor, document=number, token=at, digest=digest)
            if policy == "context" or (policy == "both" and at > 0):
                self._put(number, ids.new_tensor([self.packer.bos]))
        part = ids[at : at + self.ids.shape[1] - self.filled]
        self._put(number, part)
        return len(part)

    def _put(self, number: int, part: Tensor) -> None:
        where = slice(self.filled, self.filled + len(part))
        self.ids[0, where], self.document[0, where] = part, number
        self.filled += len(part)


def _special(tokenizer: Any) -> tuple[Any, ...]:
    """Return the identity of a tokenizer's special tokens, for comparison; the first entry is True if there is none."""
    ids = sorted(set(getattr(tokenizer, "all_special_ids", None) or ()))
    return tokenizer is None, ids, *(getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos"))


def _apart(why: str) -> Refused:
    return Refused("several models on the same text", why, "use models with one tokenizer, or give token ids")


def _stacked(rows: list[_Row], after: Cursor) -> Contexts:
    ids, document = (torch.cat([getattr(r, n) for r in rows]) for n in ("ids", "document"))
    return Contexts(ids, document >= 0, document, rows[0].cursor, after)
