"""Which states bring the answer back after the subject is made unrecognisable?

Causal tracing (Meng et al. 2022, arXiv:2202.05262), with the corruption that Zhang & Nanda 2024 (arXiv:2309.16042)
recommend as the default. The prompt runs corrupted, one state takes its clean value again, and the metric is read.

* `corruption="symmetric"`: the task's corrupt prompt, whose tokens are as usual as the clean one's. `"noise"`: the
  clean prompt with normal noise of 3σ added to the subject's embeddings, σ their standard deviation over the task's
  subjects; `draws` seeded noises, of which the mean counts. Where a pair names no subject, the tokens that its
  corruption changes get the noise.
* `effect` [layer position] = metric(restored) − metric(corrupted), mean over noises and prompts; positive means more
  answer. `recovered` is its share of clean − corrupted, `probability` the same for the answer's probability.
* `site="resid_post"`: the state after a block, or any other place with layers and positions (`mlp_in`, `z`, and in
  state-space models `ssm.state`, `ssm.y` …; Sharma et al. 2024, arXiv:2404.03646). `mlp_out`, `attn_out`, `ssm.out`:
  what one sublayer writes, also in a `window` of layers, [l − w // 2, l − w // 2 + w), always beside the result of
  layer l alone (`single`).
* `interval`: 95 %, over prompts. Control (`null`): the same places take, instead of the clean value, a step of the
  same length from the corrupted value in a random direction; sample i stands on noise i. Of more than `null_cells`
  cells, so many drawn at random do. `single` and `probability` have their own; shares (`recovered`, `other`) have those
  of effects, over clean − corrupted.
* `both`: `other` [layer position] is what the other corruption recovers, with interval and null, and the record says
  how far the two agree.
* `by="role"`: the mean over the tokens of each role (`roles.py`: the subject's first, middle and last, the next token,
  further ones, the prompt's last), prompt by prompt, then over the prompts that have it. `auto` takes roles where
  prompts have other lengths or their subjects other positions, so that a position would mix subjects with other words.
  `by="position"` counts positions from the end where prompts differ in length.
* Known failures: noise takes the model off its data, so that it can disagree with symmetric corruption in size and
  place; windows restore more than single layers add up to; denoising overstates what everything passes through; and
  where an effect sits does not say where an edit works (Hase et al. 2023, arXiv:2301.04213).
* Equivalences (tests): symmetric `resid_post` equals `patching.activation(direction="denoise")`; restoring the last
  layer and position recovers 1; a window of 1 is the single layer; by role, every token is traced in its own prompt.
* Cost: one forward a cell, window and noise, from the restored layer and position on, and one a cell, window and
  sample. By role, prompts of one length are traced together, and every token of theirs is a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Address, parse
from cutaway.core.method import method
from cutaway.core.progress import part
from cutaway.core.refuse import Call, Code, Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.sites import WRITERS
from cutaway.core.sites import site as site_row
from cutaway.core.stats import BOUNDS, correlation, generator, mean_interval, one_prompt, rank_correlation
from cutaway.interventions.ablation_values import RandomStep
from cutaway.interventions.components import positions
from cutaway.interventions.grid import window_of
from cutaway.interventions.null_cells import NULL_CELLS, draw_cells, null_cells_record
from cutaway.interventions.spans import Roles, differ, position_names, roles, subject_or_changed
from cutaway.models.access.capture import Activations
from cutaway.models.access.reading import Measure
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Add, Replace
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

Corruption = Literal["symmetric", "noise"]
Along = Literal["auto", "position", "role"]
SIGMAS = 3.0
_TOGETHER = 1 << 11  # tokens of prompts under different noises that one sweep runs side by side


@dataclass(frozen=True, kw_only=True)
class Trace(Result, kind="trace"):
    """Effect of restoring one state, or a window of layers around it, in corrupted prompts.

    By role, the axis `position` has an entry for each role, and `roles` says which one each token has (−1: none).

    Attributes:
        gap: the mean of clean − corrupted; `gap_probability` in the answer's probability, `gap_other` of the other
            corruption.
    """

    effect: Float[Tensor, "layer position"]
    interval: Float[Tensor, "layer position bound"]
    null: Float[Tensor, "layer position sample"]
    single: Float[Tensor, "layer position"]
    single_interval: Float[Tensor, "layer position bound"]
    single_null: Float[Tensor, "layer position sample"]
    probability: Float[Tensor, "layer position"]
    probability_interval: Float[Tensor, "layer position bound"]
    probability_null: Float[Tensor, "layer position sample"]
    recovered: Float[Tensor, "layer position"]
    clean: Float[Tensor, "prompt"]
    corrupt: Float[Tensor, "prompt"]
    clean_probability: Float[Tensor, "prompt"]
    corrupt_probability: Float[Tensor, "prompt"]
    other: Float[Tensor, "layer position"] | None = None
    other_interval: Float[Tensor, "layer position bound"] | None = None
    other_null: Float[Tensor, "layer position sample"] | None = None
    roles: Int[Tensor, "prompt token"] | None = None
    gap: float | None = None
    gap_probability: float | None = None
    gap_other: float | None = None


@dataclass(frozen=True)
class Corrupted:
    """The corrupted run: which prompts, and the noises on their embeddings (one None without noise)."""

    tokens: Tokens
    noises: Sequence[Tensor | None]
    says: str

    def base(self, draws: Sequence[int]) -> list[Edit]:
        """Return the noises of some draws as one edit of as many copies of the prompts."""
        chosen = [x for d in draws if (x := self.noises[d]) is not None]
        return [Add("embed", torch.cat(chosen))] if chosen else []

    def of(self, rows: Sequence[int], tokens: Tokens) -> Corrupted:
        """Return the same run of some prompts, which `tokens` are, without the padding that only others need."""
        keep, index = self.tokens.mask[list(rows)].any(0), list(rows)
        noises = [None if x is None else x[index][:, keep.to(x.device)] for x in self.noises]
        return replace(self, tokens=tokens, noises=noises)

    def together(self) -> list[range]:
        """Return the draws in groups that one sweep runs side by side."""
        size = max(1, _TOGETHER // self.tokens.ids.numel())
        return [range(i, min(i + size, len(self.noises))) for i in range(0, len(self.noises), size)]


@dataclass(frozen=True)
class Chance:
    """Random steps of a null: how many, and at which cells [layer place], a place being a position or a role."""

    samples: int
    seed: int
    cells: Bool[Tensor, "layer place"]

    @classmethod
    def drawn(cls, layers: int, places: int, samples: int, null_cells: int, seed: int) -> Chance:
        """Draw the cells."""
        cells = torch.zeros(layers * places, dtype=torch.bool)
        cells[draw_cells(range(layers * places), null_cells, generator(seed))] = True
        return cls(samples, seed, cells.unflatten(0, (layers, places)))


@dataclass(frozen=True)
class Traced:
    """Values of prompts [… prompt 2], the last axis holding the metric and the answer's probability.

    `restored` and `single` are effects [layer place prompt 2], `null` and `single_null` are [sample layer place
    prompt 2]; NaN where a prompt has no such place.
    """

    clean: Tensor
    corrupt: Tensor
    restored: Tensor
    single: Tensor
    null: Tensor
    single_null: Tensor

    @property
    def gap(self) -> float:
        """Mean of clean − corrupted."""
        return float((self.clean - self.corrupt)[:, 0].mean())

    @property
    def gaps(self) -> Float[Tensor, "layer place"]:
        """Mean of clean − corrupted over the prompts that have each place."""
        each = (self.clean - self.corrupt)[:, 0]
        return torch.where(self.restored[..., 0].isnan(), torch.nan, each).nanmean(-1)


@method(
    answers="Which states bring the answer back after the subject is made unrecognisable?",
    paper="Meng et al. 2022, arXiv:2202.05262; Zhang & Nanda 2024, arXiv:2309.16042",
    cost="prompts * (1 + both) * (6 + (draws + samples) * (3 + 2 * layer * max(position, token))) * F",
    control="random_direction",
    rung="interventional",
)
def causal_trace(
    model: Model,
    task: Task,
    /,
    *,
    site: str = "resid_post",
    corruption: Corruption = "symmetric",
    by: Along = "auto",
    window: int = 1,
    draws: int = 10,
    both: bool = False,
    samples: int = 4,
    null_cells: int = NULL_CELLS,
    seed: int = 0,
) -> Trace:
    """Restore one clean state at a time in corrupted prompts.

    Args:
        site: resid_post, a sublayer's output such as mlp_out, or another place with layers and positions.
        corruption: symmetric runs the task's corrupt prompt, noise adds 3σ of noise to the subject's embeddings.
        by: average over prompts position by position, or by what each token is to the subject; auto chooses roles where
            prompts have other lengths or subjects at other positions.
        window: how many layers are restored together, centred on each (mlp_out, attn_out and ssm.out only).
        draws: how many noises each prompt gets.
        both: trace with the other corruption too, and compare.
        samples: how many random steps of equal length make the null of each cell.
        null_cells: at how many cells, drawn at random, random steps are made; NaN elsewhere (0: at all of them).
        seed: of the noise and the random steps.

    Raises:
        Refused: a place without layers or positions, a window around anything but a sublayer's output, no subject to
            corrupt, or a corruption that does not change the metric.
    """
    row = site_row(site)
    if row.scope != "layer" or not row.has_position or not row.writable or row.axes == "batch position":
        why = f"its axes are {row.axes}" if row.scope == "layer" else "it has no layers"
        raise Refused(f"tracing site {site!r}", why, "use resid_post, mlp_out or attn_out, or ssm.state, ssm.out …")
    if window < 1 or (window > 1 and site not in WRITERS):
        why = "nothing would be restored" if window < 1 else "a later state overwrites an earlier one at its position"
        raise Refused(
            Call("causal_trace", {"window": window}),
            why,
            ("use ", Keyword("window", 1), ", or ", Keyword("site"), f" one of {', '.join(WRITERS)}"),
        )
    if draws < 1:
        raise Refused(Call("causal_trace", {"draws": draws}), "there would be no noise", "ask for at least one")
    bound = task.bind(model)
    runs = [corruption, *(["noise" if corruption == "symmetric" else "symmetric"] if both else [])]
    made = [corrupted(model, bound, c, draws, seed) for c in runs]
    named = roles(bound) if by == "role" or (by == "auto" and differ(bound)) else None
    places = len(named.names) if named is not None else len(positions(bound.clean))
    chance = Chance.drawn(len(model.places(site)), places, samples, null_cells, seed)
    traced = [_traced(model, bound, m, named, site, window, chance) for m in made]
    return _result(model, task, bound, site, made, traced, named, chance)


def corrupted(model: Model, bound: Bound, corruption: str, draws: int, seed: int) -> Corrupted:
    """Return the corrupted run of a task.

    Raises:
        Refused: noise for a pair without a subject whose corruption changes nothing.
    """
    if corruption == "symmetric":
        return Corrupted(bound.corrupt, [None], "symmetric: the task's corrupt prompt")
    where, says = subject_or_changed(bound)
    if not bool(where.any(1).all()):
        raise Refused(
            "noise on the subject", "a pair names none and changes nothing", ("give ", Code("pairs with subject="))
        )
    x, g = model.capture(bound.clean, "embed", logits=False)["embed"], generator(seed)
    sigma = float(x[where.to(x.device)].float().std())
    noises = []
    for _ in range(draws):
        noise = torch.zeros(x.shape)
        noise[where.cpu()] = SIGMAS * sigma * torch.randn(int(where.sum()), x.shape[-1], generator=g)
        noises.append(noise.to(x.device))
    said = f"noise of {SIGMAS:g} × σ = {SIGMAS * sigma:.3g} on the embeddings of {says}; {draws} draws"
    return Corrupted(bound.clean, noises, said)


def _traced(
    model: Model, bound: Bound, run: Corrupted, named: Roles | None, site: str, window: int, chance: Chance
) -> Traced:
    """Trace all prompts at once by position; by role, those of one length together and every token by itself.

    Raises:
        Refused: a corruption that does not change the metric.
    """
    rows = list(bound.clean.by_length().values())
    if named is None:
        done = _trace(model, bound, run, site, window, chance)
    else:
        parts = []
        for i, (chosen, alike) in enumerate(zip(rows, bound.buckets(), strict=True)):
            own = run.of(chosen, alike.clean if run.tokens is bound.clean else alike.corrupt)
            with part(i, len(rows)):
                tokens = replace(chance, cells=named.tokens_of(chance.cells, chosen))
                parts.append(_by_role(_trace(model, alike, own, site, window, tokens), named, chosen))
        order = torch.tensor([i for chosen in rows for i in chosen]).argsort()
        names = ("clean", "corrupt", "restored", "single", "null", "single_null")
        done = Traced(*(torch.cat([getattr(p, n) for p in parts], dim=-2)[..., order, :] for n in names))
    if not math.isfinite(done.gap) or abs(done.gap) < 1e-6:
        why = f"the corruption ({run.says}) leaves clean − corrupted at {done.gap:.2g}: there is nothing to bring back"
        raise Refused("causal tracing", why, "use prompts whose answers differ")
    return done


def _by_role(t: Traced, named: Roles, rows: list[int]) -> Traced:
    def mean(x: Tensor) -> Tensor:
        return named.averaged(x.movedim(-1, 0), rows).movedim(0, -1)

    return replace(t, **{n: mean(getattr(t, n)) for n in ("restored", "single", "null", "single_null")})


def _trace(model: Model, bound: Bound, run: Corrupted, site: str, window: int, chance: Chance) -> Traced:
    measure = bound.measure_with("prob", model)
    clean = model.capture(bound.clean, site, logits=False)
    right = model.measure(bound.clean, measure)
    layers, places = clean.layers(site), positions(bound.clean)
    cells = [(i, p) for i in layers for p in places]
    wide = [[Address(site, j, None, p) for j in window_of(i, window, layers)] for i, p in cells]
    asked = wide + ([[Address(site, i, None, p)] for i, p in cells] if window > 1 else [])
    groups, samples = run.together(), chance.samples
    worse, effects = _restored(model, run, asked, clean, measure, len(groups) + samples)
    seeds = torch.randint(1 << 62, (samples, len(asked), window), generator=generator(chance.seed)).tolist()
    stepped = chance.cells[:, : len(places)].flatten().repeat(len(asked) // len(cells)).nonzero()[:, 0].tolist()
    nulls = worse.new_full((samples, len(asked), *worse.shape[1:]), torch.nan)
    for s, own_seeds in enumerate(seeds):
        draw = s % len(run.noises)
        base = run.base([draw])
        own = model.capture(run.tokens, site, base, logits=False)
        random = [_steps(asked[i], own, clean, own_seeds[i]) for i in stepped]
        with part(len(groups) + s, len(groups) + samples):
            nulls[s, stepped] = sweep(model, run.tokens, random, measure, base=base).to(worse.device) - worse[draw]
    n = len(cells)
    found = (effects[:n], effects[-n:], nulls[:, :n], nulls[:, -n:])
    grids = (x.float().cpu().unflatten(-3, (len(layers), len(places))) for x in found)
    return Traced(right.float().cpu(), worse.mean(0).float().cpu(), *grids)


def _restored(
    model: Model, run: Corrupted, places: Sequence[Sequence[Address]], clean: Activations, measure: Measure, of: int
) -> tuple[Float[Tensor, "draw prompt 2"], Float[Tensor, "variant prompt 2"]]:
    """Return the values of every corrupted run, and the mean effect of restoring clean values; draws run side by
    side, as the first of `of` parts of the work.
    """
    n, worse, effects = len(run.tokens), [], []
    for i, draws in enumerate(run.together()):
        many, base = run.tokens.rows(list(range(n)) * len(draws)), run.base(draws)
        copies = {parse(a): clean[a].repeat(len(draws), *[1] * (clean[a].ndim - 1)) for a in clean}
        values = Activations(copies, many)
        variants: list[list[Edit]] = [[Replace(a, values[str(a)]) for a in restored] for restored in places]
        each = measure.of_copies(n)
        before = model.measure(many, each, base)
        with part(i, of):
            swept = sweep(model, many, variants, each, base=base)
        got = swept.to(before.device) - before
        worse.append(before.reshape(len(draws), n, -1))
        effects.append(got.reshape(len(places), len(draws), n, -1).sum(1))
    return torch.cat(worse), torch.stack(effects).sum(0) / len(run.noises)


def _steps(places: Sequence[Address], own: Activations, clean: Activations, seeds: Sequence[int]) -> list[Edit]:
    return [RandomStep(a, own[str(a)], clean[str(a)], s) for a, s in zip(places, seeds, strict=False)]


def _result(
    model: Model,
    task: Task,
    bound: Bound,
    site: str,
    made: list[Corrupted],
    traced: list[Traced],
    named: Roles | None,
    chance: Chance,
) -> Trace:
    t, share = traced[0], "share of clean − corrupted"
    found: dict[str, Tensor] = {}
    for name, values, null in (
        ("", t.restored[..., 0], t.null[..., 0]),
        ("single", t.single[..., 0], t.single_null[..., 0]),
        ("probability", t.restored[..., 1], t.null[..., 1]),
    ):
        found[name or "effect"] = values.nanmean(-1)
        found[f"{name}_interval".lstrip("_")] = _interval(values)
        found[f"{name}_null".lstrip("_")] = null.nanmean(-1).movedim(0, -1)
    units = dict.fromkeys([*found, "clean", "corrupt"], bound.unit)
    units |= {n: "probability" for n in found if n.startswith("probability")} | {"recovered": share}
    found["recovered"] = found["effect"] / t.gaps
    if traced[1:]:
        o = traced[1]
        gaps = o.gaps[..., None]
        found["other"] = o.restored[..., 0].nanmean(-1) / o.gaps
        found["other_interval"] = (_interval(o.restored[..., 0]) / gaps).sort(-1).values
        found["other_null"] = o.null[..., 0].nanmean(-1).movedim(0, -1) / gaps
        units |= dict.fromkeys(("other", "other_interval", "other_null"), share)
    for name, values in (("clean", t.clean), ("corrupt", t.corrupt)):
        found |= {name: values[:, 0], f"{name}_probability": values[:, 1]}
    labels: dict[str, list[Any]] = {"layer": [a.layer for a in model.places(site)], "bound": BOUNDS}
    labels["position"] = list(named.names) if named is not None else position_names(bound)
    kept: dict[str, Any] = {n: x.clone() for n, x in found.items()}
    index = named.index if named is not None else None
    return Trace(
        **kept,
        roles=index,
        gap=t.gap,
        gap_probability=float((t.clean - t.corrupt)[:, 1].mean()),
        gap_other=traced[1].gap if traced[1:] else None,
        labels=labels,
        units=units,
        reasons=_reasons(bound, named),
        record=_notes(task, made, found)
        | _axis(bound, named)
        | null_cells_record(int(chance.cells.sum()), chance.cells.numel()),
    )


def _interval(values: Float[Tensor, "layer place prompt"]) -> Float[Tensor, "layer place bound"]:
    """Over the prompts that have each place."""
    each = [v[:, ~v.isnan().any(0)] for v in values.unbind(1)]
    if all(v.shape == each[0].shape for v in each):
        return mean_interval(torch.stack(each, 1).movedim(-1, 0))
    return torch.stack([mean_interval(v.T) for v in each], dim=1)


def _axis(bound: Bound, named: Roles | None) -> dict[str, Any]:
    """Return the entries of the record about the axis of positions."""
    if named is None:
        return {"by": "position"}
    counts = dict(zip(named.names, named.has.sum(1).tolist(), strict=True))
    _, of = subject_or_changed(bound)
    return {"by": "role", "roles of": of, "prompts with the role": counts}


def _reasons(bound: Bound, named: Roles | None) -> dict[str, str]:
    """Say why fields have no interval, at no cell or at those of roles that one prompt has."""
    measured = ("effect", "single", "probability")
    few = [n for n, count in zip(named.names, named.has.sum(1).tolist(), strict=True) if count == 1] if named else []
    found = dict.fromkeys(measured, f"one prompt has the role {', '.join(few)}") if few else {}
    shared = {"recovered": "its interval and null are those of effect, divided by clean − corrupted"}
    return found | one_prompt(len(bound), *measured) | shared


def _notes(task: Task, made: list[Corrupted], found: dict[str, Tensor]) -> dict[str, Any]:
    notes: dict[str, Any] = {
        "corruption": made[0].says + (f" ({task.corruption})" if task.corruption else ""),
        "sign": "positive is more answer",
    }
    if "other" in found:
        notes["other corruption"] = made[1].says
        notes["agreement"] = agreement(found["recovered"], found["other"])
    return notes


def agreement(a: Float[Tensor, "*cell"], b: Float[Tensor, "*cell"]) -> dict[str, Any]:
    """Return the agreement of two maps: Pearson's and Spearman's r, and the cells that their top tenths share."""
    x, y = (t.double().reshape(-1) for t in (a, b))
    k = max(1, len(x) // 10)
    tops = [set(v.abs().argsort(descending=True, stable=True)[:k].tolist()) for v in (x, y)]
    found = {"pearson": correlation(x, y), "spearman": float(rank_correlation(x.numpy(), y.numpy()))}
    found["common of the largest tenth"] = len(tops[0] & tops[1]) / k
    return {name: None if math.isnan(value) else value for name, value in found.items()}
