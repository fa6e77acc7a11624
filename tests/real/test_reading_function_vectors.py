"""Function vectors of a real model: tasks of words, shown by examples, then asked about other words without any.

Nothing is tuned. The form is that of Todd et al. 2024; words that are asked about chose no head and made no vector.
"""

from __future__ import annotations

import pytest

import cutaway as ca
from cutaway.heads import FunctionVectors
from tests.real.written import measure

VECTORS = "function vectors"
TASKS = "capital,plural,past,antonym"


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_heads_that_carry_a_task_and_what_their_vector_does_alone(model, results):
    got = ca.heads.function_vectors(
        model,
        ca.tasks.concepts(TASKS),
        prompts=10,
        form="Q: {}\nA:",
        between="\n\n",
        scales=(1, 3),
        samples=4,
    )
    write(results, got)
    claimed, top1 = got.named(), got.labels["measure"].index("top-1")
    assert claimed[:3] == ["20.5", "14.1", "24.4"]
    gain, null = got.gain_interval[:, top1, :, 0], got.gain_null[:, top1].amax(-1).clamp_min(0)
    assert float(gain[0, 17]) > float(null[0, 17]), "the vector does the tasks, and no random one does"
    assert bool((gain[1, 10:21] > null[1, 10:21]).all()), "more so if it is added three times"
    by_task = dict(zip(got.labels["task"], got.gain_by_task[:, 1, top1, 15].tolist(), strict=True))
    assert by_task.pop("capital") == 0.0, "shuffled labels show it as well: nothing to carry"
    assert min(by_task.values()) > 0.5
    assert float(got.change_interval[top1, 1]) < float(got.change_null[top1].min()) - 0.5


def write(results, got: FunctionVectors) -> None:
    """The best heads, the measures without an edit, what the vector does at some depths, and what removals do."""
    chose, held = got.record["prompts that chose heads"], got.record["words held out"]
    steps = got.null[got.null.isfinite()]
    spread = {"value": float(steps.mean()), "range": [float(steps.min()), float(steps.max())]}
    results.row(VECTORS, "random steps at 64 heads", chose, probability=spread)
    for head in got.named()[:5]:
        at = tuple(map(int, head.split(".")))
        effect = measure(got.effect[at], got.interval[at])
        results.row(VECTORS, f"{head}, of {len(got.named())} claimed", chose, probability=effect)
    top1 = got.labels["measure"].index("top-1")
    for t, task in enumerate(got.labels["task"]):
        levels = {name: measure(got.baseline[t, c, top1], got.baseline_interval[t, c, top1])
                  for c, name in enumerate(got.labels["condition"])}  # fmt: skip
        gain = measure(got.gain_by_task[t, 1, top1, 15], got.gain_by_task_interval[t, 1, top1, 15],
                       got.gain_by_task_null[t, 1, top1, 15])  # fmt: skip
        results.row(VECTORS, f"{task}: words held out", held[task], **levels, **{"3 × at 15": gain})
    for layer in (10, 15, 20):
        fields = (got.gain, got.gain_interval, got.gain_null)
        gains = {f"{k} ×": measure(*(x[s, top1, layer] for x in fields)) for s, k in enumerate(got.labels["scale"])}
        results.row(VECTORS, f"vector added behind layer {layer}", sum(held.values()), **gains)
    removed = measure(got.change[top1], got.change_interval[top1], got.change_null[top1])
    results.row(VECTORS, f"the {len(got.record['heads'])} heads removed", sum(held.values()), shown=removed)
