"""The residual stream as an exact sum: embedding, every head, every attention bias, every MLP (or its neurons), or
every state-space layer.

The sum equals `resid_post` of the last layer; through the final norm with its scale frozen and the unembedding it
equals the logits. Norms after attention or MLP (Gemma 2, OLMo 2) act linearly with their scales frozen, and the
family's residual multiplier is included (Elhage et al. 2021, transformer-circuits.pub/2021/framework).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cutaway.core.finite import finite
from cutaway.core.refuse import Code, Refused
from cutaway.core.result import Result
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.anatomy.norms import Norm
from cutaway.models.anatomy.weights import unembed_rows
from cutaway.models.edits.edit import Edit
from cutaway.models.model import Model, Prompts


@dataclass(frozen=True, kw_only=True)
class Decomposition(Result, kind="decomposition"):
    """Contributions to the residual stream at one position of each prompt, and the stream they sum to.

    Components are named by address (`embed`, `head_out.9.6`, `mlp_out.3`, `mlp_post.3.17`, `ssm.out.3`) and
    `attn_bias.9`, `mlp_bias.3`. `scale` is the final norm's divisor there.
    """

    contribution: Float[Tensor, "batch component d_model"]
    total: Float[Tensor, "batch d_model"]
    scale: Float[Tensor, "batch"]


@dataclass(frozen=True)
class _Writer:
    """Units (heads or neurons) that write `act @ weight` each, then a shared bias, all through a post-norm."""

    names: list[str]
    act: Float[Tensor, "batch unit width"]
    weight: Float[Tensor, "unit width d_model"]
    bias: Float[Tensor, "d_model"]
    post: Norm | None
    multiplier: float

    def scale(self) -> Float[Tensor, "batch"]:
        """Return the post-norm's divisor for the units' sum."""
        assert self.post is not None
        total = torch.einsum("buw,uwd->bd", self.act, self.weight) + self.bias
        return self.post.scale(total)

    def contributions(self) -> Float[Tensor, "batch name d_model"]:
        """Return the contributions of each unit, and last of the bias, to the stream."""
        rest = self.bias.expand(len(self.act), 1, -1)
        parts = torch.cat([torch.einsum("buw,uwd->bud", self.act, self.weight), rest], dim=1)
        if self.post is not None:
            parts = self.post.linear(parts, self.scale()[:, None].expand(parts.shape[:2]))
            parts[:, -1] += self.post.bias
        return parts * self.multiplier

    def together(self) -> Float[Tensor, "batch d_model"]:
        """Return what all units and the bias write."""
        total = torch.einsum("buw,uwd->bd", self.act, self.weight) + self.bias
        if self.post is not None:
            total = self.post.linear(total, self.post.scale(total)) + self.post.bias
        return total * self.multiplier

    def shares(self, reader: Float[Tensor, "pair batch d_model"]) -> Float[Tensor, "pair batch name"]:
        """Dot product of each contribution with `reader`, without forming the contributions."""
        own, constant = self._through(reader)
        units = torch.einsum("buw,pbuw->pbu", self.act.double(), self._seen(own))
        return torch.cat([units, (own @ self.bias.double() + constant)[..., None]], dim=-1)

    def readers(self, reader: Float[Tensor, "pair batch d_model"]) -> Float[Tensor, "pair batch unit width"]:
        """Return `reader` in terms of each unit's activation: their dot product is the unit's share."""
        return self._seen(self._through(reader)[0])

    def _through(self, reader: Float[Tensor, "pair batch d_model"]) -> tuple[Tensor, Float[Tensor, "pair batch"]]:
        """Return the reader in front of the post-norm, and what it reads of the norm's bias."""
        own, constant = (
            reader * self.multiplier,
            torch.zeros(reader.shape[:2], dtype=reader.dtype, device=reader.device),
        )
        if self.post is not None:
            constant = own @ self.post.bias.double()
            own = self.post.folded(own) / self.scale().double()[:, None]
        return own, constant

    def _seen(self, own: Float[Tensor, "pair batch d_model"]) -> Float[Tensor, "pair batch unit width"]:
        return torch.einsum("uwd,pbd->pbuw", self.weight.double(), own)


@dataclass(frozen=True)
class Stream:
    """The stream at one position of each prompt, as whole vectors and as writers, in order of depth.

    Attributes:
        parts: the summands: vectors with their names, and writers.
        last: the stream after the last block, as the model has it.
        total: the same in float32.
        scale: the final norm's divisor.
        logits: the model's own logits there, of the same forward; None if they were not asked for.
    """

    parts: list[tuple[str, Float[Tensor, "batch d_model"]] | _Writer]
    last: Float[Tensor, "batch d_model"]
    total: Float[Tensor, "batch d_model"]
    scale: Float[Tensor, "batch"]
    logits: Float[Tensor, "batch token"] | None = None

    def names(self) -> list[str]:
        """Component names in the order of `parts`."""
        return [n for p in self.parts for n in (p.names if isinstance(p, _Writer) else [p[0]])]


