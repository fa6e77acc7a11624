"""Estimation of Jacobian lenses: exact Jacobians of contexts, row by row, averaged.

One backward gives a row of the Jacobians of all depths and positions of a batch of contexts. Half of the contexts go
into one mean and half into another: their distance says how well the mean is known. The share of the effect on the
position itself comes from further backwards, each from one position of a context along a random direction. A run is a
folder of `cutaway.training` (checkpoint, log), which holds the lens as well in the end.

The control of a lens is one that was estimated on the same tokens in shuffled order (`shuffled`): what it reads as well
needs the model and its words, yet no text.

`jacobian_directions` averages the rows of some tokens' logits alone, which costs one backward a token instead of one a
dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.record import count
from cutaway.core.refuse import Keyword, NoTokens, Refused
from cutaway.core.stats import generator, mean_interval
from cutaway.lenses.directions import TokenDirections
from cutaway.lenses.jacobian import JacobianLens, open_jacobian_lens
from cutaway.lenses.lens import about_model, token_readers
from cutaway.lenses.tuned_training import documents_of, lens_sites
from cutaway.models.access import forward, taps
from cutaway.models.access.backward import fitting
from cutaway.models.access.capture import Collector
from cutaway.models.anatomy.unembedding import readable
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.streams import Documents, Packing
from cutaway.streams.packing import Contexts, Cursor, Packer
from cutaway.training.loop import Loop, Update
from cutaway.training.plan import Plan

SKIP = 16  # first positions of a context that are left out: they are sinks, or know little
PROBES = 4  # of the effect on the position itself, per context


class ContextSource:
    """Contexts of documents, a batch at a time, with a cursor.

    Attributes:
        packer: what packs the documents.
        shuffle: seed by which the tokens of each context are shuffled; None leaves them in order.
        cursor: where the next batch begins.
    """

    def __init__(self, model: Model, documents: Documents, packing: Packing, shuffle: int | None = None):
        self.packer, self.shuffle, self.cursor = Packer(documents, model.tokenizer, packing), shuffle, Cursor()

    def __iter__(self) -> Iterator[Contexts]:
        for c in self.packer.contexts(self.cursor):
            self.cursor = c.after
            yield c if self.shuffle is None else replace(c, ids=_shuffled(c, self.shuffle))

    def identity(self) -> dict[str, Any]:
        """Return the documents and their packing, and the seed of the shuffle if there is one."""
        order = {} if self.shuffle is None else {"shuffled tokens": self.shuffle}
        return {"documents": self.packer.documents.identity(), "packing": vars(self.packer.packing).copy(), **order}

    def state(self) -> dict[str, Any]:
        """Return the cursor, and what it is of."""
        return {"cursor": self.cursor.as_dict(), **self.identity()}

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken.

        Raises:
            Refused: other documents, or another packing.
        """
        if {n: state.get(n) for n in self.identity()} != self.identity():
            raise Refused("a cursor", "it is of other documents or contexts", "give those of then, or begin anew")
        self.cursor = Cursor(**state["cursor"])
        return self


def _shuffled(contexts: Contexts, seed: int) -> Int[Tensor, "row position"]:
    """Return the tokens of contexts in random order, the first of each where it was."""
    ids = contexts.ids.clone()
    for row, real, number in zip(ids, contexts.real, range(contexts.cursor.context, 1 << 62), strict=False):
        at = real.nonzero()[1:, 0]
        row[at] = row[at[torch.randperm(len(at), generator=generator(seed * 1_000_003 + number))]]
    return ids


