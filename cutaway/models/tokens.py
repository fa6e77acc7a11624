"""Prompts as tokens: ids, mask, offsets into the user's text, and positions that padding cannot move."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, takewhile
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cutaway.core.record import note
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.text import check_encodable, occurrences
from cutaway.models.turns import parts

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Tokens:
    """A padded batch of prompts.

    `texts` are the prompts as the user wrote them ("" where only ids were given), `pieces[row]` the display string
    of every real token, `offsets[row]` its (start, end) in the text (None for special tokens).

    Continuations may stand behind a prompt, each of which goes on with the prompt itself and sees none of the others
    (`continued`): `tails[row]` are their numbers of tokens. They are columns of the batch, but no positions: lengths,
    the last token, pieces and offsets are those of the prompt.

    Tokens are never written to: lengths and columns are computed once.
    """

    ids: Int[Tensor, "batch position"]
    mask: Bool[Tensor, "batch position"]
    texts: tuple[str, ...]
    pieces: tuple[tuple[str, ...], ...]
    offsets: tuple[tuple[tuple[int, int] | None, ...], ...]
    side: Side = "right"
    tails: tuple[tuple[int, ...], ...] = ()

    def __len__(self) -> int:
        return self.ids.shape[0]

    @cached_property
    def lengths(self) -> Int[Tensor, "batch"]:
        """Number of real tokens of each prompt."""
        return self.mask.sum(-1) - self._behind if self.tails else self.mask.sum(-1)

    @property
    def _behind(self) -> Int[Tensor, "batch"]:
        return torch.tensor([sum(t) for t in self.tails], device=self.mask.device)

    @cached_property
    def shortest(self) -> int:
        """The number of real tokens of the shortest prompt; 0 of no prompts."""
        return int(self.lengths.min()) if len(self) else 0

    @cached_property
    def extremes(self) -> tuple[int, int]:
        """The smallest and the largest id; (−1, −1) of no tokens at all."""
        return (int(self.ids.min()), int(self.ids.max())) if self.ids.numel() else (-1, -1)

    @cached_property
    def padded(self) -> bool:
        """True if any row is shorter than the batch."""
        return not bool(self.mask.all())

    @cached_property
    def uneven(self) -> bool:
        """True if a position of the prompts is not one column in all rows."""
        if not self.tails:
            return self.padded
        first, lengths = self.column(0), self.lengths
        return bool((lengths != lengths[0]).any() | (first != first[0]).any())

    @property
    def prompt(self) -> Bool[Tensor, "batch position"]:
        """True at the real tokens of the prompts themselves, without what continues them."""
        return self.mask & (self.tail_of == 0) if self.tails else self.mask

    @property
    def position_ids(self) -> Int[Tensor, "batch position"]:
        """Position of each token in its own prompt, whatever the padding (padding itself gets 0); a continuation's
        first token has the one behind its prompt.
        """
        counted = (self.mask.long().cumsum(-1) - 1).clamp_min(0)
        if not self.tails:
            return counted
        counts, b = torch.tensor(self.tails, device=self.ids.device), self.tail_of
        before = (counts.cumsum(1) - counts).gather(1, (b - 1).clamp_min(0))
        return torch.where(b > 0, counted - before, counted)

    @property
    def predicting(self) -> Int[Tensor, "batch step"]:
        """Columns from which continuations are predicted: that of the prompt's last token, and those behind it."""
        steps = torch.arange(max((sum(t) for t in self.tails), default=1), device=self.ids.device)
        return (self.last[:, None] + steps).clamp_max(self.ids.shape[1] - 1)

    @cached_property
    def tail_of(self) -> Int[Tensor, "batch position"]:
        """Number of the continuation that each column belongs to, from 1; 0 in the prompt and in padding."""
        if not self.tails:
            return torch.zeros_like(self.ids)
        ends = torch.tensor(self.tails, device=self.ids.device).cumsum(1)
        behind = torch.arange(self.ids.shape[1], device=self.ids.device) - self.last[:, None] - 1
        inside = (behind >= 0) & (behind < ends[:, -1:])
        return torch.where(inside, 1 + (behind[:, :, None] >= ends[:, None]).sum(-1), 0)

    @property
    def last(self) -> Int[Tensor, "batch"]:
        """Column of the last real token of each prompt."""
        return self.column(-1)

    def column(self, position: int) -> Int[Tensor, "batch"]:
        """Column of a prompt position in each row; negative counts from the last real token.

        Raises:
            Refused: some prompt has no such position.
        """
        if position not in self._columns:
            self._columns[position] = self._column(position)
        return self._columns[position]

    @cached_property
    def _columns(self) -> dict[int, Tensor]:
        return {}

    def _column(self, position: int) -> Int[Tensor, "batch"]:
        lengths, shortest = self.lengths, self.shortest
        if len(self) and not -shortest <= position < shortest:
            raise Refused(
                f"position {position}",
                f"the shortest prompt has {shortest} tokens",
                f"use {-shortest} to {shortest - 1}",
            )
        where = torch.full_like(lengths, position) if position >= 0 else lengths + position
        front = self.ids.shape[1] - self.mask.sum(-1) if self.side == "left" else 0
        return where + front

    def row(self, i: int) -> Tokens:
        """Return one prompt, without padding."""
        return replace(
            self,
            ids=self.ids[i][self.mask[i]][None],
            mask=self.mask[i][self.mask[i]][None],
            texts=self.texts[i : i + 1],
            pieces=self.pieces[i : i + 1],
            offsets=self.offsets[i : i + 1],
            tails=self.tails[i : i + 1],
        )

    def rows(self, chosen: Sequence[int] | slice) -> Tokens:
        """Return some prompts, padded as before."""
        index = list(range(len(self)))[chosen] if isinstance(chosen, slice) else list(chosen)
        pick = torch.tensor(index, device=self.ids.device)
        parts = {n: tuple(getattr(self, n)[i] for i in index) for n in ("texts", "pieces", "offsets")}
        tails = tuple(self.tails[i] for i in index) if self.tails else ()
        return replace(self, ids=self.ids[pick], mask=self.mask[pick], tails=tails, **parts)

    def by_length(self) -> dict[tuple[int, ...], list[int]]:
        """Return the prompts of each length, shortest first; of each length and those of what continues them."""
        found: dict[tuple[int, ...], list[int]] = {}
        for i, n in enumerate(self.lengths.tolist()):
            found.setdefault((n, *(self.tails[i] if self.tails else ())), []).append(i)
        return dict(sorted(found.items()))

    def firsts(self) -> list[int]:
        """Return, for each prompt, the row of the first one that has the same tokens."""
        first = dict[tuple[int, ...], int]()
        rows = zip(self.ids, self.mask, strict=True)
        return [first.setdefault(tuple(ids[mask].tolist()), i) for i, (ids, mask) in enumerate(rows)]

    def find(self, i: int, text: str) -> list[int]:
        """Return the positions in prompt `i` of the tokens that overlap `text`: its first occurrence, in whatever case.

        An occurrence as a whole word goes before one inside a word, and equal case before another.

        Raises:
            Refused: the prompt does not contain it.
        """
        return self.occurrences(i, text)[0]

    def occurrences(self, i: int, text: str) -> list[list[int]]:
        """Return the positions of the tokens that overlap each occurrence of `text` in prompt `i`, in the order of
        `find`.

        Raises:
            Refused: the prompt does not contain it, or the tokenizer does not say where its tokens stand.
        """
        found = occurrences(self.texts[i], text)
        if not found:
            raise Refused(f"text {text!r}", f"it is not in the prompt {self.texts[i]!r}", "quote a part of the prompt")
        if all(o is None for o in self.offsets[i]):
            why = f"this tokenizer does not say where its tokens stand in the prompt {self.texts[i]!r}"
            raise Refused(f"text {text!r}", why, "use a fast tokenizer, or give positions")
        return [
            [n for n, o in enumerate(self.offsets[i]) if o is not None and o[0] < o[1] and o[0] < end and o[1] > start]
            for start, end in found
        ]

    def labels(self, i: int = 0) -> list[str]:
        """Return the axis labels for the real tokens of one prompt: its name, with its position where it repeats."""
        pieces = self.names(i)
        return [f"{p}·{n}" if pieces.count(p) > 1 else p for n, p in enumerate(pieces)]

    def names(self, i: int) -> list[str]:
        """Return what each real token of one prompt is called: its piece, or what it is in a chat's template."""
        pieces = [p.strip() or repr(p)[1:-1] for p in self.pieces[i]]
        for part in parts(self.texts[i]):
            for n, o in enumerate(self.offsets[i]):
                if part.name and o is not None and part.start <= o[0] < o[1] <= part.end:
                    pieces[n] = part.name
        return pieces

    def to(self, device: torch.device | str) -> Tokens:
        """Return the same tokens on another device."""
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))


