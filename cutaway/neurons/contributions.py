"""The change of an answer's log-probability by single neurons, and neurons masked or kept at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.anatomy.unembedding import readable
from cutaway.models.anatomy.weights import unembed_rows
from cutaway.models.edits.edit import Edit, at_places
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.neurons import memories
from cutaway.neurons.memories import Neuron

_CELLS = 1 << 24  # most logits that are made at once


@dataclass(frozen=True)
class Masked(Edit):
    """Multiply the activations of a layer's neurons at the last token by 0 or 1.

    Attributes:
        address: the place: `mlp_post` of a layer, at its last position.
        keep: 1 for a neuron that stays.
    """

    address: Address | str
    keep: Float[Tensor, "neuron"]
    positions: tuple[int, ...] | None = None

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return at_places(self, x, frame, lambda old: old * self.keep.to(old.device, old.dtype))


def mask(model: Model, chosen: Sequence[Neuron]) -> list[Edit]:
    """Return edits that silence some neurons at the last token."""
    layers = sorted({layer for layer, _ in chosen})
    return [Masked(Address("mlp_post", i, None, -1), 1 - _members(model, chosen, i)) for i in layers]


def keep(model: Model, chosen: Sequence[Neuron], layers: Sequence[int]) -> list[Edit]:
    """Return edits that silence all other neurons of some layers at the last token."""
    return [Masked(Address("mlp_post", i, None, -1), _members(model, chosen, i)) for i in layers]


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
        divisors = torch.stack([_divisor(model, i, c[:, at]) for at, i in enumerate(layers)], 1)
        return Steps([*layers], base, c / divisors[..., None] / scale[:, None, None], c)


def _divisor(model: Model, layer: int, c: Float[Tensor, "prompt neuron"]) -> Float[Tensor, "prompt"]:
    """Return the divisor of a norm behind the MLP; ones without one."""
    post = model.anatomy.part(layer, "ln2_post")
    if post is None:
        return torch.ones(len(c))
    w = model.weights
    out = c.to(model.device) @ w.mlp_out[layer].float() + w.mlp_out_bias[layer].float()
    return model.anatomy.norm(post).scale(out).cpu()


class Answers:
    """Log-probabilities of one answer a prompt, read off streams in the way of the model's own last one."""

    def __init__(self, model: Model, ids: Int[Tensor, "prompt"]):
        self.model, self.ids = model, ids.cpu()
        self.rows = unembed_rows(model.anatomy)[0].detach().float()
        plain, final = unembed_rows(model.anatomy)[1].detach().float(), model.anatomy.top("final")
        self.bias = plain if final is None else plain + self.rows @ model.anatomy.norm(final).bias.float()
        self.cap = readable(model.anatomy, f"importance of neurons of {model.name}").cap

    def log_p(self, logits: Float[Tensor, "*rest token"], prompt: int) -> Float[Tensor, "*rest"]:
        """Return the answer's log-probability."""
        logits = self.cap * torch.tanh(logits / self.cap) if self.cap else logits
        return logits[..., self.ids[prompt]] - logits.logsumexp(-1)

    @torch.no_grad()
    def first_order(self, steps: Steps) -> Float[Tensor, "prompt layer neuron"]:
        """Return the derivative of the answer's log-probability along every neuron's step.

        Without a soft cap the log-probability is concave in the logits, so none adds more than this.
        """
        out = torch.empty_like(steps.weight)
        for at, layer in enumerate(steps.layers):
            v = memories.toward_logits(self.model, memories.values(self.model, layer))
            logits = steps.base[:, at].to(self.rows.device) @ self.rows.T + self.bias
            slope = -logits.softmax(-1)
            if self.cap:
                capped = self.cap * torch.tanh(logits / self.cap)
                slope = -capped.softmax(-1) * (1 - (capped / self.cap) ** 2)
            prompts = torch.arange(len(logits), device=logits.device)
            ids = self.ids.to(logits.device)
            slope[prompts, ids] += 1 - (torch.tanh(logits[prompts, ids] / self.cap) ** 2 if self.cap else 0)
            out[:, at] = ((slope @ self.rows) @ v.T).cpu() * steps.weight[:, at]
        return out

    @torch.no_grad()
    def added(self, steps: Steps, chosen: Sequence[Neuron]) -> Float[Tensor, "prompt neuron"]:
        """Return the log-probability with a neuron's step minus that without, for some neurons."""
        out = torch.empty(len(steps.base), len(chosen))
        for at, layer in enumerate(steps.layers):
            mine = [i for i, (where, _) in enumerate(chosen) if where == layer]
            if not mine:
                continue
            v = memories.toward_logits(self.model, memories.values(self.model, layer))
            for some in torch.tensor(mine).split(max(1, _CELLS // len(self.rows))):
                units = [chosen[i][1] for i in some.tolist()]
                written = v[units] @ self.rows.T
                for p in range(len(out)):
                    plain = self.rows @ steps.base[p, at].to(self.rows.device) + self.bias
                    more = steps.weight[p, at, units].to(written.device)[:, None] * written + plain
                    out[p, some] = (self.log_p(more, p) - self.log_p(plain, p)).cpu()
        return out
