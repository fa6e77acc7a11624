"""What does cutting every edge cost the answer, measured one edge at a time?

Edge activation patching (Wang et al. 2023, arXiv:2211.00593; Mueller et al. 2025, arXiv:2504.13151, "EActP"). The
other methods of this room estimate these numbers.

* `score` of u → v: the metric less the metric in a run in which v alone reads u's alternative value, through its own
  norm; all that follows v is computed again. For denoise the metric in the corrupt run in which v alone reads u's
  clean value, less that of the corrupt run.
* `writers`, `readers`: patterns of the edges' ends, such as z.5 or q_in.9.6,mlp_in,logits; all if left empty.
* `interval`: 95 %, over prompts. `frequency`: the share of resamples of the prompts in which the edge is among the
  `share` of the measured edges with the largest |score|. Control (`null`): steps of the same length in random
  directions, at `null_cells` edges drawn at random.
* Known failures: edges that stand in for each other have small scores alone (`circuits.faithfulness` cuts many at
  once); scores of one direction need not be those of the other.
* Equivalences (tests): a loop of edits, edge by edge; edges into the logits are `patching.path` with everything
  between frozen.
* Cost: 2 forwards, and one forward an edge, from the reader's layer and the first changed position on.
"""

from __future__ import annotations

import torch

from cutaway.circuits.alternatives import alternatives
from cutaway.circuits.edge_effects import chosen_edges, measured
from cutaway.circuits.edge_scores import EdgeScores
from cutaway.circuits.scoring import scores
from cutaway.core.method import method
from cutaway.core.stats import generator
from cutaway.interventions.ablation_values import Baseline
from cutaway.interventions.null_cells import NULL_CELLS, draw_cells, null_cells_record, null_of_steps, random_steps
from cutaway.interventions.paired_runs import Direction
from cutaway.models.edits.edge_mask import places_written
from cutaway.models.edits.wiring import wiring
from cutaway.models.model import Model
from cutaway.tasks.task import Task


@method(
    answers="What does cutting every edge cost the answer, measured one edge at a time?",
    paper="Wang et al. 2023, arXiv:2211.00593; Mueller et al. 2025, arXiv:2504.13151",
    cost="prompts * (4 + cells * (4 if how == 'resample' else 1) + samples * min(null_cells or cells, cells)) * F",
    control="random_direction",
    rung="interventional",
    fills=("frequency", "clean", "corrupt"),
)
def exact(
    model: Model,
    task: Task,
    /,
    *,
    writers: tuple[str, ...] = (),
    readers: tuple[str, ...] = (),
    how: Baseline = "corrupt",
    direction: Direction = "noise",
    share: float = 0.05,
    samples: int = 4,
    null_cells: int = NULL_CELLS,
    seed: int = 0,
) -> EdgeScores:
    """Cut one edge at a time.

    Args:
        writers: only edges from these (embed, z.5, mlp_out); all if empty.
        readers: only edges into these (q_in.9.6, mlp_in, logits); all if empty.
        how: what stands in for a writer's value.
        direction: noise cuts edges of the clean run, denoise gives edges of the corrupt run their clean values.
        share: the share of the edges whose inclusion under resampled prompts is counted.
        samples: how many random steps of equal length make the null of each edge.
        null_cells: at how many edges, drawn at random, random steps are made; NaN elsewhere (0: at all of them).
        seed: of the resamples, the random steps and the donors.

    Raises:
        Refused: a model without such a wiring, no such edges, or alternative values that these prompts do not allow.
    """
    w = wiring(model)
    given = alternatives(model, task.bind(model), places_written(w), how, direction, task.corruption, seed)
    edges = chosen_edges(model, w, writers, readers)
    drawn = draw_cells(range(len(edges)), null_cells, generator(seed))
    steps = [(i, own) for i, _, own in random_steps(drawn, len(edges), samples, seed)]
    found, chance, values = measured(model, w, given, edges, steps)
    null = null_of_steps(chance.mean(-1), drawn, len(edges), samples).T.contiguous()
    record = {"score is": "measured"} | null_cells_record(len(drawn), len(edges))
    return scores(w, given, found.T, null, share, seed, record, values, edges=torch.tensor(edges))