def inner(tokens: Tokens) -> Bool[Tensor, "batch position"]:
    """Return the columns of the prompts' tokens but the first, whose norm is often huge; of one token, its own."""
    out = tokens.prompt.clone()
    out[torch.arange(len(tokens), device=out.device), tokens.column(0)] &= tokens.lengths == 1
    return out


def halves(tokens: Tokens) -> tuple[list[int], list[int]]:
    """Return the rows of every second prompt, and the others; both all if there is one. Equal prompts stay together."""
    firsts = tokens.firsts()
    number = {first: i for i, first in enumerate(dict.fromkeys(firsts))}
    parts = [[i for i, first in enumerate(firsts) if number[first] % 2 == half] for half in (0, 1)]
    return (parts[0], parts[1]) if all(parts) else ([*range(len(firsts))], [*range(len(firsts))])


def tokenize(
    tokenizer: Any,
    prompts: str | Sequence[str],
    side: Side = "right",
    limit: int | None = None,
    bos: bool | None = None,
    causal: bool = True,
) -> Tokens:
    """Return the prompts as `Tokens`, with the special tokens that the tokenizer puts in front.

    For a causal model a prompt that begins with the beginning-of-text token itself gets no second one, and what the
    tokenizer puts behind a text is left off, for nothing follows it; a warning and the record say so. `bos` puts one
    in front where the tokenizer puts none (True), or leaves it off (False). An encoder's tokens stay as they are.

    Raises:
        Refused: no prompt, an empty prompt, one longer than `limit` tokens, or characters that became `unk`; a
            beginning-of-text token that is asked for and unknown, or written twice.
    """
    texts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not texts:
        raise Refused("an empty list of prompts", "there is nothing to run", "give at least one prompt")
    if bos is not None and not causal:
        raise Refused(Keyword("bos", bos), "the model is an encoder, whose texts are framed in one way", "leave it out")
    for text in texts:
        if not isinstance(text, str):
            raise Refused(f"prompt {text!r}", f"it is {type(text).__name__}, not text", "give texts, or token ids")
        if not text.strip():
            raise Refused(f"prompt {text!r}", "it is empty", "write a sentence whose next word you want explained")
        check_encodable(text, f"prompt {_short(text)!r}")
    split = _encode(tokenizer, texts)
    encoded = [_framed(tokenizer, t, p, bos) if causal else p[:2] for t, p in zip(texts, split, strict=True)]
    for text, (ids, _) in zip(texts, encoded, strict=True):
        if limit is not None and len(ids) > limit:
            raise Refused(
                f"prompt {_short(text)!r}", f"it has {len(ids)} tokens, the model takes {limit}", "shorten it"
            )
        if _unknown(tokenizer, text, ids):
            raise Refused(f"prompt {_short(text)!r}", "the tokenizer knows no token for part of it", "use other words")
    pieces = [tuple(_pieces(tokenizer, ids, offsets, t)) for t, (ids, offsets) in zip(texts, encoded, strict=True)]
    pad = next((p for n in ("pad", "eos", "bos") if (p := getattr(tokenizer, f"{n}_token_id", None)) is not None), 0)
    return batch([ids for ids, _ in encoded], pad, side, texts, pieces, [tuple(o) for _, o in encoded])


