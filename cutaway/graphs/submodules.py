"""Submodules: the parts of a model whose output a dictionary block reconstructs, as nodes of a feature circuit.

A submodule's nodes are the latents f of its block and the error ε = x − f W_dec − b_dec, so that its output x is their
sum and an exchange of nodes is a step of x (Marks et al. 2024, arXiv:2403.19647).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.address import Address, parse
from cutaway.core.node import Error, Latent
from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import JumpRelu
from cutaway.dictionaries.opening import HELP, random_latents
from cutaway.dictionaries.splice import late_reads
from cutaway.dictionaries.subject import Dictionaries, accept_several, open_several
from cutaway.dictionaries.transforms import alone, autoencoder
from cutaway.graphs.latents import folded
from cutaway.interventions.components import positions
from cutaway.models.edits.keep import time_of
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Submodule:
    """Site that a block of latents reconstructs.

    Attributes:
        block: the number of the block among all, in the order of the forward.
        dictionary: the dictionary of this block alone.
        read: the site that the block reads; that of the submodule itself for an autoencoder.
        site: the site that the block writes.
    """

    block: int
    dictionary: Dictionary
    read: Address
    site: Address

    @property
    def n_latents(self) -> int:
        """Number of latents; in tables of nodes the error follows them."""
        return self.dictionary.n_latents

    @cached_property
    def decoder(self) -> Float[Tensor, "latent width"]:
        """Rows that one unit of each latent writes."""
        rows = self.dictionary.decoder[0][str(self.site)]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    @cached_property
    def encoder(self) -> Float[Tensor, "latent width"]:
        """Rows by which each latent's pre-activation reads."""
        return self.dictionary.encoder[0][str(self.read)].to(self.decoder)

    def codes(self, x: Float[Tensor, "batch position *width"]) -> Float[Tensor, "batch position latent"]:
        """Return the latents, given the site that is read."""
        return self.dictionary.encode({str(self.read): x}).dense().reshape(*x.shape[:2], -1)

    def error(
        self, f: Float[Tensor, "batch position latent"], x: Float[Tensor, "batch position *width"]
    ) -> Float[Tensor, "batch position width"]:
        """Return what latents leave out of the site that is written."""
        return x.flatten(2).to(f) - f @ self.decoder - self.dictionary.b_dec[str(self.site)].to(f)

    def slopes(self, x: Float[Tensor, "batch position *width"]) -> Float[Tensor, "batch position latent"]:
        """Return the derivative of each latent by its own pre-activation."""
        pre = self.dictionary.pre_activations(0, {str(self.read): x}).detach().requires_grad_(True)
        with torch.enable_grad():
            code = self.dictionary.gate.apply(pre).dense()  # type: ignore[attr-defined]
            (found,) = torch.autograd.grad(code.sum(), pre)
        return found.reshape(*x.shape[:2], -1)

    def node(self, column: int, position: int | None) -> Latent | Error:
        """Return the node of a column of tables: a latent, or behind them the error."""
        if column == self.n_latents:
            return Error(self.block, position)
        return Latent(self.block, column, position)


def submodules(model: Model, dictionaries: Sequence[Dictionary]) -> list[Submodule]:
    """Return the submodules of all blocks, in the order of the forward.

    Raises:
        Refused: a block that reads or writes several sites or has a skip, a site that is not there or that two write,
            or a gate or normalisation by which a token's code is not its own.
    """
    found: list[tuple[Dictionary, Address, Address]] = []
    for d in dictionaries:
        what = f"feature circuit over {d!r}"
        if d.models or d.skip or any(len(b.reads) != 1 or len(b.writes) != 1 for b in d.blocks):
            why = "a skip is no node" if d.skip else "its blocks read and write several sites or models"
            raise Refused(what, why, "use autoencoders, or transcoders without a skip")
        if late := [w for w in d.writes if late_reads(d, w)]:
            raise Refused(what, f"{late[0]} is written before what it is made of can be read", "use autoencoders")
        one = folded(d, what).to(model.device)
        each = [(parse(b.reads[0]), parse(b.writes[0])) for b in d.blocks]
        found += [(alone(one, n), *sites) for n, sites in enumerate(each)]
    found.sort(key=lambda parts: time_of(parts[2]))
    sites = [site for _, _, site in found]
    if twice := [a for a in sites if sites.count(a) > 1]:
        raise Refused("feature circuit", f"{twice[0]} is written by two of the dictionaries", "give one for each site")
    for place in model.places([place for _, *both in found for place in both]):
        if place.row.axes.split()[:2] != ["batch", "position"] or not place.row.writable:
            raise Refused(f"feature circuit over {place}", "it holds no vector of each token", "use a stream's site")
    return [Submodule(n, d, read, site) for n, (d, read, site) in enumerate(found)]


def neurons(subs: Sequence[Submodule]) -> list[Submodule]:
    """Return the same sites with their own coordinates for latents, which leave no error."""
    return [Submodule(s.block, _identity(str(s.site), s.decoder), s.site, s.site) for s in subs]


def _identity(site: str, like: Float[Tensor, "latent width"]) -> Dictionary:
    n = like.shape[1]
    eye, zeros = torch.eye(n).to(like), torch.zeros(n).to(like)
    return autoencoder(site, eye, eye, zeros, zeros, JumpRelu(torch.full_like(zeros, -torch.inf), signed=True))


