"""A dictionary in training: its weights, one step on a batch, and the dictionary it has become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutaway.core.stats import generator
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.gates import Chosen
from cutaway.dictionaries.kernels.reduce import ALONE, Across
from cutaway.dictionaries.kernels.sparse_matmul import dense_read, follow, read, write
from cutaway.dictionaries.kernels.topk import Encoder, Shadow
from cutaway.dictionaries.norms import Norm, Scale
from cutaway.dictionaries.objectives import Part, Pass
from cutaway.dictionaries.objectives.active import Active, tangential
from cutaway.dictionaries.parts import Block
from cutaway.dictionaries.training.adam import Adam
from cutaway.dictionaries.training.recipe import Recipe
from cutaway.models.moments import Moments

SPARSE_BELOW = 0.015  # share of active latents below which products over pairs are quicker than dense ones
DENSE_ABOVE = 0.025


@dataclass(frozen=True)
class SiteMoments:
    """Statistics of the data that a learner starts from, by site and in the site's own units."""

    mean: Mapping[str, Tensor]
    norm: Mapping[str, float]  # E‖x‖
    variance: Mapping[str, float]  # E‖x − mean‖²

    @staticmethod
    def known(found: Mapping[str, Moments]) -> SiteMoments:
        """Return the moments that were counted elsewhere, over more tokens."""
        return SiteMoments(
            {s: m.mean.float() for s, m in found.items()},
            {s: m.mean_norm for s, m in found.items()},
            {s: m.total_variance for s, m in found.items()},
        )

    @staticmethod
    def of(acts: Mapping[str, Tensor]) -> SiteMoments:
        """Return the moments of some tokens."""
        mean = {s: x.double().mean(0) for s, x in acts.items()}
        return SiteMoments(
            {s: m.float() for s, m in mean.items()},
            {s: float(x.double().norm(dim=1).mean()) for s, x in acts.items()},
            {s: float((x.double() - mean[s]).pow(2).sum(1).mean()) for s, x in acts.items()},
        )


@dataclass(frozen=True)
class Report:
    """Numbers of one step, still tensors."""

    loss: Tensor
    error: Tensor  # Σ‖y − ŷ‖² over tokens, in the dictionary's units
    deviation: Tensor  # Σ‖y − mean‖², the same
    active: Tensor  # active latents, over tokens
    terms: Mapping[str, Tensor]


