"""Circuits in files, under the names of other tools, and beside known ones."""

import pytest
import torch
import transformers as tf

import cutaway as ca
from cutaway.circuits.circuit import Circuit
from cutaway.circuits.compare import area
from cutaway.circuits.formats.mib import read_mib, write_mib
from cutaway.circuits.formats.names import mib_readers, mib_writer, read_edge
from cutaway.circuits.published import names, published
from cutaway.core.node import parse_edge
from cutaway.core.refuse import Refused
from cutaway.models.edits.wiring import wiring
from tests.circuits.doctored import plain


@pytest.fixture(scope="module")
def small():
    """A model of the sizes of GPT-2 small, narrow."""
    config = tf.GPT2Config(
        vocab_size=5, n_embd=24, n_layer=12, n_head=12, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return ca.load(tf.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("input->a0.h3<q>", "embed→q_in.0.3"), ("a7.h3->m8", "z.7.3→mlp_in.8"), ("m11->logits", "mlp_out.11→logits"),
        ("Resid Start->A1.2.K", "embed→k_in.1.2"), ("A7.3->A9.6.V", "z.7.3→v_in.9.6"),
        ("MLP 4->Resid End", "mlp_out.4→logits"),
        ("blocks.7.attn.hook_result[:, :, 3]->blocks.9.hook_q_input[:, :, 6]", "z.7.3→q_in.9.6"),
        ("blocks.0.hook_resid_pre -> blocks.5.hook_mlp_in", "embed→mlp_in.5"),
        ("blocks.4.hook_mlp_out[:]->blocks.7.hook_q_input[3]", "mlp_out.4→q_in.7.3"),
    ],
)  # fmt: skip
def test_edges_are_read_under_the_names_of_other_tools(theirs, ours):
    assert read_edge(theirs) == parse_edge(ours)


def test_names_of_mib_round_trip_for_every_edge(small):
    edges = wiring(small).edges
    assert [read_edge(f"{mib_writer(e.source)}->{mib_readers(e.target)[0]}") for e in edges] == list(edges)


@pytest.mark.parametrize("ending", [".json", ".pt"])
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gpt_neox_parallel"])
def test_graphs_of_mib_round_trip(name, ending, tmp_path):
    m = plain(name)
    w = wiring(m)
    scores = torch.randn(len(w.edges), generator=torch.Generator().manual_seed(0))
    kept = Circuit("", tuple(w.edges[::3])).mask(w)
    path = write_mib(tmp_path / f"graph{ending}", m, w, scores, kept)
    torch.testing.assert_close(read_mib(path).scores(w), scores, atol=1e-6, rtol=1e-6)
    assert torch.equal(read_mib(path, chosen=True).mask(w), kept)
    torch.testing.assert_close(
        ca.circuits.open(path, edges=20).scores(w).abs().nan_to_num(0).count_nonzero(), torch.tensor(20)
    )


def test_the_files_of_mib_have_its_keys(tmp_path):
    """As `Graph.to_json` and `Graph.to_pt` of EAP-IG write them, whose heads have keys of their own."""
    import json

    m = plain("llama_gqa")
    w, s = wiring(m), m.shape
    data = json.loads(write_mib(tmp_path / "g.json", m, w, torch.ones(len(w.edges))).read_text())
    assert data["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32}
    assert data["edges"]["a0.h1->a2.h3<k>"] == {"score": 0.5, "in_graph": False}
    assert set(data["nodes"]) == {
        "input",
        "logits",
        *(f"m{i}" for i in range(3)),
        *(f"a{i}.h{h}" for i in range(3) for h in range(4)),
    }
    held = torch.load(write_mib(tmp_path / "g.pt", m, w, torch.ones(len(w.edges))), weights_only=True)
    assert held["edges_scores"].shape == (1 + s.n_layers * (s.n_heads + 1), s.n_layers * (3 * s.n_heads + 1) + 1)
    assert held["dst_nodes"][4] == "a0.h0<k>"
    assert held["dst_nodes"][-2:] == ["m2", "logits"]


def test_files_and_names_of_nothing_known_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"cfg": {}}')
    for source, why in [
        (tmp_path / "a.json", "lacks edges, nodes"),
        ("z.0.0->nothing", "no site has that name"),
        ("", "names nothing"),
    ]:
        with pytest.raises(Refused, match=why):
            ca.circuits.open(str(source))
    with pytest.raises(Refused, match="graphs of MIB end"):
        write_mib(tmp_path / "a.txt", plain(), wiring(plain()), torch.ones(3))
    with pytest.raises(Refused, match="no such edge"):
        Circuit("", (parse_edge("z.2.0→q_in.0.0"),)).scores(wiring(plain()))
    with pytest.raises(Refused, match="have no scores"):
        ca.circuits.open("ioi", edges=3)


def test_a_circuit_finds_all_of_itself_and_published_ones_are_on_gpt2(small):
    for name in names():
        if name in ("docstring", "entity_tracking"):  # of other models
            continue
        own = ca.circuits.compare(small, name, reference=name, samples=3)
        assert own.found.tolist() == [1.0] * len(own.found)
        assert own.overlap.tolist() == [1.0, 1.0, 1.0]
        assert float(own.auroc[0]) == 1.0
        assert own.missing == ()
        assert float(own.found_null.mean()) <= 1.0
    ioi = published("ioi")
    assert len(ioi.nodes) == 26
    assert len(ioi.connected(wiring(small)).edges) == 182
    assert ca.circuits.compare(small, "z.9.9,z.9.6,mlp_out.*", samples=2).missing[0] == "z.0.1"
    with pytest.raises(Refused, match="lacks some of its components"):
        ca.circuits.compare(plain(), "z.0.0", reference="ioi")


def test_entity_tracking_is_on_a_model_of_llama_7b_s_shape():
    import transformers as tf

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 8,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 16,
    }
    w = wiring(ca.load(tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)), check=False))
    known = published("entity_tracking")
    assert [len(nodes) for nodes in known.groups.values()] == [40, 7, 20, 5]
    edges = known.connected(w).edges
    into = {"q": 0, "v": 0, "l": 0}
    for e in edges:
        into[str(e.target)[0]] += 1
        assert str(e.target) == "logits" or e.source.layer < e.target.layer
    layers = {g: [int(n.split(".")[1]) for n in nodes] for g, nodes in known.groups.items()}
    pairs = [(a, b) for a in layers["position transmitter"] for b in layers["value fetcher"] if a < b]
    assert (into["l"], into["q"]) == (40, len(pairs))
    assert int(known.components().mask(w).sum()) > len(edges)
    with pytest.raises(Refused, match="lacks some of its components"):
        ca.circuits.compare(plain(), "z.0.0", reference="entity_tracking")


def test_the_area_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    g = torch.Generator().manual_seed(0)
    size, truth = torch.randint(0, 9, (200,), generator=g).float(), torch.rand(200, generator=g) < 0.2
    assert float(area(size, truth)) == pytest.approx(roc_auc_score(truth, size), abs=1e-6)
    assert area(size, torch.zeros(200, dtype=torch.bool)).isnan()
