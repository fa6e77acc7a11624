"""Anatomy: a live model's modules under the house's names, read through its family row."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Hashable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, TypeVar

from torch import nn

from cutaway.core.record import hash_text
from cutaway.core.refuse import Code, Refused
from cutaway.core.sites import Site
from cutaway.models.anatomy.families import Family, Step, need, trace
from cutaway.models.anatomy.norms import Norm, measure

T = TypeVar("T")
_TRAINING = itemgetter("training")
_STEPS: ContextVar[list[Step] | None] = ContextVar("cutaway_steps", default=None)  # what `remember` must watch


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `d_mlp` is the width of `mlp_post` (0 where experts hide it).

    Of state-space layers: `d_inner` channels with `d_state` states each, `n_ssm_heads` step sizes (one per channel in
    the first generation), and `n_groups` that share B and C.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    context: int
    n_experts: int = 0
    d_inner: int = 0
    d_state: int = 0
    n_ssm_heads: int = 0
    n_groups: int = 0


class Anatomy:
    """Modules and sizes of one live model; holds no state of a run.

    Attributes:
        hf: transformers' model.
        family: the row of family data, or one found by probing.
        disabled: what the self-check found wrong, with the reason.
        root: the module that holds the blocks.
        blocks: the blocks in order.
        shape: sizes.
    """

    def __init__(self, hf: Any, family: Family, measured: Callable[[Anatomy], float]):
        """`measured` finds the multiplier of a family that was probed; it is called on first use."""
        self.hf, self.family, self._measured = hf, family, measured
        self.disabled: dict[str, str] = {}
        self._watched: tuple[list[Any], list[Any], list[dict[str, Any]]] | None = None  # children, their copies, flags
        self._kept: dict[Hashable, tuple[Any, list[Step]]] = {}
        self.root = need(hf, family.root, "the model's root")
        self.blocks = list(need(self.root, family.layers, "the block list"))  # type: ignore[call-overload]
        self.shape = self._shape()

    @property
    def config(self) -> Any:
        """transformers' own configuration."""
        return self.hf.config

    def configuration(self) -> str:
        """Hash of the architecture's configuration."""
        return hash_text(str(sorted(self.config.to_dict().items(), key=str)))

    @cached_property
    def parallel(self) -> bool:
        """True if attention and MLP read the same residual stream."""
        return any(key == "always" or bool(getattr(self.config, key, False)) for key in self.family.parallel)

    @cached_property
    def multiplier(self) -> float:
        """Factor of the block's contributions before they are added to the stream (Granite, MiniCPM3)."""
        if key := self.family.residual_multiplier:
            return float(getattr(self.config, key))
        return self._measured(self) if self.family.probed else 1.0

    @cached_property
    def blocks_return_tuples(self) -> bool:
        """True if a block returns (stream, attention …) instead of the bare stream, read off its code."""
        last = [n for n in ast.walk(_source(type(self.blocks[0]))) if isinstance(n, ast.Return)][-1]
        return isinstance(last.value, ast.Tuple) or getattr(last.value, "id", "") == "outputs"

    @property
    def unembed(self) -> nn.Module | None:
        """The module that turns the final residual stream into logits."""
        return self.hf.get_output_embeddings() if hasattr(self.hf, "get_output_embeddings") else None

    def in_training(self) -> list[nn.Module]:
        """Return the modules in training mode, whatever the root's mode is."""
        # Asked before every forward: reading all flags must cost next to nothing.
        if self._watched is None or self._watched[0] != self._watched[1]:
            modules = list(self.hf.modules())
            children = [m._modules for m in modules if m._modules]
            self._watched = children, [dict(c) for c in children], [m.__dict__ for m in modules]
        if not any(map(_TRAINING, self._watched[2])):
            return []
        return [m for m in self.hf.modules() if m.training]

    def part(self, layer: int, name: str) -> nn.Module | None:
        """Return a module of a block by the family row's field name (`o`, `ln1`, `down` …), or None."""
        return _noted(trace(self.blocks[layer], getattr(self.family, name)))

    def top(self, name: str) -> nn.Module | None:
        """Return a module of the root by the family row's field name (`embed`, `pos`, `final`), or None."""
        return _noted(trace(self.root, getattr(self.family, name)))

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """`make()`, made again only when a module that it found has been exchanged (adapters do that)."""
        kept = self._kept.get(key)
        if kept is not None:
            for children, name, child in kept[1]:
                if children.get(name) is not child:
                    break
            else:
                return _noted(kept)
        steps: list[Step] = []
        token = _STEPS.set(steps)
        try:
            value = make()
        finally:
            _STEPS.reset(token)
        if len(self._kept) >= 8192:
            self._kept.clear()
        kept = self._kept[key] = value, steps
        return _noted(kept)

    def norm(self, module: nn.Module) -> Norm:
        """Measure the affine form of a norm module (its weights may have been edited since)."""
        return measure(module, self.shape.d_model)

    def resid_mid_reader(self, layer: int) -> nn.Module | None:
        """Return the module whose input is the residual stream between attention and MLP, or None if parallel."""
        if self.parallel or self.family.post_norm or (self.family.ln2 is None and self.family.ln1_post is None):
            return None
        return self.part(layer, "ln2") or self.part(layer, "mlp")

    def _shape(self) -> Shape:
        c = self.config
        d_model = _first(c, "hidden_size", "n_embd")
        if self.family.ssm:
            return self._state_space_shape(d_model)
        n_heads = _first(c, "num_attention_heads", "n_head", "num_heads")
        o = next((m for i in range(len(self.blocks)) if (m := self.part(i, "o")) is not None), None)
        if o is None or not n_heads:
            raise Refused(
                f"model type {c.model_type!r}", "its attention has no output projection", "use a known family"
            )
        d_head = (_in_width(o) or d_model) // n_heads
        down = next((m for i in range(len(self.blocks)) if (m := self.part(i, "down")) is not None), None)
        kv = self._kv_heads(n_heads, d_head)
        return Shape(
            len(self.blocks),
            n_heads,
            kv,
            d_model,
            d_head,
            (_in_width(down) or 0) if down is not None else 0,
            c.vocab_size,
            _first(c, "max_position_embeddings", "n_positions", "seq_length", "n_ctx") or 1 << 30,
            (_first(c, "num_local_experts", "num_experts") or 0) if self.family.router else 0,
        )

    def _state_space_shape(self, d_model: int) -> Shape:
        mixer: Any = need(self.blocks[0], self.family.ssm, "the state-space layer")
        return Shape(
            len(self.blocks),
            0,
            0,
            d_model,
            0,
            0,
            self.config.vocab_size,
            1 << 30,
            d_inner=_in_width(need(self.blocks[0], self.family.ssm_out, "its output projection")) or 0,
            d_state=int(mixer.ssm_state_size),
            n_ssm_heads=len(mixer.A_log),
            n_groups=int(getattr(mixer, "n_groups", 1)),
        )

    def widest(self, positions: int) -> int:
        """Return the size of a block's widest activation per position of a prompt of that length."""
        s, chunk = self.shape, int(getattr(self.config, "chunk_size", 0) or 0)
        # A scan in chunks forms a square of each, however short the prompt.
        squares = s.n_ssm_heads * chunk * chunk * math.ceil(positions / chunk) // positions if chunk else 0
        return max(s.d_mlp, 4 * s.d_model, s.n_heads * positions, 2 * s.d_inner * s.d_state, squares)

    def held(self, site: Site, positions: int) -> int:
        """Return the size of a site's activation per position of a prompt of that length."""
        s = self.shape
        sizes = {
            "head": s.n_heads,
            "kv_head": s.n_kv_heads,
            "d_head": s.d_head,
            "d_model": s.d_model,
            "neuron": s.d_mlp,
            "k_pos": positions,
            "expert": s.n_experts,
            "channel": s.d_inner,
            "state": s.d_state,
            "group": s.n_groups,
            "ssm_head": s.n_ssm_heads,
            "token": s.d_vocab,
        }
        return math.prod(sizes.get(axis, 1) for axis in site.axes.split())

    def _kv_heads(self, n_heads: int, d_head: int) -> int:
        fused, k = self.part(0, "fused"), self.part(0, "k")
        if fused is not None:
            return (_out_width(fused) // d_head - n_heads) // 2
        return _out_width(k) // d_head if k is not None else _first(self.config, "num_key_value_heads") or n_heads


def _noted(found: tuple[T, list[Step]]) -> T:
    if (steps := _STEPS.get()) is not None:
        steps.extend(found[1])
    return found[0]


def _source(kind: type) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))


def _first(config: Any, *names: str) -> int:
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError as error:  # transformers' own: it may differ between layers
            why = f"its configuration gives {name} for each layer, where one number is needed"
            raise Refused(
                f"model type {config.model_type!r}", why, Code("read its modules through model.hf")
            ) from error
        if isinstance(value, int):
            return int(value)
    return 0


def _in_width(m: nn.Module) -> int | None:
    return getattr(m, "in_features", None) or getattr(m, "nx", None)


def _out_width(m: nn.Module) -> int:
    return int(getattr(m, "out_features", None) or getattr(m, "nf", 0))