@torch.no_grad()
def decompose(
    model: Model, prompts: Prompts, position: int = -1, *, neurons: Sequence[int] = (), edits: Sequence[Edit] = ()
) -> Decomposition:
    """Split the residual stream at `position` into components; the MLPs of the layers in `neurons` into neurons.

    Raises:
        Refused: the stream itself is normed between additions (BERT), so that no sum exists.
    """
    with finite(f"decomposition of {model.name}", model.dtype):
        sites = _sites(model, neurons)
        acts = model.capture(prompts, sites, edits, logits=False)
        stream = _stream(model, {str(a): acts[f"{a}@{position}"] for a in model.places(sites)}, neurons)
    parts = [p.contributions() if isinstance(p, _Writer) else p[1][:, None] for p in stream.parts]
    return Decomposition(
        contribution=torch.cat(parts, dim=1),
        total=stream.total,
        scale=stream.scale,
        labels={"component": stream.names()},
        units={"contribution": "residual stream", "total": "residual stream"},
        record={"model": model.identity(), "position": position, "final norm": "scale frozen at its value in this run"},
    )


@torch.no_grad()
def attention_written(model: Model, layer: int, z: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row d_model"]:
    """Return what a layer's attention adds to the stream for any outputs of its heads, in float32.

    Raises:
        Refused: its matrices cannot be read.
    """
    return _heads(model, layer, z.float()).together()


@torch.no_grad()
def logit_contributions(
    model: Model, parts: Decomposition, tokens: Int[Tensor, "batch"], foils: Int[Tensor, "batch"] | None = None
) -> tuple[Float[Tensor, "batch component"], Float[Tensor, "batch"]]:
    """Return each component's share of the logit of `tokens` (minus that of `foils`), and the share of the final
    biases.

    Units are logits before any soft cap; the final norm's scale is frozen, its centring and weight are applied to
    every component. Components plus biases sum to the logit (difference).
    """
    reader, offset = logit_reader(model, parts.scale, tokens[None], foils[None] if foils is not None else None)
    return torch.einsum("bcd,bd->bc", parts.contribution.double(), reader[0]).float(), offset[0].float()


@torch.no_grad()
def last_stream(model: Model, prompts: Prompts, *, neurons: bool = False, edits: Sequence[Edit] = ()) -> Stream:
    """Return the stream at each prompt's last token with the model's own logits there, from one forward under edits;
    with `neurons`, every MLP by its neurons.

    Raises:
        Refused: the stream itself is normed between additions (BERT), so that no sum exists.
    """
    layers = [i for i in range(model.shape.n_layers) if model.anatomy.part(i, "down") is not None] if neurons else []
    places = model.places(_sites(model, layers))
    shapes: dict[str, torch.Size] = {}

    def columns_of(seen: Seen, prompt: Tensor) -> Float[Tensor, "row number"]:
        assert seen.last_logits is not None
        assert seen.activations is not None
        found = {str(a): seen.activations[f"{a}@-1"] for a in places}
        shapes.update({name: x.shape[1:] for name, x in found.items()})
        logits = seen.last_logits
        return torch.cat([logits, *(x.flatten(1).to(logits.device) for x in found.values())], dim=1)

    whole = model.measure(prompts, Measure(columns_of, Reads(places=tuple(places))), edits)
    widths = [size.numel() for size in shapes.values()]
    logits, *columns = whole.split([whole.shape[1] - sum(widths), *widths], dim=1)
    acts = {name: x.unflatten(1, size) for (name, size), x in zip(shapes.items(), columns, strict=True)}
    return replace(_stream(model, acts, layers), logits=logits)


@torch.no_grad()
def logit_shares(
    model: Model, stream: Stream, tokens: Int[Tensor, "pair batch"], foils: Int[Tensor, "pair batch"] | None
) -> tuple[list[str], Float[Tensor, "pair batch component"], Float[Tensor, "pair batch"]]:
    """Return the names, shares and the final biases' share of several logit differences at each prompt's last token;
    without foils, of logits.

    Equal to `decompose` with `logit_contributions`, without forming d_model numbers for every neuron.
    """
    reader, offset = logit_reader(model, stream.scale, tokens, foils)
    shares = [
        p.shares(reader) if isinstance(p, _Writer) else torch.einsum("bd,pbd->pb", p[1].double(), reader)[..., None]
        for p in stream.parts
    ]
    return stream.names(), torch.cat(shares, dim=-1).float(), offset.float()


@torch.no_grad()
def head_readers(
    model: Model, i: int, z: Float[Tensor, "batch head d_head"], reader: Float[Tensor, "pair batch d_model"]
) -> Float[Tensor, "pair batch head d_head"]:
    """Return, for each head of layer `i`, the vector whose dot product with `z` is the head's share of what `reader`
    reads: through W_O, the post-norm with its scale frozen at its value for this `z`, and the family's multiplier.
    """
    return _heads(model, i, z.float()).readers(reader)


def check_sum(model: Model) -> None:
    """Check that the residual stream is a sum of components.

    Raises:
        Refused: it is not, or a site that its decomposition reads is disabled.
    """
    _sites(model, ())


def _sites(model: Model, neurons: Collection[int]) -> list[str]:
    """Return the sites that a decomposition reads.

    Raises:
        Refused: no sum exists, or one of its sites is disabled.
    """
    anatomy, n = model.anatomy, model.shape.n_layers
    for name in ("attn_out", "mlp_out", "head_out", "decomposition"):
        if why := anatomy.disabled.get(name):
            raise Refused(
                f"decomposition of {model.name}", f"{name} is disabled: {why}", ("see ", Code("self_check(model)"))
            )
    if anatomy.family.post_norm:
        why = "its residual stream is normed after every addition"
        raise Refused(f"decomposition of {model.name}", why, "capture resid_post instead")
    writers = ["ssm.out"] if anatomy.family.ssm else ["z", "mlp_out"]
    sites = ["resid_pre.0", *writers, f"resid_post.{n - 1}", *(f"mlp_post.{i}" for i in neurons)]
    return [*sites, "pos_embed"] if anatomy.top("pos") is not None else sites


def _stream(model: Model, acts: Mapping[str, Tensor], neurons: Collection[int]) -> Stream:
    """Split the stream at one position, given what the sites hold there."""
    anatomy, n = model.anatomy, model.shape.n_layers
    final = anatomy.top("final")
    first = acts["resid_pre.0"].float()
    parts: list[tuple[str, Tensor] | _Writer] = [("embed", first)]
    if "pos_embed" in acts:
        pos = acts["pos_embed"].float()
        parts = [("embed", first - pos), ("pos_embed", pos)]
    for i in range(n):
        if anatomy.family.ssm:
            parts.append((f"ssm.out.{i}", acts[f"ssm.out.{i}"].float()))
            continue
        parts.append(_heads(model, i, acts[f"z.{i}"].float()))
        whole = (f"mlp_out.{i}", acts[f"mlp_out.{i}"].float())
        parts.append(_neurons(model, i, acts[f"mlp_post.{i}"].float()) if i in neurons else whole)
    last = acts[f"resid_post.{n - 1}"]
    total = last.float()
    scale = anatomy.norm(final).scale(total) if final is not None else torch.ones(len(total), device=total.device)
    return Stream(parts, last, total, scale)


def _heads(model: Model, i: int, z: Float[Tensor, "batch head d_head"]) -> _Writer:
    w = model.weights
    names = [*(f"head_out.{i}.{h}" for h in range(model.shape.n_heads)), f"attn_bias.{i}"]
    return _writer(model, names, z, w.o[i].float(), w.o_bias[i].float(), model.anatomy.part(i, "ln1_post"))


def _neurons(model: Model, i: int, post: Float[Tensor, "batch neuron"]) -> _Writer:
    w = model.weights
    names = [*(f"mlp_post.{i}.{k}" for k in range(post.shape[1])), f"mlp_bias.{i}"]
    out = w.mlp_out[i].float()[:, None]
    return _writer(model, names, post[..., None], out, w.mlp_out_bias[i].float(), model.anatomy.part(i, "ln2_post"))


def _writer(
    model: Model, names: list[str], act: Tensor, weight: Tensor, rest: Tensor, post: nn.Module | None
) -> _Writer:
    norm = model.anatomy.norm(post) if post is not None else None
    return _Writer(names, act, weight, rest, norm, model.anatomy.multiplier)


def logit_reader(
    model: Model,
    scale: Float[Tensor, "batch"],
    tokens: Int[Tensor, "pair batch"],
    foils: Int[Tensor, "pair batch"] | None,
) -> tuple[Float[Tensor, "pair batch d_model"], Float[Tensor, "pair batch"]]:
    """Return the vector whose dot product with a summand of the stream is its share of the logit, and the biases'
    share.

    In float64. With its scale (`scale`) frozen the final norm is linear, so its transpose is applied to the unembedding
    once.
    """
    final = model.anatomy.top("final")
    direction, offset = unembed_rows(model.anatomy, tokens, torch.float64)
    if foils is not None:
        other, own = unembed_rows(model.anatomy, foils, torch.float64)
        direction, offset = direction - other, offset - own
    if final is None:
        return direction, offset
    norm = model.anatomy.norm(final)
    offset = offset + direction @ norm.bias.double()
    return norm.folded(direction) / scale.double()[:, None], offset
