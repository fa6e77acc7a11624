"""Generation: tokens one by one under the model's hooks, with a cache of keys and values."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from cutaway.compat.transformer_lens.key_value_cache import HookedTransformerKeyValueCache as Cache
from cutaway.compat.transformer_lens.utils import get_attention_mask, sample_logits


@torch.inference_mode()
def generated(model, tokens, mask, max_new_tokens, stops, use_past_kv_cache, do_sample, verbose, **how) -> Tensor:
    """Return the tokens [batch, position] with new ones behind them; a row that has stopped goes on with its stop."""
    from tqdm import tqdm

    cache = Cache.init_cache(model.cfg, model.cfg.device, len(tokens)) if use_past_kv_cache else None
    done, given = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device), tokens
    for _ in tqdm(range(max_new_tokens), disable=not verbose):
        seen = None if mask is None else mask[:, -given.shape[1] :]
        logits = model(given, return_type="logits", past_kv_cache=cache, attention_mask=seen)[:, -1]
        new = sample_logits(logits, tokens=tokens, **how) if do_sample else logits.argmax(-1)
        new = new.to(tokens.device)
        if stops:
            new = torch.where(done, torch.full_like(new, stops[0]), new)
            done |= torch.isin(new, torch.tensor(stops, device=new.device))
        tokens = torch.cat([tokens, new[:, None]], 1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        given = new[:, None] if cache is not None else tokens
        if stops and bool(done.all()):
            break
    return tokens


def prompt_mask(model: Any, tokens: Tensor, prepend_bos: bool, side: str) -> Tensor | None:
    """Return 1 at the real tokens of a batch; None without a tokenizer."""
    return None if model.tokenizer is None else get_attention_mask(model.tokenizer, tokens, prepend_bos, side)


def generate(
    model,
    input: Any = "",
    max_new_tokens: int = 10,
    stop_at_eos: bool = True,
    eos_token_id: int | list[int] | None = None,
    do_sample: bool = True,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = None,
    padding_side: str | None = None,
    return_type: str | None = "input",
    verbose: bool = True,
    **options: Any,
) -> Any:
    """Sample tokens one by one, under the hooks; several texts are padded on the left."""
    if unknown := set(options) - {"output_logits", "return_dict_in_generate"}:
        logging.warning("generate: these options do nothing here: %s", ", ".join(sorted(unknown)))
    text = isinstance(input, str | list)
    side = "left" if isinstance(input, list) and len(input) > 1 else model._side(padding_side)
    ids = model.to_tokens(input, prepend_bos, side) if text else input.to(model.cfg.device)
    ids = ids[None] if ids.ndim == 1 else ids
    stops = list[int]()
    if stop_at_eos:
        eos = eos_token_id if eos_token_id is not None else getattr(model.tokenizer, "eos_token_id", None)
        if eos is None:
            raise AssertionError("Must pass a eos_token_id if stop_at_eos is True and tokenizer is None")
        stops = [eos] if isinstance(eos, int) else list(eos)
    mask = prompt_mask(model, ids, model._bos(prepend_bos), side)
    how = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "freq_penalty": freq_penalty}
    out = generated(model, ids, mask, max_new_tokens, stops, use_past_kv_cache, do_sample, verbose, **how)
    if return_type == "tokens" or (return_type == "input" and not text):
        return out
    texts = [model.tokenizer.decode(row, skip_special_tokens=True) for row in out]
    return texts[0] if len(texts) == 1 else texts
