"""Dictionaries in training: the update of a run of one or several dictionaries on one stream of activations.

Every batch is read once and given to all of them. A recipe without a learning rate starts as three dictionaries whose
rates differ by factors of three; after the probe the one with the lowest loss goes on as it is, and the curves of all
three stay in the log. Starting directions come from the recipe's seed and the order of tokens from the stream; the
steps themselves draw no random numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cutaway.core.refuse import NoTokens, Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.kernels import precision
from cutaway.dictionaries.kernels.precision import Choice
from cutaway.dictionaries.kernels.topk import Encoder, top_k
from cutaway.dictionaries.training.entries import Entry, late
from cutaway.dictionaries.training.feed import acts_of
from cutaway.dictionaries.training.learner import Learner, SiteMoments
from cutaway.dictionaries.training.mesh import LatentShards
from cutaway.dictionaries.training.plan import TRIED, Plan
from cutaway.dictionaries.training.recipe import Recipe
from cutaway.dictionaries.training.sharded import ShardedLearner
from cutaway.training.guard import Guard
from cutaway.training.loop import Loop, Update

MOMENT_TOKENS = 8192  # of which means and norms are taken, where the source does not have them
RECHECK = 1000  # steps between comparisons of bfloat16 selection with float32
KIND = "dictionary training"

Curve = list[dict[str, Any]]


@dataclass(frozen=True)
class Trained:
    """Finished dictionary, the learning rate it was trained with, and the curves of all that were tried."""

    dictionary: Dictionary
    rate: float
    curves: dict[str, Curve]  # by learning rate
    tokens: int
    seconds: float
    choice: Choice


class DictionaryUpdate(Update):
    """The dictionaries of a run, in one process or, with `shards`, spread over several.

    Attributes:
        entries: the dictionaries in training, one per recipe and learning rate.
        ended: the curves of those that were dropped, by recipe and learning rate.
        choice: how products are computed and candidates are found.
        steps: steps of the whole run.
        probing: steps after which the probe ends.
    """

    kind = KIND

    def __init__(
        self, recipes: Sequence[Recipe], plan: Plan, device: torch.device | str, shards: LatentShards | None = None
    ):
        if not recipes:
            raise Refused("a training run", "no recipe was given", "give at least one")
        self.recipes, self.plan, self.device = list(recipes), plan, device
        self.ranks = self.shards = shards
        self.sites = tuple(dict.fromkeys(s for r in recipes for s in (*r.reads, *r.writes)))
        self.entries: list[Entry] = []
        self.ended: dict[int, dict[str, Curve]] = {}
        self.choice = Choice()
        self.steps = self.probing = 0

    # --- beginning

    def begin(self, loop: Loop) -> None:
        """Measure the first batches, which wait to be trained on, and start every dictionary.

        Means and norms are those of the source, if it has counted them over more tokens.
        """
        counted = self._counted(loop.source)
        first, size = self._first(loop, 1 if counted else MOMENT_TOKENS)
        if size > self.plan.tokens:
            what, why = f"a plan of {self.plan.tokens:,} tokens", f"one batch of the source has {size:,}"
            raise Refused(what, why, "plan more tokens, or make smaller batches")
        moments = SiteMoments.known(counted) if counted else SiteMoments.of(first)
        self.steps, self.probing = self.plan.steps(size), self.plan.probing(self.plan.steps(size))
        for i, recipe in enumerate(self.recipes):
            base = recipe.rate if recipe.rate is not None else recipe.customary_rate(self.steps)
            tried = (1.0,) if recipe.rate is not None or not self.probing else TRIED
            self.entries += [Entry(i, base * factor, self._learner(recipe, moments)) for factor in tried]
        self._choose(first)
        loop.note("precision", **self.choice.as_dict())

    def _learner(self, recipe: Recipe, moments: SiteMoments) -> Learner:
        silent_after = self.plan.silent_after()
        if self.shards is None:
            return Learner(recipe, moments, self.device, silent_after)
        return ShardedLearner(recipe, moments, self.shards, silent_after)

    def _counted(self, source: Any) -> dict[str, Any]:
        """Return the moments of all sites, if the source has them."""
        given = getattr(source, "moments", None)
        found: Any = given() if callable(given) else {}
        return {s: found[s] for s in self.sites} if all(s in found for s in self.sites) else {}

    def _first(self, loop: Loop, tokens: int) -> tuple[dict[str, Tensor], int]:
        """Return the activations of the first batches by site, and the tokens of one batch."""
        parts, held = [], 0
        for batch in loop.peek():
            parts.append(acts_of(batch, self.sites, self.device))
            held += _tokens(parts[-1])
            if held >= min(tokens, self.plan.tokens):
                break
        if not held:
            raise NoTokens("training", "the source gave no tokens", "give a source with tokens")
        size = next(n for n in map(_tokens, parts) if n)
        return {s: torch.cat([p[s] for p in parts]) for s in self.sites}, size

    def _choose(self, first: dict[str, Tensor]) -> None:
        """Decide on precision: as the plan says, or by measurement."""
        plan, learner = self.plan, self.entries[0].learner
        if "auto" in (plan.select, plan.products):
            weights, bias, _ = learner.encoder(0)
            k = int(getattr(learner.recipe.gating, "k", 0))
            asked = k if plan.select == "auto" and k and learner.recipe.gating.encodes else None
            self.choice = precision.measure(learner.inputs(0, first), weights, bias, asked)
            if self.shards is not None:  # all must do the same
                self.choice = Choice(**self.shards.broadcast(self.choice.as_dict()))
        if plan.select != "auto":
            self.choice = replace(self.choice, select=plan.select)
        if plan.products != "auto":
            self.choice = replace(self.choice, onednn=plan.products == "onednn")
        for e in self.entries:
            e.learner.shadowed(self.choice.select == "bfloat16")

    # --- steps

    def step(self, batch: Any, loop: Loop) -> int:
        """Train every dictionary on a batch."""
        acts = acts_of(batch, self.sites, self.device)
        done, factor = min(1.0, loop.done), self.plan.factor(loop.step, self.steps)
        for e in self.entries:
            report = e.learner.step(acts, e.rate * factor, done, batch)
            if e.guard.passes(report is not None, loop, rate=e.rate, recipe=e.recipe) and report is not None:
                e.add(report)
        self._give_up()
        if (loop.step + 1) % RECHECK == 0:
            self._recheck(acts, loop)
        return _tokens(acts)

    def after_step(self, loop: Loop) -> None:
        """End the probe when its steps are done."""
        if loop.step == self.probing:
            self._prune(loop)

    def _give_up(self) -> None:
        """Drop dictionaries that are lost; if a recipe has no other, refuse."""
        for e in [e for e in self.entries if e.guard.spent]:
            if sum(o.recipe == e.recipe for o in self.entries) == 1:
                instead = "use a lower rate, or look for infinite activations in the stream"
                e.guard.check(f"training at rate {e.rate:.3g}", instead)
            self._end(e)

    def _prune(self, loop: Loop) -> None:
        """End the probe: of each recipe the dictionary with the lowest loss goes on."""
        if len(self.entries) > len(self.recipes) and any(e.steps for e in self.entries):
            loop.log()
        for i in range(len(self.recipes)):
            tried = [e for e in self.entries if e.recipe == i]
            best = min(tried, key=lambda e: late(e.curve))
            for e in tried:
                if e is not best:
                    self._end(e)
            if len(tried) > 1:
                loop.note("probe", recipe=i, rate=best.rate, losses={f"{e.rate:.3g}": late(e.curve) for e in tried})

    def _end(self, e: Entry) -> None:
        self.ended.setdefault(e.recipe, {})[f"{e.rate:.3g}"] = e.curve
        self.entries.remove(e)

    def _recheck(self, acts: dict[str, Tensor], loop: Loop) -> None:
        """Give up bfloat16 selection where it no longer finds what float32 finds."""
        for e in self.entries:
            for b, shadow in list(e.learner.shadows.items()):
                x = e.learner.inputs(b, acts)[:128]
                w, bias, scale = e.learner.encoder(b)
                k = int(getattr(e.learner.recipe.gating, "k", 1))
                exact, fast = Encoder(w, bias, scale), Encoder(w, bias, scale, shadow)
                same = precision.agreement(top_k(x, exact, k), top_k(x, fast, k))
                if self.shards is not None:
                    same = float(self.shards.least(torch.tensor(same, dtype=torch.float64, device=self.device)))
                if same < precision.SAME:
                    loop.note("bfloat16 selection is given up", step=loop.step + 1, same=same, block=b)
                    del e.learner.shadows[b]

    def report(self, loop: Loop) -> list[dict[str, Any]]:
        """Return a line per dictionary."""
        lines, factor = [], self.plan.factor(loop.step - 1, self.steps)
        for e in self.entries:
            line = {"recipe": e.recipe, "rate": e.rate, "factor": factor} | e.line(loop.tokens - loop.logged_tokens)
            e.curve.append({"tokens": loop.tokens} | {n: line[n] for n in ("loss", "fvu", "l0", "silent")})
            lines.append(line)
        return lines

    # --- state

    def settings(self, loop: Loop) -> dict[str, Any]:
        return {"recipes": [r.as_dict() for r in self.recipes], **super().settings(loop)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, entries = {}, []
        for i, e in enumerate(self.entries):
            own, numbers = e.learner.state()
            tensors |= {f"{i}/{n}": t for n, t in own.items()} | {f"{i}/sum/{n}": t for n, t in e.sums.items()}
            saved = {"recipe": e.recipe, "rate": e.rate, "lost": e.guard.lost, "curve": e.curve, "steps": e.steps}
            entries.append(saved | {"learner": numbers})
        ended = {str(i): curves for i, curves in self.ended.items()}
        numbers = {"steps": self.steps, "probing": self.probing, "entries": entries, "ended": ended}
        return tensors, numbers | {"choice": self.choice.as_dict()}

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], loop: Loop) -> None:
        self.steps, self.probing, self.choice = record["steps"], record["probing"], Choice(**record["choice"])
        self.ended = {int(i): curves for i, curves in record["ended"].items()}
        for i, saved in enumerate(record["entries"]):
            own = {n.removeprefix(f"{i}/"): t for n, t in tensors.items() if n.startswith(f"{i}/")}
            self.entries.append(self._entry(saved, own))

    def _entry(self, saved: dict[str, Any], own: dict[str, Tensor]) -> Entry:
        means = {n.removeprefix("mean/"): t for n, t in own.items() if n.startswith("mean/")}
        moments = SiteMoments(
            means, dict.fromkeys(means, 1.0), dict.fromkeys(means, 1.0)
        )  # `restore` brings the true ones
        learner = self._learner(self.recipes[saved["recipe"]], moments)
        learner.restore(own, saved["learner"])
        sums = {n.removeprefix("sum/"): t.to(self.device) for n, t in own.items() if n.startswith("sum/")}
        guard = Guard(saved["lost"])
        return Entry(saved["recipe"], saved["rate"], learner, guard, saved["curve"], sums, saved["steps"])

    def best(self) -> tuple[float, float]:
        """Return the loss and FVU of the dictionary with the lowest loss, at the last report."""
        best = min((e.curve[-1] for e in self.entries if e.curve), key=lambda c: c["loss"], default=None)
        return (best["loss"], best["fvu"]) if best else (float("nan"), float("nan"))

    def results(self, loop: Loop) -> list[Trained]:
        """Return the dictionaries as they stand, one per recipe."""
        found, seconds = [], loop.seconds
        for i in range(len(self.recipes)):
            e = min((e for e in self.entries if e.recipe == i), key=lambda e: late(e.curve))
            curves = self.ended.get(i, {}) | {f"{e.rate:.3g}": e.curve}
            about = {"rate": e.rate, "tokens": loop.tokens, "plan": self.plan.as_dict()}
            identity = getattr(loop.source, "identity", None)
            about |= {"stream": identity()} if callable(identity) else {}
            found.append(Trained(e.learner.dictionary(**about), e.rate, curves, loop.tokens, seconds, self.choice))
        return found


def _tokens(acts: Mapping[str, Tensor]) -> int:
    return len(next(iter(acts.values())))
