"""The change of an answer's log-probability by single neurons, and neurons masked or kept at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.models.anatomy.unembedding import readable
from cutaway.models.anatomy.weights import unembed_rows
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Scale
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.neurons import memories
from cutaway.neurons.memories import Neuron

_CELLS = 1 << 24  # most logits that are made at once


def mask(model: Model, chosen: Sequence[Neuron]) -> list[Edit]:
    """Return edits that silence some neurons at the last token."""
    layers = sorted({layer for layer, _ in chosen})
    return [Scale(Address("mlp_post", i, None, -1), 1 - _members(model, chosen, i)) for i in layers]


def keep(model: Model, chosen: Sequence[Neuron], layers: Sequence[int]) -> list[Edit]:
    """Return edits that silence all other neurons of some layers at the last token."""
    return [Scale(Address("mlp_post", i, None, -1), _members(model, chosen, i)) for i in layers]


def _members(model: Model, chosen: Sequence[Neuron], layer: int) -> Float[Tensor, "neuron"]:
    out = torch.zeros(model.shape.d_mlp)
    out[[n for i, n in chosen if i == layer]] = 1
    return out


@dataclass(frozen=True)
class Steps:
    """Neurons' steps at the last token of every prompt, in one run.

    Attributes:
        layers: the layers whose neurons are asked about.
        base: the stream of each layer without its MLP's output, as the unembedding's rows meet it.
        weight: what each neuron's value is multiplied by: its coefficient, over the divisors of the norms.
        coefficient: activation of each neuron.
    """

    layers: list[int]
    base: Float[Tensor, "prompt layer d_model"]
    weight: Float[Tensor, "prompt layer neuron"]
    coefficient: Float[Tensor, "prompt layer neuron"]

    @staticmethod
    @torch.no_grad()
    def of(model: Model, tokens: Tokens, layers: Sequence[int], edits: Sequence[Edit] = ()) -> Steps:
        """Run prompts under edits."""
        readable(model.anatomy, f"importance of neurons of {model.name}")
        n = model.shape.n_layers
        post = sorted({*layers, n - 1})
        seen = memories.at_last(model, tokens, {"mlp_post": layers, "mlp_out": layers, "resid_post": post}, edits)
        stream, final = seen["resid_post"], model.anatomy.top("final")
        last = stream[:, -1]
        scale = model.anatomy.norm(final).scale(last.to(model.device)).cpu() if final is not None else last.new_ones(1)
        base = stream[:, [post.index(i) for i in layers]] - seen["mlp_out"]
        base = memories.toward_logits(model, base.to(model.device)).cpu() / scale[:, None, None]
        c = seen["mlp_post"]
        divisors = torch.stack([divisor(model, i, c[:, at]) for at, i in enumerate(layers)], 1)
        return Steps([*layers], base, c / divisors[..., None] / scale[:, None, None], c)


def divisor(model: Model, layer: int, c: Float[Tensor, "prompt neuron"]) -> Float[Tensor, "prompt"]:
    """Return the divisor of a norm behind the MLP; ones without one."""
    post = model.anatomy.part(layer, "ln2_post")
    if post is None:
        return torch.ones(len(c))
    w = model.weights
    v = w.mlp_out[layer].float()
    out = c.to(v) @ v + w.mlp_out_bias[layer].float()
    return model.anatomy.norm(post).scale(out).cpu()


class Answers:
    """Log-probabilities of each prompt's answer, read off streams in the way of the model's own last one.

    Attributes:
        ids: the tokens that are right, one or several a prompt, filled up with −1; their probabilities add up.
        rows: the unembedding, a row for each token.
        bias: what it adds, with that of the final norm.
        cap: the soft cap of logits, or None.
        concave: True if the log-probability is concave in the logits: without a cap, and with one right token.
    """

    def __init__(self, model: Model, ids: Int[Tensor, "prompt"] | Int[Tensor, "prompt choice"]):
        self.model = model
        self.rows = unembed_rows(model.anatomy)[0].detach().float()
        self.ids = (ids[:, None] if ids.ndim == 1 else ids).to(self.rows.device)
        plain, final = unembed_rows(model.anatomy)[1].detach().float(), model.anatomy.top("final")
        self.bias = plain if final is None else plain + self.rows @ model.anatomy.norm(final).bias.float()
        self.cap = readable(model.anatomy, f"importance of neurons of {model.name}").cap
        self.concave = not self.cap and self.ids.shape[1] == 1

    def log_p(self, logits: Float[Tensor, "*rest token"], prompt: int) -> Float[Tensor, "*rest"]:
        """Return the answer's log-probability."""
        logits = self.cap * torch.tanh(logits / self.cap) if self.cap else logits
        ids = self.ids[prompt]
        own = logits[..., ids.clamp_min(0)].masked_fill(ids < 0, -torch.inf)
        return own.logsumexp(-1) - logits.logsumexp(-1)

    @torch.no_grad()
    def first_order(self, steps: Steps) -> Float[Tensor, "prompt layer neuron"]:
        """Return the derivative of the answer's log-probability along every neuron's step.

        Where the log-probability is concave in the logits (`concave`), none adds more than this.
        """
        out = torch.empty_like(steps.weight)
        for at, layer in enumerate(steps.layers):
            v = self._directions(layer)
            logits = steps.base[:, at].to(self.rows.device) @ self.rows.T + self.bias
            ids = self.ids.clamp_min(0)
            own = logits.gather(1, ids)
            slope, bent = -logits.softmax(-1), torch.ones_like(own)
            if self.cap:
                capped = self.cap * torch.tanh(logits / self.cap)
                slope = -capped.softmax(-1) * (1 - (capped / self.cap) ** 2)
                bent = 1 - torch.tanh(own / self.cap) ** 2
                own = capped.gather(1, ids)
            share = own.masked_fill(self.ids < 0, -torch.inf).softmax(-1)  # of each right token among them
            slope.scatter_add_(1, ids, share * bent)
            out[:, at] = ((slope @ self.rows) @ v.T).cpu() * steps.weight[:, at]
        return out

    @torch.no_grad()
    def added(self, steps: Steps, chosen: Sequence[Neuron]) -> Float[Tensor, "prompt neuron"]:
        """Return the log-probability with a neuron's step minus that without, for some neurons."""
        out, device = torch.empty(len(steps.base), len(chosen)), self.rows.device
        for at, layer in enumerate(steps.layers):
            mine = [i for i, (where, _) in enumerate(chosen) if where == layer]
            if not mine:
                continue
            v = self._directions(layer)
            base = steps.base[:, at].to(device)
            for some in torch.tensor(mine).split(max(1, _CELLS // len(self.rows))):
                units = [chosen[i][1] for i in some.tolist()]
                written, weight, found = v[units] @ self.rows.T, steps.weight[:, at, units].to(device), list[Tensor]()
                for p in range(len(out)):
                    plain = self.rows @ base[p] + self.bias
                    more = weight[p][:, None] * written + plain
                    found.append(self.log_p(more, p) - self.log_p(plain, p))
                out[:, some] = torch.stack(found).cpu()
        return out

    def _directions(self, layer: int) -> Float[Tensor, "neuron d_model"]:
        return memories.toward_logits(self.model, memories.values(self.model, layer)).to(self.rows.device)
