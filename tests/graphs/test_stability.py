"""Stability of kept features: sets by hand, prompts that are the same, and what is refused."""

import itertools

import pytest
import torch

import cutaway as ca
from cutaway.core.node import parse_node
from cutaway.graphs import Neurons
from tests.graphs.made import model, transcoders

ROWS = torch.tensor([[5, 9, 2, 11, 7, 3], [5, 9, 4, 11, 7, 3], [5, 8, 2, 11, 6, 3], [5, 1, 2, 10, 7, 3]])


def found(rows=ROWS, kind="plain", **options):
    units = Neurons() if kind == "neurons" else transcoders("llama_gqa", kind)
    asked = {"leading": 1, "samples": 1, "targets": ("logit.17-40",)}
    graphs = [ca.graphs.trace(model("llama_gqa"), ca.tasks.as_prompts(row[None]), units, **asked) for row in rows]
    return ca.graphs.stability(graphs, **{"samples": 5, **options})


def by_prune(row, kind):
    """The units that pruning keeps, before edges are cut."""
    units = Neurons() if kind == "neurons" else transcoders("llama_gqa", kind)
    asked = {"leading": 1, "targets": ("logit.17-40",), "samples": 2}
    g = ca.graphs.trace(model("llama_gqa"), ca.tasks.as_prompts(row[None]), units, **asked)
    small = ca.graphs.prune(g, nodes=0.8, edges=1.0)
    nodes = [parse_node(n) for n in small.labels["node"]]
    return {str(n).partition("@")[0] for n in nodes if str(n).startswith(("latent", "mlp_post"))}


@pytest.mark.parametrize("kind", ["plain", "neurons"])
def test_overlaps_are_those_of_the_sets_that_pruning_keeps(kind):
    s, sets = found(kind=kind, top=10_000), [by_prune(row, kind) for row in ROWS]
    for i, j in itertools.product(range(4), range(4)):
        wanted = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        assert float(s.overlap[i, j]) == pytest.approx(wanted)
    pairs = [float(s.overlap[i, j]) for i, j in itertools.combinations(range(4), 2)]
    assert float(s.stability) == pytest.approx(sum(pairs) / 6)
    assert set(s.labels["node"]) == set.union(*sets)
    for name, kept in zip(s.labels["node"], s.kept.tolist(), strict=True):
        assert kept == sum(name in one for one in sets) / 4
    low, high = s.stability_interval.tolist()
    assert min(pairs) <= low <= float(s.stability) <= high <= max(pairs)
    assert s.influence.tolist() == sorted(s.influence.tolist(), reverse=True)


def test_a_prompt_said_twice_keeps_all_and_random_units_do_not():
    s = found(ROWS[[0, 0, 0]])
    assert float(s.stability) == 1.0
    assert s.stability_interval.tolist() == [1.0, 1.0]
    assert (s.kept == 1.0).all()
    assert float(s.stability_null.max()) < 1.0


def test_two_prompts_are_one_pair_and_have_no_interval():
    s = found(ROWS[:2])
    assert s.stability_interval.isnan().all()
    assert "one pair" in s.reasons["stability"]
    assert float(s.stability) == float(s.overlap[0, 1])


def test_paraphrases_share_more_than_chance_and_than_the_same_templates_about_other_countries():
    m, d = ca.load("miniworld"), ca.dictionaries.load("miniworld/transcoders")
    said = ("The capital of {} is", "The capital city of {} is called", "In {}, the capital is")

    def traced(*countries):
        each = (t.format(c) for t, c in zip(said, countries, strict=True))
        return [ca.graphs.trace(m, text, d, samples=1) for text in each]

    same = ca.graphs.stability(traced("Norway", "Norway", "Norway"), samples=10)
    other = ca.graphs.stability(traced("Norway", "Japan", "France"), samples=2)
    assert float(same.stability_null.max()) < float(other.stability) < float(same.stability)


@pytest.mark.parametrize(
    ("rows", "options", "word"), [(ROWS[:1], {}, "one graph"), (ROWS, {"share": 0.0}, "keeps a unit")]
)
def test_what_cannot_be_compared_is_refused(rows, options, word):
    with pytest.raises(ca.Refused, match=word):
        found(rows, **options)


def test_graphs_of_other_units_are_refused():
    m, row = model("llama_gqa"), ca.tasks.as_prompts(ROWS[:1])
    graphs = [ca.graphs.trace(m, row, u, samples=1) for u in (transcoders("llama_gqa", "plain"), Neurons())]
    with pytest.raises(ca.Refused, match="different models or units"):
        ca.graphs.stability(graphs)