class JacobianUpdate(Update):
    """Mean Jacobians in the making.

    Attributes:
        model: the model whose Jacobians they are.
        readers: the combinations of the last stream whose gradients are averaged [row d_model].
        skip: first positions of each context that are left out.
        seed: seed of the probes.
        sums: sums of the gradients over the even and the odd contexts [half depth row d_model].
        counts: how many contexts were summed [half].
        probes: per probe, the combination of rows, and its gradient from and at one position [probe row + d_model].
    """

    kind = "Jacobian lens estimation"

    def __init__(self, model: Model, readers: Float[Tensor, "row d_model"], skip: int = SKIP, seed: int = 0):
        self.model, self.readers, self.skip, self.seed = model, readers.to(model.device), skip, seed
        self.places = model.places(lens_sites(model))
        depth, dtype = len(self.places) - 1, torch.promote_types(model.dtype, torch.float32)
        self.sums = torch.zeros(2, depth, *readers.shape, dtype=dtype, device=model.device)
        self.counts = torch.zeros(2, dtype=torch.long)
        self.mixes, self.probes = list[Tensor](), list[Tensor]()

    def step(self, batch: Contexts, loop: Loop) -> int:
        """Add the Jacobians of some contexts."""
        return self.add(batch)

    def add(self, batch: Contexts) -> int:
        """Add the Jacobians of some contexts, and return how many tokens they have."""
        real = int(batch.real.sum())
        valid = positions(batch.real, self.skip)
        used = valid.any(1)
        if not bool(used.any()):
            return real
        n, ids, valid = int(used.sum()), batch.ids[used], valid[used].to(self.model.device)
        blank = (("",) * n, ((),) * n, ((),) * n)
        tokens = self.model.tokens(Tokens(ids, batch.real[used], *blank))
        half = (torch.arange(n) + int(self.counts.sum())) % 2
        with fitting(tokens):
            last, early = self._streams(tokens)
            for i, row in enumerate(self.readers):
                each = self._gradients(last, early, valid, row.expand(n, -1), whole=True)
                for h in (0, 1):
                    self.sums[h, :, i] += each[:, half == h].sum(1)
            self._probe(last, early, valid, int(self.counts.sum()))
        self.counts += torch.bincount(half, minlength=2)
        return real

    def _streams(self, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """Return the last stream and those before it, with the graph between them."""
        anatomy = self.model.anatomy
        collector = Collector(anatomy, self.places, live=True, stops=True)
        sees = {p: collector.see(p) for p in collector.places}
        with (
            self.model.edited(),
            torch.enable_grad(),
            forward.rooted(anatomy),
            taps.attached(anatomy, sees, gradient=True),
        ):
            forward.streams(anatomy, tokens, collector.share)
        *early, last = (collector.found[p] for p in self.places)
        return last, early

    def _gradients(
        self, last: Tensor, early: list[Tensor], at: Bool[Tensor, "batch position"], row: Tensor, whole: bool
    ) -> Float[Tensor, "depth batch d_model"]:
        """Return the gradients of `row` of the last stream, summed over positions: their mean there if `whole`, else
        their sum."""
        start = at[..., None].to(last.dtype) * row[:, None].to(last.dtype)
        found = torch.autograd.grad(last, early, start, retain_graph=True)
        count(backwards=len(last))
        share = at.to(self.sums.dtype) / at.sum(1, keepdim=True) if whole else at.to(self.sums.dtype)
        return torch.stack([(g.to(self.sums.dtype) * share[..., None]).sum(1) for g in found])

    def _probe(self, last: Tensor, early: list[Tensor], valid: Tensor, number: int) -> None:
        """Note the gradients of random combinations of rows, from one position of each context to itself."""
        g = [generator(self.seed * 1_000_003 + number + i) for i in range(len(valid))]
        for _ in range(PROBES):
            at = [_drawn(v, r) for v, r in zip(valid.cpu(), g, strict=True)]
            mix = torch.stack([torch.randint(2, (len(self.readers),), generator=r) * 2.0 - 1 for r in g])
            one = torch.zeros_like(valid)
            one[range(len(at)), at] = True
            rows = mix.to(self.readers.device, self.readers.dtype) @ self.readers
            found = self._gradients(last, early, one, rows, whole=False)
            self.mixes.append(mix)
            self.probes.append(found.movedim(0, 1).cpu())

    def mean(self) -> Float[Tensor, "depth row d_model"]:
        """Return the mean so far."""
        return self.sums.sum(0) / int(self.counts.sum())

    def error(self) -> Float[Tensor, "depth"]:
        """Return the standard error of the mean at each depth, as a share of its norm; NaN of one context."""
        one, other = (s / n for s, n in zip(self.sums, self.counts.tolist(), strict=True))
        return ((one - other).flatten(1).norm(dim=1) / (2 * self.mean().flatten(1).norm(dim=1))).cpu()

    def same_position(self) -> Float[Tensor, "context depth"]:
        """Return the share of the effect on the position itself in the mean Jacobian, estimated from each context.

        It is ⟨A, J⟩ / ⟨J, J⟩ of the Jacobians A of positions to themselves and the mean J.
        """
        mean = self.mean().cpu()
        norm = mean.flatten(1).square().sum(1)
        each = [
            torch.einsum("br, drk, bdk -> bd", mix.to(mean.dtype), mean, probe) / norm
            for mix, probe in zip(self.mixes, self.probes, strict=True)
        ]
        steps = [torch.stack(each[i : i + PROBES]).mean(0) for i in range(0, len(each), PROBES)]
        return torch.cat(steps)

    def report(self, loop: Loop) -> list[dict[str, Any]]:
        """Return the standard error at each depth, and its largest."""
        each = self.error()
        return [{"contexts": int(self.counts.sum()), "error": float(each.max()), "errors": each.tolist()}]

    def settings(self, loop: Loop) -> dict[str, Any]:
        own = {"skip": self.skip, "seed": self.seed, "rows": list(self.readers.shape)}
        return {**super().settings(loop), **own, "lens": {"model": about_model(self.model)}}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        numbered = {f"mix/{i}": t for i, t in enumerate(self.mixes)} | {
            f"probe/{i}": t for i, t in enumerate(self.probes)
        }
        return {"sums": self.sums, "counts": self.counts, **numbered}, {}

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], loop: Loop) -> None:
        self.sums, self.counts = tensors["sums"].to(self.sums.device), tensors["counts"]
        n = sum(name.startswith("mix/") for name in tensors)
        self.mixes, self.probes = ([tensors[f"{name}/{i}"] for i in range(n)] for name in ("mix", "probe"))

    def about(self, source: ContextSource) -> dict[str, Any]:
        """Return what a lens remembers of its estimation."""
        fit = {"contexts": int(self.counts.sum()), "skipped": self.skip, "source": source.identity()}
        return {"model": about_model(self.model), "estimation": fit}


