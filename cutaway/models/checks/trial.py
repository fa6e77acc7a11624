"""A trial: a tiny batch through a live model, for the identities of the self-check.

Most identities are about a block, and blocks of one kind (types, settings, hooks, shapes) have the same code. So one
forward of the whole model reads everything, and the forwards under edits run the first and the last block of each
kind, the others handing on what they are given; nothing is unembedded where no logits are compared.

What is compared is compared like with like: edited runs with unedited ones of the same kernels, which are then the
same numbers to the bit, in half precision too; and sums with the size of their summands, number by number, of which
rounding is a known share.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cutaway.core.address import Address, parse
from cutaway.core.refuse import Code, Refused
from cutaway.core.sites import SITES
from cutaway.core.stats import generator
from cutaway.models.access.capture import Activations
from cutaway.models.access.forward import evaluating
from cutaway.models.edits.edit import Edit
from cutaway.models.loading.identity import structure
from cutaway.models.model import Model
from cutaway.models.sweep.partial_forward import held_back, without
from cutaway.models.tokens import Tokens, batch

FAULTS = (Refused, RuntimeError, ValueError, TypeError, AttributeError, LookupError)
FORMED = ("scores", "pattern")  # sites that need the eager form of attention
_FEW = 4  # of so few layers all are run


class Trial:
    """A tiny batch through the model, with everything captured once; `layers` are those that edited runs pass."""

    def __init__(self, model: Model, seed: int = 0):
        self.model = model
        low = min(3, model.shape.d_vocab - 2)
        ids = torch.randint(low, model.shape.d_vocab, (2, 7), generator=generator(seed))
        self.tokens: Tokens = model.tokens(batch(ids.tolist()))
        offered = model.sites()
        self.here = [s.name for s in SITES if offered[s.name].startswith("read")]
        try:
            self.logits = self.run()
        except FAULTS as fault:
            raise _no_forward(model, self.tokens, fault) from fault
        self.broken: dict[str, str] = {}
        _check_stream(model, self.tokens)
        self.acts = self._captured(self.tokens, [s for s in self.here if s not in FORMED])
        self.layers = _one_of_each(model)
        self._ends: dict[bool, Tensor] = {}
        try:
            self.end()
        except FAULTS:
            self.layers = list(range(model.shape.n_layers))
        with self.short():
            places = [s for s in self.here if s != "logits"]
            self.formed = self._captured(self.tokens, places)
            self.plain = self._captured(self.tokens, [s for s in places if s not in FORMED])

    def _captured(self, tokens: Tokens, sites: Sequence[str]) -> Activations:
        """Return the sites at once; if that fails, those that can be captured alone, and why the others cannot."""
        try:
            return self.model.capture(tokens, self.there(sites))
        except FAULTS:
            for site in sites:
                try:
                    self.model.capture(tokens, self.there([site]))
                except FAULTS as fault:
                    self.broken[site] = fault_text(fault)
        self.here = [s for s in self.here if s not in self.broken]
        return self.model.capture(tokens, self.there([s for s in sites if s not in self.broken]))

    def there(self, sites: Sequence[str]) -> list[Address]:
        """Return the addresses of sites, of the blocks that run at present."""
        layers = getattr(self, "layers", None)
        found = [a for s in sites for a in self.model.places(s)]
        return found if layers is None else [a for a in found if a.layer is None or a.layer in layers]

    @contextmanager
    def short(self) -> Iterator[None]:
        """Within the block, only the blocks of `layers` do anything."""
        rest = [i for i in range(self.model.shape.n_layers) if i not in self.layers]
        with without(self.model.anatomy, rest):
            yield

    def run(self, *edits: Edit) -> Tensor:
        """Return the logits of the whole model, or the last residual stream of one without unembedding."""
        return self.model.run(self.tokens, edits).float()

    def end(self, *edits: Edit, formed: bool = False) -> Tensor:
        """Return the unembedding's input in a short run under edits; `formed`: attention is computed step by step."""
        if not edits and formed in self._ends:
            return self._ends[formed]
        head = self.model.anatomy.unembed
        watched = [Address("pattern", i) for i in self.layers] if formed else []
        with self.short():
            if head is None or any(e.where.site == "logits" for e in edits):
                out = self.run(*edits)
            else:
                with held_back(self.model.anatomy) as read:
                    self.model.capture(self.tokens, watched, edits) if watched else self.model.run(self.tokens, edits)
                out = read[-1].float()
        if not edits:
            self._ends[formed] = out
        return out

    def capture_one(self, place: str, *edits: Edit) -> Tensor:
        """Return one place of a short run under edits, which goes no further than it must."""
        return self.capture([place], *edits)[place]

    def capture(self, places: Sequence[str], *edits: Edit) -> Activations:
        """Return several places of one short run under edits; where one is a pattern, so is attention before it."""
        deepest = max((a.layer or 0 for a in map(parse, places)), default=0)
        formed = [f"pattern.{i}" for i in self.layers if i <= deepest and any(p.startswith("pattern") for p in places)]
        with self.short():
            return self.model.capture(self.tokens, [*places, *formed], edits, logits=False)

    def has(self, *sites: str) -> bool:
        """Return True if the model offers all these sites."""
        return set(sites) <= set(self.here)

    def near(self, *sites: str) -> list[int]:
        """Return the layers of edited runs at which all these sites exist."""
        found = [set(self.formed.layers(s)) for s in sites]
        return sorted(set.intersection(*found)) if self.has(*sites) else []

    def bare(self) -> Tensor:
        """Return the logits of transformers alone, nothing attached."""
        with torch.no_grad(), evaluating(self.model.anatomy):
            out = self.model.hf(self.tokens.ids)
        return (out.logits if getattr(out, "logits", None) is not None else out[0]).float()

    def gap(self, a: Tensor, b: Tensor) -> float:
        """Return the largest difference, relative to the largest number of the second; inf if either is not finite."""
        a, b = a.detach().float(), b.detach().float()
        return _worst((a - b).abs() / b.abs().max().clamp_min(1e-9))

    def sum_gap(self, parts: Sequence[Tensor], whole: Tensor) -> float:
        """Return the largest difference of a sum from what it should be, number by number relative to the size of
        the summands.
        """
        total = torch.stack([p.detach().float() for p in parts]).sum(0)
        size = torch.stack([p.detach().float().abs() for p in (*parts, whole)]).sum(0)
        size = size + size.mean(-1, keepdim=True)
        return _worst((total - whole.detach().float()).abs() / size.clamp_min(1e-9))


