"""Roles of attention heads on a task: one row a role, which says from where to where a head of that role looks.

The places of a prompt are those of what it says about its own answer: the end, where the answer is read, earlier tokens
that are the answer or the foil, the last of several sayings of the foil, those before it, and the tokens behind them.
Of "When Mary and John went to the store, John gave a drink to" with the answer Mary and the foil John, the repeat is
the second John, the first saying the first one, and the token behind it is "went". The subject is what the question
is about (or what the corruption changes), where that is neither answer nor foil: the land whose capital is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.stats import generator
from cutaway.interventions.spans import subject_or_changed
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.model import Model
from cutaway.tasks.bound import Bound

Spot = Literal["end", "answer", "foil", "repeat", "first saying", "behind first saying", "subject"]


@dataclass(frozen=True)
class Role:
    """A role of an attention head on a task.

    Attributes:
        name: the name in the field.
        query: the place from which it looks.
        keys: the places at which it looks.
        writes: 1 if its direct effect must raise the answer over the foil, −1 if it must lower it, else 0.
    """

    name: str
    query: Spot
    keys: Spot
    writes: int = 0


MOVER, BACKUP, INHIBITION = "name mover", "backup name mover", "S-inhibition"
SUPPRESSOR = "foil suppressor"

#: order of the entries of the axis `role`
ROLES = (
    Role(MOVER, "end", "answer", writes=1),
    Role("negative name mover", "end", "answer", writes=-1),
    Role(SUPPRESSOR, "end", "foil", writes=1),
    Role(BACKUP, "end", "answer"),
    Role(INHIBITION, "end", "repeat"),
    Role("duplicate token", "repeat", "first saying"),
    Role("induction", "repeat", "behind first saying"),
    Role("previous token", "behind first saying", "first saying"),
    Role("subject head", "end", "subject", writes=1),
)
NAMES = [row.name for row in ROLES]


@dataclass(frozen=True)
class Looks:
    """The query and the keys of every role in every prompt, as positions in the prompt itself.

    Attributes:
        query: the position of the query; 0 where a prompt has none.
        keys: the keys: the role's own in front, behind them as many at random per draw.
    """

    query: Int[Tensor, "prompt role"]
    keys: Bool[Tensor, "prompt role draw position"]

    @property
    def there(self) -> Bool[Tensor, "prompt role"]:
        """True where a prompt has the keys of a role."""
        return self.keys[:, :, 0].any(-1)

    def own(self, *names: str) -> Looks:
        """Return the queries and keys of some roles, without those drawn at random."""
        at = [NAMES.index(n) for n in names]
        return Looks(self.query[:, at], self.keys[:, at, :1])

    def measure(self, layers: Sequence[int]) -> Measure:
        """Return the measurement of attention to the keys, [role draw layer head] as one row per prompt.

        A role that a prompt has no keys of, and a draw without enough tokens, give NaN.
        """
        places = tuple(Address("pattern", i) for i in layers)

        def attention(seen: Seen, prompt: Int[Tensor, "row"]) -> Float[Tensor, "row number"]:
            assert seen.activations is not None
            t, home = seen.activations.tokens, seen.activations[str(places[0])].device
            at = t.position_ids.to(home)[:, None, None]
            keys, query = self.keys.to(home)[prompt.to(home)], self.query.to(home)[prompt.to(home)]
            wanted = keys.gather(-1, at.expand(*keys.shape[:3], -1)) & t.prompt.to(home)[:, None, None]
            mask = wanted.float().masked_fill(~keys.any(-1, keepdim=True), torch.nan)
            column, rows = query + t.column(0).to(home)[:, None], torch.arange(len(query), device=home)[:, None]
            each = [
                torch.einsum("brhk,brdk->brdh", seen.activations[str(a)].float().to(home)[rows, :, column], mask)
                for a in places
            ]
            return torch.stack(each, 3).flatten(1)

        return Measure(attention, Reads(last_logits=False, places=places))

    def read(self, model: Model, bound: Bound, layers: Sequence[int]) -> Float[Tensor, "prompt role draw layer head"]:
        """Return the attention of every head to the keys."""
        found = model.measure(bound.clean, self.measure(layers)).float().cpu()
        return found.reshape(len(found), *self.keys.shape[1:3], len(layers), -1)


def looks(model: Model, bound: Bound, samples: int, seed: int) -> Looks:
    """Find the places of every role in the clean prompts, and draw as many tokens at random per draw.

    Drawn are other tokens that the query may look at, or where there are not more of them than keys, any; without the
    first token of the prompt, where attention rests.
    """
    lengths, width, g = bound.clean.lengths.tolist(), int(bound.clean.lengths.max()), generator(seed)
    query = torch.zeros(len(bound), len(ROLES), dtype=torch.long)
    keys = torch.zeros(len(bound), len(ROLES), 1 + samples, width, dtype=torch.bool)
    subject, _ = subject_or_changed(bound)
    for i, n in enumerate(lengths):
        spots = _spots(model, bound, subject[i], i, n)
        for r, row in enumerate(ROLES):
            own = [k for k in spots[row.keys] for q in spots[row.query][-1:] if k < q]
            if not own:
                continue
            query[i, r] = spots[row.query][-1]
            keys[i, r, 0, own] = True
            behind = range(1, spots[row.query][-1] + 1)
            others = [k for k in behind if k not in own]
            pool = torch.tensor(others if len(others) > len(own) else behind)
            for s in range(samples if len(pool) >= len(own) else 0):
                keys[i, r, 1 + s, pool[torch.randperm(len(pool), generator=g)[: len(own)]]] = True
    return Looks(query, keys)


def _spots(model: Model, bound: Bound, subject: Bool[Tensor, "position"], i: int, length: int) -> dict[Spot, list[int]]:
    """Return the positions of every place in one clean prompt, in order; `subject` is True in the columns of its
    subject.
    """
    front = int(bound.clean.column(0)[i])
    ids = bound.clean.ids[i, front : front + length].tolist()
    answer, foil = int(bound.answers[i]), int(bound.foils[i])
    texts = [t.strip() for t in model.text.token_texts([*ids, answer, foil])]
    said = {
        name: [k for k in range(length) if ids[k] == token or (texts[k] and texts[k] == text)]
        for name, token, text in (("answer", answer, texts[-2]), ("foil", foil, texts[-1]))
    }
    first, repeat = (said["foil"][:-1], said["foil"][-1:]) if len(said["foil"]) > 1 else ([], [])
    return {
        "end": [length - 1],
        "answer": said["answer"],
        "foil": said["foil"],
        "repeat": repeat,
        "first saying": first,
        "subject": [k for k in (subject.nonzero()[:, 0] - front).tolist() if k not in (*said["answer"], *said["foil"])],
        "behind first saying": [k + 1 for k in first if k + 1 not in repeat],
    }
