"""The helpers of `transformer_lens.utils`, with its names, arguments and results."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cutaway.core.refuse import Refused

USE_DEFAULT_VALUE = None
SliceInput = int | tuple | list | Tensor | np.ndarray | slice | None
_TYPES = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
_NAMES = {"attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v",
          "mlp_pre": "pre", "mlp_mid": "mid", "mlp_post": "post"}  # fmt: skip
_ATTENTION = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
_MLP = ("pre", "post", "mid", "pre_linear")


class Mismatch(Refused, AssertionError, ValueError):
    """Refusal of arguments that do not fit each other, where TransformerLens asserts or raises a `ValueError`."""


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """Return the hook name of a shorthand: `("k", 6, "a")` and `"k6"` are `blocks.6.attn.hook_k`."""
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    if match := re.match(r"([a-z]+)(\d+)([a-z]?.*)", name):
        name, layer, layer_type = match.groups()
    name = _NAMES.get(name, name)
    within = "attn" if name in _ATTENTION else "mlp" if name in _MLP else _TYPES.get(layer_type or "", layer_type)
    if layer is None and name in ("scale", "normalized"):
        within = f"ln_final.{within}" if within else "ln_final"
    return f"blocks.{layer}." * (layer is not None) + f"{within}." * bool(within) + f"hook_{name}"


class Slice:
    """Slice of one axis: an int drops the axis, a tuple is a range, a list or array takes indices, None takes all.

    Attributes:
        slice: what an axis is indexed with.
        mode: "int", "slice", "array" or "identity".
    """

    def __init__(self, input_slice: Any = None):
        self.slice: Any = input_slice
        if input_slice is None or isinstance(input_slice, tuple | slice):
            self.slice = slice(*input_slice) if isinstance(input_slice, tuple) else input_slice or slice(None)
            self.mode = "identity" if input_slice is None else "slice"
        elif isinstance(input_slice, list | Tensor | np.ndarray):
            self.slice, self.mode = to_numpy(input_slice), "array"
        elif isinstance(input_slice, int):
            self.mode = "int"
        else:
            raise Mismatch(f"Slice({input_slice!r})", "it is no slice", "give an int, a tuple, a list or an array")

    def apply(self, tensor: Any, dim: int = 0) -> Any:
        """Return the slice of a tensor along one dimension."""
        index: list[Any] = [slice(None)] * tensor.ndim
        index[dim] = self.slice
        return tensor[tuple(index)]

    def indices(self, max_ctx: int | None = None) -> np.ndarray:
        """Return the indices that are taken of an axis of length `max_ctx`."""
        if self.mode == "int":
            return np.array([self.slice], dtype=np.int64)
        if max_ctx is None:
            raise Mismatch("Slice.indices()", "the axis has no length", "give max_ctx=")
        return np.arange(max_ctx, dtype=np.int64)[self.slice]

    def __repr__(self) -> str:
        return f"Slice: {self.slice} Mode: {self.mode} "

    @classmethod
    def unwrap(cls, slice_input: Any) -> Slice:
        """Return a slice that keeps its axis."""
        if isinstance(slice_input, Slice):
            return slice_input
        return Slice([slice_input] if isinstance(slice_input, int) else slice_input)


def to_numpy(tensor: Any) -> np.ndarray:
    """Return a tensor, list, tuple or number as an array; bfloat16 as float32."""
    if isinstance(tensor, Tensor):
        tensor = tensor.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(tensor, np.ndarray | list | tuple | int | float | bool | str):
        return np.asarray(tensor)
    raise Mismatch(f"to_numpy of {type(tensor)}", "it holds no numbers", "give a tensor, array, list or number")


def get_corner(tensor: Any, n: int = 3) -> Any:
    """Return the first `n` entries along every axis."""
    return tensor[tuple(slice(n) for _ in range(tensor.ndim))]


def remove_batch_dim(tensor: Tensor) -> Tensor:
    """Return a tensor without its first axis, if that has length 1."""
    return tensor.squeeze(0)


def transpose(tensor: Tensor) -> Tensor:
    """Return a tensor with its last two axes exchanged."""
    return tensor.mT


def is_square(x: Tensor) -> bool:
    """Return True of a square matrix."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Tensor) -> bool:
    """Return True of a lower triangular matrix."""
    return is_square(x) and x.equal(x.tril())


