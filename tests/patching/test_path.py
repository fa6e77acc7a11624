"""Path patching against two or three plain runs with hooks, and against what it must equal."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.core.stats import mean_interval
from cutaway.models.model import Model
from cutaway.patching import activation, path
from cutaway.patching.path import receivers
from cutaway.tasks.task import Task
from tests.conformance.subjects import llama_task, miniworld, random_llama, tokenizer, told, uneven_task
from tests.models.tiny import CONFIGS


@cache
def llama():
    return random_llama()


@cache
def of_family(name, spread=1.0):
    """A tiny random model of a family with the tokenizer of the Llama; `spread` makes attention less uniform."""
    import transformers as tf

    kind, sizes = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = tf.AutoModelForCausalLM.from_config(getattr(tf, kind)(**{**sizes, "vocab_size": len(tokenizer())})).eval()
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim > 1 and spread != 1.0:
                p.mul_(spread)
    return Model(hf, tokenizer(), name)


class Hand:
    """The random Llama by plain hooks: what passes its maps, and runs in which some of it is put in by hand."""

    def __init__(self, model):
        self.hf, self.layers, self.d = model.hf, model.hf.model.layers, model.shape.d_head

    def modules(self):
        """Name → (module, whether its input is meant)."""
        named = {"final": (self.hf.model.norm, True)}
        for i, block in enumerate(self.layers):
            named |= {("z", i): (block.self_attn.o_proj, True), ("q", i): (block.self_attn.q_proj, False),
                      ("v", i): (block.self_attn.v_proj, False), ("mlp_out", i): (block.mlp, False),
                      ("mlp_in", i): (block.mlp, True), ("ln1", i): (block.input_layernorm, True),
                      ("resid_pre", i): (block, True), ("attn_in", i): (block.input_layernorm, False),
                      ("ln2", i): (block.post_attention_layernorm, True)}  # fmt: skip
        return named

    def run(self, ids, put=()):
        """Last logits, and everything that passed; `put` maps a name to what is made of its tensor."""
        seen, put = {}, dict(put)

        def before(name):
            def hook(module, args):
                x = put[name](args[0].clone()) if name in put else args[0]
                seen[name] = x.clone()
                return (x,)

            return hook

        def after(name):
            def hook(module, args, out):
                y = put[name](out.clone()) if name in put else out
                seen[name] = y.clone()
                return y

            return hook

        def scaled(name):
            """A norm with the divisor of another vector."""

            def hook(module, args, out):
                x, other = args[0].pow(2).mean(-1, keepdim=True), put["scale", name]
                eps = module.variance_epsilon
                return out * ((x + eps) / (other.pow(2).mean(-1, keepdim=True) + eps)).sqrt()

            return hook

        with ExitStack() as stack, torch.no_grad():
            for name, (module, inside) in self.modules().items():
                if ("scale", name) in put:
                    stack.callback(module.register_forward_hook(scaled(name)).remove)
                hook = module.register_forward_pre_hook(before(name)) if inside else None
                stack.callback((hook or module.register_forward_hook(after(name))).remove)
            return self.hf(ids).logits[:, -1], seen

    def head(self, h, value):
        """Put in one head's part."""

        def change(x):
            x[..., h * self.d : (h + 1) * self.d] = value[..., h * self.d : (h + 1) * self.d]
            return x

        return change

    def frozen(self, own, sender, value, mlps, norms):
        """The first run: the sender (an MLP if it names no head) changed, all other heads (and what is named) held."""
        layer, h = sender
        put: dict[Any, Any] = {("z", j): (lambda x, j=j: own["z", j]) for j in range(2)}
        if mlps:
            put |= {("mlp_out", j): (lambda x, j=j: own["mlp_out", j]) for j in range(2)}
        if h is None:
            put["mlp_out", layer] = lambda x: value
        else:
            put["z", layer] = lambda x: self.head(h, value)(own["z", layer].clone())
        if norms:
            put |= {("scale", n): own[n] for n in [("ln1", 0), ("ln1", 1), ("ln2", 0), ("ln2", 1), "final"]}
        return put


