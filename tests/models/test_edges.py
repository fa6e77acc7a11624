"""Edges of the residual stream: who hears whom is what the model does, and an edge patch is two runs by hand."""

from functools import cache

import pytest
import torch

import cutaway as ca
from cutaway.core.address import parse
from cutaway.core.refuse import Refused
from cutaway.models.edits.edges import EdgePatch, precedes, reads, writes
from cutaway.models.edits.library import Add, Freeze, Replace
from cutaway.models.sweep.edges import sweep_edges
from tests.models.tiny import build

IDS = torch.tensor([[5, 9, 2, 11, 7, 3], [1, 4, 4, 8, 2, 6]])
WRITERS = ["attn_out", "mlp_out", "z", "ssm.out"]
READERS = ["attn_in", "q_in", "k", "ln1.scale", "mlp_in", "ln2.scale", "mlp_pre", "resid_mid", "ssm.in", "resid_post"]


@cache
def model(name):
    return ca.load(build(name))


def there(m, sites, layers=(0, 1)):
    offered = m.sites()
    return [f"{s}.{i}" for s in sites if offered[s].startswith("read") for i in layers]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_parallel", "gpt_neox_sequential", "phi", "llama_gqa", "gemma2",
                                  "olmo2", "cohere", "falcon_40b", "bloom", "mamba"])  # fmt: skip
def test_who_hears_whom_is_what_the_model_does(name):
    """With all other writers held, a reader's value changes if, and only if, it hears the writer."""
    m = model(name)
    held, readers = there(m, ["z", "mlp_out", "ssm.out"]), there(m, READERS)
    values = m.capture(IDS, [*held, *readers, "final.scale"])
    for writer in there(m, WRITERS):
        width = values[writer].shape[2:] if writer in values else (m.shape.d_model,)
        step = torch.randn(width, generator=torch.Generator().manual_seed(0))
        after = [h for h in held if h != writer and not (writer[:8] == "attn_out" and h == f"z.{writer[9:]}")]
        edits = [*(Freeze(h, values) for h in after), Add(writer, step)]
        got = m.capture(IDS, [*readers, "final.scale"], edits)
        for reader in [*readers, "final.scale"]:
            moved = not torch.allclose(got[reader], values[reader], atol=1e-6, rtol=1e-6)
            assert moved == precedes(m.anatomy, parse(writer), parse(reader)), (writer, reader)


def by_hand(m, tokens, patch):
    """The sender's run with what is frozen, then the receivers' values put into the run alone."""
    first = [*patch.frozen, patch.sender]
    ends = patch.heard(m.anatomy)
    if str(patch.receivers[0]) == "logits":
        return m.run_last(tokens, first)
    got = m.capture(tokens, [a.place for a in ends], first, logits=False) if ends else {}
    return m.run_last(tokens, [Replace(a, got[str(a)]) for a in ends])


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "cohere"])
def test_a_sweep_of_edges_is_two_runs_each(name):
    m = model(name)
    tokens, d = m.tokens(IDS), torch.randn(m.shape.d_model, generator=torch.Generator().manual_seed(1))
    values = m.capture(tokens, ["z", "mlp_out"])
    heads = tuple(Freeze(f"z.{i}", values) for i in range(m.shape.n_layers))
    all_ = (*heads, *(Freeze(f"mlp_out.{i}", values) for i in range(m.shape.n_layers)))
    head = Replace("z.0.1", values["z.1.2"])
    patches = [
        EdgePatch(head, ("logits",), heads), EdgePatch(Add("mlp_out.0", d), ("q_in.1.2",), all_),
        EdgePatch(head, ("v_in.1.0@2", "k_in.1.0@2"), heads), EdgePatch(Add("mlp_out.0@1", d), ("mlp_in.1",), heads),
        EdgePatch(Add("mlp_out.1", d), ("q_in.1.2",), all_),
        EdgePatch(Add("embed@0", d), ("mlp_in.0", "q_in.1.0"), all_),
        EdgePatch(head, ("logits",), all_),
    ]  # fmt: skip
    got = sweep_edges(m, tokens, patches, lambda logits, _: logits[:, 3])
    want = torch.stack([by_hand(m, tokens, p)[:, 3] for p in patches])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    plain = m.run_last(tokens)[:, 3]
    assert torch.allclose(got[4], plain, atol=1e-6)  # too late for its receiver
    moved = [(row - plain).abs().max() for n, row in enumerate(got) if n != 4]
    assert min(moved) > 1e-6
    assert sweep_edges(m, tokens, [], lambda logits, _: logits[:, 3]).shape == (0, 2)


def test_edges_are_named():
    patch = EdgePatch(Add("z.0.1", torch.zeros(1)), ("q_in.1.0", "mlp_in.1"))
    assert [str(e) for e in patch.edges] == ["z.0.1→q_in.1.0", "z.0.1→mlp_in.1"]
    assert writes("z")
    assert not writes("q")
    assert reads("q_in")
    assert reads("logits")
    assert not reads("z")


@pytest.mark.parametrize(
    ("sender", "receivers", "word"),
    [("q.0.1", ("mlp_in.1",), "does not write"), ("z.0.1", ("z.1.1",), "does not read"), ("z.0.1", (), "logits alone"),
     ("z.0.1", ("logits", "mlp_in.1"), "logits alone")],
)  # fmt: skip
def test_ends_of_another_kind_are_refused(sender, receivers, word):
    with pytest.raises(Refused, match=word):
        EdgePatch(Add(sender, torch.zeros(1)), receivers)
    if receivers and "logits" not in receivers:
        with pytest.raises(Refused):
            precedes(model("gpt2").anatomy, parse(sender), parse(receivers[0]))


def test_places_outside_the_model_are_refused():
    m = model("gpt2")
    with pytest.raises(Refused, match="outside"):
        sweep_edges(m, m.tokens(IDS), [EdgePatch(Add("z.0.1", torch.zeros(8)), ("q_in.7.0",))], lambda x, _: x[:, 0])
