"""QK attribution: pairs that hooks by hand measure, sums that are the model's scores, and what is refused."""

import pytest
import torch

import cutaway as ca
from cutaway.graphs import Neurons
from tests.graphs.made import FAMILIES, IDS, FrozenByHand, contribution, model, transcoders

PROMPTS = ca.tasks.as_prompts(IDS)


def asked(name, kind="plain", **options):
    units = Neurons() if kind == "neurons" else transcoders(name, kind)
    return ca.graphs.qk(model(name), PROMPTS, units, **{"head": "2.1", "key": 2, "leading": 1, "samples": 2, **options})


@pytest.mark.parametrize("kind", ["per layer", "cross-layer", "neurons"])
@pytest.mark.parametrize("name", [*FAMILIES, "gemma3", "mistral_window"])
def test_pairs_sum_to_the_score_and_their_contrast_to_its_difference_from_all_keys(name, kind):
    found = asked(name, kind, top=7)
    acts = model(name).capture(IDS, ["scores", "pattern"])
    own, scores = found.score[found.score.isfinite()], acts["scores.2"][0, 1, -1]
    if (cap := found.record["soft cap"]) is not None:
        own = cap * torch.tanh(own / cap)
    assert torch.allclose(own, scores[-len(own) :], atol=1e-10, rtol=0)
    total, apart = found.pair.sum() + found.rest, found.contrast.sum() + found.rest_contrast
    assert abs(float(found.residual)) < 1e-10
    assert float(total) == pytest.approx(float(found.score[2]), abs=1e-10)
    assert float(apart) == pytest.approx(float(found.score[2] - found.score.nanmean()), abs=1e-10)
    assert torch.equal(found.pattern, acts["pattern.2"][0, 1, -1].double())
    assert float(found.contrast.std()) > 0


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_parallel", "llama_gqa", "qwen3", "granite"])
def test_pairs_are_products_of_queries_and_keys_that_hooks_move_in_the_frozen_model(name):
    """Rotary positions, norms of queries and keys and shared key heads are those of the model itself."""
    m, d, found = model(name), transcoders(name, "plain"), asked(name, top=200)
    g = ca.graphs.trace(m, PROMPTS, d, leading=1, samples=1)
    by_hand = FrozenByHand(m, {}, 1)
    start, group = by_hand.seen, m.shape.n_heads // m.shape.n_kv_heads
    moved = {}
    for name_of in {*found.labels["query_node"][:4], *found.labels["key_node"][:4]}:
        if not name_of.startswith(("embed", "latent", "error")):
            continue
        by_hand.reads(contribution(g, m, d, by_hand, g.labels["node"].index(name_of)))
        moved[name_of] = [(by_hand.seen[f"{s}.2"] - start[f"{s}.2"])[0] for s in "qk"]
    scale = found.record["scale"]
    assert len(moved) > 3
    for one, (q, _) in moved.items():
        for other, (_, k) in moved.items():
            if one in found.labels["query_node"] and other in found.labels["key_node"]:
                wanted = scale * float(q[-1, 1] @ k[2, 1 // group])
                got = found.pair[found.labels["query_node"].index(one), found.labels["key_node"].index(other)]
                assert float(got) == pytest.approx(wanted, abs=1e-9)


def test_in_the_first_layer_tokens_are_all_there_is():
    found = asked("llama_gqa", head="0.3", key=1)
    assert found.labels["query_node"] == ["embed@5"]
    at = found.labels["key_node"].index("embed@1")
    assert float(found.pair[0, at]) == pytest.approx(float(found.score[1]), abs=1e-12)
    others = [i for i in range(len(found.labels["key_node"])) if i != at]
    assert float(found.pair[0, others].abs().max()) == 0.0  # other tokens count by contrast alone
    assert float(found.rest) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", ["llama_gqa", "gemma2"])
def test_what_a_key_loses_is_what_an_edit_of_the_scores_changes(name):
    m, found = model(name), asked(name, top=3)
    acts = m.capture(IDS, ["scores", "pattern"])
    cap, score = found.record["soft cap"], found.score[2]
    for i in range(3):
        for j in range(3):
            scores = acts["scores.2"].clone()
            left = score - found.pair[i, j]
            scores[0, 1, -1, 2] = left if cap is None else cap * torch.tanh(left / cap)
            new = m.capture(IDS, "pattern.2", [ca.edits.Replace("scores.2", scores)])["pattern.2"][0, 1, -1, 2]
            assert float(found.lost[i, j]) == pytest.approx(float(found.pattern[2] - new), abs=1e-7)
    assert float(found.lost.abs().max()) > 1e-5


def test_the_head_that_looks_most_is_asked_by_default():
    found = asked("llama_gqa", head="", key=None)
    acts = model("llama_gqa").capture(IDS, "pattern")
    every = torch.stack([acts[f"pattern.{i}"][0, :, -1, 1:-1] for i in range(3)])
    assert float(found.pattern[int(found.record["key"].split()[0])]) == pytest.approx(float(every.max()))


def test_the_null_keeps_the_lengths_of_what_it_stands_for():
    found = asked("llama_gqa", samples=400, seed=3)
    spread = found.pair_null.pow(2).mean(-1).sqrt() * model("llama_gqa").shape.d_head ** 0.5
    assert (found.pair.abs() <= spread * 1.3).all()  # no product is larger than that of the lengths
    assert float(found.pair_null.mean(-1).abs().max()) < float(spread.max()) / 4


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("llama_gqa", {"head": "2.9"}, "2.9"), ("llama_gqa", {"head": "2.*"}, "4 heads"),
        ("llama_gqa", {"query": 9}, "6 tokens"), ("llama_gqa", {"key": 6}, "keys 0 to 5"),
        ("llama_gqa", {"query": 0, "key": 0}, "one key alone"), ("llama_gqa", {"top": 0}, "has a part"),
        ("bloom", {}, "distances"), ("cohere", {}, "the norm of its q"), ("stablelm_parallel", {}, "the norm of its q"),
    ],
)  # fmt: skip
def test_what_is_no_product_of_a_query_and_a_key_is_refused(name, options, word):
    with pytest.raises(ca.Refused, match=word):
        asked(name, **options)
