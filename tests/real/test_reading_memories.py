"""Neurons of SmolLM2 on passages and sums: token frequency, composition of memories, polysemanticity, arithmetic.

Nothing is tuned, and what does not come out is written down as it is.
"""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.neurons import FrequencyNeurons
from cutaway.neurons.arithmetic import problems
from tests.real import sets
from tests.real.written import mean, measure, share

FREQUENCY, COMPOSED, MANY, SUMS = "token-frequency neurons", "composition of memories", "polysemanticity", "arithmetic"
DEEP, LATE = tuple(range(20, 30)), tuple(range(22, 30))
only_smollm2 = pytest.mark.parametrize("name", ["smollm2"], indirect=True)


def passages(model: ca.Model, width: int) -> ca.tasks.Prompts:
    """The passages, cut into pieces of one length."""
    rows = sets.ids(model.tokenizer, [row["text"] for row in sets.rows("passages")])
    return ca.tasks.as_prompts([r[i : i + width] for r in rows for i in range(0, len(r) - width + 1, width)])


def write_frequency(results, found: FrequencyNeurons, kind: str = "") -> None:
    """Cosine, effects on KL and entropy, and what of them goes through the component or the scale."""
    held = int(found.record["split"].split()[-1])
    shown = (("KL to unigram", "unigram component"), ("entropy", "final norm's scale"))
    for i, neuron in enumerate(found.labels["neuron"]):
        parts = {
            "cosine": {
                "value": float(found.score[i]),
                "control": [float(found.null[i].min()), float(found.null[i].max())],
            }
        }
        for name, way in shown:
            j, h = found.labels["measure"].index(name), found.labels["mediator"].index(way)
            parts[name] = measure(found.effect[j, i], found.effect_interval[j, i], found.effect_null[j, i])
            parts[f"{name}, through the {way.split()[-1]}"] = measure(
                found.mediated[h, j, i], found.mediated_interval[h, j, i], found.mediated_null[h, j, i]
            )
        results.row(FREQUENCY, f"{kind}{neuron}", held, **parts)


@only_smollm2
def test_neurons_along_the_frequency_of_tokens(model, results):
    """Three of the last layers, by how far they move the logits along it, and what predictions are without them."""
    found = ca.neurons.frequency(model, passages(model, 24), layers=DEEP, top=3, samples=5)
    write_frequency(results, found)
    assert bool((found.score.abs() > found.null.abs().amax(-1)).all())


@only_smollm2
def test_neurons_that_the_unembedding_hardly_reads(model, results):
    """Of a tenth with the longest values in the last three layers, the three with the least logit variance."""
    found = ca.neurons.statistics(model, passages(model, 24), layers=(27, 28, 29), samples=1)
    variance = found.score[found.labels["statistic"].index("logit variance")]
    long = found.norm >= found.norm.quantile(0.9)
    order = torch.where(long, variance, torch.inf).flatten().argsort()[:3].tolist()
    names = [f"{found.labels['layer'][i // variance.shape[1]]}.{i % variance.shape[1]}" for i in order]

    write_frequency(
        results, ca.neurons.frequency(model, passages(model, 24), neurons=names, samples=5), "hardly read: "
    )


@only_smollm2
def test_layers_compose_what_their_memories_say(model, results):
    texts = sets.ids(model.tokenizer, [row["text"] for row in sets.rows("passages")])
    prompts = ca.tasks.as_prompts([ids[:n] for ids in texts for n in (20, 34, 48)])
    found = ca.neurons.composition(model, prompts, layers=(0, 5, 10, 15, 20, 25, 29), samples=5)
    for at, layer in enumerate(found.labels["layer"]):
        parts = {
            name: measure(found.share[j, at], found.interval[j, at], found.null[j, at])
            for j, name in enumerate(found.labels["outcome"])
            if name != "agreement"
        }
        own = measure(found.composed[at], found.composed_interval[at], found.composed_null[at])
        results.row(COMPOSED, f"layer {layer:02}", len(prompts), **{"within: no memory": own}, **parts)
    assert float(found.composed.min()) > 0.5


@only_smollm2
def test_at_how_many_things_neurons_fire(model, results):
    """The 8 largest updates of a layer, each beside random directions of that layer."""
    prompts, number = passages(model, 48), dict[int, torch.Tensor]()
    for layer in (2, 10, 20, 29):
        found = ca.neurons.polysemanticity(model, prompts, layers=(layer,), top=8, contexts=12, samples=10)
        parts = {
            f"{view} ({half})": mean(found.score[v, h], found.null[v, h].mean(0))
            for v, view in enumerate(("contexts", "tokens"))
            for h, half in enumerate(found.labels["half"])
        }
        results.row(MANY, f"layer {layer:02}", len(found.labels["neuron"]), **parts)
        number[layer] = found.score[0].mean(-1)
    assert bool((number[29] < number[10]).all()), "neurons of the last layer fire at fewer things, on both halves"


@only_smollm2
def test_which_sums_it_can_do(model, results):
    right = dict[str, float]()
    for name in ("+", "-", "*", "/"):
        plain, told = (t.narrow(model).bind(model, "prob") for t in problems(name, 24, 4))
        for what, bound in (("solved before", plain), ("in words", told)):
            hits = model.run_last(bound.clean).argmax(-1) == bound.answers
            results.row(SUMS, f"{name}: {what}", len(bound), **{"top-1": share(hits.tolist())})
            right[f"{name} {what}"] = float(hits.float().mean())
    assert right["+ solved before"] > 0.5 > 0.3 > right["+ in words"]


@only_smollm2
def test_addition_without_the_neurons_that_heads_trigger(model, results):
    found = ca.neurons.arithmetic(
        model, operations="+", prompts=12, shots=4, layers=LATE, sizes=(10, 100), samples=3, null_cells=6
    )
    for i, name in enumerate(found.labels["operation"]):
        key = found.labels["key"][i][0]
        null = found.null[i][found.null[i].isfinite()]
        head = measure(found.key[i, 0], found.key_interval[i, 0], null)
        results.row(SUMS, f"{name}: without head {key}", 6, probability=head)
        for j, size in enumerate(found.labels["size"]):
            parts = {
                way: measure(values[i, 0, j], interval[i, 0, j], chance[i, 0, j])
                for way, values, interval, chance in (
                    ("masked", found.masked, found.masked_interval, found.masked_null),
                    ("kept", found.kept, found.kept_interval, found.kept_null),
                    ("masked in words", found.words_masked, found.words_masked_interval, found.words_masked_null),
                )
            }
            before = {"untouched": {"value": float(found.untouched[i, 0])}}
            results.row(SUMS, f"{name}: first {size} neurons", 6, **parts, **before)
    assert float(found.masked[0, 0, 1]) < float(found.masked_null[0, 0, 1].min())
