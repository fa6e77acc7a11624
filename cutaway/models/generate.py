"""Generation under edits: transformers' own loop and cache, with the frame kept true at every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from cutaway.core.finite import finite, notice
from cutaway.core.out_of_memory import is_out_of_memory
from cutaway.core.record import count
from cutaway.core.refuse import Refused, nearest
from cutaway.models.access import forward
from cutaway.models.access.positions import FRAME, ForwardFrame
from cutaway.models.anatomy import rope
from cutaway.models.anatomy.anatomy import Anatomy
from cutaway.models.anatomy.linear import leading
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit, of_prompts
from cutaway.models.tokens import Tokens

GENERATION = "generation"  # the name under which the self-check can disable it

# Options of transformers' generate that have another place here, and which.
_ELSEWHERE = {
    **dict.fromkeys(("max_length", "tokens"), "say max_new_tokens="),
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids", "negative_prompt_ids",
                     "negative_prompt_attention_mask"), "give prompts, or model.tokens(…), which know their padding"),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
                     "output_hidden_states"), "run the prompt with its continuation, or capture there"),
    "generation_config": "give its settings as options", "past_key_values": "give the whole prompt",
    "custom_generate": "call model.hf.generate inside model.edited(…)",
}  # fmt: skip
_OBJECTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "assistant_model", "streamer")
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id")


@runtime_checkable
class Editable(Protocol):
    """Protocol of a model whose continuations are generated: its modules, its tokenizer, and its runs under edits."""

    hf: Any
    tokenizer: Any
    name: str
    anatomy: Anatomy

    def edited(self, *edits: Edit) -> AbstractContextManager[Any]:
        """Run everything within the block under edits."""
        ...


def continuations(model: Editable, t: Tokens, new: int, edits: Sequence[Edit], options: dict[str, Any]) -> list[str]:
    """Return each prompt's continuation as text (ids as words if the model has no tokenizer).

    Raises:
        Refused: an encoder, nothing to generate, more tokens than the model's context, or an unsuitable option.
    """
    ids = continuation_ids(model, t, new, edits, options)
    if model.tokenizer is None:
        return [" ".join(map(str, row)) for row in ids]
    return model.tokenizer.batch_decode(ids, skip_special_tokens=True)


def continuation_ids(
    model: Editable, t: Tokens, new: int, edits: Sequence[Edit], options: dict[str, Any]
) -> list[list[int]]:
    """Return the ids of each prompt's continuation; behind an end of text stands padding.

    Raises:
        Refused: as `continuations`.
    """
    if not model.anatomy.family.causal:
        raise Refused(
            f"generate with {model.name}", "an encoder does not continue text", "load a causal language model"
        )
    if GENERATION in model.anatomy.disabled:
        raise Refused(
            f"generate with {model.name}", model.anatomy.disabled[GENERATION], "run the longer prompt instead"
        )
    if new < 1 or t.ids.shape[1] + new > model.anatomy.shape.context:
        room = model.anatomy.shape.context - t.ids.shape[1]
        raise Refused(
            f"generate {new} tokens", f"there is room for 1 to {room}", "ask for fewer, or shorten the prompt"
        )
    found = [list[list[int]]() for _ in range(len(t))]
    for rows, own in _together(model, t, new, options):
        prompts = BatchSlice.of(t, rows, False)
        some = t if prompts.everything else prompts.tokens(t)
        ids = generated_ids(model, some, new, of_prompts(edits, prompts), own)
        each = ids.tolist()
        several = len(each) // len(rows)  # continuations of a prompt
        for n, i in enumerate(rows):
            found[i] = each[n * several : (n + 1) * several]
    return [row for own in found for row in own]


def _together(model: Editable, t: Tokens, new: int, options: dict[str, Any]) -> list[tuple[list[int], dict[str, Any]]]:
    """Group the prompts that may grow together, with options: no cache where rotary frequencies change on the way."""
    lengths, found = t.lengths.tolist(), dict[Any, list[int]]()
    for i, n in enumerate(lengths):
        sides = {rope.side(model.anatomy, n), rope.side(model.anatomy, n + new - 1)}
        found.setdefault(sides.pop() if len(sides) == 1 else n, []).append(i)
    return [
        (rows, options if isinstance(key, tuple) else {**options, "use_cache": False}) for key, rows in found.items()
    ]


def generated_ids(model: Editable, t: Tokens, new: int, edits: Sequence[Edit], options: dict[str, Any]) -> torch.Tensor:
    """Return the new token ids, [batch, step].

    Raises:
        Refused: an option that is unknown, has its own place here, or that transformers refuses.
    """
    forward.check_padding(model.anatomy, t)
    _check_options(model, options, edits)
    ran: dict[int, int] = {}

    def enter(module: nn.Module, args: Any, kw: Any) -> None:
        ids = kw.get("input_ids") if kw.get("input_ids") is not None else args[0]
        offset = _past(kw, ids.shape[1], ran)
        beams = len(ids) // len(t)
        rows = t if beams == 1 else t.rows([i for i in range(len(t)) for _ in range(beams)])
        cached = getattr(kw.get("past_key_values"), "layers", ())
        roomy = any(
            hasattr(layer, "max_cache_len") for layer in cached
        )  # of a fixed size: columns that hold nothing yet
        FRAME.set(ForwardFrame(rows, len(ids), ids.shape[1], offset, roomy))
        count(forwards=len(ids) * ids.shape[1] / t.ids.shape[1])

    given = {n: v for n, v in options.items() if n in _OBJECTS}
    if "stop_strings" in options:
        given["tokenizer"] = model.tokenizer
    handles = [
        model.hf.register_forward_pre_hook(enter, with_kwargs=True),
        model.hf.register_forward_hook(lambda module, args, out: notice(out.logits[:, -1])),
    ]
    token = FRAME.set(None)
    try:
        with (
            finite(f"generate with {model.name}", leading(model.hf).dtype),
            model.edited(*edits),
            torch.no_grad(),
            _settings(model, new, options) as settings,
        ):
            out = model.hf.generate(t.ids, settings, attention_mask=t.mask.long(), **given)
    except (ValueError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        if not options or is_out_of_memory(error):
            raise
        raise _unfit(options, error) from error
    finally:
        FRAME.reset(token)
        for handle in handles:
            handle.remove()
    return out[:, t.ids.shape[1] :]


@contextmanager
def _settings(model: Editable, new: int, options: Mapping[str, Any]) -> Iterator[Any]:
    """The settings of one generation; the model's own, which fill whatever is left open, are set aside meanwhile."""
    from transformers import GenerationConfig

    hf, own = model.hf, model.hf.generation_config
    kept = {n: getattr(own, n, None) for n in _KEPT}
    if kept["pad_token_id"] is None:
        ends = (getattr(model.tokenizer, "pad_token_id", None), getattr(hf.config, "eos_token_id", None), 0)
        kept["pad_token_id"] = next(e for e in ends if isinstance(e, int))
    asked = {n: v for n, v in options.items() if n not in _OBJECTS}
    made = {**kept, "max_new_tokens": new, "do_sample": False, "disable_compile": True, **asked}
    hf.generation_config = GenerationConfig(**kept)
    try:
        yield GenerationConfig(**made)
    finally:
        hf.generation_config = own