def override_or_use_default_value(default_flag: Any, override: Any = None) -> Any:
    """Return the override unless it is None."""
    return default_flag if override is None else override


def repeat_along_head_dimension(tensor: Tensor, n_heads: int, clone_tensor: bool = True) -> Tensor:
    """Repeat a stream [batch, pos, d_model] for each head: [batch, pos, head, d_model]."""
    repeated = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], n_heads, tensor.shape[-1])
    return repeated.clone() if clone_tensor else repeated


def get_device() -> str:
    """Return "cuda" where there is one, else "cpu" (as there, Apple's is not taken unasked)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def gelu_new(input: Tensor) -> Tensor:
    """Return GPT-2's GELU."""
    return 0.5 * input * (1.0 + torch.tanh(np.sqrt(2.0 / np.pi) * (input + 0.044715 * torch.pow(input, 3.0))))


def calc_fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    """Return the number of inputs and outputs of a weight, heads counted as outputs."""
    if not 1 <= tensor.ndim <= 3:
        raise Mismatch(
            f"fans of {tuple(tensor.shape)}", "it is no weight", "give a vector, a matrix or one of each head"
        )
    heads, fan_in, fan_out = (1, 1, *tensor.shape)[-3:]
    return fan_in, heads * fan_out


def init_xavier_uniform_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Draw a weight uniformly, of variance 2 · gain² / (inputs + outputs)."""
    return _uniform(param, gain * (2 / sum(calc_fan_in_and_fan_out(param))) ** 0.5)


def init_xavier_normal_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Draw a weight normally, of variance 2 · gain² / (inputs + outputs)."""
    return nn.init.normal_(param, std=gain * (2 / sum(calc_fan_in_and_fan_out(param))) ** 0.5)


def init_kaiming_uniform_(param: Tensor, a=0.0, nonlinearity="relu", gain=1.0, mode="fan_in") -> Tensor:
    """Draw a weight uniformly, of variance (gain · the nonlinearity's)² / inputs."""
    return _uniform(param, _kaiming(param, a, nonlinearity, gain, mode))


def init_kaiming_normal_(param: Tensor, a=0.0, nonlinearity="relu", gain=1.0, mode="fan_in") -> Tensor:
    """Draw a weight normally, of variance (gain · the nonlinearity's)² / inputs."""
    return nn.init.normal_(param, std=_kaiming(param, a, nonlinearity, gain, mode))


def _kaiming(param: Tensor, a: float, nonlinearity: Any, gain: float, mode: str) -> float:
    fan_in, fan_out = calc_fan_in_and_fan_out(param)
    return gain * nn.init.calculate_gain(nonlinearity, a) / (fan_in if mode == "fan_in" else fan_out) ** 0.5


def _uniform(param: Tensor, std: float) -> Tensor:
    return nn.init.uniform_(param, -(3**0.5) * std, 3**0.5 * std)


def lm_cross_entropy_loss(
    logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
) -> Tensor:
    """Return the mean loss of predicting the next token, or [batch, pos − 1]; 0 where either token is masked."""
    loss = -F.log_softmax(logits, dim=-1)[..., :-1, :].gather(-1, tokens[..., 1:, None])[..., 0]
    count: Any = loss.numel()
    if attention_mask is not None:
        if attention_mask.shape != tokens.shape:
            shapes = f"{tuple(attention_mask.shape)} and {tuple(tokens.shape)}"
            raise Mismatch("attention_mask of tokens", f"their shapes are {shapes}", "give one entry per token")
        seen = attention_mask[:, :-1].bool() & attention_mask[:, 1:].bool()
        loss, count = loss.masked_fill(~seen, 0.0), seen.sum()
    return loss if per_token else loss.sum() / count


