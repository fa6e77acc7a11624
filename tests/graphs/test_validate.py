"""Validation of graphs: effects are what edits by hand change, frozen ones are the edges, controls are as named."""

from dataclasses import replace

import pytest
import torch

import cutaway as ca
from cutaway.core.node import parse_node
from cutaway.core.stats import generator, rotation
from cutaway.graphs import Neurons
from cutaway.graphs.validate import along_all_paths
from tests.graphs.made import IDS, model, transcoders

PROMPTS = ca.tasks.as_prompts(IDS)
PAIR = ("logit.17-40",)


def checked(name, kind, **options):
    units = Neurons() if kind == "neurons" else transcoders(name, kind)
    quick = {"top": 6, "samples": 2, "leading": 1, "targets": PAIR}
    return ca.graphs.validate(model(name), PROMPTS, units, **quick | options)


def difference(m, edits=()):
    """The logit of the target less that of its foil, before any soft cap."""
    logits = m.capture(IDS, "logits", edits)["logits"][0, -1]
    return float(logits[17] - logits[40])


@pytest.mark.parametrize("kind", ["plain", "neurons"])
@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_parallel", "llama_gqa", "qwen3", "granite"])
def test_frozen_effects_are_edges_and_others_are_what_edits_by_hand_change(name, kind):
    m, v = model(name), checked(name, kind)
    assert float((v.frozen - v.direct).abs().max()) < 1e-6 * float(v.direct.abs().max())
    plain = difference(m)
    for label, effect in list(zip(v.labels["node"], v.effect.tolist(), strict=True))[:3]:
        node = parse_node(label)
        if kind == "neurons":
            edit = ca.edits.Ablate(node)
        else:
            d = transcoders(name, kind)
            act = d.encode({f"mlp_in.{node.block}": m.capture(IDS, f"mlp_in.{node.block}")[f"mlp_in.{node.block}"][0]},
                           node.block).dense()[node.position, node.index]  # fmt: skip
            step = act * d.decoder[node.block][f"mlp_out.{node.block}"][node.index]
            edit = ca.edits.Add(f"mlp_out.{node.block}@{node.position}", -step)
        assert effect == pytest.approx(plain - difference(m, edit), rel=1e-4, abs=1e-5)


def test_what_cannot_be_held_is_not_claimed():
    for name, kind, word in (("gemma2", "plain", "behind attention"), ("llama_gqa", "per layer", "skip")):
        v = checked(name, kind)
        assert v.frozen.isnan().all()
        assert word in v.reasons["frozen"]
        assert v.effect.isfinite().all()


def test_effects_along_all_paths_are_the_solution_of_the_linear_system():
    g = ca.graphs.trace(model("llama_gqa"), PROMPTS, transcoders("llama_gqa", "cross-layer"), targets=PAIR, samples=2)
    n = len(g.influence)
    step = torch.zeros(n, n, dtype=torch.float64)  # how far each unit follows each source, in shares of its value
    units = g.node_of[g.share == 0]
    step[units] = g.weight[g.share == 0] / g.value[g.share == 0, None]
    reached = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - step)
    wanted = g.weight[-1] @ reached
    assert torch.allclose(along_all_paths(g), wanted, atol=1e-9 * float(wanted.abs().max()))
    last = [i for i, node in enumerate(g.nodes) if getattr(node, "block", None) == 2]
    assert torch.equal(along_all_paths(g)[last], g.weight[-1][last])


def test_rotated_decoders_give_the_graph_of_the_rotated_dictionary():
    v, d = checked("llama_gqa", "plain", seed=3), transcoders("llama_gqa", "plain")
    for i, replacement in enumerate(v.replacement_null.tolist()):
        turn = rotation(32, generator(4 + i)).double()
        turned = replace(d, decoder=tuple({s: w @ turn for s, w in rows.items()} for rows in d.decoder))
        g = ca.graphs.trace(model("llama_gqa"), PROMPTS, turned, targets=PAIR, leading=1)
        assert replacement == pytest.approx(float(g.replacement), rel=1e-5)


def test_agreement_of_the_bundled_transcoders_has_an_interval_and_their_rotations_replace_less():
    m = ca.load("miniworld")
    v = ca.graphs.validate(m, "The capital of Norway is", ca.dictionaries.load("miniworld/transcoders"), samples=2)
    low, high = v.agreement_interval.tolist()
    assert low < float(v.agreement) < high
    assert float(v.replacement) > float(v.replacement_null.max())
    assert float(v.completeness) > float(v.completeness_null.max())
    assert (v.effect_null.std(1) > 0).all()


def test_a_single_unit_has_no_agreement():
    v = checked("llama_gqa", "plain", top=1)
    assert bool(v.agreement.isnan())
    assert bool(v.agreement_interval.isnan().all())


def test_graphs_without_units_are_refused():
    with pytest.raises(ca.Refused, match="none with an influence"):
        checked("llama_gqa", "plain", top=0)