FREEZE = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize(("mlps", "norms"), FREEZE)
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_paths_to_the_logits_equal_the_definition(mlps, norms, direction):
    model, task = llama(), llama_task()
    bound, hand = task.bind(model), Hand(model)
    target, giver = (bound.clean, bound.corrupt) if direction == "noise" else (bound.corrupt, bound.clean)
    (base, own), (_, other) = (hand.run(t.ids) for t in (target, giver))
    want, answer = torch.zeros(2, 4, len(bound)), torch.zeros(2, 4, len(bound))
    for sender in [(i, h) for i in range(2) for h in range(4)]:
        got, _ = hand.run(target.ids, hand.frozen(own, sender, other["z", sender[0]], mlps, norms))
        want[sender] = bound.metric(got) - bound.metric(base)
        answer[sender] = (got - base).gather(1, bound.answers[:, None])[:, 0]
    result = path(model, task, direction=direction, freeze_mlps=mlps, freeze_norms=norms, samples=1)
    assert torch.allclose(result.effect, want.mean(-1), atol=1e-4)
    share = answer / base.gather(1, bound.answers[:, None])[:, 0].abs()
    assert torch.allclose(result.relative, share.mean(-1), atol=1e-4)
    assert torch.allclose(result.relative_interval, mean_interval(share.movedim(-1, 0)), atol=1e-3)
    assert result.effect.abs().min() > 1e-4


@pytest.mark.parametrize(("mlps", "norms"), FREEZE)
@pytest.mark.parametrize("receiver", ["logits", "q.1.2", "mlp_in.1"])
def test_mlps_send_by_the_same_definition(mlps, norms, receiver):
    model, task = llama(), llama_task()
    bound, hand = task.bind(model), Hand(model)
    (base, own), (_, other) = (hand.run(t.ids) for t in (bound.clean, bound.corrupt))
    want, layers = torch.zeros(2, len(bound)), range(2 if receiver == "logits" else 1)
    for i in layers:
        put = hand.frozen(own, (i, None), other["mlp_out", i], mlps, norms)
        got, heard = hand.run(bound.clean.ids, put)
        if receiver == "q.1.2":
            got, _ = hand.run(bound.clean.ids, {("q", 1): hand.head(2, heard["q", 1])})
        elif receiver == "mlp_in.1":
            got, _ = hand.run(bound.clean.ids, {("mlp_in", 1): lambda x, heard=heard: heard["mlp_in", 1]})
        want[i] = bound.metric(got) - bound.metric(base)
    result = path(model, task, receiver=receiver, senders="mlps", freeze_mlps=mlps, freeze_norms=norms, samples=1)
    assert result.axes()["effect"] == ("layer",)
    assert torch.allclose(result.effect, want.mean(-1), atol=1e-4)
    assert result.effect[0].abs() > 1e-5
    assert result.record["frozen"][0] == "heads"
    with pytest.raises(Refused, match="no MLP comes before it"):
        path(model, task, receiver="q.0.1,mlp_in.0", senders="mlps")


def test_a_set_of_answers_counts_by_all_its_logits():
    plain = llama_task()
    pairs = tuple(replace(p, answers=(p.answer, "book", "letter"), foils=(p.foil,)) for p in plain)
    model, task = llama(), Task("sets", pairs)
    bound, hand = task.bind(model), Hand(model)
    (base, own), (_, other) = (hand.run(t.ids) for t in (bound.clean, bound.corrupt))
    got, _ = hand.run(bound.clean.ids, hand.frozen(own, (0, 1), other["z", 0], False, False))
    assert bound.answer_sets is not None
    before, after = (x.gather(1, bound.answer_sets).exp().sum(1).log() for x in (base, got))
    result = path(model, task, samples=1)
    assert torch.allclose(result.relative[0, 1], ((after - before) / before.abs()).mean(), atol=1e-4)
    assert result.record["least |logit|"] == pytest.approx(float(before.abs().min()), abs=1e-4)


def test_truth_on_miniworld_arithmetic_heads_hear_the_operator():
    """Without an operator few heads change the sum's logit, and the one that most do is found in all prompts."""
    model = miniworld()
    task = ca.tasks.load("arithmetic", model, 12, corruption="no_operator")
    result = path(model, task, samples=2)
    low = result.relative.flatten().argmin()
    assert result.relative.flatten()[low] < -0.05  # the paper's threshold of a key head
    assert result.relative_interval.flatten(0, 1)[low, 1] < 0
    assert (result.relative < -0.05).sum() <= 6
    assert path(model, task, senders="mlps", samples=1).relative.shape == (6,)


