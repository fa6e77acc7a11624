"""Graph files of other tools: JSON out and in, raw graphs in, and what is refused."""

import json
import os
import sys
import types

import pytest
import torch

import cutaway as ca
from cutaway.core.cantor import cantor, from_cantor
from cutaway.core.node import parse_node
from cutaway.core.pt import read_pt
from cutaway.graphs.schema import faults, graph_schema
from cutaway.views.html import html
from cutaway.views.wording import visible
from tests.graphs.made import IDS, model, transcoders


@pytest.fixture(scope="module")
def whole():
    m = ca.load("miniworld")
    return ca.graphs.trace(m, 'They said: "oslo', ca.dictionaries.load("miniworld/transcoders"), samples=2)


def written(tmp_path, *given, **named):
    return json.loads(ca.graphs.write_graph(tmp_path / "g.json", *given, **named).read_text("utf-8"))


def test_a_file_keeps_the_schema_and_comes_back(whole, tmp_path):
    small = ca.graphs.prune(whole)
    data = written(tmp_path, whole, small, slug="my doggo graph", labels={small.labels["node"][0]: '<img src="x">\n'})
    assert not list(faults(data, graph_schema()))
    assert data["metadata"]["slug"] == "my-doggo-graph"
    local = written(tmp_path, whole, small, scan="./data/pages of all")["metadata"]["scan"]
    assert local == ".-data-pages-of-all"
    assert written(tmp_path, whole, small, scan="./data/pages")["metadata"]["scan"] == "./data/pages"
    assert data["nodes"][0]["clerp"] == "<img src='x'>⏎"
    ids = [n["node_id"] for n in data["nodes"]]
    assert len(set(ids)) == len(ids)
    assert {e for link in data["links"] for e in (link["source"], link["target"])} <= set(ids)
    for node in data["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            assert from_cantor(node["feature"]) == tuple(int(x) for x in node["node_id"].split("_")[:2])
        if node["is_target_logit"]:
            assert node["clerp"].count('"') == 2
            assert "(p=" in node["clerp"]
    back = ca.graphs.read_graph(tmp_path / "g.json")
    assert back.labels["node"] == small.labels["node"]
    assert back.edge_names() == small.edge_names()
    assert torch.allclose(back.weight, small.weight)
    for name in ("cumulative", "activation"):
        kept = torch.tensor([not n.startswith("logit") for n in back.labels["node"]])
        ours = small.attribute(name) * (kept if name == "cumulative" else 1)
        assert torch.allclose(back.attribute(name), ours)
    assert "<img" not in back._repr_html_()


@pytest.mark.parametrize("kind", ["cross-layer", "neurons"])
def test_any_graph_can_be_written(kind, tmp_path):
    units = "neurons" if kind == "neurons" else transcoders("gpt2", kind)
    targets = ("logit.3-5", "logit.7")
    g = ca.graphs.trace(model("gpt2"), ca.tasks.as_prompts(IDS), units, targets=targets, nodes=40, samples=2)
    small = ca.graphs.prune(g, "paper", nodes=0.99)
    data = written(tmp_path, g, small)
    assert not list(faults(data, graph_schema()))
    assert len({n["node_id"] for n in data["nodes"]}) == len(small.nodes)
    back = ca.graphs.read_graph(tmp_path / "g.json")
    virtual = g.vocabulary + 0  # a difference of logits has an id behind the vocabulary
    names = [n.replace("logit.3-5", f"logit.{virtual}") for n in small.labels["node"]]
    assert back.labels["node"] == names


def test_pairing_is_that_of_cantor():
    assert [cantor(x, y) for x, y in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1))] == [0, 1, 2, 3, 4]
    assert all(from_cantor(cantor(x, y)) == (x, y) for x in range(9) for y in range(0, 70000, 999))