def known(tokenizer: Any, texts: Sequence[str]) -> list[bool]:
    """For each text, True if the tokenizer has tokens for all of it."""
    if not texts or getattr(tokenizer, "unk_token_id", None) is None:
        return [True] * len(texts)
    return [not _unknown(tokenizer, t, ids) for t, (ids, *_) in zip(texts, _encode(tokenizer, texts), strict=True)]


def _unknown(tokenizer: Any, text: str, ids: Sequence[int]) -> bool:
    """Return True if some of a text became the unknown token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    ends = {getattr(tokenizer, n, None) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return unknown is not None and unknown in ids and unknown not in ends and str(tokenizer.unk_token) not in text


def continued(tokens: Tokens, continuations: Sequence[Sequence[Sequence[int]]]) -> Tokens:
    """Return prompts with continuations behind them: for each prompt, the token ids of one or several, as many of
    them for every prompt.
    """
    rows = [
        [*ids[mask].tolist(), *(t for tail in tails for t in tail)]
        for ids, mask, tails in zip(tokens.ids, tokens.mask, continuations, strict=True)
    ]
    pad = next(iter(tokens.ids[~tokens.mask].tolist()), 0)
    made = batch(rows, pad, tokens.side, tokens.texts, tokens.pieces, tokens.offsets)
    return replace(made.to(tokens.ids.device), tails=tuple(tuple(map(len, tails)) for tails in continuations))


def uncontinued(tokens: Tokens) -> Tokens:
    """Return the prompts alone, without the continuations behind them."""
    if not tokens.tails:
        return tokens
    rows = [ids[own].tolist() for ids, own in zip(tokens.ids, tokens.prompt, strict=True)]
    pad = next(iter(tokens.ids[~tokens.mask].tolist()), 0)
    return batch(rows, pad, tokens.side, tokens.texts, tokens.pieces, tokens.offsets).to(tokens.ids.device)


def batch(
    rows: Sequence[Sequence[int]],
    pad: int = 0,
    side: Side = "right",
    texts: Sequence[str] | None = None,
    pieces: Sequence[tuple[str, ...]] | None = None,
    offsets: Sequence[tuple[Any, ...]] | None = None,
) -> Tokens:
    """Return the token ids as a padded batch."""
    width = max(len(r) for r in rows)
    ids, mask = list[list[int]](), list[list[bool]]()
    for r in rows:
        own, rest = list(r), width - len(r)
        ids.append([*[pad] * rest, *own] if side == "left" else [*own, *[pad] * rest])
        mask.append([*[False] * rest, *[True] * len(own)] if side == "left" else [*[True] * len(own), *[False] * rest])
    return Tokens(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(mask, dtype=torch.bool),
        tuple(texts or [""] * len(rows)),
        tuple(pieces or [tuple(str(t) for t in r) for r in rows]),
        tuple(offsets or [(None,) * len(r) for r in rows]),
        side,
    )


def running_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds, so that the parts joined are the text.

    A token that completes a character adds all of it. If the tokenizer rewrites earlier text, each token has its own
    text instead.
    """
    texts, so_far = [], ""
    for n in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
        added = longer.rstrip("\ufffd") if n < len(ids) else longer
        if not added.startswith(so_far):
            return [tokenizer.decode([i]) for i in ids]
        texts.append(added[len(so_far) :])
        so_far = added
    return texts