def _check_options(model: Editable, options: Mapping[str, Any], edits: Sequence[Edit]) -> None:
    if not options:
        return
    from transformers import GenerationConfig

    known = [n for n in vars(GenerationConfig()) if not n.startswith("_") and n != "transformers_version"]
    for name in options:
        if name in _ELSEWHERE:
            raise Refused(f"generate({name}=…)", "this generate takes prompts and returns texts", _ELSEWHERE[name])
        if name not in known and name not in _OBJECTS:
            near = nearest(name, [*known, *_OBJECTS])
            why = "there is no such option" + (f"; near: {near}" if near else "")
            raise Refused(f"generate({name}=…)", why, "give an option of transformers' generate")
    if "offloaded" in str(options.get("cache_implementation")) and leading(model.hf).device.type == "cpu":
        why = "it moves keys and values from a GPU to the CPU, and the model is on the CPU"
        raise Refused(f"generate(cache_implementation={options['cache_implementation']!r})", why, "leave it out")
    if edits and (options.get("guidance_scale") or 1) != 1:
        why = "its second run has no prompt, so an edit would not mean there what it means here"
        raise Refused("generate(guidance_scale=…) under edits", why, "leave out one of the two")


def _unfit(options: Mapping[str, Any], error: Exception) -> Refused:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:240]
    return Refused(
        f"generate({', '.join(f'{n}={v!r}' for n, v in options.items())})",
        f"transformers cannot: {reason}",
        "change these options",
    )


def _past(kw: dict[str, Any], width: int, ran: dict[int, int]) -> int:
    """Return the number of columns in the cache of a call; those of recurrent states are counted in `ran`."""
    if kw.get("past_key_values") is not None:
        return int(kw["past_key_values"].get_seq_length())
    if kw.get("cache_params") is None:
        return 0
    key = id(kw["cache_params"])
    ran[key] = ran.get(key, 0) + width
    return ran[key] - width
