"""Activation patching with TransformerLens' names, run as one sweep where the model has a house engine.

Cells whose patch changes nothing in the corrupted run are not run; the others share what stands before their patch, in
batches. The metric still gets the logits [batch pos d_vocab] of one cell at a time; those of the last position alone
are computed as long as it indexes nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cutaway.compat.transformer_lens.hook_points import HookPoint
from cutaway.compat.transformer_lens.utils import Mismatch, get_act_name, get_attention_mask
from cutaway.core.address import Address
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.edits.edit import Edit
from cutaway.models.sweep.executor import sweep

Setter = Callable[[Tensor, Sequence[int], Tensor], Tensor]
Metric = Callable[[Tensor], Any]
_ALL = slice(None)
_LOGITS, _NONE = Address("logits"), torch.empty(0)


@dataclass(frozen=True, eq=False)
class _Patch(Edit):
    """A cell's patch: what a setter makes of a hook's activation.

    Attributes:
        make: takes the activation, which it may write into, and returns it with the patch.
        name: the hook.
        address: the house's place of the hook.
        own: the activation in the corrupted run, which the patch finds there.
        since: the first column that it changes.
    """

    make: Callable[..., Tensor]
    name: str
    address: Any = None
    own: Tensor = _NONE
    since: int = 0
    positions: tuple[int, ...] | None = None
    whole_batch: ClassVar[bool] = True  # the metric reads all prompts together

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        new = self.make(self.own.clone())
        return new.narrow(self.axis, new.shape[self.axis] - x.shape[self.axis], x.shape[self.axis])

    @property
    def axis(self) -> int:
        """The axis of the activation along which the prompt runs."""
        return 2 if self.name.endswith(("pattern", "scores")) else 1

    def moved(self) -> list[int]:
        """Return the columns of the corrupted run that it changes."""
        changes = self.make(self.own.clone()) != self.own
        return changes.transpose(0, self.axis).flatten(1).any(1).nonzero().flatten().tolist()


Runs = Sequence[Sequence[_Patch]]  # the patches of each


class _EveryPosition(Exception):
    """Signal that a metric reads more than the last position."""


class _LastLogits(Tensor):
    """Logits [batch pos d_vocab] whose last position alone is real; reading any other raises `_EveryPosition`."""

    _KNOWN = (Tensor.size, Tensor.dim, Tensor.__len__, *(getattr(Tensor, n).__get__ for n in
              ("shape", "ndim", "device", "dtype", "requires_grad", "is_cuda")))  # fmt: skip

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in cls._KNOWN or (func is Tensor.__getitem__ and _is_last(args[1], args[0].shape[1])):
                return func(*args, **(kwargs or {}))
        raise _EveryPosition


def _is_last(index: Any, width: int) -> bool:
    """Return True of an index [prompt, position, …] or [..., position, token] of the last position alone."""
    if not isinstance(index, tuple) or len(index) < 2 or not isinstance(index[1], int | slice):
        return False
    first = isinstance(index[0], int | slice) or (index[0] is ... and len(index) == 3)
    return first and index[1] in (-1, width - 1, slice(-1, None))


def generic_activation_patch(
    model: Any,
    corrupted_tokens: Tensor,
    clean_cache: Any,
    patching_metric: Metric,
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
) -> Any:
    """Return the metric of the corrupted run under each patch, with one axis for each index, or a row of `index_df`.

    Raises:
        Mismatch: both or neither of `index_axis_names` and `index_df`.
    """
    if (index_df is None) == (index_axis_names is None):
        raise Mismatch("generic_activation_patch()", "it needs its cells once", "give index_axis_names= or index_df=")
    if index_df is None:
        shape = [_length(model, corrupted_tokens, activation_name, axis) for axis in index_axis_names or ()]
        rows = [list(i) for i in itertools.product(*map(range, shape))]
    else:
        shape, rows = [len(index_df)], index_df.values.tolist()
    names = [get_act_name(activation_name, i[0]) for i in rows]
    cells = [_Patch(partial(_made, patch_setter, i, clean_cache[n]), n) for n, i in zip(names, rows, strict=True)]
    values = _values(model, corrupted_tokens, cells, patching_metric)
    found = torch.tensor(values, device=model.cfg.device).reshape(shape)
    if not return_index_df:
        return found
    return found, make_df_from_ranges(shape, index_axis_names or ()) if index_df is None else index_df


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> Any:
    """Return a data frame of all combinations of indices, the last column fastest."""
    import pandas as pd

    return pd.DataFrame(list(itertools.product(*map(range, column_max_ranges))), columns=list(column_names))


def _length(model: Any, tokens: Tensor, activation: str, axis: str) -> int:
    if axis in ("pos", "src_pos", "dest_pos"):
        return tokens.shape[-1]
    few = model.cfg.n_key_value_heads if activation in ("k", "v") else None
    return {"layer": model.cfg.n_layers, "head": few or model.cfg.n_heads, "head_index": few or model.cfg.n_heads}[axis]


def _made(setter: Setter, index: Sequence[int], clean: Tensor, x: Tensor, hook: Any = None) -> Tensor:
    return setter(x.clone() if x.requires_grad else x, index, clean)


def _place(model: Any, name: str) -> Address | None:
    """Return the house's address of a hook, where both hold the same values."""
    place, site, layer = model.places.get(name), name.rpartition("hook_")[2], int(name.split(".")[1])
    if isinstance(place, Address):
        return None if site == "scale" or (site == "result" and not model.cfg.use_attn_result) else place
    turned = model.cfg.positional_embedding_type == "rotary" or model.house.family.qk_norm
    return Address(site, layer) if site == "v" or (site in ("q", "k") and not turned) else None