@pytest.mark.parametrize(("mlps", "norms"), FREEZE)
@pytest.mark.parametrize(
    ("receiver", "place"),
    [
        ("q.1.2", ("q", 1)),
        ("v.1.1", ("v", 1)),
        ("mlp_in.1", ("mlp_in", 1)),
        ("attn_in.1", ("attn_in", 1)),
        ("resid_pre.1", ("resid_pre", 1)),
    ],
)
def test_paths_to_a_receiver_equal_the_definition(mlps, norms, receiver, place):
    """Queries are put in before their rotation here and after it there, which is the same."""
    model, task = llama(), llama_task()
    bound, hand = task.bind(model), Hand(model)
    (base, own), (_, other) = (hand.run(t.ids) for t in (bound.clean, bound.corrupt))
    want = torch.zeros(2, 4, len(bound))
    for sender in [(i, h) for i in range(2) for h in range(4)]:
        _, heard = hand.run(bound.clean.ids, hand.frozen(own, sender, other["z", sender[0]], mlps, norms))
        unit = receiver.split(".")[2:]
        whole = hand.head(int(unit[0]), heard[place]) if unit else lambda x, heard=heard: heard[place]
        got, _ = hand.run(bound.clean.ids, {place: whole})
        want[sender] = bound.metric(got) - bound.metric(base)
    result = path(model, task, receiver=receiver, freeze_mlps=mlps, freeze_norms=norms, samples=1)
    assert torch.allclose(result.effect, want.mean(-1), atol=1e-4)
    assert result.effect[0].abs().min() > 1e-5
    silent = result.effect[1].abs().max()
    assert silent > 1e-5 if place[0] == "mlp_in" else silent == 0  # a head of layer 1 comes too late for others there
    assert result.record["receiver"] == [receiver]


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gpt_neox_parallel", "cohere"])
def test_with_all_frozen_paths_to_the_logits_are_direct_attributions(family):
    model, task = of_family(family), llama_task()
    bound = task.bind(model)
    end, final = f"resid_post.{model.shape.n_layers - 1}", model.anatomy.top("final")
    assert final is not None
    own, other = (model.capture(t, ["z", end]) for t in (bound.clean, bound.corrupt))
    norm = model.anatomy.norm(final)
    scale, rows = norm.scale(own[f"{end}@-1"]), torch.arange(len(bound))
    want = torch.zeros(model.shape.n_layers, model.shape.n_heads)
    for i in range(model.shape.n_layers):
        step = other[f"z.{i}@-1"] - own[f"z.{i}@-1"]
        written = torch.einsum("bhe,hed->bhd", step, model.weights.o[i].detach())
        logits = norm.linear(written, scale[:, None].expand(written.shape[:2])) @ model.weights.unembed.detach()
        want[i] = (logits[rows, :, bound.answers] - logits[rows, :, bound.foils]).mean(0)
    result = path(model, task, freeze_mlps=True, freeze_norms=True, samples=1)
    assert torch.allclose(result.effect, want, atol=1e-4 * float(want.abs().max()) + 1e-6)


@pytest.mark.parametrize("task", [llama_task(), uneven_task()], ids=["even", "uneven"])
def test_from_the_last_layer_nothing_but_the_direct_path_is_left(task):
    paths, whole = path(llama(), task, samples=1), activation(llama(), task, site="z", direction="noise", samples=1)
    assert torch.allclose(paths.effect[-1], whole.effect[-1], atol=1e-4)
    assert torch.allclose(paths.interval[-1], whole.interval[-1], atol=1e-4)
    assert not torch.allclose(paths.effect[0], whole.effect[0], atol=1e-3)


@pytest.mark.parametrize("task", [llama_task(), uneven_task()], ids=["even", "uneven"])
@pytest.mark.parametrize("senders", ["heads", "mlps"])
def test_between_frozen_heads_only_the_last_position_runs_again(task, senders, monkeypatch):
    end = path(llama(), task, senders=senders, samples=2)
    monkeypatch.setattr(sys.modules["cutaway.patching.path"], "_read_at_end", lambda *_: False)
    whole = path(llama(), task, senders=senders, samples=2)
    for a, b in ((end.effect, whole.effect), (end.null, whole.null), (end.relative_interval, whole.relative_interval)):
        assert torch.allclose(a, b, atol=1e-5)
    spent, most = (x.record["cost"]["forwards"] for x in (end, whole))
    assert spent < most or (len(task) == 3 and spent == most)  # so few prompts of several lengths run in their padding


def test_a_metric_of_other_positions_hears_all_that_is_sent():
    """Between frozen heads, what is sent where the corruption begins arrives there, and not at the end."""
    model, plain = llama(), llama_task()
    early = int(plain.bind(model).changed.int().argmax(1).max())
    heard = path(
        model, replace(plain, metric=ca.tasks.activation(f"resid_post.1@{early}", torch.randn(model.shape.d_model)))
    )
    assert heard.effect.abs().min() > 1e-5


