"""A compiler of programs into the weights of a GPT-2, which transformers and every method then treat as any other.

Each variable has its own dimensions of the residual stream: one per value, or one alone for a number. Dimension 0 marks
the beginning of the text. A selection is a head whose scores are SHARPNESS times the rank of each key for each query;
the beginning of the text has half a rank, so that a selection of nothing attends there. A width is read off the weight
that the beginning keeps when it competes as an equal. A map is one ReLU unit per value, or a pair of values; of a
number, a ramp between neighbouring values that it tells apart.

Variables that the program does not use may be computed beside it: heads and units that are at work and that nothing
reads. A method that goes by activity alone takes them for parts of the circuit.

Norms are the identity. LayerNorm subtracts the mean, which is 0 because every write is repeated, negated, in the last
dimension; and its ε = 2⁴⁰ leaves no trace of the variance in float32, while its weight 2²⁰ undoes the division exactly.

GPT-2's attention is causal, so programs are. What needs the whole text says it behind an `=`, one token after another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.zoo.compiled.language import Input, Mapped, Number, Selection, Taken, Value, Variable, schedule

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

#: score of a selected key over one that is not: e^(−SHARPNESS/2) is the weight that a selection leaks
SHARPNESS = 24.0
#: logit of the answer; all others have 0
LOGIT = 10.0
#: positions beyond the longest text and its beginning, which have no index
SPARE = 8
#: tokens before the words: the beginning of the text, and unknown words, which have no value
SPECIAL = 2
_EPS = 2.0**40
_MARK = 0


@dataclass
class Head:
    """Weights of one head, before they are put into a model: of as many places as its scores and values need."""

    query: Float[Tensor, "dim place"]
    bias: Float[Tensor, "place"]
    key: Float[Tensor, "dim place"]
    value: Float[Tensor, "dim part"]
    output: Float[Tensor, "part dim"]


@dataclass
class Units:
    """ReLU units of one layer: what each reads, its bias and what it writes."""

    width: int
    reads: list[Tensor] = field(default_factory=list)
    bias: list[float] = field(default_factory=list)
    writes: list[Tensor] = field(default_factory=list)

    def add(self, reads: dict[int, float], bias: float, writes: dict[int, float]) -> None:
        """Add one unit, by the coefficients of the dimensions that it reads and writes."""
        for rows, given in ((self.reads, reads), (self.writes, writes)):
            row = torch.zeros(self.width)
            for dim, coefficient in given.items():
                row[dim] += coefficient
            rows.append(row)
        self.bias.append(bias)


@dataclass(frozen=True)
class Compiled:
    """A program laid out in layers.

    Attributes:
        program: the variable that the model says.
        words: the words of the vocabulary, after the beginning of the text.
        longest: the number of tokens of the longest text, without its beginning.
        beside: variables that are computed and not used.
    """

    program: Variable
    words: tuple[str, ...]
    longest: int
    beside: tuple[Variable, ...] = ()

    @cached_property
    def order(self) -> list[Variable]:
        """The variables, each after its inputs."""
        return schedule(self.program, *self.beside)

    @cached_property
    def dims(self) -> dict[Variable, dict[Value, int]]:
        """The dimension of each value of each variable; of a number, one dimension under None."""
        found, n = dict[Variable, dict[Value, int]](), _MARK + 1
        for v in self.order:
            names: Sequence[Value] = (None,) if isinstance(v, Number) else v.values
            found[v] = {x: n + i for i, x in enumerate(names)}
            n += len(names)
        return found

    @cached_property
    def used(self) -> int:
        """The number of dimensions of mark and variables."""
        return 1 + sum(map(len, self.dims.values()))

    @cached_property
    def layer(self) -> dict[Variable, int]:
        """The layer that computes each variable: the first whose inputs are there; −1 of inputs."""
        step = dict[Variable, int]()  # attention of layer l is step 2l, its MLP step 2l + 1
        for v in self.order:
            if isinstance(v, Input):
                step[v] = -1
                continue
            ready, odd = max(step[i] for i in v.inputs) + 1, int(isinstance(v, Mapped))
            step[v] = ready + (ready % 2 != odd)
        return {v: s // 2 if s >= 0 else -1 for v, s in step.items()}

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return max(self.layer.values()) + 1

    @property
    def n_heads(self) -> int:
        """The number of heads of each layer: as many as the widest one needs."""
        needed = Counter(self.layer[v] for v in self.order if isinstance(v, Taken | Number))
        return max(needed.values(), default=1)

    def heads(self, layer: int) -> list[Head]:
        """Return the heads of one layer."""
        return [self._head(v) for v in self.order if isinstance(v, Taken | Number) and self.layer[v] == layer]

    def units(self, layer: int) -> Units:
        """Return the ReLU units of one layer."""
        units = Units(self.used)
        for v in self.order:
            if isinstance(v, Mapped) and self.layer[v] == layer:
                self._map(units, v)
        return units

    def _head(self, v: Taken | Number) -> Head:
        dims, own = self.dims, self.dims[v]
        pairs: list[tuple[int, int, float]]  # (dimension read, place in the head, coefficient)
        match v:
            case Taken(of=of, default=default):
                places = {x: i for i, x in enumerate(v.values)}
                pairs = [(dims[of][x], places[x], 1.0) for x in of.values]
                pairs += [(_MARK, places[default], 1.0)] if default is not None else []
                writes = [(places[x], own[x]) for x in v.values]
            case Number(of=None):
                pairs, writes = [(_MARK, 0, 1.0)], [(0, own[None])]
            case Number(of=Variable() as of, numbers=numbers):
                pairs = [(dims[of][x], 0, float(numbers[x])) for x in of.values if numbers.get(x)]
                writes = [(0, own[None])]
        value, output = torch.zeros(self.used, len(writes)), torch.zeros(len(writes), self.used)
        for dim, place, coefficient in pairs:
            value[dim, place] += coefficient
        for place, dim in writes:
            output[place, dim] = 1.0
        start = 1.0 if isinstance(v, Number) and v.of is None else 0.5
        return Head(*self._scores(v.selection, start), value, output)

    def _scores(self, selection: Selection, start: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return W_Q, its bias and W_K of a selection, in which the beginning of the text ranks `start`."""
        keys, queries = selection.keys, selection.queries
        key_at = self.dims[keys] if keys is not None else {None: -1}
        query_at = self.dims[queries] if queries is not None else {None: -1}
        ranks = torch.tensor([[float(selection.rank(k, q) or 0) for k in key_at] for q in query_at])  # [query, key]
        by_query = len(query_at) <= len(key_at)
        left = torch.eye(len(query_at)) if by_query else ranks
        right = ranks.T if by_query else torch.eye(len(key_at))
        n = left.shape[1]
        query, bias, key = torch.zeros(self.used, n + 1), torch.zeros(n + 1), torch.zeros(self.used, n + 1)
        if queries is None:
            bias[:n] = left[0]
        else:
            query[list(query_at.values()), :n] = left
        # Where keys do not matter, all positions have score 0 and the beginning less than that by what it lacks.
        if keys is not None:
            key[list(key_at.values()), :n] = right
            key[_MARK, n] = start
        else:
            key[_MARK, n] = start - 1
        bias[n] = 1.0
        return SHARPNESS * query, SHARPNESS * bias, key

    def _map(self, units: Units, v: Mapped) -> None:
        own = self.dims[v]
        if len(v.of) == 2:
            one, other = (self.dims[i] for i in v.of)
            for x, i in one.items():
                for y, j in other.items():
                    if (z := v.function(x, y)) is not None:
                        units.add({i: 1.0, j: 1.0}, -1.0, {own[z]: 1.0})
        elif isinstance(v.of[0], Number):
            self._steps(units, v, v.of[0])
        else:
            for x, i in self.dims[v.of[0]].items():
                if (z := v.function(x)) is not None:
                    units.add({i: 1.0}, 0.0, {own[z]: 1.0})

    def _steps(self, units: Units, v: Mapped, number: Number) -> None:
        """Add the units of a map of a number: a ramp between neighbours where its value changes."""
        own, dim = self.dims[v], self.dims[number][None]
        points = sorted(zip(number.coded, map(v.function, number.values), strict=True))
        units.add({_MARK: -1.0}, 1.0, {own[points[0][1]]: 1.0})  # the lowest value's, everywhere but at the beginning
        for (low, before), (high, after) in pairwise(points):
            if before == after:
                continue
            slope = 1 / (high - low)
            foot = slope * low
            for shift, sign in ((0.0, 1.0), (1.0, -1.0)):
                bias = -foot - shift
                silent = {dim: slope, _MARK: -max(0.0, slope + bias)}  # a number at the beginning is at most 1
                units.add(silent, bias, {own[after]: sign, own[before]: -sign})


