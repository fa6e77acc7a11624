"""Direct logit attribution: closure, single shares by hand, neurons, and what is kept together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.lenses import direct_attribution as module_function
from cutaway.tasks.task import Task
from tests.conformance import subjects
from tests.lenses.plain import WIRING, Wiring, frozen, output_rows, run
from tests.models.common import widely
from tests.models.tiny import CONFIGS

attribute = module_function
CAUSAL = [n for n in CONFIGS if n != "bert"]
MOE = ("mixtral", "qwen2_moe", "qwen3_moe")


def by_hand(hf: Any, w: Wiring, ids: list[int], answer: int, foil: int, heads: int) -> tuple[dict[str, float], float]:
    """Each component's share, by taking it out of the final stream with the norm's scale frozen; and the total."""
    r = run(hf, w, torch.tensor([ids]))
    final, head = hf.get_submodule(w.final), hf.get_submodule(w.head)
    weight = head.weight.detach().double()
    read = (weight[answer] - weight[foil]) * w.scale
    whole = frozen(final, w, r.stream[-1], r.stream[-1]) @ read

    def share(part: torch.Tensor) -> float:
        return float(whole - frozen(final, w, r.stream[-1], r.stream[-1] - part) @ read)

    out = {"embed": share(r.stream[0] if r.position is None else r.stream[0] - r.position)}
    if r.position is not None:
        out["pos_embed"] = share(r.position)
    for i, block in enumerate(hf.get_submodule(w.blocks)):
        o, rows = block.get_submodule(w.o), r.z[i].reshape(heads, -1)
        parts = torch.einsum("hk,hkd->hd", rows, output_rows(o).reshape(heads, rows.shape[1], -1))
        bias = o.bias.detach().double() if o.bias is not None else torch.zeros_like(parts[0])
        if w.after_attn:
            norm = block.get_submodule(w.after_attn)
            parts, bias = (frozen(norm, w, r.attn[i], x) for x in (parts, bias))
        out |= {f"head_out.{i}.{h}": share(part) for h, part in enumerate(parts)}
        out[f"attn_bias.{i}"] = share(bias)
        out[f"mlp_out.{i}"] = share(r.mlp[i])
    constant = getattr(final, "bias", None)
    biases = [b[answer] - b[foil] for b in (getattr(head, "bias", None),) if b is not None]
    out["final bias"] = float(sum(biases) * w.scale if biases else 0.0)
    out["final bias"] += float(constant.detach().double() @ read) if constant is not None else 0.0
    logits = torch.atanh(r.logits / w.cap) * w.cap if w.cap else r.logits
    return out, float(logits[answer] - logits[foil])


@pytest.mark.parametrize("name", list(WIRING))
@pytest.mark.parametrize("uneven", [False, True])
def test_single_shares_by_hand(name, uneven):
    model, task = subjects.family(name), subjects.numbered_task(uneven)
    got = attribute(model, task, samples=2)
    rows = []
    for n, pair in enumerate(task.pairs):
        ids, answer, foil = [int(x[1:]) for x in pair.clean.split()], int(pair.answer[1:]), int(pair.foil[1:])
        shares, total = by_hand(model.hf, WIRING[name], ids, answer, foil, model.shape.n_heads)
        assert sum(shares.values()) == pytest.approx(total, abs=1e-5), "the hand itself does not close"
        assert float(got.total[n]) == pytest.approx(total, abs=1e-4)
        rows.append(shares)
    assert set(got.labels["component"]) == set(rows[0])
    for component, effect in zip(got.labels["component"], got.effect.tolist(), strict=True):
        assert effect == pytest.approx(sum(r[component] for r in rows) / len(rows), abs=1e-5), component


@pytest.mark.parametrize("name", widely(CAUSAL))
@pytest.mark.parametrize("neurons", [False, True])
def test_shares_close_in_every_family(name, neurons):
    got = attribute(subjects.family(name), subjects.numbered_task(), neurons=neurons, samples=1)
    size = float(got.total.abs().max())
    assert float(got.residual.abs().max()) <= 1e-4 * size
    assert float(got.effect.sum()) == pytest.approx(float(got.total.mean()), abs=1e-4 * size)
    assert got.record["closure"]["largest residual"] == pytest.approx(float(got.residual.abs().max()))


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "olmo2", "cohere", "gpt_neox_parallel", "granite"])
def test_neurons_sum_to_their_mlp(name):
    model, task = subjects.family(name), subjects.numbered_task()
    whole, split = attribute(model, task, samples=2), attribute(model, task, neurons=True, samples=2)
    effect = dict(zip(whole.labels["component"], whole.effect.tolist(), strict=True))
    for i in range(model.shape.n_layers):
        mine = [n for n, c in enumerate(split.labels["component"]) if c.startswith((f"mlp_post.{i}.", f"mlp_bias.{i}"))]
        assert len(mine) == model.shape.d_mlp + 1
        assert float(split.effect[mine].sum()) == pytest.approx(effect[f"mlp_out.{i}"], abs=1e-5)
    rest = [c for c in effect if not c.startswith("mlp_out")]
    for c in rest:
        assert float(split.effect[split.labels["component"].index(c)]) == pytest.approx(effect[c], abs=1e-6)


@pytest.mark.parametrize("top", [1, 5, 10_000])
def test_the_rest_is_kept_as_one_sum(top):
    model, task = subjects.family("llama_gqa"), subjects.numbered_task()
    whole, some = attribute(model, task), attribute(model, task, top=top)
    assert len(some.effect) == min(top + 1, len(whole.effect))
    torch.testing.assert_close(some.effect.sum(), whole.effect.sum(), atol=1e-5, rtol=0)
    torch.testing.assert_close(some.null.sum(0), whole.null.sum(0), atol=1e-5, rtol=0)
    kept = sorted(whole.effect.abs().tolist(), reverse=True)[:top]
    assert some.effect[:top].abs().tolist() == pytest.approx(kept)
    if top < len(whole.effect):
        assert some.labels["component"][-1] == f"{len(whole.effect) - top} others"


def test_logits_beyond_the_cap_still_close():
    """Where the cap is nearly reached its inverse loses digits; the shares must be held to the uncapped logits."""
    from cutaway.models.model import Model
    from tests.models.tiny import V, build

    hf = build("gemma2")
    with torch.no_grad():
        hf.lm_head.weight.mul_(400)
    got = attribute(Model(hf, subjects.word_tokenizer(V), "capped"), subjects.numbered_task(), samples=1)
    assert float(got.total.abs().max()) > 20
    assert float(got.residual.abs().max()) <= 1e-4 * float(got.total.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    got = attribute(subjects.family("llama_gqa", dtype), subjects.numbered_task(), samples=1)
    exact = attribute(subjects.family("llama_gqa"), subjects.numbered_task(), samples=1)
    assert got.effect.dtype == torch.float32
    torch.testing.assert_close(got.effect, exact.effect, atol=0.1 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_shares_that_miss_the_logits_are_refused(monkeypatch):
    from cutaway.models.anatomy.weights import Weights

    view = vars(Weights)["o"]
    monkeypatch.setattr(view, "of", lambda weights, layer, of=view.of: of(weights, layer) * 1.1)
    with pytest.raises(Refused, match="miss the logits"):
        attribute(subjects.family("llama_gqa"), subjects.numbered_task())


def test_the_null_reads_toward_other_tokens_of_the_same_runs():
    model, task = subjects.miniworld(), ca.tasks.load("ioi", subjects.miniworld(), 16)
    got = attribute(model, task, samples=40)
    closed = got.null.sum(0)
    assert closed.std() > 0.5, "each sample closes on the logit difference of another pair of tokens"
    assert float(got.effect.sum()) > float(closed.abs().max()), "the answer is further apart than random tokens"


def test_a_single_prompt_has_shares_and_says_why_it_has_no_interval():
    got = attribute(subjects.family("gpt2"), Task("one", subjects.numbered_task().pairs[:1]))
    assert got.interval.isnan().all()
    assert got.reasons == {"effect": "one prompt"}
