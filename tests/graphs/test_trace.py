"""Attribution graphs: rows that close, edges that interventions confirm, and scores that mean what they say."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from safetensors.torch import save_file

import cutaway as ca
from cutaway.core.node import Error, Latent, parse_node
from cutaway.dictionaries.gates import BatchTopK, Relu
from cutaway.dictionaries.norms import TokenNorm
from cutaway.dictionaries.transforms import one_block, together
from cutaway.graphs import Neurons
from cutaway.graphs.influence import circuit_tracer_scores, completeness, masks, replacement, spread
from tests.dictionaries.common import dictionary
from tests.graphs.made import FAMILIES, IDS, FrozenByHand, contribution, model, transcoders
from tests.models.tiny import build

KINDS = ("per layer", "cross-layer", "neurons")
_PAIR = ("logit.17-40",)


def units(name, kind):
    return Neurons() if kind == "neurons" else transcoders(name, kind)


def traced(name, kind="per layer", **options):
    return ca.graphs.trace(model(name), ca.tasks.as_prompts(IDS), units(name, kind), **{"samples": 3, **options})


def exact(m):
    """Transcoders that are the MLPs of a model with ReLUs."""
    w, parts = m.weights, []
    for i in range(m.shape.n_layers):
        read, write = f"mlp_in.{i}", f"mlp_out.{i}"
        weights = {read: w.mlp_in[i].T.detach()}, {write: w.mlp_out[i].detach()}
        biases = w.mlp_in_bias[i].detach(), {write: w.mlp_out_bias[i].detach()}
        parts.append(one_block(*weights, *biases, Relu()))
    return together(parts)


# --- closure


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_sum_to_the_values_of_their_targets(name, kind):
    g = traced(name, kind, leading=1)
    assert len(g.value) > 60
    assert float((g.value - g.weight.sum(1)).abs().max()) < 1e-9 * float(g.value.abs().max())
    assert float(g.residual.abs().max()) < 1e-9 * float(g.value.abs().max())


def test_the_values_are_those_of_the_model():
    m, d, g = model("qwen3"), transcoders("qwen3"), traced("qwen3", targets=(*_PAIR, "logit.3"))
    acts = m.capture(IDS, ["mlp_in", "logits", "pattern"])  # patterns too, for attention of the same precision
    logits = acts["logits"][0, -1]
    assert g.value[-2:].tolist() == pytest.approx([float(logits[17] - logits[40]), float(logits[3] - logits.mean())])
    for node, value, act in zip(g.nodes, g.value[:-2], g.activation, strict=False):
        pre = d.pre_activations(node.block, {f"mlp_in.{node.block}": acts[f"mlp_in.{node.block}"][0]})
        assert float(pre[node.position, node.index]) == pytest.approx(float(value), abs=1e-9)
        assert float(act) == pytest.approx(float(value), abs=1e-9)
        assert act > 0


def test_in_single_precision_rows_close_to_rounding():
    m = ca.load("miniworld")
    for units_of in (ca.dictionaries.load("miniworld/transcoders"), "neurons"):
        g = ca.graphs.trace(m, "The capital of Norway is", units_of, nodes=400)
        assert float(g.residual.abs().max()) < 1e-4 * float(g.value.abs().max())
        assert g.record["closure"]["largest residual"] == float(g.residual.abs().max())


# --- edges are effects in the frozen model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_edges_are_the_effects_of_growing_their_source_with_all_else_frozen(name, kind):
    m, g = model(name), traced(name, kind, leading=1, targets=_PAIR)
    d = None if kind == "neurons" else transcoders(name, kind)
    by_hand = FrozenByHand(m, d.skip if d is not None else {}, 1)
    read = (g.kinds["unit"] & g.weight.any(0)).nonzero()[:, 0]
    starts = read[[0, len(read) // 3, len(read) // 2, -1]].tolist()
    tokens = [g.labels["node"].index(n) for n in ("embed@0", "embed@3")]
    errors = g.kinds["error"].nonzero()[3:5, 0].tolist()
    for s in [*starts, *tokens, *errors]:
        moved = by_hand.moved(contribution(g, m, d, by_hand, s))
        column, seen = g.weight[:, s], values(g, m, d, by_hand, moved)
        assert torch.allclose(column, seen, atol=1e-9 * float(g.weight.abs().max()), rtol=0), g.labels["node"][s]
        assert float(column.abs().max()) > 1e-6 * float(g.weight.abs().max())


def values(g, m, d, by_hand, moved):
    """By how much every target moves, given what the MLPs and the unembedding read."""
    w, acts, nodes = m.weights, by_hand.acts, [parse_node(n) for n in g.labels["target"][:-1]]
    each = []  # of every unit of each layer, at each position
    for i in range(m.shape.n_layers):
        x = moved[f"mlp_in.{i}"]
        if d is not None:
            each.append(x @ d.encoder[i][f"mlp_in.{i}"].T)
            continue
        u = x @ w.mlp_in[i].detach()
        if f"mlp_gate.{i}" in acts:  # half of a through each branch
            a, pre, gate = (acts[f"mlp_{n}.{i}"][0] for n in ("post", "pre", "gate"))
            u = 0.5 * a / pre * u + 0.5 * a / gate * (x @ w.mlp_gate[i].detach())
        each.append(u)
    at = [(n.block, n.position, n.index) if d is not None else (n.layer, n.position, n.unit) for n in nodes]
    found = [each[i][q, unit] for i, q, unit in at]
    pair = parse_node(g.labels["target"][-1])
    apart = w.unembed[:, pair.token] - w.unembed[:, pair.foil]
    return torch.stack([*found, moved["final"][-1] @ apart.detach()])


# --- limits in which the graph is known


def test_exact_transcoders_leave_no_error_and_are_the_neurons():
    m = model("opt")
    prompts = ca.tasks.as_prompts(IDS)
    one, two = (ca.graphs.trace(m, prompts, u, samples=3) for u in (exact(m), Neurons()))
    assert float(one.weight[:, one.kinds["error"]].abs().max()) < 1e-12
    assert float(one.replacement) == pytest.approx(1.0, abs=1e-12)
    assert float(one.completeness) == pytest.approx(1.0, abs=1e-12)
    names = {f"latent.{n.layer}.{n.unit}@{n.position}": str(n) for n in two.nodes if str(n).startswith("mlp_post")}
    assert len(names) > 100
    assert [names.get(n, n) for n in one.labels["target"]] == two.labels["target"]
    order = [two.labels["node"].index(names.get(n, n)) for n in one.labels["node"] if not n.startswith("error")]
    kept = ~one.kinds["error"]
    assert torch.allclose(one.weight[:, kept], two.weight[:, order], atol=1e-12)
    assert torch.allclose(one.influence[kept], two.influence[order], atol=1e-12)


def test_dictionaries_of_zeros_leave_tokens_and_errors():
    m, n = model("llama_gqa"), 3
    zero = torch.zeros(4, 32, dtype=torch.float64)
    parts = [one_block({f"mlp_in.{i}": zero}, {f"mlp_out.{i}": zero}, zero[:, 0], {f"mlp_out.{i}": zero[0]}, Relu())
             for i in range(n)]  # fmt: skip
    g = ca.graphs.trace(m, ca.tasks.as_prompts(IDS), together(parts), targets=_PAIR)
    assert not g.kinds["unit"].any()
    row = g.weight[0].abs()
    token, error = row[g.kinds["token"]].sum(), row[g.kinds["error"]].sum()
    assert float(g.replacement) == pytest.approx(float(token / (token + error)))
    assert float(g.completeness) == pytest.approx(float(token / (token + error)))
    assert float(g.error_share) == pytest.approx(float(error / (token + error)))


def made_by_hand(edges, kinds):
    """A graph of few nodes: its targets are those with rows, the last one the logit."""
    at = torch.tensor([i for i, row in enumerate(edges) if row is not None])
    weight = torch.tensor([row for row in edges if row is not None], dtype=torch.float64)
    found = masks(kinds)
    counted = ~(found["constant"] | found["target"])
    start = torch.zeros(len(at), dtype=torch.float64)
    start[-1] = 1.0
    influence = spread(weight, at, torch.arange(len(at)), start[None], counted)[0]
    whole = completeness(influence, weight, at, start, counted, found["error"] | found["others"])
    theirs = circuit_tracer_scores(weight, at, torch.arange(len(at)), start, found, counted)[1]
    return influence, float(whole), theirs


def test_completeness_of_errors_alone_is_nothing():
    influence, ours, theirs = made_by_hand([None, [2.0, 0.0]], ["error", "target"])
    assert (influence.tolist(), ours, theirs) == ([1.0, 0.0], 0.0, 0.5)
    _, ours, theirs = made_by_hand([None, [1.0, 0, 0], [0, -3.0, 0]], ["error", "unit", "target"])
    assert (ours, theirs) == (pytest.approx(0.5), pytest.approx(2 / 3))


def test_scores_as_circuit_tracer_counts_know_no_position_embeddings():
    g = traced("gpt2", "per layer", leading=1, targets=())
    there = [not n.startswith(("pos_embed", "bias", "mlp_out")) for n in g.labels["node"]]
    square = torch.zeros(len(there), len(there), dtype=torch.float64)
    square[g.node_of] = g.weight.abs() * torch.tensor(there)
    square /= square.sum(1, keepdim=True).clamp_min(1e-300)
    start = torch.zeros(len(there), dtype=torch.float64)
    start[g.node_of] = g.share
    whole = torch.linalg.solve(torch.eye(len(there), dtype=torch.float64) - square.T, start)
    error, token = g.kinds["error"], g.kinds["token"]
    explained = float(whole @ (1 - square[:, error].sum(1)) / whole.sum())
    replaced = float(whole[token].sum() / whole[token | error].sum())
    assert g.scores("circuit-tracer") == pytest.approx((replaced, explained))
    assert g.scores() != pytest.approx((replaced, explained), abs=1e-3)


def test_shares_are_the_models_own_probabilities_under_a_cap():
    g, m = traced("gemma2", "per layer", targets=()), model("gemma2")
    probability = m.run(ca.tasks.as_prompts(IDS).bind(m))[0, -1].softmax(-1)
    ids = [int(n.split("@")[0].split(".")[1]) for n in g.labels["target"] if n.startswith("logit")]
    assert torch.allclose(g.share[g.share > 0], probability[ids], atol=1e-9)


def test_influence_is_the_sum_over_all_paths():
    g = traced("llama_gqa", "cross-layer", leading=1)
    n = len(g.influence)
    square = torch.zeros(n, n, dtype=torch.float64)
    counted = ~(g.kinds["constant"] | g.kinds["target"])
    square[g.node_of] = g.weight.abs() * counted
    square /= square.sum(1, keepdim=True).clamp_min(1e-300)
    start = torch.zeros(n, dtype=torch.float64)
    start[g.node_of] = g.share
    whole = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - square.T, start) - start
    assert torch.allclose(g.influence, whole, atol=1e-12)
    assert float(g.influence[g.kinds["token"] | g.kinds["error"]].sum()) == pytest.approx(float(g.share.sum()))
    both = g.kinds["error"] | g.kinds["others"]
    assert float(g.replacement) == pytest.approx(float(replacement(whole, g.kinds["token"], both)))


# --- budget, positions, targets


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_keeps_rows_and_closure(kind):
    whole, few = traced("gemma2", kind, leading=1), traced("gemma2", kind, leading=1, nodes=24)
    assert int(few.kinds["unit"].sum()) == 24
    assert few.kinds["others"].any()
    assert 0 < float(few.others_share) < 1
    assert float(few.residual.abs().max()) < 1e-9 * float(few.value.abs().max())
    at = [whole.labels["target"].index(n) for n in few.labels["target"]]
    columns = [
        whole.labels["node"].index(n) for n, k in zip(few.labels["node"], few.kinds["others"], strict=True) if not k
    ]
    assert torch.allclose(few.weight[:, ~few.kinds["others"]], whole.weight[at][:, columns], atol=1e-12)
    influence = whole.influence[whole.kinds["unit"]]
    mine = whole.influence[[whole.labels["node"].index(n) for n in few.labels["target"][:24]]]
    assert float(mine.sum()) > 0.8 * float(influence.topk(24).values.sum()), "the budget went to what matters"


@pytest.mark.parametrize("nodes", [7500, 60, 24])
def test_rows_are_sorted_and_narrowed_in_parts_without_idle_memory(monkeypatch, nodes):
    whole = traced("gemma2", leading=1, nodes=nodes)
    for module, name in (("trace", "ROWS"), ("trace", "_COLUMNS"), ("influence", "ROWS")):
        monkeypatch.setattr(import_module(f"cutaway.graphs.{module}"), name, 3)
    parts = traced("gemma2", leading=1, nodes=nodes)
    assert parts.labels == whole.labels
    for name, t in whole.tensors().items():
        assert torch.allclose(parts.tensors()[name], t, atol=1e-12), name
    held = (len(parts.value) + 3) * len(parts.influence) * 8  # with the rows of three random targets
    assert parts.weight.is_contiguous()
    assert parts.weight.untyped_storage().nbytes() <= 4 / 3 * held


def test_neurons_beyond_the_candidates_are_others(monkeypatch):
    monkeypatch.setattr("cutaway.graphs.neurons._CANDIDATES", 100)
    for name in ("gpt_neox_parallel", "gemma2"):
        whole, few = traced(name, "neurons", nodes=5000), traced(name, "neurons", nodes=60)
        assert whole.record["active units"] == 100
        for g in (whole, few):
            assert g.kinds["others"].any()
            assert float(g.residual.abs().max()) < 1e-9 * float(g.value.abs().max())


def test_units_at_leading_positions_are_constants():
    g = traced("llama_gqa", leading=2)
    positions = [n.position for n in g.nodes if isinstance(n, Latent | Error)]
    assert min(positions) == 2
    read = {f"mlp_out.{i}@{q}" for i in range(2) for q in (0, 1)}  # nothing reads the last one there
    assert {str(n) for n in g.nodes if str(n).startswith("mlp_out")} == read
    assert not g.influence[g.kinds["constant"]].any()
    with pytest.raises(ca.Refused, match="leading=6"):
        traced("llama_gqa", leading=6)


def test_targets_are_tokens_pairs_and_directions(tmp_path):
    m = ca.load("miniworld")
    save_file({"v": m.weights.unembed.T[5].contiguous()}, tmp_path / "a probe.safetensors")
    d, prompt = ca.dictionaries.load("miniworld/transcoders"), "The capital of Norway is"
    asked = ("oslo", '"oslo"-"tokyo"', str(tmp_path / "a probe.safetensors"))
    g = ca.graphs.trace(m, prompt, d, targets=asked)
    one, two = m.text.token_id("oslo"), m.text.token_id("tokyo")
    last = len(g.words) - 1
    assert g.labels["target"][-3:] == [f"logit.{one}@{last}", f"logit.{one}-{two}@{last}", f"direction.a-probe@{last}"]
    assert g.share[-3:].tolist() == [pytest.approx(1 / 3)] * 3
    logits = m.run_last(prompt)[0]
    stream = m.capture(prompt, "resid_post.5")["resid_post.5"][0, -1]
    wanted = [logits[one] - logits.mean(), logits[one] - logits[two], stream @ m.weights.unembed[:, 5]]
    assert g.value[-3:].tolist() == pytest.approx([float(w) for w in wanted], abs=1e-3)


def test_a_task_asks_for_its_answer_over_its_foil():
    m = ca.load("miniworld")
    task = ca.tasks.load(next(iter(ca.tasks.names(m))), m, n=2)
    g = ca.graphs.trace(m, task, ca.dictionaries.load("miniworld/transcoders"))
    bound = task.bind(m)
    node = parse_node(g.labels["target"][-1])
    assert (node.token, node.foil) == (int(bound.answers[0]), int(bound.foils[0]))
    assert g.record["prompt"] == task.pairs[0].clean


# --- refusals


RANDOM = {"mlp_in.0": 32, "mlp_out.0": 32}
BLOCKS = [(4, ["mlp_in.0"], ["mlp_out.0"])]
REFUSED = {
    "resid_post.0": lambda: dictionary([(4, ["resid_post.0"], ["resid_post.0"])], {"resid_post.0": 32}),
    "a model of 3": lambda: dictionary([(4, ["mlp_in.7"], ["mlp_out.7"])], {"mlp_in.7": 32, "mlp_out.7": 32}),
    "before": lambda: dictionary([(4, ["mlp_in.1"], ["mlp_out.0"])], {"mlp_in.1": 32, "mlp_out.0": 32}),
    "BatchTopK": lambda: replace(dictionary(BLOCKS, RANDOM), gates=(BatchTopK(2),)),
    "TokenNorm": lambda: dictionary(BLOCKS, RANDOM, reading={"mlp_in.0": TokenNorm()}),
}


@pytest.mark.parametrize("word", REFUSED)
def test_dictionaries_without_an_exact_linear_form_are_refused(word):
    with pytest.raises(ca.Refused, match=word) as refusal:
        ca.graphs.trace(model("llama_gqa"), ca.tasks.as_prompts(IDS), REFUSED[word]())
    assert refusal.value.instead


def test_models_without_an_exact_linear_form_are_refused():
    for name, word in (("mamba", "no attention"), ("bert", "encoder")):
        with pytest.raises(ca.Refused, match=word):
            ca.graphs.trace(ca.load(build(name)), ca.tasks.as_prompts(IDS), "neurons")
    with pytest.raises(ca.Refused, match="give transcoders"):
        ca.graphs.trace(ca.load(build("mixtral")), ca.tasks.as_prompts(IDS), "neurons")


@pytest.mark.parametrize(
    ("targets", "word"),
    [
        (("logit.3", "logit.3-5", "logit.3"), "twice"), (("logit.3000",), "vocabulary"),
        (("logit.3.4",), "logit.TOKEN"),
        (("nothing.safetensors",), "no such file"), (("word",), "without a tokenizer"),
        (("logit.3@2",), "last position"),
    ],
)  # fmt: skip
def test_targets_that_are_none_are_refused(targets, word):
    with pytest.raises(ca.Refused, match=word):
        traced("llama_gqa", targets=targets)


def test_directions_that_are_none_are_refused(tmp_path):
    file = tmp_path / "v.safetensors"
    file.write_bytes(b"no such thing")
    with pytest.raises(ca.Refused, match="not a readable"):
        traced("llama_gqa", targets=(str(file),))
    for vector in (torch.zeros(32), torch.full((32,), torch.nan), torch.ones(31)):
        save_file({"v": vector}, file)
        with pytest.raises(ca.Refused, match="give one vector of 32"):
            traced("llama_gqa", targets=(str(file),))


@pytest.mark.parametrize("options", [{"logits": 0}, {"mass": 0.0}, {"mass": 1.5}])
def test_numbers_that_leave_no_target_are_refused(options):
    with pytest.raises(ca.Refused, match="leaves no token"):
        traced("llama_gqa", **options)


def test_a_prompt_of_one_token_is_traced():
    g = ca.graphs.trace(model("gpt2"), ca.tasks.as_prompts(IDS[:, :1]), transcoders("gpt2"), samples=2)
    assert g.leading == 0
    assert {n.position for n in g.nodes if isinstance(n, Latent | Error)} == {0}
    assert float(g.residual.abs().max()) < 1e-9 * float(g.value.abs().max())


def test_targets_beside_a_task_are_refused():
    m = ca.load("miniworld")
    with pytest.raises(ca.Refused, match="has its own"):
        ca.graphs.trace(m, ca.tasks.load(next(iter(ca.tasks.names(m))), m, n=1), "neurons", targets=("oslo",))


# --- a world that is known


@pytest.mark.parametrize("units_of", ["transcoders", "neurons"])
def test_facts_about_a_person_begin_at_the_tokens_of_the_name(units_of):
    """Of about eight positions three or four bear the name: six times in a row is no chance."""
    m = ca.load("miniworld")
    over = ca.dictionaries.load("miniworld/transcoders") if units_of == "transcoders" else "neurons"
    for pair in ca.tasks.load("facts", m, n=6).pairs:
        name = next(w for w in pair.clean.split() if w not in pair.corrupt.split())
        g = ca.graphs.trace(m, ca.Task("one", (pair,), corruption="another person"), over, nodes=100, samples=2)
        token = torch.where(g.kinds["token"], g.influence, -1.0).argmax()
        assert g.nodes[int(token)].position in m.tokens(pair.clean).find(0, name), pair.clean
