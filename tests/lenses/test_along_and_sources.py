"""The accumulated residual and the sources of heads: by hand, and as sums of direct attribution."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from tests.conformance import subjects
from tests.lenses.plain import WIRING, frozen, output_rows, run
from tests.models.common import widely
from tests.models.tiny import CONFIGS


def _keep(values: list[torch.Tensor], module: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
    values.append(out.detach().double()[0])


SUMS = [n for n in CONFIGS if n != "bert"]


def reading(hf, w, answer: int, foil: int):
    """The unembedding's direction, and what the final norm's and the unembedding's biases say along it."""
    final, head = hf.get_submodule(w.final), hf.get_submodule(w.head)
    weight = head.weight.detach().double()
    read = (weight[answer] - weight[foil]) * w.scale
    constant = getattr(final, "bias", None)
    offset = float(constant.detach().double() @ read) if constant is not None else 0.0
    bias = getattr(head, "bias", None)
    return final, read, offset + (float(bias[answer] - bias[foil]) * w.scale if bias is not None else 0.0)


@pytest.mark.parametrize("name", list(WIRING))
def test_every_depth_by_hand(name):
    model, task, w = subjects.family(name), subjects.numbered_task(True), WIRING[name]
    got = ca.lenses.accumulated_residual(model, task, samples=1)
    rows = []
    for n, pair in enumerate(task.pairs):
        r = run(model.hf, w, torch.tensor([[int(x[1:]) for x in pair.clean.split()]]))
        final, read, offset = reading(model.hf, w, int(pair.answer[1:]), int(pair.foil[1:]))
        rows.append([float(frozen(final, w, r.stream[-1], x) @ read) + offset for x in r.stream])
        assert float(got.total[n]) == pytest.approx(rows[-1][-1], abs=1e-4)
    assert got.effect.tolist() == pytest.approx(torch.tensor(rows).mean(0).tolist(), abs=1e-5)


@pytest.mark.parametrize("name", widely(SUMS))
def test_steps_of_the_curve_and_sums_of_sources_are_direct_shares(name):
    model, task = subjects.family(name), subjects.numbered_task(True)
    got = ca.lenses.accumulated_residual(model, task, mid=True, each_position=True, samples=2)
    direct = ca.lenses.direct_attribution(model, task, samples=2)
    share = dict(zip(direct.labels["component"], direct.effect.tolist(), strict=True))
    for i in range(model.shape.n_layers):
        attention = sum(v for c, v in share.items() if c.startswith((f"head_out.{i}.", f"attn_bias.{i}")))
        before, mid, end = got.effect[2 * i : 2 * i + 3, -1].tolist()
        assert mid - before == pytest.approx(attention, abs=1e-5)
        assert end - mid == pytest.approx(share[f"mlp_out.{i}"], abs=1e-5)
    assert got.labels["layer"][:3] == ["embed", "0.mid", "0"]
    by_source = ca.lenses.source_attribution(model, task, samples=2)
    heads = torch.tensor([v for c, v in share.items() if c.startswith("head_out")])
    torch.testing.assert_close(by_source.effect.sum(1) + by_source.earlier, heads, atol=1e-6, rtol=0)
    torch.testing.assert_close(by_source.contribution, heads, atol=1e-6, rtol=0)
    assert len(got.labels["position"]) == 4


def test_other_positions_are_the_ends_of_shorter_prompts():
    """In a causal model, what is read at a position is what the prompt that ends there is read to say."""
    model = subjects.family("llama_gqa")
    text = subjects.numbered(5, 6, 7, 8)
    shorter = [subjects.numbered(*range(5, 6 + i)) for i in range(4)]
    whole = ca.lenses.accumulated_residual(model, ca.tasks.as_prompts(text), answer="w9", each_position=True, samples=1)
    each = [ca.lenses.accumulated_residual(model, ca.tasks.as_prompts(t), answer="w9", samples=1) for t in shorter]
    torch.testing.assert_close(whole.effect, torch.stack([e.effect for e in each], -1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2"])
def test_sources_by_hand(name):
    """Attention of the eager forward times hooked values, in float64, through W_O, post-norm, final norm and head."""
    model, task, w = subjects.family(name), subjects.numbered_task(True), WIRING[name]
    got = ca.lenses.source_attribution(model, task, samples=1)
    heads, wanted = model.shape.n_heads, []
    for pair in task.pairs:
        ids = torch.tensor([[int(x[1:]) for x in pair.clean.split()]])
        r, values, handles = run(model.hf, w, ids), list[torch.Tensor](), []
        for block in model.hf.get_submodule(w.blocks):
            module = block.attn.c_attn if name == "gpt2" else block.self_attn.v_proj
            handles.append(module.register_forward_hook(partial(_keep, values)))
        before = model.hf.config._attn_implementation
        model.hf.set_attn_implementation("eager")
        with torch.no_grad():
            patterns = model.hf(ids, output_attentions=True).attentions
        model.hf.set_attn_implementation(before)
        for h in handles:
            h.remove()
        final, read, _ = reading(model.hf, w, int(pair.answer[1:]), int(pair.foil[1:]))
        rows = []
        for i, block in enumerate(model.hf.get_submodule(w.blocks)):
            v = values[i].chunk(3, -1)[2] if name == "gpt2" else values[i]
            v = v.unflatten(-1, (-1, model.shape.d_head)).repeat_interleave(heads // model.shape.n_kv_heads, 1)
            o = output_rows(block.get_submodule(w.o)).reshape(heads, model.shape.d_head, -1)
            for h in range(heads):
                parts = patterns[i][0, h, -1, :, None].double() * v[:, h] @ o[h]
                if w.after_attn:
                    parts = frozen(block.get_submodule(w.after_attn), w, r.attn[i], parts)
                rows.append(frozen(final, w, r.stream[-1], parts) @ read)
        wanted.append(torch.stack(rows))
    torch.testing.assert_close(got.effect, torch.stack([x[:, -4:] for x in wanted]).mean(0).float(), atol=1e-6, rtol=0)
    earlier = torch.stack([x[:, :-4].sum(1) for x in wanted]).mean(0).float()
    torch.testing.assert_close(got.earlier, earlier, atol=1e-6, rtol=0)


def test_the_rest_is_kept_as_one_sum():
    model, task = subjects.family("llama_gqa"), subjects.numbered_task(True)
    whole, some = (ca.lenses.source_attribution(model, task, top=top, samples=2) for top in (0, 1))
    torch.testing.assert_close(some.effect.sum(0), whole.effect.sum(0), atol=1e-6, rtol=0)
    every = torch.cat([whole.earlier[:, None], whole.effect], 1)
    torch.testing.assert_close(
        torch.cat([some.earlier[:, None], some.effect], 1)[0], every[every.abs().amax(1).argmax()]
    )


def test_values_that_are_not_the_models_are_refused(monkeypatch):
    from cutaway.models.access.capture import Activations

    get = Activations.__getitem__

    def wrong(self, key):
        return get(self, key) * (1.2 if str(key).startswith("v.1") else 1.0)

    monkeypatch.setattr(Activations, "__getitem__", wrong)
    with pytest.raises(Refused, match="miss the logits"):
        ca.lenses.source_attribution(subjects.family("llama_gqa"), subjects.numbered_task())


def test_models_without_attention_are_refused():
    model = subjects.family("mamba")
    with pytest.raises(Refused, match="no attention"):
        ca.lenses.source_attribution(model, subjects.numbered_task())
    with pytest.raises(Refused, match="no attention and no MLP"):
        ca.lenses.accumulated_residual(model, subjects.numbered_task(), mid=True)