def _values(model: Any, tokens: Tensor, cells: Sequence[_Patch], metric: Metric) -> list[float]:
    """Measure the cells: in one sweep where the house alone runs the model, else one by one."""
    points = [model.mod_dict[name] for name in getattr(model, "places", ())]
    alone = points and all(isinstance(p, HookPoint) and not p.has_hooks() for p in points)
    left = model.tokenizer is not None and model.tokenizer.padding_side == "left"
    if not alone or (left and not get_attention_mask(model.tokenizer, tokens, model.cfg.default_prepend_bos).all()):
        return _looped(model, tokens, [[c] for c in cells], metric)
    names = {c.name for c in cells}
    with torch.no_grad():
        own = model.run_with_cache(tokens, names_filter=names.__contains__, return_type=None)[1]
        cells = [replace(c, own=own[c.name], address=_place(model, c.name)) for c in cells]
        moved = {n: replace(c, since=columns[0]) for n, c in enumerate(cells) if (columns := c.moved())}
    way = _looped if any(c.address is None for c in moved.values()) else _swept
    # Cells that change nothing share a run without a patch, the last one.
    runs = [[c] for c in moved.values()] + [[]] * (len(moved) < len(cells))
    found = way(model, tokens, runs, metric)
    values = found[-1:] * len(cells)
    for n, value in zip(moved, found, strict=False):
        values[n] = value
    return values


def _looped(model: Any, tokens: Tensor, runs: Runs, metric: Metric) -> list[float]:
    hooks = [[(c.name, c.make) for c in run] for run in runs]
    return [_number(metric(model.run_with_hooks(tokens, fwd_hooks=some))) for some in hooks]


def _number(value: Any) -> float:
    return value.item() if isinstance(value, Tensor) else float(value)


def _swept(model: Any, tokens: Tensor, runs: Runs, metric: Metric, whole: bool = False) -> list[float]:
    """Sweep the runs for a metric of the last position; of the `whole` logits if it turns out to read more."""
    n, width = tokens.shape

    def function(seen: Seen, prompt: Tensor) -> Tensor:
        rows: Any = seen.activations[_LOGITS] if whole and seen.activations else seen.last_logits
        each = [x if whole else x[:, None].expand(-1, width, -1).as_subclass(_LastLogits) for x in rows.split(n)]
        return torch.tensor([_number(metric(x)) for x in each], device=rows.device).repeat_interleave(n)

    measure = Measure(function, Reads(not whole, (_LOGITS,) * whole))
    try:
        with torch.no_grad():
            return sweep(model.house, model.house.tokens(tokens), runs, measure)[:, 0].tolist()
    except _EveryPosition:
        return _swept(model, tokens, runs, metric, whole=True)