def lay_out(program: Variable, words: Sequence[str], longest: int, beside: Sequence[Variable] = ()) -> Compiled:
    """Return a program in layers, for texts of up to `longest` tokens.

    Raises:
        Refused: it says something that the vocabulary lacks.
    """
    if isinstance(program, Number) or (strange := [v for v in program.values if v not in words]):
        what = "a number" if isinstance(program, Number) else f"{strange[0]!r}"
        raise Refused(f"program that says {what}", "the vocabulary has words alone, and not this", "map it to words")
    return Compiled(program, tuple(words), longest, tuple(beside))


def emit(compiled: Compiled) -> GPT2LMHeadModel:
    """Return the model that has the program as its weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers = range(compiled.n_layers)
    heads, units = [compiled.heads(i) for i in layers], [compiled.units(i) for i in layers]
    n_heads = compiled.n_heads
    widest = max((max(h.query.shape[1], h.value.shape[1]) for some in heads for h in some), default=1)
    d_head = max(widest, -(-(compiled.used + 1) // n_heads))
    config = GPT2Config(
        vocab_size=SPECIAL + len(compiled.words),
        n_positions=compiled.longest + SPARE,
        n_embd=n_heads * d_head,
        n_layer=compiled.n_layers,
        n_head=n_heads,
        n_inner=max(1, *(len(u.bias) for u in units)),
        activation_function="relu",
        layer_norm_epsilon=_EPS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        dtype="float32",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.fill_(_EPS**0.5 if ".ln_" in name and name.endswith("weight") else 0.0)
        blocks: list[Any] = list(model.transformer.h)
        _embed(compiled, model)
        for block, own_heads, own_units in zip(blocks, heads, units, strict=True):
            for i, head in enumerate(own_heads):
                _put_head(block.attn, head, i * d_head, d_head)
            if own_units.bias:
                n = len(own_units.bias)
                block.mlp.c_fc.weight[: compiled.used, :n] = torch.stack(own_units.reads).T
                block.mlp.c_fc.bias[:n] = torch.tensor(own_units.bias)
                _write(block.mlp.c_proj.weight, slice(0, n), torch.stack(own_units.writes))
    return model


def _embed(compiled: Compiled, model: GPT2LMHeadModel) -> None:
    used = compiled.used
    rows = torch.zeros(model.config.vocab_size, used)
    rows[0, _MARK] = 1.0
    places = torch.zeros(model.config.n_positions, used)
    for v in compiled.order:
        if isinstance(v, Input):
            for x, dim in compiled.dims[v].items():
                if isinstance(x, int):
                    places[x, dim] = 1.0
                else:
                    rows[SPECIAL + compiled.words.index(str(x)), dim] = 1.0
    _write(model.transformer.wte.weight, slice(0, len(rows)), rows)
    _write(model.transformer.wpe.weight, slice(0, len(places)), places)
    for x, dim in compiled.dims[compiled.program].items():
        model.lm_head.weight[SPECIAL + compiled.words.index(str(x)), dim] = LOGIT


def _put_head(attention: Any, head: Head, start: int, d_head: int) -> None:
    """Put a head into the columns of the concatenated W_Q, W_K, W_V from `start` on; scores are divided by √d_head."""
    weight, bias, width = attention.c_attn.weight, attention.c_attn.bias, attention.c_proj.weight.shape[0]
    root = d_head**0.5
    for part, (matrix, factor) in enumerate(((head.query, root), (head.key, 1.0), (head.value, 1.0))):
        at = part * width + start
        weight[: matrix.shape[0], at : at + matrix.shape[1]] = factor * matrix
    bias[start : start + len(head.bias)] = root * head.bias
    _write(attention.c_proj.weight, slice(start, start + len(head.output)), head.output)


def _write(into: Tensor, rows: slice, written: Float[Tensor, "row dim"]) -> None:
    """Put rows of writes into a weight, each with its negated sum in the last dimension, so that its mean is 0."""
    into[rows, : written.shape[1]] = written
    into[rows, -1] -= written.sum(1)
