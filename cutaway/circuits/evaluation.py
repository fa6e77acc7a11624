"""Evaluation of circuits: the metric of every prompt with the edges outside of a circuit cut, and shares of it.

What stands in for the writers comes from `circuits.alternatives`; the runs are masked runs. With noise a circuit's
edges are kept in the clean run, and all others get the alternative value; with denoise a circuit's edges get their
clean values in the corrupt run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cutaway.circuits.alternatives import Alternatives, alternatives
from cutaway.core.out_of_memory import in_halves
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.stats import ratio_interval
from cutaway.interventions.ablation_values import Baseline, derangements
from cutaway.interventions.halves import halves
from cutaway.interventions.paired_runs import Direction
from cutaway.models.access.capture import Activations
from cutaway.models.access.reading import Measure, jointly
from cutaway.models.edits.edge_mask import Written, places_written, written
from cutaway.models.edits.wiring import Wiring, wiring
from cutaway.models.model import Model
from cutaway.models.sweep.masks import Mask, sweep_masks
from cutaway.models.tokens import Tokens
from cutaway.tasks.bound import Bound
from cutaway.tasks.task import Task

Half = Literal["all", "second"]
_PART_BYTES = 1 << 29  # of what the writers of one part of the prompts write


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Prompts on which circuits are evaluated, and what stands in where their edges are cut.

    Attributes:
        model: the model.
        wiring: its writers and readers.
        given: the alternative values.
        shuffled: the prompts with the answers of others; None where the metric has no answers to exchange.
        split: the prompts that are measured, in words.
    """

    model: Model
    wiring: Wiring
    given: Alternatives
    shuffled: Bound | None
    split: str

    @staticmethod
    def of(model: Model, task: Task, how: Baseline, direction: Direction, half: Half, seed: int) -> Evaluation:
        """Bind a task, or its second half, and find its alternative values."""
        _, second, split = halves(task) if half == "second" else (task, task, "all prompts")
        found = wiring(model)
        given = alternatives(model, second.bind(model), places_written(found), how, direction, task.corruption, seed)
        return Evaluation(model, found, given, _shuffled(given.bound, seed), split)

    def __len__(self) -> int:
        return len(self.given.bound)

    @property
    def columns(self) -> int:
        """The number of metrics: the task's own, and that of the answers of others."""
        return 1 if self.shuffled is None else 2

    def mask(self, circuit: Mask) -> Mask:
        """Return the mask that evaluates a circuit: its edges are kept, or with denoise they alone are exchanged."""
        kept = circuit if circuit.is_floating_point() else circuit.float()
        return kept if self.given.direction == "noise" else 1 - kept

    def values(self, circuits: Sequence[Mask]) -> Float[Tensor, "circuit prompt metric"]:
        """Return the metric of every prompt under every circuit, mean over donors."""
        masks, out = [self.mask(c) for c in circuits], list[Tensor]()

        def run(tokens: Tokens, alternative: Written, measure: Measure) -> Float[Tensor, "circuit prompt metric"]:
            return sweep_masks(self.model, self.wiring, tokens, masks, alternative, measure).float().cpu()

        self.parts(lambda *part: out.append(torch.stack([run(part[0], a, part[2]) for a in part[1]]).mean(0)))
        return torch.cat(out, dim=1)

    def parts(self, work: Callable[[Tokens, list[dict[Any, Tensor]], Measure], object]) -> None:
        """Call `work` on the prompts part by part: the tokens that run, the alternatives of each donor, the metrics."""
        given, model = self.given, self.model

        def do(rows: Sequence[int]) -> None:
            stands = given.part(model, rows)
            measures = [b.rows(rows).measure for b in (given.bound, self.shuffled) if b is not None]
            with torch.no_grad():
                made = [self._written(s) for s in stands]
            tokens = given.target if len(rows) == len(self) else given.target.rows(rows)
            work(tokens, made, jointly(measures))

        one = model.dtype.itemsize * given.target.ids.shape[1] * model.shape.d_model * len(self.wiring.writers)
        in_halves(range(len(self)), max(1, _PART_BYTES // one), do)

    def _written(self, stand: Activations) -> dict[Any, Tensor]:
        return written(self.model, {str(a): stand[str(a)] for a in places_written(self.wiring)})

    def whole_and_empty(self) -> list[Bool[Tensor, "writer reader"]]:
        """Return the circuits of all edges, and of none."""
        return [torch.ones_like(self.wiring.heard), torch.zeros_like(self.wiring.heard)]

    def gap(self, whole: Float[Tensor, "prompt"], empty: Float[Tensor, "prompt"]) -> Float[Tensor, "prompt"]:
        """Return what all edges together are worth, for each prompt.

        Raises:
            Refused: nothing, on average.
        """
        gap = whole - empty
        if not bool(gap.mean().isfinite()) or abs(float(gap.mean())) < 1e-6:
            why = "the metric is the same with all edges cut, so a circuit has nothing to carry"
            raise Refused(
                "evaluation of a circuit", why, ("use prompts whose answers differ, or another ", Keyword("how"))
            )
        return gap

    def spec(self, how: Baseline) -> tuple[str, ...]:
        """Return what two evaluations must share to be compared."""
        readout = self.given.bound.readout.name
        return (
            f"alternative {how}",
            f"direction {self.given.direction}",
            f"metric {readout}",
            f"edges {len(self.wiring.pairs)}",
        )

    def record(self) -> dict[str, Any]:
        """Return the entries of a record beyond the options."""
        return self.given.record() | {"measured": self.split, "refresh": "writers are those of the masked run"}


def shares(
    values: Float[Tensor, "circuit prompt"], empty: Float[Tensor, "prompt"], gap: Float[Tensor, "prompt"]
) -> tuple[Float[Tensor, "circuit"], Float[Tensor, "circuit bound"]]:
    """Return (m(C) − m(∅)) / (m(M) − m(∅)) of every circuit, a ratio of means, and its interval over prompts."""
    above = values - empty
    return above.mean(1) / gap.mean(), ratio_interval(above.T, gap[:, None].expand(-1, len(values)))


def same_spec(own: tuple[str, ...], other: tuple[str, ...]) -> None:
    """Check that two evaluations measure the same.

    Raises:
        Refused: they do not.
    """
    differ = [f"{a} and {b}" for a, b in zip(own, other, strict=True) if a != b]
    if differ:
        raise Refused("comparison of two evaluations", f"they differ: {', '.join(differ)}", "evaluate both alike")


def _shuffled(bound: Bound, seed: int) -> Bound | None:
    """Return the prompts with the answers and foils of others, where answers are single tokens."""
    row = bound.readout
    if not row.last_logits or row.needs_reference or bound.clean.tails or len(bound) < 2:
        return None
    order = torch.tensor(derangements([range(len(bound))], 1, seed)[0], device=bound.answers.device)
    sets = {n: None if (t := getattr(bound, n)) is None else t[order] for n in ("answer_sets", "foil_sets")}
    return replace(bound, answers=bound.answers[order], foils=bound.foils[order], **sets)
