"""Neurons, heads and the stream of SmolLM2 in the vocabulary: what they promote, fire at, chain and add up to.

Nothing is tuned, and what does not come out is written down as it is.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import cutaway as ca
from cutaway.core.stats import mean_interval
from tests.real import sets
from tests.real.test_reading_memories import passages
from tests.real.written import Measure, measure, share

VALUES, TRIGGERS, STATISTICS = (
    "tokens of neurons, from weights",
    "triggers of neurons",
    "what neurons write, from weights",
)
CHAINS, ALONG, SOURCES = "chains of tokens, from weights", "the answer along depth", "where heads bring the answer from"
LAYERS, TOP, N = (0, 10, 20, 29), 8, 16
only_smollm2 = pytest.mark.parametrize("name", ["smollm2"], indirect=True)


def capitals(model: ca.Model) -> ca.tasks.Prompts:
    """The clean prompts about capitals."""
    return ca.tasks.as_prompts([p.clean for p in sets.task(model, "fact_capital", N).pairs])


def over_neurons(values: Tensor, null: Tensor, within: tuple[float, float] = (-math.inf, math.inf)) -> Measure:
    """A mean over neurons [neuron], with its interval over them, and the means of each draw [neuron, sample]."""
    return measure(values.mean(), mean_interval(values, within=within), null.mean(0))


@only_smollm2
def test_tokens_that_neurons_promote_and_read(model, results):
    """Neurons with the largest updates on capitals, their values and keys held against the vocabulary."""
    found = ca.neurons.values(model, capitals(model), layers=LAYERS, top=TOP, samples=8)
    for at, layer in enumerate(LAYERS):
        rows = slice(at * TOP, (at + 1) * TOP)
        sides = enumerate(found.labels["side"])
        parts = {side: over_neurons(found.score[i, rows], found.null[i, rows]) for i, side in sides}
        results.row(VALUES, f"layer {layer:02}", TOP, **parts)
    reads = found.labels["side"].index("gate reads")
    assert float(found.score[reads, :TOP].mean()) > float(found.null[reads, :TOP].mean(0).max()), (
        "first keys read tokens"
    )


@only_smollm2
def test_contexts_in_which_neurons_fire(model, results):
    found = ca.neurons.triggers(model, passages(model, 48), layers=LAYERS, top=TOP)
    for at, layer in enumerate(LAYERS):
        rows = slice(at * TOP, (at + 1) * TOP)
        again = over_neurons(found.share[rows], found.null[rows], (0, 1))
        said = over_neurons(found.agreement[rows], found.agreement_null[rows], (0, 1))
        results.row(TRIGGERS, f"layer {layer:02}", TOP, **{"same token again": again, "promotes what follows": said})
    assert bool((found.activation[:, :, :-1] >= found.activation[:, :, 1:]).all())


@only_smollm2
def test_where_the_values_of_neurons_lie(model, results):
    found = ca.neurons.statistics(model, capitals(model), layers=LAYERS, samples=4)
    for at, layer in enumerate(LAYERS):
        parts = dict[str, Measure]()
        for i, name in enumerate(found.labels["statistic"]):
            scale = 1000 if name == "logit variance" else 1
            parts[name] = over_neurons(scale * found.score[i, at], scale * found.null[i, at])
        results.row(STATISTICS, f"layer {layer:02}", found.score.shape[-1], **parts)
    kurtosis = found.labels["statistic"].index("kurtosis")
    assert bool((found.score[kurtosis].mean(-1) > found.null[kurtosis].mean(1).amax(-1)).all()), "a privileged basis"


@only_smollm2
def test_chains_of_bare_tokens(model, results):
    """A negative finding: no head raises the token to which it attends, where both circuits read bare embeddings."""
    heads = {"induction": ("17.3", "17.4", "18.6"), "previous token": ("16.0", "17.8"), "reads capitals": ("23.4",)}
    kind_of = {head: kind for kind, some in heads.items() for head in some}
    found = ca.weights.circuits(model, heads=tuple(kind_of), sources=512, pairs=48, samples=2)
    copied = []
    for head in found.labels["head"]:
        chains = found.chains(head)
        hits = {"raises what it attends to": [b == c for _, b, c in chains],
                "attends to its own token": [a == b for a, b, _ in chains]}  # fmt: skip
        results.row(CHAINS, f"{kind_of[head]}: {head}", len(chains), **{
            name: share(right) | {"control": exchanged(chains, name)} for name, right in hits.items()})  # fmt: skip
        copied.append(sum(hits["raises what it attends to"]) / len(chains))
    assert max(copied) < 0.1


def exchanged(chains: list[tuple[str, str, str]], name: str) -> list[float]:
    """The range of shares when the last token of a pair is that of another chain."""
    first, last = (1, 2) if name.startswith("raises") else (0, 1)
    n, found = len(chains), list[float]()
    for shift in range(1, n, 5):
        found.append(sum(chains[i][first] == chains[(i + shift) % n][last] for i in range(n)) / n)
    return [min(found), max(found)]


@only_smollm2
def test_the_answer_along_depth(model, results):
    """Capitals: the stream is read with the scale of its end, and the last depth is the model's own difference."""
    found = ca.lenses.accumulated_residual(model, sets.task(model, "fact_capital", N))
    for depth in ("embed", "5", "15", "20", "22", "23", "25", "27", "28", "29"):
        at = found.labels["layer"].index(depth)
        what = f"after layer {int(depth):02}" if depth != "embed" else "after embedding"
        results.row(ALONG, what, N, effect=measure(found.effect[at], found.interval[at], found.null[at]))
    steps = found.effect.diff()
    assert found.labels["layer"][1 + int(steps.argmax())] == "23", "the layer whose head reads the capital"
    torch.testing.assert_close(found.effect[-1], found.total.mean(), rtol=1e-4, atol=1e-4)


@only_smollm2
@pytest.mark.parametrize("task", ["fact_capital", "ioi"])
def test_tokens_from_which_heads_bring_the_answer(model, results, task):
    """The five heads that bring most from any position, each with the position from which it brings most."""
    found = ca.lenses.source_attribution(model, sets.task(model, task, N), top=5)
    for i, head in enumerate(found.labels["head"][:5]):
        at = int(found.effect[i].abs().argmax())
        parts = measure(found.effect[i, at], found.interval[i, at], found.null[i, at])
        what = f"{task}: {head} from {found.labels['position'][at].split('@')[1]}"
        results.row(SOURCES, what, N, effect=parts, head={"value": float(found.contribution[i])})
    own, chance = found.effect[0].abs(), found.null[0]
    at = int(own.argmax())
    assert float(own[at]) > float(chance[at].abs().max())
    assert found.labels["head"][0].startswith("23.")
