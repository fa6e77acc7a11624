"""Which features, tokens and errors make the model say this, and along which edges?

Attribution graphs (Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs). The prompt's own forward is
made linear: attention patterns and norms' divisors stay what they were, and what MLPs write are sources. A target reads
the stream by a vector v (a latent's encoder row, a neuron's weights, a logit's row of the unembedding). Its edge from a
source that writes w is A = vᵀ J w, where J sums the paths between them: the stream, OV circuits and skips.

* Nodes: latents of (skip) transcoders and cross-layer transcoders, `latent.LAYER.NUMBER@POSITION`, or the neurons,
  `mlp_post.LAYER.NEURON@POSITION` (gated MLPs by the half rule: their value is the activation); what a dictionary
  misses, `error.LAYER@POSITION`; tokens and position embeddings; constants, `bias…`; targets.
* Closure: each row sums to its target's value, biases included; `residual` is what it misses, and one beyond rounding
  (1e-3 of the values' size, 1e-6 in float64; the record has the number) is a refusal.
* `influence`: p · Σ_k Â^k over all paths, Â = |A| with rows summing to 1, constants left out. With more active units
  than `nodes`, rows are swept in order of the influence known so far. What is left out is one source per layer and
  position, `others.LAYER@POSITION`. Of neurons, those beyond 32,768 of least relevance (RelP) are left out at once.
* `replacement` = influence from tokens over that from tokens, errors and units left out. `completeness` = 1 − share of
  errors and units left out in a target's inputs, weighted by influence, over targets alone. `scores("circuit-tracer")`
  counts as version 0.5 does.
* Equals circuit-tracer 0.5 on the same model and transcoders (`bench.graph_parity`): active features, edges, targets
  with their probabilities, influence, scores and pruning. What it leaves out is here: constants, position embeddings
  (sources of their own), and skips at leading positions, which are part of a constant here and a path there.
* Leading positions: at a beginning-of-text token units are no nodes, for what is written there is the same in every
  prompt; each MLP's output there is one constant, `mlp_out.LAYER@0`.
* Control (`influence_null`): the same graph asked for random tokens (or pairs) in place of the target. A node that
  matters for any token is not evidence about this one: the largest influences are often of this kind. `excess` is what
  a node has beyond the largest of its null, so that `top(by="excess", largest=True)` ranks what speaks for this
  target; chance alone gives 1 of samples + 1 nodes an excess. Pictures of the pruned graph show the others pale.
* Assumptions and failures: patterns are given, not explained. Edges are those of the replacement under frozen
  attention, and interventions on the model differ. With a budget the null sees rows that were chosen for the target. No
  interval: it is one prompt, the first of several.
* Cost: one forward, and as many more as it takes to write the target's words. Within `resuming(folder)` (`--resume`)
  rows are kept in shards, and a sweep that was killed goes on from them with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.content import content
from cutaway.core.method import method
from cutaway.core.node import Direction, Logit, Node
from cutaway.core.refuse import Keyword, Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.frozen import Frozen, check_linear
from cutaway.graphs.influence import ROWS, graph_scores, kind_of, masks, sources, spread
from cutaway.graphs.latents import ActiveLatents, as_transcoders
from cutaway.graphs.neurons import ActiveNeurons, neuron_sites
from cutaway.graphs.subject import Neurons
from cutaway.graphs.sweep import Readers, Sweep
from cutaway.graphs.targets import Targets, first_prompt, read_targets
from cutaway.graphs.units import Units
from cutaway.lenses.closure import check_closure
from cutaway.models.model import Model
from cutaway.models.sweep.cache import model_key
from cutaway.models.sweep.parts import Parts
from cutaway.models.tokens import Tokens
from cutaway.models.vocabulary import special_ids
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.task import Task

_ROUNDS = 8  # parts in which a budget is spent, each in the order known then
_COLUMNS = 512  # of all rows, those that are sorted at once
_MOST = 4 / 3  # times its size that a matrix may hold in memory


@method(
    answers="Which features, tokens and errors make the model say this, and along which edges?",
    paper="Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs",
    cost="3 * F",
    control="random_targets",
    rung="observational",
)
def trace(
    model: Model,
    task: Task | Prompts,
    transcoders: Dictionary | Neurons,
    /,
    *,
    targets: tuple[str, ...] = (),
    nodes: int = 7500,
    logits: int = 10,
    mass: float = 0.95,
    leading: int | None = None,
    samples: int = 20,
    seed: int = 0,
) -> AttributionGraph:
    """Trace the attribution graph of one prompt: of a task's first, toward logit(answer) − logit(foil).

    Args:
        targets: of prompts, what is explained: tokens, `"a"-"b"`, or .safetensors files of one direction [default: the
            likeliest next tokens].
        nodes: most units that are nodes of their own, those of the largest influence.
        logits: most tokens where no target is named, at least 1.
        mass: the probability that they hold together.
        leading: leading positions whose units are no nodes [default: 1 behind a beginning-of-text token, else 0].
        samples: how many random targets make the null.
        seed: of the random targets.

    Raises:
        Refused: a family or a dictionary without an exact linear form, a target that is none, a number out of range,
            or rows that miss their targets' values.
    """
    run = prepare(model, task, transcoders, targets, logits, mass, leading, samples, seed)
    return run.graph(nodes)


@dataclass(frozen=True, eq=False)
class Run:
    """A prompt whose graph can be swept.

    Attributes:
        tokens: the prompt.
        frozen: its run, made linear.
        units: its active units.
        targets: what is explained.
        over: the dictionary whose latents the units are, or the neurons.
    """

    tokens: Tokens
    frozen: Frozen
    units: Units
    targets: Targets
    over: Dictionary | Neurons

    def graph(self, nodes: int) -> AttributionGraph:
        """Sweep the rows of at most `nodes` units and return the graph; within `resuming`, rows are kept."""
        sweep = Sweep(self.frozen, self.units, kept=Parts.open("graph", self._key))
        try:
            chosen, rows = sweep_rows(sweep, self.targets, nodes)
        finally:
            sweep.kept.write()
        rows, names = _with_others(self, sweep, chosen, rows)
        return assemble(self, chosen, rows, names)

    def _key(self) -> str:
        """Return the key of all that a row depends on beside its reader."""
        over = self.over.fingerprint() if isinstance(self.over, Dictionary) else ""
        return content(
            (*model_key(self.frozen.model), self.tokens.ids, over, vars(self.units.table), self.units.leading)
        )


@torch.no_grad()
def prepare(
    model: Model,
    task: Task | Prompts,
    transcoders: Dictionary | Neurons,
    targets: tuple[str, ...],
    logits: int,
    mass: float,
    leading: int | None,
    samples: int,
    seed: int,
) -> Run:
    """Run the first prompt and find its active units and its targets."""
    check_linear(model)
    found = as_transcoders(transcoders, model.shape.n_layers) if isinstance(transcoders, Dictionary) else None
    sites = neuron_sites(model) if found is None else ()
    tokens, asked = first_prompt(model, task, targets)
    width = tokens.ids.shape[1]
    if leading is None:
        leading = int(tokens.ids[0, 0].cpu() in special_ids(model.tokenizer)) if width > 1 else 0
    if not 0 <= leading < width:
        raise Refused(Keyword("leading", leading), f"the prompt has {width} tokens", f"give at most {width - 1}")
    frozen = Frozen(model, tokens, sites)
    goals = read_targets(frozen, asked, logits, mass, samples, seed)
    units = ActiveNeurons(frozen, leading, goals.together) if found is None else ActiveLatents(frozen, found, leading)
    return Run(tokens, frozen, units, goals, transcoders)


@torch.no_grad()
def sweep_rows(sweep: Sweep, targets: Targets, nodes: int) -> tuple[Int[Tensor, "unit"], Float[Tensor, "row column"]]:
    """Return the units that are nodes, in order, and the rows of these units, the targets, and the random ones.

    Behind the columns of the sources are those of the targets, all zero, for targets are sources of nothing. Of more
    units than `nodes`, each part of the budget goes to those of the largest influence in the rows so far.
    """
    units, layers, end = sweep.units, sweep.frozen.layers, sweep.columns.starts["end"]
    n, asked, ends = len(units.table), len(targets.vector), len(targets.vector) + len(targets.null)
    most = min(n, nodes)
    rows = targets.vector.new_zeros(most + ends, end + asked)
    swept = rows[:, :end]
    sweep.rows(targets.readers(layers, sweep.frozen.width - 1), swept[most:])
    swept[most : most + asked, sweep.columns.starts["own bias"]] = targets.constant
    every = torch.arange(n, device=rows.device)
    if n <= nodes:
        unit_rows(sweep, every, swept[:n])
        return every, rows
    start = rows.new_zeros(1, len(rows))
    start[0, most : most + asked] = targets.share
    counted = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
    counted[sweep.columns.starts["mlp_out"] :] = False
    chosen, size = every[:0], max(1, -(-nodes // _ROUNDS))
    while (free := nodes - len(chosen)) > 0:  # rows are filled upward, so that those done are one block
        at = torch.cat([chosen, every.new_full((ends,), -1)])
        level = torch.cat([units.table.layer[chosen], every.new_full((ends,), layers)])
        known = spread(rows[free:], at, level, start[:, free:], counted)[0, :n]
        known[chosen] = -1.0
        more = known.topk(min(size, free)).indices
        unit_rows(sweep, more, swept[free - len(more) : free])
        chosen = torch.cat([more, chosen])
    order = chosen.argsort()
    for part in rows[:nodes].split(_COLUMNS, 1):
        part[:] = part[order]
    return chosen[order], rows


def unit_rows(sweep: Sweep, some: Int[Tensor, "unit"], out: Float[Tensor, "unit column"]) -> None:
    """Write the rows of some units into `out`, their own constants included."""
    t = sweep.units.table
    sweep.rows(Readers(t.layer[some], t.position[some], sweep.units.readers(some)), out)
    out[:, sweep.columns.starts["own bias"]] = sweep.units.constants(some)


@torch.no_grad()
def assemble(
    run: Run, chosen: Int[Tensor, "unit"], weight: Float[Tensor, "row node"], names: list[Node]
) -> AttributionGraph:
    """Return the graph of swept rows over its nodes, its residuals checked."""
    goals, table, layers = run.targets, run.units.table, run.frozen.layers
    n, samples = len(goals.nodes), len(goals.null)
    units = torch.arange(len(chosen), device=weight.device)
    node_of = torch.cat([units, torch.arange(len(names) - n, len(names), device=weight.device)])
    value = torch.cat([table.value[chosen], goals.value])
    share = torch.cat([torch.zeros_like(table.value[chosen]), goals.share])
    kinds = {name: mask.to(weight.device) for name, mask in masks([kind_of(x) for x in names]).items()}
    at = torch.cat([node_of, torch.full((samples,), -1, device=weight.device)])
    level = torch.cat([table.layer[chosen], torch.full((n + samples,), layers, device=weight.device)])
    start = torch.zeros(1 + samples, len(weight)).to(weight)
    start[0, : len(share)] = share
    start[range(1, 1 + samples), range(len(share), len(share) + samples)] = goals.share.sum()
    found = spread(weight, at, level, start, sources(kinds))
    influence, null, weight = found[0], found[1:].T, weight[: len(share)]
    total = torch.cat([part.sum(1, dtype=torch.float64) for part in weight.split(ROWS)])
    residual = value - total.to(value)
    sizes = torch.linalg.vector_norm(weight, 1, dim=1)
    check_closure("attribution graph", run.frozen.model, residual, value, sizes)
    activation = torch.zeros(len(names)).to(weight)
    activation[: len(chosen)] = table.activation[chosen]
    texts = [str(x) for x in names]
    return AttributionGraph(
        influence=influence.cpu(),
        influence_null=null.cpu().contiguous(),
        excess=(influence - null.amax(1)).cpu(),
        weight=weight.cpu(),
        node_of=node_of.cpu(),
        activation=activation.cpu(),
        value=value.cpu(),
        residual=residual.cpu(),
        share=share.cpu(),
        **graph_scores(influence, weight, node_of, share, kinds),
        words=run.tokens.pieces[0],
        ids=tuple(run.tokens.ids[0].tolist()),
        target_words=tuple(_words(run, node) for node in goals.nodes),
        layers=layers,
        vocabulary=run.frozen.model.shape.d_vocab,
        leading=run.units.leading,
        labels={"node": texts, "target": [texts[i] for i in node_of.tolist()]},
        units=dict.fromkeys(("influence", "influence_null", "excess"), "share of influence")
        | {"weight": "of its value"},
        reasons={"influence": "one prompt"},
        record=_record(run, residual, value, len(chosen)),
    )


def _with_others(
    run: Run, sweep: Sweep, chosen: Int[Tensor, "unit"], rows: Float[Tensor, "row column"]
) -> tuple[Float[Tensor, "row node"], list[Node]]:
    """Return the rows over the units chosen, every other source that writes anything and the targets, with their nodes.

    Units that are not chosen are added to the others of their layer and position.
    """
    table, at, n = run.units.table, sweep.columns.starts, sweep.columns.units
    left = torch.ones(n, dtype=torch.bool, device=rows.device)
    left[chosen] = False
    if bool(left.any()):
        cell = at["others"] + table.layer[left] * sweep.columns.width + table.position[left]
        for part in rows.split(ROWS):
            part.index_add_(1, cell, part[:, :n][:, left])
    fixed = torch.arange(n, at["end"], device=rows.device)
    fixed = fixed[(rows[:, n : at["end"]] != 0).any(0)]
    ends = torch.arange(at["end"], rows.shape[1], device=rows.device)
    rest = sweep.columns.nodes()
    named = [table.layer[chosen].tolist(), table.index[chosen].tolist(), table.position[chosen].tolist()]
    units: list[Node] = [run.units.node(*one) for one in zip(*named, strict=True)]
    names = [*units, *(rest[i - n] for i in fixed.tolist()), *run.targets.nodes]
    return _narrowed(rows, torch.cat([chosen, fixed, ends])), names


def _narrowed(rows: Float[Tensor, "row column"], kept: Int[Tensor, "node"]) -> Float[Tensor, "row node"]:
    """Return some columns of rows: written over the rows themselves, unless much of their memory would lie idle."""
    if len(kept) * _MOST < rows.shape[1]:
        return rows[:, kept]
    made = rows.view(-1)[: len(rows) * len(kept)].view(len(rows), len(kept))
    for into, part in zip(made.split(ROWS), rows.split(ROWS), strict=True):
        into[:] = part[:, kept]
    return made


def _words(run: Run, node: Logit | Direction) -> str:
    """Return a target in words."""
    if isinstance(node, Direction):
        return node.name
    tokens = [node.token] if node.foil is None else [node.token, node.foil]
    return " − ".join(run.frozen.model.text.token_texts(tokens))


def _record(run: Run, residual: Tensor, value: Tensor, nodes: int) -> dict[str, object]:
    worst, size = float(residual.abs().max()), float(value.double().pow(2).mean().sqrt())
    return {
        "prompt": run.tokens.texts[0] or run.tokens.ids[0].tolist(),
        "targets": {str(node): _words(run, node) for node in run.targets.nodes},
        "closure": {"largest residual": worst, "size of values": size, "rows": len(value)},
        "frozen": "attention patterns and divisors of all norms, at their values in this run",
        "active units": len(run.units.table),
        "units that are nodes": nodes,
        "leading positions without units": run.units.leading,
        "normalisation": "constants (biases, MLPs at leading positions) are no part of influences",
    }
