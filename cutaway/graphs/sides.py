"""The two sides of one attention score: parts of a query and of every key that each source of a graph makes up.

Queries and keys are affine in the stream once divisors of norms are frozen: their rows are readers of the stream before
the layer, which the sweep takes down to all sources. Positions turn the parts as they turned the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.graphs.sweep import Readers, Sweep
from cutaway.graphs.trace import Run
from cutaway.models.projections import Projection, projection, scoring, visible
from cutaway.models.rotary import Turns, turns_of


@dataclass(frozen=True)
class Look:
    """A head, the position that looks, and the one looked at."""

    layer: int
    head: int
    query: int
    key: int


class Sides:
    """Parts of a query and of the keys that it sees.

    Attributes:
        look: the head and the positions.
        keys: the positions of the keys that no mask hides.
        at: the index of the look's key among them.
        score: the model's scores of all positions, before a soft cap; NaN where a mask hides them.
        pattern: its probabilities.
        form: how the layer makes scores.
        query: the query's parts, times the scale of scores.
        parts: the parts of each key.
    """

    query: Float[Tensor, "source d_head"]
    parts: Float[Tensor, "key source d_head"]

    def __init__(self, run: Run, look: Look):
        self.run, self.look = run, look
        model, i, h = run.frozen.model, look.layer, look.head
        sites = [f"{s}.{i}" for s in ("attn_in", "q", "k", "scores")]
        acts = model.capture(
            run.tokens, ["pattern", *sites], logits=False
        )  # all patterns: the precision of the graph's
        x, q, k = (acts[f"{s}.{i}"][0].to(run.frozen.dtype) for s in ("attn_in", "q", "k"))
        self.form = scoring(model, i, q, k, acts[f"scores.{i}"][0])
        seen = visible(acts[f"scores.{i}"][0, h, look.query])
        shared = h // (model.shape.n_heads // model.shape.n_kv_heads)
        self.keys: list[int] = seen.nonzero()[:, 0].tolist()
        self.at = self.keys.index(look.key)
        self.score = torch.where(seen, self.form.scale * (k[:, shared] @ q[look.query, h]), torch.nan)
        self.pattern = acts[f"pattern.{i}"][0, h, look.query].to(run.frozen.dtype)
        self._sweep = Sweep(run.frozen, run.units, top=i)
        of_queries, of_keys = projection(model, i, "q"), projection(model, i, "k")
        turns = turns_of(model, i, of_queries.of(x), q)
        self.query = self.form.scale * self._made_of(of_queries, h, look.query, x, turns)
        self.parts = torch.stack([self._made_of(of_keys, shared, p, x, turns) for p in self.keys])

    def _made_of(
        self, side: Projection, head: int, position: int, x: Float[Tensor, "position d_model"], turns: Turns
    ) -> Float[Tensor, "source d_head"]:
        """Return what each source makes up of a query or key."""
        rows, constant = side.affine(head, x[position])
        vectors, shift = self.run.frozen.attention_readers(self.look.layer, rows, position)
        where = torch.full((len(rows),), position, device=rows.device)
        found = self._sweep.rows(Readers(torch.full_like(where, self.look.layer), where, vectors))
        found[:, self._sweep.columns.starts["own bias"]] = constant + shift
        return turns.turned(found.T, position)

    def marginals(self) -> tuple[Float[Tensor, "key source"], Float[Tensor, "key source"]]:
        """Return what each source of the query makes with every key, and each source of the keys with the query."""
        return self.parts.sum(1) @ self.query.T, self.parts @ self.query.sum(0)

    def name(self, source: int) -> str:
        """Return the name of a source."""
        t, n = self.run.units.table, self._sweep.columns.units
        if source < n:
            return str(self.run.units.node(int(t.layer[source]), int(t.index[source]), int(t.position[source])))
        return str(self._sweep.columns.nodes()[source - n])
