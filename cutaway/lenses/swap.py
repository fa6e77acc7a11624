"""Does the output swap when two tokens are swapped in the stream, along the directions of a lens?

A lens reads the logit of a token as a direction at each depth. At one depth at a time, the residual stream's
coordinates along the unit directions of answer and foil, â and f̂, are exchanged, and the model runs on (Anthropic 2026,
for Jacobian lenses). A lens whose directions the model itself uses swaps the output; one that only reads what is
correlated with it does not. `ca.lenses.identity_lens(model)`, on the command line `--lens logit`, is the logit lens.

* `effect[layer]`: the mean change of logit(answer) − logit(foil); `interval`: 95 %, over prompts.
* `success`: the share of prompts in which the less likely of answer and foil becomes the likelier, with its Wilson
  interval; `likeliest`: the share in which it becomes the likeliest of all tokens. `length`: the mean length of the
  change at the last position, as a share of the stream's.
* `how`: `exchange` adds (h·f̂ − h·â) (â − f̂) / (1 − â·f̂), which exchanges both coordinates and keeps the norm of h;
  `move` adds (h·â) (f̂ − â), which turns the answer's coordinate into the foil's. `strength` multiplies the change.
* The last position is edited, or with `everywhere` all but the first.
* Control: at the same places a change of the same length in a random direction (`null`, `success_null`).
* Assumption: the model reads a token at that depth along one direction, the same in all prompts. Without success
  a depth may hold the token in another form, or at other positions. At the last depths success is near to certain,
  for there the unembedding is what reads; what tells lenses apart is how early it begins.
* Known failures: both directions of a pair contain what is common to all tokens; the exchange leaves that alone, `move`
  does not. Large changes leave what later layers have seen: `length` says where.
* Equivalences (tests): at the last depth of a model with an RMS norm, the exchange exchanges the logits of answer and
  foil but for the norms of their unembedding rows.
* Cost: 1 + (1 + samples) · (layers + 1) forwards, each from its layer on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.method import method
from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt, share_interval
from cutaway.lenses.decode import depth_labels, question, streams
from cutaway.lenses.directions import RankOne, TokenDirections, exchange
from cutaway.lenses.jacobian import JacobianLens
from cutaway.lenses.lens import depth_address
from cutaway.lenses.tuned import TunedLens
from cutaway.models.anatomy.norms import wide
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.task import Task

How = Literal["exchange", "move"]


@dataclass(frozen=True, kw_only=True)
class SwapCurve(Result, kind="swap_curve"):
    """Swaps of answer and foil along depth, and whether the output swaps.

    Attributes:
        effect: the mean change of logit(answer) − logit(foil).
        interval: 95 %, over prompts.
        null: the same after changes of equal length in random directions.
        success: the share of prompts in which the less likely of answer and foil becomes the likelier.
        success_interval: 95 %, over prompts.
        success_null: the same after the random changes.
        likeliest: the share in which it becomes the likeliest of all tokens.
        length: the mean length of the change at the last position, as a share of the stream's.
        clean: logit(answer) − logit(foil) per prompt, without an edit.
    """

    effect: Float[Tensor, "layer"]
    interval: Float[Tensor, "layer bound"]
    null: Float[Tensor, "layer sample"]
    success: Float[Tensor, "layer"]
    success_interval: Float[Tensor, "layer bound"]
    success_null: Float[Tensor, "layer sample"]
    likeliest: Float[Tensor, "layer"]
    length: Float[Tensor, "layer"]
    clean: Float[Tensor, "prompt"]


@method(
    answers="Does the output swap when two tokens are swapped in the stream, along the directions of a lens?",
    paper="Anthropic 2026, Jacobian lenses",
    cost="prompts * (1 + (1 + samples) * (layers + 1)) * F",
    control="random_direction",
    rung="interventional",
)
def swap(
    model: Model,
    task: Task,
    lens: TunedLens | JacobianLens,
    /,
    *,
    how: How = "exchange",
    everywhere: bool = False,
    strength: float = 1.0,
    samples: int = 4,
    seed: int = 0,
) -> SwapCurve:
    """Swap answer and foil in the stream along a lens's directions, one depth at a time.

    Args:
        how: exchange both coordinates, or move the answer's to the foil.
        everywhere: edit every position but the first, not the last one alone.
        strength: factor of the change.
        samples: how many random directions make the null of each depth.
        seed: of the random directions.

    Raises:
        Refused: the lens is of another model, or the unembedding is not linear behind the final norm.
    """
    asked = _Asked.of(model, task)
    ids, which = asked.pair.unique(return_inverse=True)
    return _swapped(model, asked, lens.directions(model, ids)[:, which], how, everywhere, strength, samples, seed)


@dataclass(frozen=True)
class _Asked:
    """The prompts of a task, and the ids of answers and foils [2 prompt]."""

    prompts: Tokens
    pair: Int[Tensor, "two prompt"]
    record: dict[str, Any]

    @staticmethod
    def of(model: Model, task: Task) -> _Asked:
        asked = question(model, task)
        assert asked.answers is not None
        assert asked.foils is not None
        return _Asked(asked.prompts, torch.stack([asked.answers, asked.foils]), asked.record)


def swap_along(
    model: Model,
    task: Task,
    directions: TokenDirections,
    *,
    how: How = "exchange",
    everywhere: bool = False,
    strength: float = 1.0,
    samples: int = 4,
    seed: int = 0,
) -> SwapCurve:
    """Swap answer and foil as `swap` does, along directions without the rest of their lens.

    Raises:
        Refused: an answer or foil without a direction.
    """
    asked = _Asked.of(model, task)
    known = {model.text.token_id(text): i for i, text in enumerate(directions.tokens)}
    missing = sorted(set(asked.pair.flatten().tolist()) - known.keys())
    if missing:
        word = model.text.token_texts(torch.tensor(missing[:1]))[0]
        raise Refused(f"a swap of {word!r}", "there is no direction of it", "name it among the tokens")
    which = torch.tensor([[known[i] for i in ids] for ids in asked.pair.tolist()])
    return _swapped(model, asked, directions.rows[:, which], how, everywhere, strength, samples, seed)


def _swapped(
    model: Model,
    asked: _Asked,
    rows: Float[Tensor, "layer two prompt d_model"],
    how: How,
    everywhere: bool,
    strength: float,
    samples: int,
    seed: int,
) -> SwapCurve:
    """Swap along the directions of the answers and of the foils."""
    answer, foil = normalize(wide(rows), dim=-1).unbind(1)
    reads, writes = exchange(answer, foil) if how == "exchange" else (answer, foil - answer)
    writes = strength * writes
    x, own = streams(model, asked.prompts)
    size = writes.norm(dim=-1, keepdim=True)
    random = normalize(torch.randn(samples, *writes.shape, generator=generator(seed)), dim=-1).to(writes) * size
    values = _swept(model, asked, reads, [writes, *random], everywhere)
    clean = _difference(own, asked.pair)
    each, null = values[0], values[1:]
    changed, by_chance = (((v[..., 0] > 0) != (clean > 0)).float() for v in (each, null))
    length = ((wide(x) * reads).sum(-1).abs() * size[..., 0] / wide(x).norm(dim=-1)).mean(1)
    effect = each[..., 0] - clean
    return SwapCurve(
        effect=effect.mean(1).cpu(),
        interval=mean_interval(effect.T),
        null=(null[..., 0] - clean).mean(-1).T.cpu(),
        success=changed.mean(1).cpu(),
        success_interval=share_interval(changed.T),
        success_null=by_chance.mean(-1).T.cpu(),
        likeliest=torch.where(clean > 0, each[..., 2], each[..., 1]).mean(1).cpu(),
        length=length.float().cpu(),
        clean=clean.cpu(),
        labels={"layer": depth_labels(model), "bound": BOUNDS},
        units=dict.fromkeys(("effect", "clean"), "logit difference")
        | dict.fromkeys(("success", "likeliest"), "share of prompts")
        | {"length": "share of the stream's norm"},
        record={"positions": "all but the first" if everywhere else "the last", **asked.record},
        reasons=one_prompt(len(clean), "success", "effect"),
    )


def _difference(logits: Float[Tensor, "row token"], pair: Int[Tensor, "two row"]) -> Float[Tensor, "row"]:
    """Return logit(answer) − logit(foil)."""
    answer, foil = logits.float().gather(-1, pair.T.to(logits.device)).unbind(-1)
    return answer - foil


def _swept(
    model: Model,
    asked: _Asked,
    reads: Float[Tensor, "layer prompt d_model"],
    writes: Sequence[Float[Tensor, "layer prompt d_model"]],
    everywhere: bool,
) -> Float[Tensor, "change layer prompt value"]:
    """Return the logit difference, and 1 where the answer or where the foil is the top token, after every change."""
    tokens, layers = asked.prompts, len(reads)
    groups = list(tokens.by_length().values()) if everywhere else [list(range(len(tokens)))]
    out = torch.empty(len(writes), layers, len(tokens), 3, device=model.device)
    for rows in groups:
        kept, length = torch.tensor(rows, device=tokens.ids.device), int(tokens.lengths[rows[0]])
        positions = (tuple(range(1, length)) or (0,)) if everywhere else (-1,)

        def values(logits: Tensor, prompt: Tensor, pair: Tensor = asked.pair[:, kept]) -> Tensor:
            own = pair[:, prompt.to(pair.device)].to(logits.device)
            top = (logits.argmax(-1) == own).float()
            return torch.stack([_difference(logits, own), *top], -1)

        variants = [
            [RankOne(depth_address(d), reads[d, kept], w[d, kept], positions)] for w in writes for d in range(layers)
        ]
        found = sweep(model, tokens.rows(rows) if everywhere else tokens, variants, values)
        out[:, :, kept] = found.reshape(len(writes), layers, len(kept), 3)
    return out
