"""Sweeps over edge masks: many masked runs of the same prompts as one plan.

Masks run from the first block in which they touch a reader, with the stream of the plain run injected there, as many
at once as the budget of rows × positions and the memory of what their writers write allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.finite import finite
from cutaway.core.out_of_memory import in_halves
from cutaway.core.progress import advance
from cutaway.models.access.reading import measure_of, observe
from cutaway.models.anatomy import rope
from cutaway.models.dry import made_up, planned, some
from cutaway.models.edits.edge_mask import MaskedForward, Written, check_mask, places_written, removed_by, written
from cutaway.models.edits.wiring import Wiring
from cutaway.models.model import Model
from cutaway.models.sweep.executor import Metric
from cutaway.models.sweep.partial_forward import entered
from cutaway.models.sweep.plan import RESUME, room
from cutaway.models.tokens import Tokens

Mask = Bool[Tensor, "writer reader *position"] | Float[Tensor, "writer reader *position"]
_EMBED = Address("embed")
_BYTES = 1 << 28  # of what the writers of one batch write


def sweep_masks(
    model: Model,
    wiring: Wiring,
    tokens: Tokens,
    masks: Sequence[Mask],
    alternative: Written,
    metric: Metric,
    *,
    budget: int | None = None,
    plain: PlainRuns | None = None,
) -> Float[Tensor, "mask batch *metric"]:
    """Measure every prompt under every mask over the edges of a wiring (True or 1 keeps an edge).

    Args:
        alternative: what stands in for what the writers write, of all prompts or of each.
        metric: as `sweep` takes it.
        budget: the largest number of rows × positions run at once (but one prompt always fits it).
        plain: plain runs of these prompts that an earlier sweep has kept, for it and later ones.

    Raises:
        Refused: masks of another wiring, prompts that do not fit in memory, or numbers that are none.
    """
    work = _Sweep(model, wiring, tokens, masks, alternative, metric, budget, plain or PlainRuns())
    with finite(f"a sweep of {model.name}", model.dtype), model.edited(), torch.no_grad():
        for rows in rope.apart(model.anatomy, tokens):
            in_halves(rows, work.rows_at_once, work.run)
    return work.found()


class PlainRuns:
    """The plain runs of prompts, from which masked runs start: the streams into blocks, and what was written before.

    Use one for several sweeps over masks of the same prompts; each adds what those before it did not need.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[int, ...], dict[int, Tensor]] = {}
        self._before: dict[tuple[int, ...], dict[Address, Tensor]] = {}

    def of(
        self, model: Model, wiring: Wiring, prompts: Tokens, rows: Sequence[int], starts: Sequence[int]
    ) -> tuple[dict[int, Tensor], Written]:
        """Return the streams that enter some blocks, and what is written before the last of these.

        Args:
            rows: the numbers of these prompts, by which their runs are kept.
            starts: the blocks.
        """
        key = tuple(rows)
        streams, before = self._streams.setdefault(key, {}), self._before.setdefault(key, {})
        if lacking := [i for i in starts if i not in streams]:
            first = [a for a in places_written(wiring) if (a.layer or 0) < max(starts)]
            earlier = [a for a in first if (_EMBED if a.site == "resid_pre" else a) not in before]
            places = [Address("resid_pre", i) for i in lacking]
            acts = model.capture(prompts, [*places, *earlier], logits=False)
            streams |= {i: acts[str(a)] for i, a in zip(lacking, places, strict=True)}
            before |= written(model, {str(a): acts[str(a)] for a in earlier})
        return streams, before


class _Sweep:
    """A sweep over masks, with what it has found so far.

    Attributes:
        rows_at_once: how many rows one batch has.
    """

    def __init__(
        self,
        model: Model,
        wiring: Wiring,
        tokens: Tokens,
        masks: Sequence[Mask],
        alternative: Written,
        metric: Metric,
        budget: int | None,
        plain: PlainRuns,
    ):
        self.model, self.wiring, self.tokens, self.masks, self.plain = model, wiring, tokens, masks, plain
        self.alternative, self.measure = alternative, measure_of(metric)
        able = RESUME not in model.disabled and not self.measure.reads.places
        self.first = [self._first(m) if able else 0 for m in masks]
        s, width = model.shape, tokens.ids.shape[1]
        each = model.dtype.itemsize * s.d_model * (2 * len(wiring.writers) + 6 * s.n_heads) * width
        self.rows_at_once = max(1, min(room(model, width, budget) // width, _BYTES // each))
        self._values: Tensor | None = None  # [mask, batch, *metric]
        self._done = torch.zeros(len(masks), len(tokens), dtype=torch.bool)

    def _first(self, mask: Mask) -> int:
        """Return the block from which a mask's run differs from the plain one; at most the last."""
        last = self.model.shape.n_layers - 1
        check_mask(self.wiring, mask)
        changed = (mask != 1).flatten(2).any(2) if mask.ndim == 3 else mask != 1
        touched = (changed & self.wiring.heard.to(mask.device)).any(0).tolist()
        layers = [v.layer for v, on in zip(self.wiring.readers, touched, strict=True) if on and v.layer is not None]
        return min(layers, default=last)

    def run(self, rows: Sequence[int]) -> None:
        """Run every mask on some prompts."""
        prompts = self.tokens if len(rows) == len(self.tokens) else self.tokens.rows(rows)
        order = sorted(range(len(self.masks)), key=lambda k: self.first[k])
        starts = sorted({self.first[k] for k in order} - {0})
        streams, before = self.plain.of(self.model, self.wiring, prompts, rows, starts)
        alternative = {a: x if len(x) == 1 else x[list(rows)] for a, x in self.alternative.items()}
        size = max(1, self.rows_at_once // len(rows))
        for at in some(range(0, len(order), size)):
            in_halves(
                order[at : at + size], size, lambda few: self._batch(few, rows, prompts, alternative, streams, before)
            )

    def _batch(
        self,
        masks: Sequence[int],
        rows: Sequence[int],
        prompts: Tokens,
        alternative: Written,
        streams: dict[int, Tensor],
        before: Written,
    ) -> None:
        since, n = self.first[masks[0]], len(masks)
        removed = removed_by(self.wiring, torch.stack([self.masks[k] for k in masks]))
        earlier = {a: x for a, x in before.items() if (-1 if a.layer is None else a.layer) < since}
        forward = MaskedForward(self.model, self.wiring, removed, alternative, since, earlier)
        copies = prompts.rows(list(range(len(prompts))) * n)
        start = entered(self.model, since, streams[since].repeat(n, 1, 1)) if since else nullcontext()
        with start, forward.attached():
            seen = observe(self.model.anatomy, copies, self.measure.reads, since)
        values = self.measure(seen, torch.tensor(rows, device=self.tokens.ids.device).repeat(n))
        self._enter(masks, rows, values.unflatten(0, (n, len(rows))))

    def _enter(self, masks: Sequence[int], rows: Sequence[int], values: Float[Tensor, "mask row *metric"]) -> None:
        if self._values is None:
            self._values = values.new_zeros(len(self.masks), len(self.tokens), *values.shape[2:])
        k, i = torch.tensor(masks)[:, None], torch.tensor(rows)
        self._values[k, i] = values
        self._done[k, i] = True
        advance(float(self._done.sum()), self._done.numel())

    def found(self) -> Float[Tensor, "mask batch *metric"]:
        """Return the values; those that a dry run leaves out are made up."""
        if self._values is None:
            return torch.empty(0, len(self.tokens), device=self.model.device)
        return self._values if planned() is None else made_up(self._values, self._done.to(self._values.device))
