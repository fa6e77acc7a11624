"""Does a layer's MLP say what one of its memories says, and does its output decide what the stream says?

Composition of memories (Geva et al. 2021, arXiv:2012.14913, section 5; 2022, arXiv:2203.14680), at the last token. r is
the stream without the output of the layer's MLP, f that output, and r + f the stream behind it. Each is read as a
prediction: its likeliest token through the final norm and the unembedding.

* `share[outcome, layer]`: between layers. `agreement`: r, f and r + f say the same. `residual`: r + f says what r says,
  and f something else. `mlp`: r + f says what f says, and r something else. `composition`: r + f says what neither of
  them says. The four add up to 1.
* `composed[layer]`: within a layer, the share of prompts on which f says what none of the `memories` of largest |c|·‖v‖
  says. A memory says the top token of c·v: of negative c, what v suppresses most.
* `interval` and `composed_interval`: 95 %, Wilson's, over prompts.
* Control: `null` has a random mix of the layer's values, of the norm of f, in the place of f. `composed_null` turns the
  sign of every memory's coefficient at random: the same memories at the same strengths.
* Assumption: early layers write in the basis of the unembedding. Where they do not, no token is said by anybody, and
  shares stay within their nulls.
* Known failures: one likeliest token stands for a whole distribution: two vectors that say almost the same count as
  different. `composed` falls with the number of memories, and a memory outside of them is not asked.
* f and c·v are read as directions: the bias of the final norm is in r and r + f only.
* Cost: one forward, and the product with the vocabulary of 3 + 3 · samples vectors a prompt and of each memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, generator, one_prompt, share_interval
from cutaway.models.anatomy.unembedding import readable
from cutaway.models.anatomy.weights import unembed_rows
from cutaway.models.model import Model
from cutaway.neurons import memories as memory
from cutaway.neurons.contributions import divisor
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

OUTCOMES = ["agreement", "residual", "mlp", "composition"]


@dataclass(frozen=True, kw_only=True)
class LayerComposition(Result, kind="layer_composition"):
    """Predictions of MLPs, of the stream before them and of their memories, compared.

    Attributes:
        share: prompts of each outcome of the stream's and the MLP's prediction.
        interval: of `share`, 95 %, over prompts.
        null: `share` with a random mix of the layer's values in the place of the MLP's output.
        composed: prompts on which the MLP's prediction is that of none of its strongest memories.
        composed_interval: of `composed`, 95 %, over prompts.
        composed_null: `composed` with the signs of all coefficients drawn at random.
    """

    share: Float[Tensor, "outcome layer"]
    interval: Float[Tensor, "outcome layer bound"]
    null: Float[Tensor, "outcome layer sample"]
    composed: Float[Tensor, "layer"]
    composed_interval: Float[Tensor, "layer bound"]
    composed_null: Float[Tensor, "layer sample"]


@method(
    answers="Does a layer's MLP say what one of its memories says, and does its output decide what the stream says?",
    paper="Geva et al. 2021, arXiv:2012.14913; Geva et al. 2022, arXiv:2203.14680",
    cost="prompts * F",
    control="random_memories",
    rung="observational",
)
def composition(
    model: Model,
    prompts: Prompts,
    /,
    *,
    layers: tuple[int, ...] = (),
    memories: int = 10,
    samples: int = 3,
    seed: int = 0,
) -> LayerComposition:
    """Compare the predictions of every MLP with those of its memories and of the stream before and behind it.

    Args:
        layers: only these; all if empty.
        memories: how many memories of each layer and prompt are asked, the strongest first.
        samples: how many random mixes and draws of signs make the nulls.
        seed: of both.

    Raises:
        Refused: no such layer, an encoder, a model without dense MLPs, or an unembedding that is not linear.
    """
    check_predicts(model)
    readable(model.anatomy, f"predictions of MLPs of {model.name}")
    there, g = memory.dense_layers(model, layers), generator(seed)
    seen = memory.at_last(model, prompts.bind(model), dict.fromkeys(("mlp_post", "mlp_out", "resid_post"), there))
    rows = unembed_rows(model.anatomy)[0].detach().float()
    shares, nulls, composed, chance = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    for at, layer in enumerate(there):
        c, f, after = (seen[site][:, at].to(rows.device) for site in ("mlp_post", "mlp_out", "resid_post"))
        v = memory.values(model, layer).to(rows.device)
        found = _outcomes(model, rows, after - f, f)
        random = [memory.mixed(v, f.norm(dim=-1), g)[0] for _ in range(samples)]
        shares.append(found)
        nulls.append(torch.stack([_outcomes(model, rows, after - f, x).mean(0) for x in random], -1))
        own, turned = _composed(model, rows, layer, (c, f, v), min(max(memories, 1), c.shape[1]), samples, g)
        composed.append(own)
        chance.append(turned)
    each, some = torch.stack(shares, -1).cpu(), torch.stack(composed, -1).cpu()  # [prompt, outcome, layer]
    return LayerComposition(
        share=each.mean(0),
        interval=share_interval(each),
        null=torch.stack(nulls, 1).cpu(),
        composed=some.mean(0),
        composed_interval=share_interval(some),
        composed_null=torch.stack(chance).cpu(),
        labels={"outcome": OUTCOMES, "layer": there, "bound": BOUNDS},
        units=dict.fromkeys(("share", "null", "composed", "composed_null"), "share of prompts"),
        reasons=one_prompt(len(each), "share", "composed"),
        record={"position": -1, "memories": min(max(memories, 1), model.shape.d_mlp)},
    )


def _outcomes(
    model: Model,
    rows: Float[Tensor, "token d_model"],
    before: Float[Tensor, "prompt d_model"],
    added: Float[Tensor, "prompt d_model"],
) -> Float[Tensor, "prompt outcome"]:
    """Return 1 at the outcome of each prompt."""
    way = readable(model.anatomy, f"predictions of MLPs of {model.name}")
    first, last = (way.logits(way.read(x.to(model.dtype))).argmax(-1) for x in (before, before + added))
    said = _said(model, rows, added)[0]
    kept, given = last == first, last == said
    return torch.stack([kept & given, kept & ~given, given & ~kept, ~kept & ~given], -1).float()


def _said(
    model: Model, rows: Float[Tensor, "token d_model"], x: Float[Tensor, "row d_model"]
) -> tuple[Int[Tensor, "row"], Int[Tensor, "row"]]:
    """Return the tokens that directions promote and suppress most."""
    parts = [
        (logits.argmax(-1), logits.argmin(-1)) for logits in memory.logits_of(memory.toward_logits(model, x), rows)
    ]
    return torch.cat([top for top, _ in parts]), torch.cat([bottom for _, bottom in parts])


def _composed(
    model: Model,
    rows: Float[Tensor, "token d_model"],
    layer: int,
    given: tuple[Float[Tensor, "prompt neuron"], Float[Tensor, "prompt d_model"], Float[Tensor, "neuron d_model"]],
    k: int,
    samples: int,
    g: torch.Generator,
) -> tuple[Float[Tensor, "prompt"], Float[Tensor, "sample"]]:
    """Return 1 for each prompt whose MLP says what none of its memories says, and the share under random signs."""
    c, f, v = given
    active = (c.abs() * v.norm(dim=-1)).topk(k).indices  # [prompt, memory]
    units, where = active.unique(return_inverse=True)
    top, bottom = _said(model, rows, v[units])
    promoted, suppressed, signs = top[where], bottom[where], c.gather(1, active).sign()

    def alone(out: Float[Tensor, "prompt d_model"], sign: Float[Tensor, "prompt memory"]) -> Float[Tensor, "prompt"]:
        said = torch.where(sign < 0, suppressed, promoted)
        return (said != _said(model, rows, out)[0][:, None]).all(1).float()

    scale, chance = divisor(model, layer, c.cpu()).to(c.device)[:, None], list[Tensor]()
    for _ in range(samples):
        turn = torch.randint(2, c.shape, generator=g).to(c) * 2 - 1
        turned = f - ((1 - turn) * c) @ v / scale
        chance.append(alone(turned, signs * turn.gather(1, active)).mean())
    return alone(f, signs), torch.stack(chance)