def _worst(x: Tensor) -> float:
    return float(x.nan_to_num(float("inf"), float("inf")).max()) if x.numel() else 0.0


def fault_text(fault: Exception) -> str:
    """Return a fault in one line."""
    return fault.why if isinstance(fault, Refused) else f"{type(fault).__name__}: {fault}".splitlines()[0]


def _one_of_each(model: Model) -> list[int]:
    """Return the first and the last layer of every kind of block."""
    n = model.shape.n_layers
    if n <= _FEW:
        return list(range(n))
    kinds: dict[str, list[int]] = {}
    for i, block in enumerate(model.anatomy.blocks):
        kinds.setdefault(re.sub(r"\|layer_idx=\d+", "", structure(block)[0]), []).append(i)
    return sorted({0, n - 1, *(i for own in kinds.values() for i in (own[0], own[-1]))})


def _check_stream(model: Model, tokens: Tokens) -> None:
    """Refuse a model whose blocks do not hand on one residual stream."""
    x = model.capture(tokens, "resid_pre.0", logits=False)["resid_pre.0"]
    wanted = (*tokens.ids.shape, model.shape.d_model)
    if tuple(x.shape) != wanted:
        why = f"its blocks hand on {list(x.shape)}, not one residual stream of {list(wanted)}"
        raise Refused(
            f"model {model.name}", why, (Code("read its modules through model.hf"), " with plain torch hooks")
        )


def _no_forward(model: Model, tokens: Tokens, fault: Exception) -> Refused:
    """Why a model does not run: its own forward's fault if that fails too, else how it is run here."""
    call = f"hf(torch.tensor([{tokens.ids[0].tolist()}]))"
    try:
        with torch.no_grad(), evaluating(model.anatomy):
            model.hf(tokens.ids)
    except Exception as own:
        place, trace = "", own.__traceback__
        while trace is not None:
            place, trace = f" ({trace.tb_frame.f_code.co_qualname}, line {trace.tb_lineno})", trace.tb_next
        why = f"it does not run, by itself either: {fault_text(own)}{place}"
        return Refused(f"model {model.name}", why, f"mend it until {call} runs")
    why = f"{call} runs, but not as it is read here: it does not run with {fault_text(fault)}"
    return Refused(f"model {model.name}", why, (Code("read its modules through model.hf"), " with plain torch hooks"))