def _setter(where: Callable[..., tuple[Any, ...]]) -> Setter:
    """Return the setter that takes over the clean values at a place of the index."""

    def patch(corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor) -> Tensor:
        corrupted_activation[where(*index)] = clean_activation[where(*index)]
        return corrupted_activation

    return patch


layer_pos_patch_setter = _setter(lambda layer, pos: (_ALL, pos))
layer_pos_head_vector_patch_setter = _setter(lambda layer, pos, head: (_ALL, pos, head))
layer_head_vector_patch_setter = _setter(lambda layer, head: (_ALL, _ALL, head))
layer_head_pattern_patch_setter = _setter(lambda layer, head: (_ALL, head))
layer_head_pos_pattern_patch_setter = _setter(lambda layer, head, dest: (_ALL, head, dest))
layer_head_dest_src_pos_pattern_patch_setter = _setter(lambda layer, head, dest, src: (_ALL, head, dest, src))


def _helper(activation: str, setter: Setter, *axes: str) -> Callable[..., Any]:
    return partial(generic_activation_patch, patch_setter=setter, activation_name=activation, index_axis_names=axes)


# Each takes (model, corrupted_tokens, clean_cache, patching_metric) and returns [layer, …] with the axes named here.
get_act_patch_resid_pre = _helper("resid_pre", layer_pos_patch_setter, "layer", "pos")
get_act_patch_resid_mid = _helper("resid_mid", layer_pos_patch_setter, "layer", "pos")
get_act_patch_attn_out = _helper("attn_out", layer_pos_patch_setter, "layer", "pos")
get_act_patch_mlp_out = _helper("mlp_out", layer_pos_patch_setter, "layer", "pos")
get_act_patch_attn_head_out_by_pos = _helper("z", layer_pos_head_vector_patch_setter, "layer", "pos", "head")
get_act_patch_attn_head_q_by_pos = _helper("q", layer_pos_head_vector_patch_setter, "layer", "pos", "head")
get_act_patch_attn_head_k_by_pos = _helper("k", layer_pos_head_vector_patch_setter, "layer", "pos", "head")
get_act_patch_attn_head_v_by_pos = _helper("v", layer_pos_head_vector_patch_setter, "layer", "pos", "head")
get_act_patch_attn_head_out_all_pos = _helper("z", layer_head_vector_patch_setter, "layer", "head")
get_act_patch_attn_head_q_all_pos = _helper("q", layer_head_vector_patch_setter, "layer", "head")
get_act_patch_attn_head_k_all_pos = _helper("k", layer_head_vector_patch_setter, "layer", "head")
get_act_patch_attn_head_v_all_pos = _helper("v", layer_head_vector_patch_setter, "layer", "head")
get_act_patch_attn_head_pattern_all_pos = _helper("pattern", layer_head_pattern_patch_setter, "layer", "head_index")
get_act_patch_attn_head_pattern_by_pos = _helper(
    "pattern", layer_head_pos_pattern_patch_setter, "layer", "head_index", "dest_pos"
)
get_act_patch_attn_head_pattern_dest_src_pos = _helper(
    "pattern", layer_head_dest_src_pos_pattern_patch_setter, "layer", "head_index", "dest_pos", "src_pos"
)


def _every(helpers: Sequence[Any], model: Any, corrupted_tokens: Tensor, clean_cache: Any, metric: Metric) -> Tensor:
    """Stack what several helpers return [patch_type layer …]; of fewer key-value heads, zeros fill up the rest."""
    found = [helper(model, corrupted_tokens, clean_cache, metric) for helper in helpers]
    return torch.stack([F.pad(x, (0, found[0].shape[-1] - x.shape[-1])) for x in found])


def _pattern_by_pos(*given: Any) -> Tensor:
    return get_act_patch_attn_head_pattern_by_pos(*given).transpose(1, 2)


get_act_patch_block_every = partial(_every, (get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out))
get_act_patch_attn_head_all_pos_every = partial(_every, (
    get_act_patch_attn_head_out_all_pos, get_act_patch_attn_head_q_all_pos, get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_v_all_pos, get_act_patch_attn_head_pattern_all_pos))  # fmt: skip
get_act_patch_attn_head_by_pos_every = partial(_every, (
    get_act_patch_attn_head_out_by_pos, get_act_patch_attn_head_q_by_pos, get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_v_by_pos, _pattern_by_pos))  # fmt: skip
