"""What does a hidden state say when another prompt has to put it into words?

Patchscopes (Ghandeharioun et al. 2024, arXiv:2401.06102): the residual stream at one token of a prompt takes the place
of that of one token of a target prompt, at the same depth or another, and the model goes on from there.

* `probability[layer]`: of the answer behind the target prompt, with the state of this depth in it, mean over prompts;
  `interval`: 95 %, over prompts; `rank`: its median rank (0 is the top). The answer is `answer`, or what the model says
  next behind the prompt itself: then a target that repeats its last word asks if the state holds that already.
* `decoded[layer, prompt, step]`: the tokens that the model says greedily from there, as words in the labels.
* Controls: states of random direction and the same length (`null`), and `unpatched`: the target prompt as it is.
* Assumption: the target prompt reads a state as it would read its own at that depth. A depth at which nothing is said
  may hold it in a form that this prompt does not ask for.
* Known failures: a target that makes the answer likely by itself (see `unpatched`). States of one depth put in at
  another have another length than those that stand there.
* Equivalence (test): at the last depth, from the last token into the last token, the next token is the prompt's own.
* Cost: 2 forwards, and 1 + samples + decode a depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, mean_interval, one_prompt
from cutaway.lenses.decode import depth_labels, question, rank_of
from cutaway.models.edits.library import Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.prompts import Prompts, as_prompts

IDENTITY = "cat -> cat; hello -> hello; house -> house; x"


@dataclass(frozen=True, kw_only=True)
class Patchscope(Result, kind="patchscope"):
    """Continuations of a target prompt with the states of other prompts in it.

    Attributes:
        probability: of the answer, with the state of each depth in the target.
        interval: of `probability`, 95 %, over prompts.
        null: `probability` with random states of the same length.
        rank: median rank of the answer.
        unpatched: probability of the answer behind the target as it is.
        decoded: the tokens that follow.
    """

    probability: Float[Tensor, "layer"]
    interval: Float[Tensor, "layer bound"]
    null: Float[Tensor, "layer sample"]
    rank: Float[Tensor, "layer"]
    unpatched: Float[Tensor, ""]
    decoded: Int[Tensor, "layer prompt step"]


@method(
    answers="What does a hidden state say when another prompt has to put it into words?",
    paper="Ghandeharioun et al. 2024, arXiv:2401.06102",
    cost="prompts * (4 + (1 + samples + decode) * (layers + 1)) * F",
    control="random_states",
    rung="interventional",
)
def patchscope(
    model: Model,
    prompts: Prompts,
    /,
    *,
    target: str = IDENTITY,
    target_layer: int | None = None,
    back: int = 0,
    target_back: int = 0,
    answer: str | None = None,
    decode: int = 4,
    samples: int = 8,
    seed: int = 0,
) -> Patchscope:
    """Put the state of each depth of a prompt into a target prompt, and let the model go on.

    Args:
        target: the prompt that takes the state.
        target_layer: the block behind which it is put in [default: the depth that it was taken from].
        back: how many tokens before the prompt's last one the state is taken.
        target_back: how many tokens before the target's last one it is put in.
        answer: the answer to look for [default: what the model says next behind the prompt itself].
        decode: how many tokens are decoded, at least 1.
        samples: how many random states make the null.
        seed: of the random states.

    Raises:
        Refused: nothing to decode, no such layer, or a position that a prompt does not have.
    """
    asked = question(model, prompts, answer)
    own = asked.known(model)
    if not decode:
        raise Refused(Keyword("decode", 0), "no token would be decoded", "use 1 or more")
    acts = model.capture(asked.prompts, _depths(model), logits=False)
    states = torch.stack([acts[f"{a}@{-1 - back}"] for a in _depths(model)])  # [layer prompt d_model]
    wanted = as_prompts([target] * len(asked.prompts)).bind(model)
    column = int(wanted.lengths[0]) - 1 - target_back
    if column < 0:
        why = f"the target has {int(wanted.lengths[0])} tokens"
        raise Refused(Keyword("target_back", target_back), why, "count fewer back")
    into, chance = _into(model, target_layer), _random(states, samples, seed)
    every = [[], *([e] for x in (states, *chance) for e in _edits(into, x, column))]

    def metric(logits: Float[Tensor, "row token"], prompt: Int[Tensor, "row"]) -> Float[Tensor, "row metric"]:
        ids, p = own[prompt], logits.float().softmax(-1)
        said = p.gather(1, ids[:, None])[:, 0]
        return torch.stack([said, rank_of(logits, ids).float(), logits.argmax(-1).float()], dim=1)

    found = sweep(model, wanted, every, metric).float().cpu()
    each = found[1:].unflatten(0, (1 + samples, len(states)))  # [sample layer prompt metric]
    decoded = _decoded(model, wanted, _edits(into, states, column), each[0, :, :, 2].long(), decode)
    words = [[model.text.token_texts(row) for row in rows] for rows in decoded]
    return Patchscope(
        probability=each[0, :, :, 0].mean(1),
        interval=mean_interval(each[0, :, :, 0].T, within=(0.0, 1.0)),
        null=each[1:, :, :, 0].mean(2).T.contiguous(),
        rank=each[0, :, :, 1].median(1).values,
        unpatched=found[0, :, 0].mean(),
        decoded=decoded,
        labels={"layer": depth_labels(model), "bound": BOUNDS, "decoded": words},
        units={"probability": "probability", "rank": "tokens more likely", "unpatched": "probability"},
        record={"target text": target, "put in at": wanted.pieces[0][column], **asked.record},
        reasons=one_prompt(len(asked.prompts), "probability"),
    )


def _depths(model: Model) -> list[Address]:
    return [Address("resid_pre", 0), *(Address("resid_post", i) for i in range(model.shape.n_layers))]


def _into(model: Model, layer: int | None) -> list[Address]:
    """Return where the state of each depth is put in."""
    if layer is None:
        return _depths(model)
    if layer >= model.shape.n_layers:
        why = f"the model has blocks 0 to {model.shape.n_layers - 1}"
        raise Refused(Keyword("target_layer", layer), why, "name one of them")
    return [Address("resid_post", layer)] * (model.shape.n_layers + 1)


def _random(states: Float[Tensor, "layer prompt d_model"], samples: int, seed: int) -> list[Tensor]:
    """Return states of random direction, the same for all prompts, as long as their own."""
    g, out, length = generator(seed), list[Tensor](), states.float().norm(dim=-1, keepdim=True)
    for _ in range(samples):
        noise = torch.randn(len(states), 1, states.shape[-1], generator=g).to(states.device)
        out.append((noise / noise.norm(dim=-1, keepdim=True) * length).to(states.dtype))
    return out


def _edits(into: Sequence[Address], states: Float[Tensor, "layer prompt d_model"], position: int) -> list[Replace]:
    """Return the edit that puts in the states of each depth."""
    return [Replace(Address(a.site, a.layer, None, position), x) for a, x in zip(into, states, strict=True)]


def _decoded(
    model: Model, target: Tokens, edits: Sequence[Replace], first: Int[Tensor, "layer prompt"], steps: int
) -> Int[Tensor, "layer prompt step"]:
    """Return the tokens that follow the target under each edit, greedily, given the first."""
    start, out = target.ids[0][target.mask[0]].tolist(), list[Tensor]()
    for edit, said in zip(edits, first, strict=True):
        rows = said[:, None]
        for _ in range(steps - 1):
            longer = as_prompts([start + row for row in rows.tolist()]).bind(model)
            rows = torch.cat([rows, model.run_last(longer, edits=[edit]).argmax(-1).cpu()[:, None]], dim=1)
        out.append(rows)
    return torch.stack(out)
