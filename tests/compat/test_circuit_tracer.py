"""circuit-tracer's façade: its own values where they are stored, else the house's, and definitions."""

import json
import shutil
from urllib.request import urlopen

import pytest
import torch
from safetensors.torch import load_file

import cutaway as ca
from bench import graph_parity, parity
from bench.compat import circuit_tracer as oracle
from cutaway import Refused, compat
from cutaway.compat import circuit_tracer as ct
from cutaway.compat.circuit_tracer.attribution import CustomTarget
from cutaway.compat.circuit_tracer.graph import Graph, compute_graph_scores, prune_graph
from cutaway.compat.circuit_tracer.serving import serve
from cutaway.compat.circuit_tracer.utils import (
    Feature,
    create_graph_files,
    decode_url_features,
    get_top_features,
    get_unembed_vecs,
)
from cutaway.dictionaries.formats.circuit_tracer import write
from cutaway.graphs.circuit_tracer import raw_graph, raw_parts

IDS = torch.tensor(graph_parity.prompt())
GEMMA = "Gemma 2, thresholds"
THEIRS = load_file(oracle.FILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made, names = tmp_path_factory.mktemp("circuit_tracer"), (*oracle.CASES, GEMMA)
    parity.save(str(made), [graph_parity.CASES[n].shape for n in names])
    for n in names:
        write(graph_parity.transcoders(graph_parity.CASES[n].kind, parity.LAYERS, parity.WIDTH), made / n)
    return made


@pytest.fixture(scope="module")
def models(folder):
    made = {n: str(folder / graph_parity.CASES[n].shape) for n in (*oracle.CASES, GEMMA)}
    with compat.imports(models={"google/a-model": made[GEMMA], "gemma": str(folder / GEMMA)}):
        named = ct.ReplacementModel.from_pretrained(
            "google/a-model", "gemma", backend="transformerlens", lazy_decoder=True
        )
    return {n: ct.ReplacementModel.from_pretrained(made[n], str(folder / n)) for n in oracle.CASES} | {GEMMA: named}


@pytest.fixture(scope="module")
def graph(models):
    return ct.attribute(IDS, models[GEMMA], batch_size=64, verbose=False)


@pytest.mark.parametrize("name", oracle.CASES)
def test_interventions_are_those_of_circuit_tracer(models, name):
    found = oracle.values(models[name], IDS)
    assert {f"{name}: {key}" for key in found} == {key for key in THEIRS if key.startswith(f"{name}: ")}
    for key, value in found.items():
        theirs = THEIRS[f"{name}: {key}"]
        assert torch.allclose(value, theirs, atol=1e-5 * float(theirs.abs().max())), key


def test_activations_are_those_of_the_transcoders_but_at_the_first_token(models):
    model = models[GEMMA]
    logits, found = model.get_activations(IDS)
    acts = model.house.capture(IDS[None], ["mlp_in", "logits"])
    assert torch.equal(logits, acts["logits"])
    code = model.transcoders.encode({r: acts[r] for r in model.transcoders.reads}).dense()
    assert torch.equal(found[:, 1:], code.reshape(len(IDS), 3, -1).transpose(0, 1)[:, 1:])
    assert not found[:, 0].any()
    sparse = model.get_activations(" ".join(f"t{i}" for i in IDS[1:]), sparse=True)[1]
    assert torch.equal(sparse.to_dense(), found)
    before = model.get_activations(IDS, apply_activation_function=False)[1]
    assert torch.equal(before[found != 0], found[found != 0])  # these gates pass what exceeds their threshold


def test_transcoders_that_read_a_norm_before_its_weight_get_it_from_the_model(models, folder, tmp_path):
    shutil.copytree(folder / GEMMA, tmp_path / "before")
    config = tmp_path / "before" / "config.yaml"
    config.write_text(config.read_text().replace("mlp.hook_in", "ln2.hook_normalized"))
    model = ct.ReplacementModel.from_pretrained(str(folder / "Gemma 2"), str(tmp_path / "before"))
    weight = 1 + model.house.hf.model.layers[1].pre_feedforward_layernorm.weight
    reads = {"mlp_in.1": model.house.capture(IDS[None], "mlp_in.1")["mlp_in.1"] / weight}
    expected = models[GEMMA].transcoders.pre_activations(1, reads)
    found = model.get_activations(IDS, apply_activation_function=False)[1][1]
    assert torch.allclose(found[1:], expected[1:], atol=1e-4)


def test_a_value_that_a_feature_has_anyhow_changes_nothing_and_open_ends_reach_new_tokens(models):
    model = models[GEMMA]
    logits, found = model.get_activations(IDS)
    layer, position, feature = found.nonzero()[20].tolist()
    same, acts = model.feature_intervention(IDS, [(layer, position, feature, found[layer, position, feature])])
    assert torch.allclose(same, logits, atol=1e-6)
    assert torch.allclose(acts, found, atol=1e-6)
    many = [(layer, slice(position, None), torch.tensor([feature, 3]), torch.tensor([5.0, 9.0]))]
    options = {"do_sample": False, "max_new_tokens": 3, "stop_at_eos": False, "freeze_attention": False}
    text, steps, _ = model.feature_intervention_generate(IDS, many, **options)
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False).input_ids)
    whole = torch.cat([IDS[:1], ids])
    again, _ = model.feature_intervention(whole[:-1], many, freeze_attention=False)
    assert torch.allclose(again[0, len(IDS) - 1 :], steps, atol=1e-5)
    assert model.feature_intervention(IDS, many, return_activations=False)[1] is None


