"""The truncated forward: the values of the whole one, nothing run beyond the deepest place, nothing left behind."""

import pytest
import torch

from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models import Ablate, Add
from tests.models.common import IDS, KINDS, PADDED, bare, gap, model, noise, sites


def blocks_run(m, run):
    """Which blocks begin while `run()` runs."""
    begun: list[int] = []
    hooks = [b.register_forward_pre_hook(lambda *_, i=i: begun.append(i)) for i, b in enumerate(m.anatomy.blocks)]
    try:
        run()
    finally:
        for h in hooks:
            h.remove()
    return begun


@pytest.mark.parametrize("name", [*KINDS, "bert"])
def test_every_site_is_bit_equal_to_the_whole_forward_and_the_model_stays_as_it_was(name):
    m = model(name)
    plain = bare(m.hf)
    for site in sites(m):
        place = str(m.places(site)[0])
        assert torch.equal(m.capture(IDS, place, logits=False)[place], m.capture(IDS, place)[place]), place
    assert torch.equal(bare(m.hf), plain)


@pytest.mark.parametrize("name", KINDS)
def test_several_sites_of_padded_prompts_come_in_one_pass_that_stops_after_the_deepest(name):
    m, asked = model(name), ["embed", "resid_pre.0", "attn_out.0", "z.1", "mlp_out.1"]
    for t in PADDED.values():
        whole = m.capture(t, asked)
        part = m.capture(t, asked, logits=False)
        assert all(torch.equal(part[a], whole[a]) for a in asked)
    with counting() as spent:
        assert blocks_run(m, lambda: m.capture(IDS, asked, logits=False)) == [0, 1]
    assert spent.forwards == pytest.approx(len(IDS) * 2 / m.shape.n_layers)


def test_what_enters_a_block_needs_only_the_blocks_before():
    m = model("llama")
    assert blocks_run(m, lambda: m.capture(IDS, "resid_post.0", logits=False)) == [0]
    with counting() as spent:
        m.capture(IDS, "resid_pre.1", logits=False)
    assert spent.forwards == pytest.approx(len(IDS) / 3)
    with counting() as spent:
        m.capture(IDS, "embed", logits=False)
    assert spent.forwards == 0


def test_a_shallow_edit_is_seen_and_a_deeper_one_is_still_reached():
    m, shallow, deep = model("llama"), Add("resid_pre.1", noise(32)), Ablate("z.2.0")
    assert gap(m.capture(IDS, "resid_pre.1", shallow, logits=False)["resid_pre.1"],
               m.capture(IDS, "resid_pre.1")["resid_pre.1"] + noise(32)) < 1e-6  # fmt: skip
    run = blocks_run(m, lambda: m.capture(IDS, "resid_pre.1", [shallow, deep], logits=False))
    assert run == [0, 1, 2]
    with m.edited(Add("pattern.2", torch.zeros(()))):
        assert blocks_run(m, lambda: m.capture(IDS, "resid_post.0", logits=False)) == [0, 1, 2]


def test_an_edit_that_the_forward_never_passes_is_still_refused(monkeypatch):
    m = model("llama")
    monkeypatch.setitem(m.anatomy.blocks[2].__dict__, "forward", lambda x, *a, **k: x)
    with pytest.raises(Refused, match="never passed"):
        m.capture(IDS, "resid_pre.1", Ablate("z.2.0"), logits=False)