class Learner:
    """A dictionary in training; `training/sharded.py` has one whose latents and tokens are spread over processes."""

    across: Across = ALONE

    def __init__(
        self, recipe: Recipe, moments: SiteMoments, device: torch.device | str = "cpu", silent_after: int = 10_000_000
    ):
        self.recipe, self.silent_after = recipe, silent_after
        self.scale = {
            s: len(moments.mean[s]) ** 0.5 / moments.norm[s] if recipe.scaled and moments.norm[s] > 0 else 1.0
            for s in (*recipe.reads, *recipe.writes)
        }
        self.mean = {s: (moments.mean[s] * f).to(device) for s, f in self.scale.items()}
        self.variance = sum(moments.variance[s] * self.scale[s] ** 2 for s in recipe.writes)
        self.weights: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._start()
        self.weights = {n: w.to(device).requires_grad_() for n, w in self.weights.items()}
        self.buffers = {n: b.to(device) for n, b in self.buffers.items()}
        self.adam = Adam({n: w.detach() for n, w in self.weights.items()}, recipe.adam)
        self.shadows: dict[int, Shadow] = {}
        self.dense = [not recipe.gating.fixed] * len(recipe.blocks)

    # --- steps

    def step(self, acts: Mapping[str, Tensor], rate: float, done: float, batch: Any = None) -> Report | None:
        """Learn from a batch; None if the loss is not a number, and then nothing has changed."""
        p = self.forward(acts, done, batch)
        report, loss = self.losses(p)
        if not bool(torch.isfinite(report.loss)):
            return None
        gradients = self._gradients(loss)
        if gradients:
            self.adam.step(gradients, rate)
        self._after(p)
        return report

    def forward(self, acts: Mapping[str, Tensor], done: float = 1.0, batch: Any = None) -> Pass:
        """Pass a batch through the dictionary, with gradients."""
        own = self.recipe
        xs = {s: acts[s] if f == 1.0 else acts[s] * f for s, f in self.scale.items()}
        outs = {s: self.weights[f"b_dec.{s}"] for s in own.writes}
        for b in range(len(own.blocks)):
            for source, site in self._skips(b):
                outs[site] = outs[site] + xs[source] @ self.weights[f"skip.{source}>{site}"].T
        actives = [self._active(b, xs) for b in range(len(own.blocks))]
        shares, nested = [], []
        for b, active in enumerate(actives):
            steps = self._decoded(b, active)
            shares.append(steps[-1])
            nested.append(steps)
            for site, part in zip(own.blocks[b].writes, self._by_site(b, steps[-1]), strict=True):
                outs[site] = outs[site] + part
        parts = [self._part(b, xs, outs, shares[b], actives[b]) for b in range(len(own.blocks))]
        whole = [[p.out - p.own + n for n in steps[:-1]] + [p.out] for p, steps in zip(parts, nested, strict=True)]
        units = {s: y / self.scale[s] for s, y in outs.items()}
        return Pass(parts, units, whole, self.silent_after, self.variance, done, batch, xs, outs)

    def losses(self, p: Pass) -> tuple[Report, Tensor]:
        """Return the loss of a pass and its parts."""
        xs, ys = p.xs, p.ys
        errors = torch.stack([(xs[s] - y).pow(2).sum() for s, y in ys.items()])
        tokens = len(next(iter(xs.values())))
        error = errors.sum()
        loss, terms = self.recipe.squared * error / tokens, {}
        for term in self.recipe.terms:
            value = term.of(p)
            terms[type(term).__name__] = value.detach()
            loss = loss + term.now(p.done) * value
        with torch.no_grad():
            deviation = torch.stack([(xs[s] - self.mean[s]).pow(2).sum() for s in ys]).sum()
            active = torch.stack([part.active.count() for part in p.parts]).sum()
        return Report(loss.detach(), error.detach(), deviation, active, terms), loss

    # --- what it has become

    def dictionary(self, **about: Any) -> Dictionary:
        """Return the dictionary as it stands."""
        blocks = self.recipe.blocks
        w = {n: t.detach().clone() for n, t in self.weights.items()}
        reading: dict[str, Norm] = {s: Scale(self.scale[s]) for s in self.recipe.reads if self.scale[s] != 1.0}
        writing: dict[str, Norm] = {s: Scale(self.scale[s]) for s in self.recipe.writes if self.scale[s] != 1.0}
        return Dictionary(
            blocks,
            tuple(self._encoder_of(b, w) for b in range(len(blocks))),
            tuple(_cut(w[f"decoder.{b}"], block.writes, self._widths(block.writes)) for b, block in enumerate(blocks)),
            tuple(self._bias(b, w) for b in range(len(blocks))),
            {s: w[f"b_dec.{s}"] for s in self.recipe.writes},
            tuple(self.recipe.gating.gate(self._own(b)) for b in range(len(blocks))),
            {(r, s): w[f"skip.{r}>{s}"] for b in range(len(blocks)) for r, s in self._skips(b)},
            self.recipe.subtract,
            self.recipe.decoder == "norm_aware",
            reading,
            writing,
            {"recipe": self.recipe.as_dict(), **about},
        )

    def silent(self) -> float:
        """Return the share of latents, of all blocks, that count as silent."""
        each = [self.buffers[f"silent.{b}"] >= self.silent_after for b in range(len(self.recipe.blocks))]
        return float(torch.cat(each).float().mean())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the next step depends on: tensors by name, and JSON-ready numbers."""
        tensors = {f"weight/{n}": w.detach() for n, w in self.weights.items()}
        tensors |= {f"buffer/{n}": b for n, b in self.buffers.items()}
        tensors |= {f"mean/{s}": m for s, m in self.mean.items()} | self.adam.state()
        numbers = {"scale": self.scale, "variance": self.variance, "steps": self.adam.steps, "dense": self.dense}
        numbers |= {"shadows": sorted(self.shadows), "silent_after": self.silent_after}
        return tensors, numbers

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take up an earlier `state`."""
        for n, w in self.weights.items():
            w.copy_(tensors[f"weight/{n}"])
        for n, b in self.buffers.items():
            b.copy_(tensors[f"buffer/{n}"])
        self.mean = {s: tensors[f"mean/{s}"].to(m.device) for s, m in self.mean.items()}
        self.scale, self.variance = dict(numbers["scale"]), numbers["variance"]
        self.dense, self.silent_after = list(numbers["dense"]), numbers["silent_after"]
        self.adam.restore(tensors, numbers["steps"])
        self.shadows = {b: Shadow.of(*self.encoder(b)) for b in numbers["shadows"]}

    def shadowed(self, on: bool) -> None:
        """Choose candidates in bfloat16 from now on, or not."""
        self.shadows = {}
        if on and self.recipe.gating.fixed and self.recipe.gating.encodes:
            for b in range(len(self.recipe.blocks)):
                self.shadows[b] = Shadow.of(*self.encoder(b))

    def inputs(self, b: int, acts: Mapping[str, Tensor]) -> Tensor:
        """Return the input of a block's encoder, for activations in the sites' own units."""
        p = self._p(b)
        x = self._x(b, {s: acts[s] * self.scale[s] for s in self.recipe.blocks[b].reads})
        return x if p is None else x - p.detach()

    def encoder(self, b: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the weights, bias and scale by which a block selects."""
        return self._rows(b).detach(), self._bias(b, self.weights).detach(), self._scale(b)

    # --- parts of a step

    def _gradients(self, loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(self.weights.values()), allow_unused=True)
        return {n: g for n, g in zip(self.weights, found, strict=True) if g is not None}

    def _active(self, b: int, xs: Mapping[str, Tensor]) -> Active:
        x, p, own = self._x(b, xs), self._p(b), self._own(b)
        w, bias = self._rows(b), self._bias(b, self.weights)
        if self.dense[b]:
            return self.recipe.gating.active(dense_read(x, w, bias, p), None, len(x), own)
        with torch.no_grad():
            centred = x if p is None else x - p
            chosen = self._chosen(b, centred, Encoder(*self.encoder(b), self.shadows.get(b)))
        if self.recipe.gating.encodes:
            pre = read(x, w, bias, p, chosen.pairs, chosen.value)
        else:
            assert chosen.value is not None
            pre = follow(x, w, p, chosen.pairs, chosen.value, self.recipe.decoder == "unit")
        return self.recipe.gating.active(pre, chosen, len(x), own)

    def _chosen(self, b: int, centred: Tensor, encoder: Encoder) -> Chosen:
        return self.recipe.gating.choose(centred, encoder, self._own(b))

    def _prefixes(self, b: int) -> tuple[int, ...]:
        """Return the number of latents held here in each prefix of the objective."""
        return self.recipe.prefixes

    def _decoded(self, b: int, active: Active) -> list[Tensor]:
        """Return the outputs of a block from each prefix of the objective, the whole last."""
        w, unit = self.weights[f"decoder.{b}"], self.recipe.decoder == "unit"
        widths = self._prefixes(b)
        if not widths:
            return [active.decode(active.value, w, unit)]
        edges = (*widths, len(w))
        if active.pairs is None:
            rows = tangential(w) if unit else w
            starts = (0, *widths)
            shares = [active.value[:, a:z] @ rows[a:z] for a, z in zip(starts, edges, strict=True)]
            return list(torch.stack(shares).cumsum(0))
        parts, order = active.pairs.split(edges)
        shares = write(active.value[order], w, parts, unit).view(active.tokens, len(edges), -1)
        return list(shares.cumsum(1).unbind(1))

    def _part(self, b: int, xs: Mapping[str, Tensor], outs: Mapping[str, Tensor], own: Tensor, active: Active) -> Part:
        writes = self.recipe.blocks[b].writes
        target, out = (_joined([values[s] for s in writes]) for values in (xs, outs))
        rows, bias, decoder = self._rows(b), self._bias(b, self.weights), self.weights[f"decoder.{b}"]
        widths, silent, unit = self._widths(writes), self.buffers[f"silent.{b}"], self.recipe.decoder == "unit"
        x, p = self._x(b, xs), self._p(b)
        return Part(x, p, target, out, own, active, rows, bias, decoder, widths, silent, unit, self.across)

    @torch.no_grad()
    def _after(self, p: Pass) -> None:
        """Follow an update up: norms, shadows, silent latents, thresholds, and the form of the next pass."""
        for b, part in enumerate(p.parts):
            decoder, active = self.weights[f"decoder.{b}"], part.active
            assert isinstance(active, Active)
            if self.recipe.decoder == "unit":
                decoder.div_(decoder.norm(dim=1, keepdim=True).clamp_(min=1e-12))
            self._notice(b, active)
            if b in self.shadows:
                self.shadows[b].refresh(*self.encoder(b))

    def _notice(self, b: int, active: Active) -> None:
        """Learn from a batch about thresholds, silent latents, and the form of the next pass."""
        self.recipe.gating.learned(active, self._scale(b), self._own(b), self.across)
        silent = self.buffers[f"silent.{b}"]
        silent.add_(active.tokens).masked_fill_(active.fires > 0, 0)
        if not self.recipe.gating.fixed:
            self._reform(b, float(active.count()) / (active.tokens * len(silent)))

    def _reform(self, b: int, density: float) -> None:
        self.dense[b] = density > (SPARSE_BELOW if self.dense[b] else DENSE_ABOVE)

    def _scale(self, b: int) -> Tensor | None:
        return self.weights[f"decoder.{b}"].detach().norm(dim=1) if self.recipe.decoder == "norm_aware" else None

    def _rows(self, b: int) -> Tensor:
        """Return the rows that a block reads with: its encoder, or its decoder if the gate has no encoder."""
        return self.weights[f"{'encoder' if self.recipe.gating.encodes else 'decoder'}.{b}"]

    def _encoder_of(self, b: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the finished encoder of a block, by site."""
        reads = self.recipe.blocks[b].reads
        return _cut(weights[f"encoder.{b}"], reads, self._widths(reads)) if self.recipe.gating.encodes else {}

    def _bias(self, b: int, weights: Mapping[str, Tensor]) -> Tensor:
        """b_enc; a gated block has its biases in the gate, and one without encoder has none."""
        name = f"b_enc.{b}"
        return weights[name] if name in weights else self.buffers[name]

    def _own(self, b: int) -> dict[str, Tensor]:
        """Return the buffers and weights of a block's gate, by name."""
        prefix = f"gate.{b}."
        held = self.weights | self.buffers
        return {n.removeprefix(prefix): t for n, t in held.items() if n.startswith(prefix)}

    def _x(self, b: int, xs: Mapping[str, Tensor]) -> Tensor:
        return _joined([xs[s] for s in self.recipe.blocks[b].reads])

    def _p(self, b: int) -> Tensor | None:
        reads = self.recipe.blocks[b].reads
        return _joined([self.weights[f"b_dec.{s}"] for s in reads]) if self.recipe.subtract else None

    def _by_site(self, b: int, y: Tensor) -> list[Tensor]:
        writes = self.recipe.blocks[b].writes
        return [y] if len(writes) == 1 else list(y.split(self._widths(writes), dim=1))

    def _widths(self, sites: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(len(self.mean[s]) for s in sites)

    def _skips(self, b: int) -> list[tuple[str, str]]:
        block: Block = self.recipe.blocks[b]
        return [(r, w) for r in block.reads for w in block.writes] if self.recipe.skip else []

    def _start(self) -> None:
        """Starting weights: random directions, the encoder beside the decoder, biases so that the mean is right."""
        g = generator(self.recipe.seed)
        apart = set(self.recipe.reads) != set(self.recipe.writes)
        gating, unit = self.recipe.gating, self.recipe.decoder == "unit"
        for s in self.recipe.writes:
            self.weights[f"b_dec.{s}"] = self.mean[s].cpu().clone()
        for b, block in enumerate(self.recipe.blocks):
            n, wide = block.n_latents, sum(self._widths(block.writes))
            size = 1.0 if gating.fixed else 0.1
            if apart:  # a map to another site starts from zero, and latents start centred
                w = torch.nn.functional.normalize(torch.randn(n, sum(self._widths(block.reads)), generator=g))
                decoder = torch.zeros(n, wide)
                if unit:
                    decoder = torch.nn.functional.normalize(torch.randn(n, wide, generator=g))
                centre = -(w @ _joined([self.mean[s].cpu() for s in block.reads])) if not self.recipe.subtract else 0
                bias = torch.zeros(n) + centre
            else:
                decoder = torch.nn.functional.normalize(torch.randn(n, wide, generator=g)) * size
                w, bias = decoder.clone(), torch.zeros(n)
            self.weights |= ({f"encoder.{b}": w} if gating.encodes else {}) | {f"decoder.{b}": decoder}
            own = {f"gate.{b}.{name}": t for name, t in gating.parameters(n).items()}
            self.weights |= own
            biased = f"gate.{b}.b_gate" in own
            for name in ("b_gate", "b_mag") if biased else ():
                own[f"gate.{b}.{name}"].add_(bias)
            if biased or not gating.encodes:
                self.buffers[f"b_enc.{b}"] = torch.zeros(n)
            else:
                self.weights[f"b_enc.{b}"] = bias
            self.buffers |= {f"gate.{b}.{name}": t for name, t in gating.buffers().items()}
            self.buffers[f"silent.{b}"] = torch.zeros(n, dtype=torch.int64)
            for source, site in self._skips(b):
                self.weights[f"skip.{source}>{site}"] = torch.zeros(*self._widths((site, source)))


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, -1)


def _cut(w: Tensor, sites: tuple[str, ...], widths: tuple[int, ...]) -> dict[str, Tensor]:
    return {s: t.contiguous() for s, t in zip(sites, w.split(widths, dim=1), strict=True)}