def _drawn(valid: Bool[Tensor, "position"], g: torch.Generator) -> int:
    """Draw one of the positions that count."""
    where = valid.nonzero()[:, 0]
    return int(where[torch.randint(len(where), (), generator=g)])


def positions(real: Bool[Tensor, "row position"], skip: int) -> Bool[Tensor, "row position"]:
    """Return the positions of contexts that count: all but the first `skip` and the last real one."""
    at, after = torch.arange(real.shape[1]), torch.zeros_like(real)
    after[:, :-1] = real[:, 1:]
    return real & after & (at >= skip)


def estimate_jacobian_lens(
    model: Model,
    text: Documents | Sequence[str] | None = None,
    *,
    tokens: int = 12_800,
    context: int = 128,
    batch: int = 512,
    skip: int = SKIP,
    seed: int = 0,
    shuffled: bool = False,
    out: str | Path | None = None,
    resume: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> JacobianLens:
    """Estimate a Jacobian lens on text: d_model backwards per batch of contexts.

    Args:
        model: the model; its weights stay as they are.
        text: documents, or a list of texts; None means the text of the model's own world.
        tokens: number of tokens to average over; fewer where the text ends.
        context: tokens per context, over which effects on later positions are summed.
        batch: tokens that go through the model at once; several contexts if it is larger than one.
        skip: first positions of each context that are left out; the last always is.
        seed: seed of the probes that tell the share of the position itself, and of the shuffle.
        shuffled: estimate a control: the tokens of each context in random order, the first where it was.
        out: folder for checkpoints, the log and the lens; None keeps nothing.
        resume: go on from the checkpoint in `out`, if there is one.
        on_log: called with every line of the log: `error` is the largest standard error of a depth.

    Raises:
        Refused: no text, a context without positions, a model whose stream shares no basis with its unembedding, or a
            checkpoint of another run.
        KeyboardInterrupt: as it came; with `out`, the last whole batch is in the checkpoint, and the same call goes on.
    """
    source = _source(model, text, context, batch, skip, "estimating a Jacobian lens", seed if shuffled else None)
    update = JacobianUpdate(model, torch.eye(model.shape.d_model), skip, seed)
    loop = Loop(update, source, Plan(tokens=tokens, log_every=1), out, on_log=on_log)
    loop.start(resume)
    loop.run()
    _check_some(update)
    each = update.same_position()
    lens = JacobianLens(
        update.mean().cpu(), update.error(), each.mean(0), mean_interval(each).to(each.dtype), update.about(source)
    )
    return lens if out is None else open_jacobian_lens(lens.save(out))


def jacobian_directions(
    model: Model,
    text: Documents | Sequence[str] | None,
    tokens: Sequence[str],
    *,
    contexts: int = 100,
    context: int = 128,
    batch: int = 512,
    skip: int = SKIP,
) -> TokenDirections:
    """Return the directions that a Jacobian lens reads as some tokens, without the rest of the lens.

    They are exact on the same contexts: one backward per token and batch instead of one per dimension.

    Args:
        model: the model.
        text: documents, or a list of texts; None means the text of the model's own world.
        tokens: the tokens, each as a text.
        contexts: how many contexts are averaged; fewer where the text ends.
        context: tokens per context.
        batch: tokens that go through the model at once.
        skip: first positions of each context that are left out.

    Raises:
        Refused: no text, or a text of several tokens.
    """
    source = _source(model, text, context, batch, skip, "directions of a Jacobian lens")
    readers = token_readers(model, torch.tensor([model.text.token_id(t) for t in tokens]))
    update = JacobianUpdate(model, readers, skip)
    for some in source:
        kept = max(0, contexts - int(update.counts.sum()))
        update.add(Contexts(some.ids[:kept], some.real[:kept], some.document[:kept], some.cursor, some.after))
        if int(update.counts.sum()) >= contexts:
            break
    _check_some(update)
    about = {**update.about(source), "error": update.error().tolist()}
    return TokenDirections(torch.cat([update.mean(), update.readers[None]]), tuple(tokens), about)


def _source(
    model: Model,
    text: Documents | Sequence[str] | None,
    context: int,
    batch: int,
    skip: int,
    what: str,
    shuffle: int | None = None,
) -> ContextSource:
    if model.family.post_norm or model.anatomy.unembed is None:
        why = "it has no unembedding that reads its residual stream directly"
        raise Refused(f"lens on {model.name}", why, "use a causal language model")
    readable(model.anatomy, f"lens on {model.name}")
    if context > model.shape.context:
        why = f"the model takes {model.shape.context} tokens"
        raise Refused(f"contexts of {context} tokens", why, "use a shorter context")
    if not 0 <= skip <= context - 2:
        why = f"contexts of {context} tokens have no position left, besides the last"
        raise Refused(Keyword("skip", skip), why, "skip fewer, or use longer contexts")
    packing = Packing(context, rows=max(1, batch // context))
    return ContextSource(model, documents_of(model, text, what), packing, shuffle)


def _check_some(update: JacobianUpdate) -> None:
    if not int(update.counts.sum()):
        why = f"no context has a position behind the first {update.skip} and before its last"
        raise NoTokens("estimating a Jacobian lens", why, "give longer text, or skip fewer")