def lm_accuracy(logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
    """Return how often the likeliest next token is right, or for each token [batch, pos − 1]."""
    right = logits.argmax(-1)[:, :-1] == tokens[:, 1:]
    return right if per_token else right.sum() / right.numel()


def sample_logits(
    final_logits, top_k=None, top_p=None, temperature=1.0, freq_penalty=0.0, repetition_penalty=1.0, tokens=None
) -> Tensor:
    """Sample the next token of each row of logits [batch d_vocab]; penalties, temperature, top_k or top_p, in order."""
    from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

    ids: Any = tokens
    if repetition_penalty != 1.0 and tokens is not None:
        final_logits = RepetitionPenaltyLogitsProcessor(repetition_penalty)(ids, final_logits)
    if temperature == 0.0:
        return final_logits.argmax(-1)
    final_logits = final_logits / temperature
    if (
        (freq_penalty > 0 and tokens is None)
        or (top_k or 1) < 1
        or top_k == 0
        or not 0 < (1 if top_p is None else top_p) <= 1
    ):
        why = "a penalty needs tokens=, top_k at least 1, and top_p a number in (0, 1]"
        raise Mismatch(f"sample_logits(top_k={top_k}, top_p={top_p}, freq_penalty={freq_penalty})", why, "give these")
    if freq_penalty > 0:
        final_logits = final_logits - freq_penalty * F.one_hot(ids, final_logits.shape[-1]).sum(1)
    if top_k is not None:
        final_logits = TopKLogitsWarper(top_k)(ids, final_logits)
    elif top_p is not None:
        final_logits = TopPLogitsWarper(top_p)(ids, final_logits)
    return torch.distributions.Categorical(logits=final_logits.float()).sample()


def composition_scores(left: Any, right: Any, broadcast_dims: bool = True) -> Tensor:
    """Return ‖left @ right‖ / (‖left‖ ‖right‖) of factored matrices, for every pair of their leading dimensions."""
    if broadcast_dims:
        inner, outer = right.ndim - 2, left.ndim - 2
        for i in range(outer):
            right = right.unsqueeze(i)
        for i in range(inner):
            left = left.unsqueeze(i + outer)
    if left.rdim != right.ldim:
        raise Mismatch("composition scores", f"{left.shape} and {right.shape} do not fit", "left.rdim is right.ldim")
    new_left, new_right = left.collapse_l(), right.collapse_r()
    norms = [x.norm(dim=(-2, -1)) for x in (new_left @ new_right, new_right, new_left)]
    return norms[0] / norms[1] / norms[2]


def get_attention_mask(tokenizer: Any, tokens: Tensor, prepend_bos: bool, padding_side: str | None = None) -> Tensor:
    """Return 1 at every token [batch, pos] that is not padding at the padded side."""
    mask = torch.ones_like(tokens)
    if tokenizer is None:
        return mask
    left, real = (padding_side or tokenizer.padding_side) != "right", tokens.ne(tokenizer.pad_token_id)
    padding = (real.cumsum(-1) if left else real.flip(-1).cumsum(-1).flip(-1)) == 0
    mask[padding] = 0
    if left and prepend_bos and tokenizer.bos_token_id == tokenizer.pad_token_id:
        mask[torch.arange(len(mask)), padding.sum(-1) - 1] = 1
    return mask


def get_tokens_with_bos_removed(tokenizer: Any, tokens: Tensor, padding_side: str | None = None) -> Tensor:
    """Return tokens [batch, pos] without the BOS that stands in front of each prompt."""
    if tokenizer.bos_token_id is None:
        return tokens
    if (padding_side or tokenizer.padding_side) == "right":
        return tokens[..., 1:]
    at = (tokens == tokenizer.bos_token_id).int().argmax(-1)
    if tokenizer.bos_token_id == tokenizer.pad_token_id:
        at = (tokens.ne(tokenizer.pad_token_id).cumsum(-1) == 0).sum(-1) - 1
    keep = torch.ones_like(tokens, dtype=torch.bool).scatter(1, at.unsqueeze(-1), False)
    return tokens[keep].view(*tokens.shape[:-1], -1)


def tokenize_and_concatenate(
    dataset,
    tokenizer,
    streaming=False,
    max_length=1024,
    column_name="text",
    add_bos_token=True,
    num_proc=10,
    set_format=True,
) -> Any:
    """Return a dataset of rows `tokens` [max_length]: the texts one behind the other, EOS between, BOS in front.

    The rest of each batch of texts is dropped, and each of `num_proc` processes has batches of its own.
    """
    dataset = dataset.remove_columns([c for c in dataset.features if c != column_name])
    front = [tokenizer.bos_token_id] * add_bos_token
    length = max_length - len(front)
    padding = tokenizer.eos_token_id if tokenizer.pad_token is None else tokenizer.pad_token_id
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})

    def tokenized(examples: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = examples[column_name]
        rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        ids = [i for n, row in enumerate(rows) for i in (*[tokenizer.eos_token_id] * (n > 0), *row)]
        if rows and len(ids) < length:
            ids += [padding] * (length - len(ids))
        starts = range(0, len(ids) - length + 1, length)
        return {"tokens": [[*front, *ids[at : at + length]] for at in starts]}

    processes = {} if streaming else {"num_proc": num_proc}
    found = dataset.map(tokenized, batched=True, remove_columns=[column_name], **processes)
    if set_format:
        found.set_format(type="torch", columns=["tokens"])
    return found


def test_prompt(
    prompt, answer, model, prepend_space_to_answer=True, print_details=True, prepend_bos=None, top_k=10
) -> None:
    """Print rank, logit and probability of the answer's tokens, and the likeliest tokens."""
    answers = [answer] if isinstance(answer, str) else answer
    if prepend_space_to_answer:
        answers = [a if a.startswith(" ") else f" {a}" for a in answers]
    several = len(answers) > 1
    front, behind = model.to_tokens(prompt, prepend_bos=prepend_bos), model.to_tokens(answers, prepend_bos=False)
    behind = behind[:, :1] if several else behind
    tokens = torch.cat([front.repeat(len(behind), 1), behind], dim=1)
    pieces = [model.to_str_tokens(a, prepend_bos=False) for a in answers]
    if print_details:
        _print("Tokenized prompt:", model.to_str_tokens(prompt, prepend_bos=prepend_bos))
        _print(*("Tokenized answers:", pieces) if several else ("Tokenized answer:", pieces[0]))
    logits, ranks = model(tokens), []
    for step in range(behind.shape[1]):
        now, own = logits[:, front.shape[1] + step - 1], behind[:, step].tolist()
        probs = now.softmax(-1)
        order = probs.sort(descending=True).indices
        ranks.append([(p[step], int((o == t).nonzero())) for p, o, t in zip(pieces, order, own, strict=True)])
        if print_details:
            _print(f"Performance on answer token{'s' * several}:")
            for (piece, rank), x, p, t in zip(ranks[-1], now, probs, own, strict=True):
                _print(f"Rank: {rank: <8} Logit: {x[t].item():5.2f} Prob: {p[t].item():6.2%} Token: |{piece}|")
            for i, t in enumerate(order[0, :top_k].tolist()):
                there = f"Logit: {now[0, t].item():5.2f} Prob: {probs[0, t].item():6.2%}"
                _print(f"Top {i}th token. {there} Token: |{model.to_string(torch.tensor(t))}|")
    _print("Ranks of the answer tokens:", ranks if several else [r[0] for r in ranks])


def _print(*words: Any) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def download_file_from_hf(repo_name: str, file_name: str, subfolder: str = ".", **kwargs: Any) -> Any:
    """Refuse: pickles and downloads are not opened here."""
    path = f"{repo_name}/{subfolder}/{file_name}"
    raise Refused(f"download of {path}", "nothing is downloaded here", "save it as safetensors or JSON and open that")
