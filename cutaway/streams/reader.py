"""Contexts through the model, no further than the deepest site asked for, as activations of real tokens.

Of several models, each under a name, all read the same contexts; a site is then `NAME:ADDRESS`, and an address without
a name means that of every model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from cutaway.core.address import Address, split_model
from cutaway.core.record import hash_text
from cutaway.core.refuse import Refused
from cutaway.models.access.fast_kernels import OWN, FastKernels, KernelChoice
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.streams.batch import Batch
from cutaway.streams.masks import CALIBRATION, Masking, MaskRule, norm, rule
from cutaway.streams.packing import Contexts, Cursor, Packer, Packing
from cutaway.streams.sources import Documents

Models = Model | Mapping[str, Model]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Group:
    """The tokens of some contexts that went through the model at once, masked ones left out if so asked."""

    batch: Batch
    cursor: Cursor
    after: Cursor


class Reader:
    """Reads the activations of documents, from any cursor on, always in the same groups of contexts."""

    def __init__(
        self,
        model: Models,
        documents: Documents,
        sites: str | Address | Sequence[str | Address],
        packing: Packing,
        masking: Masking,
        dtype: torch.dtype | str | None,
        fast_kernels: bool = True,
    ):
        self.models = named(model)
        for m in self.models.values():
            if packing.context > m.shape.context:
                why = f"the model takes {m.shape.context} tokens"
                raise Refused(f"contexts of {packing.context} tokens", why, "use a shorter context")
        self._sites = _addresses(self.models, sites)
        self.sites = [_full(n, a) for n, addresses in self._sites.items() for a in addresses]
        first, *others = self.models.values()
        self.packer = Packer(documents, first.tokenizer, packing, [m.tokenizer for m in others])
        self.rule: MaskRule = rule(masking, first.tokenizer)
        self.dtype = storage(dtype if dtype is not None else first.dtype)
        self.fast_kernels, self.kernels = fast_kernels, {n: FastKernels(m.anatomy) for n, m in self.models.items()}
        self.choices: dict[str, KernelChoice] | None = None if fast_kernels else self._own()  # None until a context

    @property
    def model(self) -> Model | None:
        """The model, if there is one alone."""
        return self.models.get("")

    @cached_property
    def widths(self) -> dict[str, int]:
        """Width of the flattened activations by address, found by a token through the model."""
        one = torch.zeros(1, 1, dtype=torch.long)
        return {a: x.shape[-1] for a, x in self._through(Contexts(one, one >= 0, one, Cursor(), Cursor())).acts.items()}

    def identity(self) -> dict[str, Any]:
        """Return the model, documents, packing, masking, sites and dtype."""
        p, m = self.packer.packing, self.rule.masking
        return {
            "model": self._model,
            "documents": self._documents,
            "sites": self.sites,
            "packing": vars(p).copy(),
            "masking": {**vars(m), "special ids": self.rule.special.tolist()},
            "dtype": str(self.dtype).removeprefix("torch."),
            "quick": self.fast_kernels,
        }

    @cached_property
    def key(self) -> str:
        """Hash of the identity."""
        return hash_text(repr(sorted(self.identity().items())))

    def noted_kernels(self) -> dict[str, Any] | None:
        """Return the kernels of the forwards, JSON-ready (None if not decided yet)."""
        if self.choices is None:
            return None
        noted = {n: vars(w).copy() for n, w in self.choices.items()}
        return noted[""] if self.model is not None else noted

    def restore_kernels(self, noted: Mapping[str, Any] | None) -> None:
        """Compute forwards with the noted kernels."""
        if noted is None:
            self.choices = None if self.fast_kernels else self._own()
        else:
            each = {"": noted} if self.model is not None else noted
            self.choices = {n: KernelChoice(**w) for n, w in each.items()}

    def texts(self, numbers: Collection[int]) -> dict[int, Int[Tensor, "position"]]:
        """Read the ids of some contexts by number, masked tokens included, without running a model."""
        found: dict[int, Tensor] = {}
        for c in self.packer.contexts(Cursor()):
            for n, (ids, real) in enumerate(zip(c.ids, c.real, strict=True), c.cursor.context):
                if n in numbers:
                    found[n] = ids[real]
            if len(found) == len(numbers):
                break
        return found

    def _own(self) -> dict[str, KernelChoice]:
        return dict.fromkeys(self.models, OWN)

    def groups(
        self, cursor: Cursor, epochs: int | None = 1, select: Callable[[Iterator[Contexts]], Iterator[Contexts]] = iter
    ) -> Iterator[Group]:
        """Yield the groups from a cursor on; from the beginning, the first ones set the masking's thresholds.

        `select` takes all groups of contexts and yields those that go through the model.
        """
        contexts, held = self._decided(self.packer.contexts(cursor, epochs)), dict[Cursor, Batch]()
        if self.rule.masking.sinks is not None and not self.rule.thresholds:
            if cursor != Cursor():
                raise Refused("a cursor", "the masking's thresholds are not known there", "restore a stream's state")
            first = list(islice(contexts, -(-CALIBRATION // self.packer.packing.rows)))
            held = {c.cursor: self._through(c) for c in first}
            self.rule.learn((b.ids, b.acts) for b in held.values())
            contexts = chain(first, contexts)
        for c in select(contexts):
            yield self._group(c, held.pop(c.cursor) if c.cursor in held else self._through(c))

    def _decided(self, contexts: Iterator[Contexts]) -> Iterator[Contexts]:
        """Yield the same contexts, after choosing the kernels on the first row of a fresh stream."""
        for c in contexts:
            if self.choices is None:
                one = Contexts(c.ids[:1], c.real[:1], c.document[:1], c.cursor, c.after)
                kernels = self.kernels.items()
                self.choices = {n: k.choose(lambda one=one, n=n: [*self._acts(n, one).values()]) for n, k in kernels}
            yield c

    def _group(self, c: Contexts, batch: Batch) -> Group:
        self.rule.counts["contexts"] += len(c.ids)
        self.rule.counts["padding"] += int((~c.real).sum())
        mask = self.rule.mask(batch.ids, batch.acts)
        if self.rule.masking.drop:
            kept = batch if bool(mask.all()) else batch.rows(mask)
            mask = torch.ones(len(kept), dtype=torch.bool, device=mask.device)
        else:
            kept = batch
        acts = {a: self._stored(a, x) for a, x in kept.acts.items()}
        return Group(replace(kept, acts=acts, mask=mask), c.cursor, c.after)

    def _through(self, c: Contexts) -> Batch:
        n, acts = len(c.ids), dict[str, Tensor]()
        for name in self.models:
            with nullcontext() if self.choices is None else self.kernels[name].running(self.choices[name]):
                acts |= self._acts(name, c)
        device = next(iter(acts.values())).device
        at = torch.arange(c.ids.shape[1]).expand_as(c.ids)
        number = torch.arange(c.cursor.context, c.cursor.context + n)[:, None].expand_as(c.ids)
        words = [t[c.real].to(device) for t in (c.ids, c.document, number, at, torch.ones_like(c.real))]
        return Batch({a: x.to(device) for a, x in acts.items()}, *words)

    def _acts(self, name: str, c: Contexts) -> dict[str, Tensor]:
        """Run one model on contexts and return the activations at its sites."""
        model, sites, n = self.models[name], self._sites[name], len(c.ids)
        tokens = model.tokens(Tokens(c.ids, c.real, ("",) * n, ((),) * n, ((),) * n))
        found = model.capture(tokens, sites, logits=False)
        return {_full(name, a): _flat(found[a], tokens.mask, not tokens.padded) for a in sites}

    def _stored(self, a: str, x: Tensor) -> Tensor:
        y = x.to(self.dtype)
        if y.dtype != x.dtype and y.dtype == torch.float16 and not bool(norm(y).isfinite().all()):
            most = float(x.abs().max())
            raise Refused(f"{a} as float16", f"its values reach {most:.3g}, float16 ends at 65504", "use bfloat16")
        return y

    @cached_property
    def _model(self) -> dict[str, Any]:
        if self.model is not None:
            return self.model.identity()
        each = {n: m.identity() for n, m in self.models.items()}
        return {
            "name": ", ".join(f"{n}={m.name}" for n, m in self.models.items()),
            "models": each,
            "dtype": next(iter(each.values()))["dtype"],
        }

    @cached_property
    def _documents(self) -> dict[str, Any]:
        return self.packer.documents.identity()


def storage(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype meant, if activations can be kept in it.

    Raises:
        Refused: another dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise Refused(f"dtype {name}", "activations are not kept in it", f"use {', '.join(DTYPES)}")
    return DTYPES[name]


def named(model: Models) -> dict[str, Model]:
    """Return the models by name; one alone has the empty name.

    Raises:
        Refused: no model, or a name that could not stand before an address.
    """
    if not isinstance(model, Mapping):
        return {"": model}
    wrong = [n for n in model if not n or any(c in n for c in ":*/ @→,>")]
    if wrong or not model:
        what = f"a model named {wrong[0]!r}" if wrong else "no model"
        raise Refused(what, "names stand before addresses, as base:resid_post.3", "use words such as base and tuned")
    return dict(model)


def _full(name: str, address: str) -> str:
    return f"{name}:{address}" if name else address


def _addresses(models: Mapping[str, Model], sites: str | Address | Sequence[str | Address]) -> dict[str, list[str]]:
    """Return the addresses to read in each model; one that reads nothing is refused."""
    asked: dict[str, list[str | Address]] = {n: [] for n in models}
    for site in [sites] if isinstance(sites, str | Address) else sites:
        names, rest = models_of(site, models)
        for n in names:
            asked[n].append(rest)
    return {n: _of_one(m, asked[n]) for n, m in models.items()}


def models_of(site: str | Address, models: Collection[str]) -> tuple[list[str], str | Address]:
    """Return the models that a site or pattern is of (all of `models` if it names none), and the rest of it.

    Raises:
        Refused: it names a model that is not there.
    """
    name, rest = (site.model, replace(site, model="")) if isinstance(site, Address) else split_model(site)
    if name and name not in models:
        there = f"there are {', '.join(models)}" if "" not in models else "give one model a name, or leave it out"
        raise Refused(f"site {site}", f"no model is named {name}", there)
    return [name] if name else list(models), rest


def _of_one(model: Model, sites: Sequence[str | Address]) -> list[str]:
    found = model.places(sites)
    if not found:
        raise Refused("an empty list of sites", "there is nothing to read", "name one, such as resid_post.0")
    for a in found:
        if a.position is not None:
            raise Refused(f"site {a}", "a stream reads every position", "leave out the @")
        if a.row.axes.split()[:2] != ["batch", "position"]:
            raise Refused(f"site {a}", f"it has no vector a token: its axes are {a.row.axes}", "see cutaway sites")
    return [str(a) for a in dict.fromkeys(found)]


def _flat(x: Tensor, real: Tensor, whole: bool) -> Tensor:
    """[batch, position, …] as [token, width], real tokens only."""
    flat = x.reshape(*x.shape[:2], -1)
    return flat.flatten(0, 1) if whole else flat[real.to(x.device)]
