"""Vectors of texts at many addresses at once: means over a text's tokens or parts of them, and single tokens.

Texts run in batches of similar length, no further than the deepest address, and only what is read of a batch is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address, Pattern
from cutaway.core.progress import advance
from cutaway.core.refuse import Keyword, Refused
from cutaway.models.access.capture import Activations
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, inner
from cutaway.models.watching import in_batches

READINGS = ("mean", "last")
#: readings of texts that are a prompt and a response (Chen et al. 2025: response_avg, prompt_avg, prompt_last)
PERSONA = ("response_mean", "prompt_mean", "prompt_last")
_TOKENS = 1024  # that run together


@dataclass(frozen=True)
class TextVectors:
    """Vectors of texts.

    Attributes:
        vectors: one per reading, address and text.
        addresses: the addresses, in order.
        readings: `mean` is the mean over a text's tokens without the first, whose norm is often huge; `last` is the
            last token; `response_mean` is the mean over the response's tokens, `prompt_mean` that over the prompt's
            without the first, and `prompt_last` the prompt's last token. A token that begins in the prompt and ends
            in the response belongs to the response.
        tokens: the token ids of each text.
    """

    vectors: Float[Tensor, "reading address text width"]
    addresses: tuple[Address, ...]
    readings: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]


def text_vectors(
    model: Model,
    texts: Sequence[str],
    sites: Pattern | Sequence[Pattern],
    readings: Sequence[str] = READINGS,
    batch: int = _TOKENS,
    prompts: Sequence[str] = (),
) -> TextVectors:
    """Read vectors of texts at all addresses that some patterns mean, with one forward per text.

    Args:
        model: the model.
        texts: the texts.
        sites: the addresses.
        readings: `READINGS`, and of texts with prompts `PERSONA`.
        batch: number of tokens that run together.
        prompts: the prompt that each text begins with, whose response the rest is; none if texts are whole.

    Raises:
        Refused: an empty text, no such reading, one of a response where texts are whole, or addresses that have no
            vectors or vectors of different widths.
    """
    places = tuple(model.places(sites))
    means, tokens = text_means(model, texts, places, readings, lambda acts: _all_vectors(acts, places), batch, prompts)
    ids = tuple(tuple(row[real].tolist()) for row, real in zip(tokens.ids.cpu(), tokens.mask.cpu(), strict=True))
    return TextVectors(means, places, tuple(readings), ids)


def text_means(
    model: Model,
    texts: Sequence[str],
    places: Sequence[Address],
    readings: Sequence[str],
    values: Callable[[Activations], Sequence[Float[Tensor, "text position width"]]],
    batch: int = _TOKENS,
    prompts: Sequence[str] = (),
) -> tuple[Float[Tensor, "reading value text width"], Tokens]:
    """Return the means over the tokens that readings choose of whatever is made of activations, and the tokens.

    Args:
        model: the model.
        texts: the texts.
        places: the addresses that are captured.
        readings: as of `text_vectors`.
        values: makes tensors of one width of the activations of a batch.
        batch: number of tokens that run together.
        prompts: as of `text_vectors`.

    Raises:
        Refused: an empty text, no such reading, or one of a response where texts are whole.
    """
    _check(texts, readings, prompts)
    tokens = model.tokens(texts)
    starts = responses(tokens, prompts) if prompts else tokens.lengths
    order = sorted(range(len(tokens)), key=tokens.lengths.tolist().__getitem__)
    found: Tensor | None = None
    done = 0
    for rows in _batches(model, tokens, order, batch):
        some = BatchSlice.of(tokens, rows, True).tokens(tokens)
        chosen = [_WAYS[r](some, starts[rows]) for r in readings]
        part = _means(values(model.capture(some, places, logits=False)), chosen)
        if found is None:
            found = part.new_empty(*part.shape[:2], len(texts), part.shape[-1])
        found[:, :, rows] = part
        done += len(rows)
        advance(done, len(texts))
    assert found is not None
    return found, tokens


def responses(tokens: Tokens, prompts: Sequence[str]) -> Int[Tensor, "text"]:
    """Return the position of the first token of each text that is not of its prompt alone.

    Raises:
        Refused: a prompt without a token, a response without one, or a tokenizer that does not say where tokens stand.
    """
    found = list[int]()
    for i, prompt in enumerate(prompts):
        ends = [o[1] if o is not None else 0 for o in tokens.offsets[i]]
        start = next((n for n, end in enumerate(ends) if end > len(prompt)), 0)
        if not any(ends[:start]):
            why = "the prompt or the response has no token of its own" if any(ends) else "its tokenizer tells no places"
            raise Refused(f"text {tokens.texts[i]!r:.60} as prompt and response", why, "read whole texts: mean, last")
        found.append(start)
    return torch.tensor(found, device=tokens.ids.device)


def _of_response(tokens: Tokens, starts: Int[Tensor, "text"]) -> Bool[Tensor, "text position"]:
    return tokens.mask & (tokens.position_ids >= starts[:, None])


def _of_prompt(tokens: Tokens, starts: Int[Tensor, "text"]) -> Bool[Tensor, "text position"]:
    first = (tokens.position_ids == 0) & (starts > 1)[:, None]
    return tokens.mask & ~first & (tokens.position_ids < starts[:, None])


def _at(tokens: Tokens, positions: Int[Tensor, "text"]) -> Bool[Tensor, "text position"]:
    return tokens.mask & (tokens.position_ids == positions[:, None])


#: the tokens that each reading is the mean of, by the position of each text's response
_WAYS: dict[str, Callable[[Tokens, Tensor], Tensor]] = {
    "mean": lambda tokens, starts: inner(tokens),
    "last": lambda tokens, starts: _at(tokens, tokens.lengths - 1),
    "response_mean": _of_response,
    "prompt_mean": _of_prompt,
    "prompt_last": lambda tokens, starts: _at(tokens, starts - 1),
}


def _check(texts: Sequence[str], readings: Sequence[str], prompts: Sequence[str]) -> None:
    empty = next((i for i, t in enumerate(texts) if not t.strip()), None)
    if empty is not None or not texts:
        why = "there is none" if empty is None else f"text {empty} is empty"
        raise Refused(f"vectors of {len(texts)} texts", why, "give texts with at least a word each")
    known = READINGS + (PERSONA if prompts else ())
    if wrong := [r for r in readings if r not in known]:
        why = "no text is read so" if wrong[0] not in PERSONA else "these texts are not given as prompt and response"
        raise Refused(Keyword("readings", wrong[0]), why, f"use {', '.join(known)}")


def _batches(model: Model, tokens: Tokens, order: list[int], most: int) -> list[list[int]]:
    """Return the rows that run together, of similar length, with at most `most` tokens."""
    sorted_tokens, out = tokens.rows(order), list[list[int]]()
    for apart in in_batches(model, sorted_tokens, len(order)):
        group = list[int]()
        for i in sorted(apart):
            if group and (len(group) + 1) * int(tokens.lengths[order[i]]) > most:
                out.append(group)
                group = []
            group.append(order[i])
        out.append(group)
    return out


def _means(
    each: Sequence[Float[Tensor, "text position width"]], chosen: Sequence[Bool[Tensor, "text position"]]
) -> Float[Tensor, "reading value text width"]:
    """Return the means over the chosen tokens of a batch."""
    shares = torch.stack([c / c.sum(1, keepdim=True) for c in chosen])  # [reading text position]
    return torch.stack([torch.einsum("rtp,tpw->rtw", shares.to(x.device), x).cpu() for x in each], 1)


def _all_vectors(acts: Activations, places: Sequence[Address]) -> list[Float[Tensor, "text position width"]]:
    each = [_vectors(acts[str(a)], a).float() for a in places]
    if len({x.shape[-1] for x in each}) > 1:
        widths = ", ".join(f"{a} {x.shape[-1]}" for a, x in zip(places, each, strict=True))
        raise Refused("vectors of texts", f"the addresses have different widths: {widths}", "read them apart")
    return each


def _vectors(x: Tensor, a: Address) -> Float[Tensor, "text position width"]:
    if x.ndim != 3 or not a.row.has_position:
        why = f"its activations are {list(x.shape)}, which is not [batch, position, width]"
        raise Refused(Keyword("sites", str(a)), why, "use a site of vectors, such as resid_post")
    return x