@pytest.mark.parametrize("task", [llama_task(), uneven_task()], ids=["even", "uneven"])
def test_receivers_at_a_position_and_several_at_once(task):
    every = path(llama(), task, receiver="q.1.2", samples=1)
    last = path(llama(), task, receiver="q.1.2@-1", samples=1)
    assert last.effect[0].abs().max() > 1e-5
    assert torch.allclose(last.effect, every.effect, atol=1e-4)  # in the last layer only the last query is heard
    both = path(llama(), task, receiver="v.1.0,v.1.1,q.1.0,q.1.1,q.1.2,q.1.3,k.1.0,k.1.1,mlp_in.0", samples=1)
    assert both.effect[0].abs().min() > 1e-5
    assert not torch.allclose(both.effect, every.effect, atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "qwen3"])
def test_what_projections_read_is_what_they_make_of_it(family):
    """Queries follow from what the query projection of the head reads, and all three from what the layer's do."""
    model, task = of_family(family, 8.0), llama_task()

    def effect(receiver):
        return path(model, task, receiver=receiver, samples=1).effect

    def same(a, b):
        assert b[0].abs().max() > 1e-3
        return torch.allclose(a, b, atol=1e-3 * float(b.abs().max()))

    for one in ("q.1.2", "k.1.1", "v.1.1"):
        assert same(effect(one.replace(".", "_in.", 1)), effect(one))
    entries = {"q": model.shape.n_heads, "k": model.shape.n_kv_heads, "v": model.shape.n_kv_heads}
    every = [f"{site}.1.{h}" for site, n in entries.items() for h in range(n)]
    layer = effect("attn_in.1")
    assert same(effect(every), layer)
    assert same(effect("attn_in.1,q_in.1.2"), layer), "the same difference is not put in twice"
    assert same(effect("attn_in.1@-1"), effect([f"{a}@-1" for a in every]))


def in_place(value):
    """A hook that changes what a module reads, for all who read it."""

    def hook(module, args):
        args[0].copy_(value)

    return hook


def test_the_stream_between_attention_and_mlp_reaches_both_ways():
    """By hand: the stream is changed in place before the second norm, so that the sum behind the MLP has it, too."""
    model, task = llama(), llama_task()
    bound, hand = task.bind(model), Hand(model)
    (base, own), (_, other) = (hand.run(t.ids) for t in (bound.clean, bound.corrupt))
    want = torch.zeros(2, 4, len(bound))
    for sender in [(i, h) for i in range(2) for h in range(4)]:
        _, heard = hand.run(bound.clean.ids, hand.frozen(own, sender, other["z", sender[0]], False, False))
        norm = hand.layers[1].post_attention_layernorm
        hook = norm.register_forward_pre_hook(in_place(heard["ln2", 1]))
        got, _ = hand.run(bound.clean.ids)
        hook.remove()
        want[sender] = bound.metric(got) - bound.metric(base)
    result = path(model, task, receiver="resid_mid.1", samples=1)
    assert torch.allclose(result.effect, want.mean(-1), atol=1e-4)
    assert result.effect.abs().min() > 1e-5


def test_an_earlier_receiver_keeps_its_own_value_for_a_later_sender():
    """Heads of layer 0 come too late for a query there, and change nothing by it."""
    with_, without = (path(llama(), llama_task(), receiver=r, samples=1) for r in ("q.0.1,mlp_in.1", "mlp_in.1"))
    assert torch.allclose(with_.effect, without.effect, atol=1e-5)
    with pytest.raises(Refused, match="no head comes before it"):
        path(llama(), llama_task(), receiver="q.0.1")


@pytest.mark.parametrize(
    "text",
    ["", "q.1", "q_in.1", "z.1.2", "mlp_out.1", "resid_post.1", "ln1.scale.1", "logits,q.1.2", "q.7.0", "head 9"],
)
def test_other_receivers_are_refused(text):
    with pytest.raises(Refused):
        receivers(llama(), text.split(","))
    with pytest.raises(Refused):
        path(llama(), llama_task(), receiver=text)


def test_a_corruption_without_effect_is_refused():
    pair = told("Mary", "John", "Anna")
    same = Task("same", (type(pair)(pair.clean, pair.clean, pair.answer, pair.foil),))
    with pytest.raises(Refused, match="nothing to bring back"):
        path(llama(), same)