@dataclass(frozen=True)
class Places:
    """Cells of positions that nodes stand for: all positions together, or each by itself.

    Attributes:
        names: the positions, or None for all of them.
        tokens: the prompts.
    """

    names: tuple[int | None, ...]
    tokens: Tokens

    @classmethod
    def of(cls, tokens: Tokens, by: str) -> Places:
        """Return the cells of `by`: all or position."""
        return cls(tuple(positions(tokens)) if by == "position" else (None,), tokens)

    def summed(self, x: Float[Tensor, "batch position column"]) -> Float[Tensor, "batch place column"]:
        """Sum over the positions of each cell."""
        if self.names == (None,):
            return x.sum(1, keepdim=True)
        columns = torch.stack([self.tokens.column(p) for p in self.names if p is not None], 1).to(x.device)
        return x.gather(1, columns[..., None].expand(-1, -1, x.shape[2]))

    def only(self, x: Float[Tensor, "batch position column"], place: int) -> Float[Tensor, "batch position column"]:
        """Return zeros outside of one cell."""
        position = self.names[place]
        if position is None:
            return x
        column = self.tokens.column(position).to(x.device)[:, None, None]
        return torch.where(torch.arange(x.shape[1], device=x.device)[:, None] == column, x, 0.0)


@dataclass(frozen=True, eq=False)
class Change:
    """Steps of a submodule's nodes between two runs, of all latents or of some.

    Attributes:
        sub: the submodule.
        places: the cells of positions.
        columns: the latents.
        latents: their steps.
        error: the step of the error.
        partner: random latents along whose rows the null's steps go.
        drift: random unit vectors along which those of the error go.
    """

    sub: Submodule
    places: Places
    columns: Int[Tensor, "latent"]
    latents: Float[Tensor, "batch position latent"]
    error: Float[Tensor, "batch position width"]
    partner: Int[Tensor, "sample latent"]
    drift: Float[Tensor, "sample width"]

    def of(self, columns: Int[Tensor, "chosen"]) -> Change:
        """Return the change of some latents, and of the error."""
        return Change(
            self.sub,
            self.places,
            self.columns[columns],
            self.latents[..., columns],
            self.error,
            self.partner[:, columns],
            self.drift,
        )

    def effects(self, slope: Float[Tensor, "batch position *width"]) -> Float[Tensor, "batch place column"]:
        """Return Σ step · slope of every latent, and of the error in the last column."""
        g = slope.flatten(2).to(self.latents)
        rows = self.sub.decoder[self.columns]
        return self._products(g, rows, self.error)

    def chance(self, slope: Float[Tensor, "batch position *width"]) -> Float[Tensor, "place column sample"]:
        """Return the mean over prompts of the same for steps as long in random directions."""
        g, rows, out = slope.flatten(2).to(self.latents), self.sub.decoder, []
        length, size = rows.norm(dim=1), self.error.norm(dim=-1, keepdim=True)
        for partner, drift in zip(self.partner, self.drift, strict=True):
            scale = length[self.columns] / length[partner].clamp_min(1e-12)
            out.append(self._products(g, rows[partner] * scale[:, None], size * drift).mean(0))
        return torch.stack(out, -1)

    def _products(self, g: Tensor, rows: Tensor, error: Tensor) -> Float[Tensor, "batch place column"]:
        each = torch.cat([self.latents * (g @ rows.T), (error * g).sum(-1, keepdim=True)], -1)
        return self.places.summed(each)

    def moves(self) -> Float[Tensor, "place column"]:
        """Return the largest |step| of each node."""
        sizes = torch.cat([self.latents.abs(), self.error.norm(dim=-1, keepdim=True)], -1)
        return self.places.summed(sizes).amax(0)

    def step(self, column: int) -> Float[Tensor, "batch position width"]:
        """Return the step of the written site when one node of all is exchanged."""
        if column == self.sub.n_latents:
            return self.error
        return self.latents[..., column, None] * self.sub.decoder[column]


def change(
    sub: Submodule, own: Mapping[str, Tensor], other: Mapping[str, Tensor], places: Places, samples: int, seed: int
) -> Change:
    """Return the steps of a submodule's nodes from one run to another."""
    codes = [sub.codes(acts[str(sub.read)]) for acts in (own, other)]
    errors = [sub.error(f, acts[str(sub.site)]) for f, acts in zip(codes, (own, other), strict=True)]
    n, chance = sub.n_latents, generator(seed + sub.block)
    partner = torch.randint(n, (samples, n), generator=chance)
    drift = torch.nn.functional.normalize(torch.randn(samples, errors[0].shape[-1], generator=chance), dim=1)
    every = torch.arange(n, device=sub.decoder.device)
    return Change(
        sub, places, every, codes[1] - codes[0], errors[1] - errors[0], partner.to(every), drift.to(sub.decoder)
    )


_WORDS = HELP.replace("a sparse dictionary", "autoencoders of several sites with commas between them")
AUTOENCODERS = register(
    Subject(
        "autoencoders",
        Dictionaries,
        (Flag("autoencoders", str, REQUIRED, _WORDS),),
        open_several,
        lambda given: Dictionaries(
            random_latents(given["model"], 24 + n, 8, site)
            for n, site in enumerate(("resid_post.0", "attn_out.1", "mlp_out.1"))
        ),
        accept=lambda given: accept_several([given] if isinstance(given, Dictionary) else given),
        advice="a dictionary or a list of them",
    )
)
