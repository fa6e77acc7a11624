"""Generation under edits: transformers' own loop and cache, with the frame kept true at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cutaway.core.record import count
from cutaway.core.refuse import Refused
from cutaway.models import forward
from cutaway.models.edits import Edit
from cutaway.models.frame import FRAME, Frame
from cutaway.models.tokens import Tokens

if TYPE_CHECKING:
    from cutaway.models.model import Model


def continuations(model: Model, t: Tokens, new: int, edits: Sequence[Edit], options: dict[str, Any]) -> list[str]:
    """Each prompt's continuation as text (ids as words where there is no tokenizer).

    Raises:
        Refused: an encoder, nothing to generate, or more tokens than the model's context.
    """
    if not model.family.causal:
        raise Refused(
            f"generate with {model.name}", "an encoder does not continue text", "load a causal language model"
        )
    if new < 1 or t.ids.shape[1] + new > model.shape.context:
        room = model.shape.context - t.ids.shape[1]
        raise Refused(
            f"generate {new} tokens", f"there is room for 1 to {room}", "ask for fewer, or shorten the prompt"
        )
    ids = generated_ids(model, t, new, edits, options)
    if model.tokenizer is None:
        return [" ".join(map(str, row.tolist())) for row in ids]
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)


def generated_ids(model: Model, t: Tokens, new: int, edits: Sequence[Edit], options: dict[str, Any]) -> torch.Tensor:
    """The new token ids, [batch, step]."""
    forward.check_padding(model.body, t)
    ran: dict[int, int] = {}

    def enter(module: nn.Module, args: Any, kw: Any) -> None:
        ids = kw.get("input_ids") if kw.get("input_ids") is not None else args[0]
        offset = _past(kw, ids.shape[1], ran)
        beams = len(ids) // len(t)
        rows = t if beams == 1 else t.rows([i for i in range(len(t)) for _ in range(beams)])
        FRAME.set(Frame(rows, len(ids), ids.shape[1], offset))
        count(forwards=len(ids) * ids.shape[1] / t.ids.shape[1])

    defaults: dict[str, Any] = {"max_new_tokens": new, "do_sample": False}
    if getattr(model.hf.generation_config, "pad_token_id", None) is None:
        ends = (getattr(model.tokenizer, "pad_token_id", None), getattr(model.hf.config, "eos_token_id", None), 0)
        defaults["pad_token_id"] = next(e for e in ends if isinstance(e, int))
    handle = model.hf.register_forward_pre_hook(enter, with_kwargs=True)
    token = FRAME.set(None)
    try:
        with model.edited(*edits), torch.no_grad():
            out = model.hf.generate(t.ids, attention_mask=t.mask.long(), **{**defaults, **options})
    finally:
        FRAME.reset(token)
        handle.remove()
    return out[:, t.ids.shape[1] :]


def _past(kw: dict[str, Any], width: int, ran: dict[int, int]) -> int:
    """How many columns the cache of a call holds; recurrent states do not say, so theirs are counted in `ran`."""
    if kw.get("past_key_values") is not None:
        return int(kw["past_key_values"].get_seq_length())
    if kw.get("cache_params") is None:
        return 0
    key = id(kw["cache_params"])
    ran[key] = ran.get(key, 0) + width
    return ran[key] - width