def test_a_raw_graph_is_the_house_s_graph_in_another_order(models, graph, tmp_path):
    model = models[GEMMA]
    whole = ca.graphs.trace(model.house, ca.tasks.as_prompts(IDS[None]), model.transcoders, leading=1, samples=1)
    assert torch.equal(raw_parts(whole)["adjacency_matrix"], graph.adjacency_matrix)
    assert compute_graph_scores(graph) == pytest.approx(whole.scores("circuit-tracer"), abs=1e-6)
    graph.to_pt(tmp_path / "a.pt")
    again = Graph.from_pt(tmp_path / "a.pt")
    assert torch.equal(again.adjacency_matrix, graph.adjacency_matrix)
    assert (again.logit_targets, again.cfg.n_layers, again.scan) == (graph.logit_targets, 3, graph.scan)
    nodes, edges, cumulative = prune_graph(again, 0.7, 0.95)
    kept = ca.graphs.prune(whole, "circuit-tracer", nodes=0.7, edges=0.95)
    assert (int(nodes.sum()), int(edges.sum())) == (len(kept.nodes), len(kept.weight))
    assert torch.equal(graph.adjacency_matrix[edges].sort().values, kept.weight.sort().values)
    assert float(cumulative.max()) == pytest.approx(1.0, abs=1e-5)
    features, scores = get_top_features(again, 4)
    names = {str(n): float(x) for n, x in zip(whole.nodes, whole.influence, strict=True)}
    assert [names[f"latent.{i}.{number}@{p}"] for i, p, number in features] == pytest.approx(scores, rel=1e-5)
    assert scores == sorted(scores, reverse=True)
    assert raw_graph(vars(again)).labels["node"] == again.house.labels["node"]


def test_targets_are_tokens_ids_or_directions(models):
    model = models[GEMMA]
    vectors = get_unembed_vecs(model, [3, 7])
    texts = ct.attribute(IDS, model, attribution_targets=["t3", "t7"])
    ids = ct.attribute(IDS, model, attribution_targets=torch.tensor([3, 7]))
    assert torch.equal(texts.adjacency_matrix, ids.adjacency_matrix)
    assert texts.logit_targets == [("t3", 3), ("t7", 7)]
    p = model.get_activations(IDS)[0][0, -1].softmax(-1)
    assert torch.allclose(texts.logit_probabilities, p[[3, 7]])
    one = ct.attribute(IDS, model, attribution_targets=[CustomTarget("a", 0.4, vectors[0] - vectors[1])])
    assert one.logit_targets == [("a", model.cfg.d_vocab)]
    difference = texts.adjacency_matrix[-2] - texts.adjacency_matrix[-1]
    assert torch.allclose(one.adjacency_matrix[-1, :-1], difference[:-2], atol=1e-5)
    few = ct.attribute(IDS, model, max_feature_nodes=5)
    assert len(few.selected_features) == 5
    assert torch.equal(few.active_features, one.active_features)
    assert torch.equal(few.activation_values, one.activation_values)


def test_graph_files_are_of_the_schema_and_served_to_this_machine(graph, tmp_path):
    graph.scan = "a-set"
    for slug in ("one", "two", "one"):
        create_graph_files(graph, slug, tmp_path / "files", node_threshold=0.6)
    listed = json.loads((tmp_path / "files" / "graph-metadata.json").read_text())["graphs"]
    assert [(row["slug"], row["scan"]) for row in listed] == [("two", "a-set"), ("one", "a-set")]
    assert listed[0]["prompt_tokens"] == [f"t{i}" for i in IDS]
    assert len(ca.graphs.read_graph(tmp_path / "files" / "one.json").nodes) == int(prune_graph(graph, 0.6)[0].sum())
    server = serve(tmp_path / "files", port=0)
    try:
        address = "http://{}:{}".format(*server.server_address)
        assert "<h2" in urlopen(f"{address}/index.html").read().decode()
        assert json.loads(urlopen(f"{address}/two.json").read())["metadata"]["slug"] == "two"
        assert server.server_address[0] == "127.0.0.1"
    finally:
        server.stop()
    graph.scan = None
    with pytest.raises(Refused, match="which transcoders"):
        create_graph_files(graph, "three", tmp_path)


def test_prompts_begin_with_a_special_token(models):
    model = models[GEMMA]
    assert model.ensure_tokenized("t1 t2").tolist() == [parity.WORDS - 1, 1, 2]
    assert model.ensure_tokenized([parity.WORDS - 1, 1]).tolist() == [parity.WORDS - 1, 1]


def test_addresses_of_graphs_name_features():
    groups = json.dumps([["say it", "21_5943_10", "17_7178_9"], ["say it", "2_1_3"]])
    found, pinned = decode_url_features(f"https://x.org/graph?slug=a&pinnedIds=4_6_2%2CE_26_9&supernodes={groups}")
    assert found == {"say it": [Feature(21, 10, 5943), Feature(17, 9, 7178)], "say it (2)": [Feature(2, 3, 1)]}
    assert pinned == [Feature(4, 2, 6), Feature(-1, 9, 26)]


def test_what_has_no_place_here_is_refused(models, tmp_path):
    with pytest.raises(Refused, match="divisors of norms"):
        models[GEMMA].feature_intervention(IDS, oracle.ROWS, constrained_layers=range(3))
    torch.save({"input_string": "a"}, tmp_path / "a.pt")
    with pytest.raises(Refused, match="holds no"):
        Graph.from_pt(tmp_path / "a.pt")