def broken(data, case):
    match case:
        case "links":
            data["links"][0]["source"] = "9_9_9"
        case "twice":
            data["nodes"][1]["node_id"] = data["nodes"][0]["node_id"]
        case "'nodes'":
            del data["nodes"]
        case "not of type number":
            data["links"][0]["weight"] = "1"
        case "position 99":
            data["nodes"][0]["ctx_idx"] = 99
        case "lorsa":
            data["nodes"][0]["feature_type"] = "lorsa"
        case "of type 'logit' cannot be read":
            data["nodes"][-1] |= {"feature_type": "logit", "node_id": "none"}
            data["links"] = []
        case "two of its ids mean embed":
            token = next(n for n in data["nodes"] if n["feature_type"] == "embedding")
            data["nodes"].append(token | {"node_id": token["node_id"] + "_again"})
        case "type number":
            data["links"][0]["weight"] = 10**400
        case "type integer":
            data["nodes"][0]["ctx_idx"] = -(10**400)
        case "does not match":
            data["metadata"]["slug"] = "../up"
    return data


@pytest.mark.parametrize(
    ("case", "word"),
    [("links", "which is no node"), *((w, w) for w in (
        "twice", "'nodes'", "not of type number", "position 99", "lorsa", "does not match",
        "of type 'logit' cannot be read", "type number", "two of its ids mean embed", "type integer",
    ))],
)  # fmt: skip
def test_broken_files_are_refused(whole, tmp_path, case, word):
    data = broken(written(tmp_path, whole), case)
    (tmp_path / "b.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ca.Refused, match=word):
        ca.graphs.read_graph(tmp_path / "b.json")


def test_ids_that_collide_are_refused_not_guessed(whole, tmp_path):
    """circuit-tracer 0.5 names the error of layer 3 at position 5 as it names feature 3 of layer 0 there."""
    data = written(tmp_path, whole)
    error = next(n for n in data["nodes"] if n["feature_type"] == "mlp reconstruction error")
    layer, position = error["node_id"].split("_")[0], error["ctx_idx"]
    data["links"] = []
    error["node_id"] = f"0_{layer}_{position}"
    (tmp_path / "b.json").write_text(json.dumps(data), "utf-8")
    assert f"error.{layer}@{position}" in ca.graphs.read_graph(tmp_path / "b.json").labels["node"]
    data["nodes"].append({**data["nodes"][0], "node_id": error["node_id"]})
    (tmp_path / "b.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(ca.Refused, match="twice"):
        ca.graphs.read_graph(tmp_path / "b.json")


def test_the_words_of_a_foreign_file_are_drawn_as_text(whole, tmp_path):
    data = written(tmp_path, whole)
    for node in data["nodes"]:
        node["clerp"] = f"<script>alert({node['ctx_idx']})</script> a label that would never end"
    data["metadata"] |= {"prompt": "<q>", "prompt_tokens": ["<i>"] * 90}
    (tmp_path / "b.json").write_text(json.dumps(data), "utf-8")
    back = ca.graphs.read_graph(tmp_path / "b.json")
    page = html(back)
    assert not [tag for tag in ("<script>alert", "<q>", "<i>") if tag in page]
    assert ">&lt;script&gt;alert(1)&lt;/scrip…</text>" in page
    assert back.plot() is not None


def test_pictures_say_targets_by_their_words(whole):
    small = ca.graphs.prune(whole, "paper")
    names, page = small.labels["node"], small._repr_html_()
    word = visible(whole.target_words[0])
    at = names.index(whole.labels["target"][-len(whole.target_words)])
    assert (small.titles[at], small.select(node=[at, 0]).titles[0]) == (f"“{word}”", f"“{word}”")
    assert small.titles[0] == ""
    assert f">“{word}”</text>" in page
    assert f"{names[at]} “{word}”" in page
    assert small.record["targets"][names[at]] == whole.target_words[0]


class LogitTarget:
    def __init__(self, token_str, vocab_idx):
        self.token_str, self.vocab_idx = token_str, vocab_idx


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def raw(g, tmp_path, **more):
    """The file of circuit-tracer for the same graph: features, errors of every layer, tokens, logits."""
    ghost = types.ModuleType("ghost")
    LogitTarget.__module__, ghost.LogitTarget = "ghost", LogitTarget
    sys.modules["ghost"] = ghost
    width, kept = len(g.words), g.kinds["unit"].nonzero()[:, 0].tolist()
    names = [g.labels["node"][i] for i in kept]
    order = names + [f"error.{i}@{p}" for i in range(g.layers) for p in range(width)]
    order += [f"embed@{p}" for p in range(width)] + [n for n in g.labels["node"] if n.startswith("logit")]
    at, square = {n: i for i, n in enumerate(g.labels["node"])}, torch.zeros(len(order), len(order))
    for row, target in enumerate(g.labels["target"]):
        for column, source in enumerate(order):
            square[order.index(target), column] = g.weight[row, at[source]] if source in at else 0.0
    units = [parse_node(n) for n in names]
    logits = [parse_node(n) for n in g.labels["target"] if n.startswith("logit")]
    file = tmp_path / "raw.pt"
    held = {
        "input_string": "x", "adjacency_matrix": square, "cfg": LogitTarget("a config", 0),
        "active_features": torch.tensor([[n.block, n.position, n.index] for n in units]),
        "selected_features": torch.arange(len(units)), "activation_values": g.activation[kept].float(),
        "logit_targets": [LogitTarget("w", n.token) for n in logits],
        "logit_probabilities": g.share[-len(logits):].float(),
        "vocab_size": g.vocabulary, "input_tokens": torch.tensor(g.ids), "scan": "mine", **more,
    }  # fmt: skip
    torch.save(held, file)
    del sys.modules["ghost"]
    return file


def test_raw_graphs_are_read_without_running_their_code(tmp_path):
    g = ca.graphs.trace(model("llama_gqa"), ca.tasks.as_prompts(IDS), transcoders("llama_gqa"), samples=2, leading=1)
    trap = tmp_path / "made by the file"
    with pytest.raises(ca.Refused, match="code"):
        ca.graphs.read_raw_graph(raw(g, tmp_path, extra=Hostile(str(trap))))
    assert not trap.exists()
    back = ca.graphs.read_raw_graph(raw(g, tmp_path))
    assert back.labels["target"] == g.labels["target"]
    shared = [n for n in g.labels["node"] if n in back.labels["node"] and not n.startswith("bias")]
    ours, theirs = ([x.labels["node"].index(n) for n in shared] for x in (g, back))
    assert torch.allclose(back.weight[:, theirs], g.weight[:, ours].float(), rtol=1e-5)
    assert torch.allclose(back.influence[theirs], g.influence[ours].float(), atol=1e-5)
    assert float(back.replacement) == pytest.approx(float(g.replacement), abs=1e-5)
    assert ca.graphs.prune(back).labels["node"]
    old = ca.graphs.read_raw_graph(raw(g, tmp_path, logit_targets=torch.tensor([n.token for n in map(
        parse_node, g.labels["target"]) if hasattr(n, "token")])))  # fmt: skip
    assert old.labels == back.labels


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda h: {"input_tokens": torch.arange(5)}, "does not hold"),
        (lambda h: {"adjacency_matrix": "x"}, "no tensor"),
        (lambda h: {"adjacency_matrix": h["adjacency_matrix"][0]}, "does not hold"),
        (lambda h: {"adjacency_matrix": h["adjacency_matrix"] * torch.nan}, "not finite"),
        (lambda h: {"active_features": -h["active_features"]}, "not among"),
        (lambda h: {"active_features": h["active_features"][:, :2]}, "not among"),
        (lambda h: {"active_features": h["active_features"][:1].expand_as(h["active_features"])}, "twice"),
        (lambda h: {"selected_features": h["cfg"]}, "do not fit"),
        (lambda h: {"logit_targets": [h["cfg"]] * len(h["logit_targets"]), "selected_features": None}, "twice"),
        (lambda h: {"logit_targets": h["cfg"]}, "do not fit"),
        (lambda h: {"logit_targets": ["x"] * len(h["logit_targets"])}, "do not fit"),
        (lambda h: {"vocab_size": h["cfg"]}, "do not fit"),
    ],
)
def test_broken_raw_graphs_are_refused(change, word, tmp_path):
    g = ca.graphs.trace(model("llama_gqa"), ca.tasks.as_prompts(IDS), transcoders("llama_gqa"), samples=2, leading=1)
    held = read_pt(raw(g, tmp_path), objects=True)
    held["cfg"] = LogitTarget("a config", 0)
    held["logit_targets"] = [LogitTarget(**t.state) for t in held["logit_targets"]]
    with pytest.raises(ca.Refused, match=word):
        ca.graphs.read_raw_graph(raw(g, tmp_path, **change(held)))
    with pytest.raises(ca.Refused, match="there is none"):
        ca.graphs.read_raw_graph(tmp_path / "nothing.pt")