_Places = list[tuple[int, int] | None]


_Encoded = tuple[list[int], _Places, list[bool]]


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[_Encoded]:
    """Return the tokens of each text, where they stand in it, and which of them the tokenizer has put around it."""
    if not getattr(tokenizer, "is_fast", False):
        return [_slowly(tokenizer, text) for text in texts]
    out = tokenizer(list(texts), return_offsets_mapping=True, return_special_tokens_mask=True)
    special, found = set(getattr(tokenizer, "all_special_ids", ())), list[_Encoded]()
    for ids, offsets, put in zip(
        *(out[n] for n in ("input_ids", "offset_mapping", "special_tokens_mask")), strict=True
    ):
        places = [None if i in special and o[0] == o[1] else tuple(o) for i, o in zip(ids, offsets, strict=True)]
        found.append((list(ids), places, list(map(bool, put))))
    return found


def _slowly(tokenizer: Any, text: str) -> _Encoded:
    ids, bare = (list(tokenizer(text, **kw)["input_ids"]) for kw in ({}, {"add_special_tokens": False}))
    start = next((k for k in range(len(ids)) if ids[k : k + len(bare)] == bare), 0)
    own = range(start, start + len(bare) if ids[start : start + len(bare)] == bare else len(ids))
    return ids, _told_offsets(tokenizer, ids, text), [n not in own for n in range(len(ids))]


def _framed(tokenizer: Any, text: str, encoded: _Encoded, bos: bool | None) -> tuple[list[int], _Places]:
    """Return the tokens of a prompt that a causal model goes on with: one beginning of text, and nothing behind."""
    ids, places, put = encoded
    start = next((n for n, p in enumerate(put) if not p), len(ids))
    end = next((n for n in range(len(ids), start, -1) if not put[n - 1]), len(ids))
    if end < len(ids):
        behind = "".join(tokenizer.decode([i]) for i in ids[end:])
        _tell(f"the tokenizer puts {behind!r} behind every text; prompts are read before it")
    first = ids[start - 1] if start else getattr(tokenizer, "bos_token_id", None)
    own = len(list(takewhile(lambda i: i == first, ids[start:end])))
    what = f"prompt {_short(text)!r}"
    if own and (bos is False or (start and own > 1)):
        why = f"it begins with {own} × {tokenizer.decode([first])!r}"
        raise Refused(
            what if bos is None else (f"{what} with ", Keyword("bos", bos)), why, "write it once, or leave it out"
        )
    if start and not own and first in ids[start:end]:
        count = ids[:end].count(first)
        _tell(f"{what} holds {count} × {tokenizer.decode([first])!r}, that of the tokenizer among them")
    if start and bos is False:
        return ids[start:end], places[start:end]
    if start and own:  # of the two, the tokenizer's goes
        return [*ids[: start - 1], *ids[start:end]], [*places[: start - 1], None, *places[start + 1 : end]]
    if bos and not start and not own:
        if first is None:
            raise Refused(Keyword("bos", True), "the tokenizer has no beginning-of-text token", "leave it out")
        return [first, *ids[:end]], [None, *places[:end]]
    return ids[:end], places[:end]


def _tell(text: str) -> None:
    note(text)
    warnings.warn(text, stacklevel=5)


def _told_offsets(tokenizer: Any, ids: list[int], text: str) -> list[tuple[int, int] | None]:
    """Return the character span of each token from decoded texts alone; None unless these join to the text itself."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    own = [i for i in ids if i not in special]
    parts = running_texts(tokenizer, own)
    if "".join(parts) != text:
        return [None] * len(ids)
    ends = list(accumulate(map(len, parts)))
    told = iter([(end - len(part), end) for end, part in zip(ends, parts, strict=True)])
    return [None if i in special else next(told) for i in ids]


def _pieces(tokenizer: Any, ids: list[int], offsets: Sequence[tuple[int, int] | None], text: str) -> list[str]:
    return [
        text[o[0] : o[1]] if o is not None and o[1] > o[0] else tokenizer.decode([i])
        for i, o in zip(ids, offsets, strict=True)
    ]


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
