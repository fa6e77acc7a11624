"""Masked runs: each reader by hand, through edits of what it reads, in models of every wiring; sweeps; gradients."""

import pytest
import torch

from cutaway.core.address import Address
from cutaway.core.refuse import Refused
from cutaway.models.access.reading import Reads, observe
from cutaway.models.edits.edge_mask import MaskedForward, places_written, removed_by, written
from cutaway.models.edits.library import Replace
from cutaway.models.edits.wiring import wiring
from cutaway.models.sweep.masks import sweep_masks
from cutaway.models.tokens import batch
from tests.models.common import model, widely
from tests.models.tiny import CONFIGS

IDS = torch.tensor([[5, 9, 2, 11, 7, 3], [1, 4, 4, 8, 2, 6]])
ALT = torch.tensor([[5, 9, 3, 11, 17, 4], [1, 14, 4, 9, 2, 7]])
CORE = ("gpt2", "llama_gqa", "gemma2", "gemma3", "gpt_neox_parallel")


def writes(m, ids, edits=()):
    places = places_written(wiring(m))
    acts = m.capture(ids, places, edits, logits=False)
    return written(m, {str(a): acts[str(a)] for a in places})


def random_masks(m, n, seed=0):
    return torch.rand(n, *wiring(m).heard.shape, generator=torch.Generator().manual_seed(seed))


def masked(m, masks, alternative):
    """Logits of the prompts under each mask: [mask batch position token]."""
    copies = m.tokens(IDS.repeat(len(masks), 1))
    with MaskedForward(m, wiring(m), removed_by(wiring(m), masks), alternative).attached():
        return m.run(copies).unflatten(0, (len(masks), len(IDS)))


def one_writes(values, u):
    return values[u.place][:, :, u.unit] if u.site == "z" else values[u.place]


def by_hand(m, mask, alternative):
    """Logits of the run in which every reader's input is written out, from the first to the last."""
    w, edits, parallel = wiring(m), [], m.anatomy.parallel

    def read(v, place):
        cur, i = writes(m, IDS, edits), w.readers.index(v)
        x = m.capture(IDS, place, edits, logits=False)[place].clone()
        for j, u in enumerate(w.writers):
            if w.heard[j, i]:
                share = (1 - mask[j, i]).view(1, -1, 1)
                x += share * (one_writes(alternative, u) - one_writes(cur, u))
        norm = m.anatomy.top("final") if v.layer is None else m.anatomy.part(v.layer, f"ln{1 + (v.site == 'mlp_in')}")
        norm = m.anatomy.part(v.layer, "ln1") if norm is None and v.site == "mlp_in" and parallel else norm
        return Replace(place if v.site == "logits" else v, x if v.site == "logits" or norm is None else norm(x))

    for i in range(m.shape.n_layers):
        here = [v for v in w.readers if v.layer == i]
        attention = [read(v, f"resid_pre.{i}") for v in here if v.site != "mlp_in" or parallel]
        edits += attention
        edits += [] if parallel else [read(Address("mlp_in", i), f"resid_mid.{i}")]
    edits.append(read(Address("logits"), f"resid_post.{m.shape.n_layers - 1}"))
    return m.run(IDS, edits)


@pytest.mark.parametrize("name", widely([n for n in CONFIGS if n != "bert"], CORE))
def test_a_masked_run_is_every_readers_input_by_hand(name):
    m = model(name)
    alternative, shape = writes(m, ALT), wiring(m).heard.shape
    masks = torch.stack([torch.ones(shape), torch.zeros(shape), *random_masks(m, 1)])
    got, plain = masked(m, masks, alternative), m.run(IDS)
    assert torch.equal(masked(m, masks[:1], alternative)[0], plain)
    torch.testing.assert_close(got[0], plain, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got[1], m.run(ALT), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[2], by_hand(m, masks[2], alternative), atol=1e-5, rtol=1e-5)
    assert (got[2] - plain).abs().max() > 0.01
    placed = torch.rand(1, *shape, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        masked(m, placed, alternative)[0], by_hand(m, placed[0], alternative), atol=1e-5, rtol=1e-5
    )


# Gemma's norms compute in float32 whatever the dtype, so its changes must be larger.
@pytest.mark.parametrize(("name", "size"), [("gpt2", 1e-5), ("gpt_neox_parallel", 1e-5), ("gemma2", 1e-3)])
def test_the_gradient_in_the_mask_is_that_of_small_changes(name, size):
    m = model(name, torch.float64)
    w, t, alternative = wiring(m), m.tokens(IDS), writes(m, ALT)
    mask = random_masks(m, 1).double()

    def value(mask):
        with MaskedForward(m, w, removed_by(w, mask), alternative).attached():
            logits = observe(m.anatomy, t, Reads()).last_logits
        return (logits[:, 3] - logits[:, 7]).sum()

    mask.requires_grad_(True)
    (slope,) = torch.autograd.grad(value(mask), mask)
    assert not slope[0][~w.heard].any()
    assert (slope[0][w.heard] != 0).float().mean() > 0.9
    for seed in range(3):
        step = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad():
            change = (value(mask + size * step) - value(mask - size * step)) / (2 * size)
        torch.testing.assert_close(change, (slope * step).sum(), atol=size / 10, rtol=size)


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa", "gemma2", "gpt_neox_parallel"])
def test_a_sweep_of_masks_is_one_masked_run_each(name):
    """From their own layers on, in any batches, bool and float."""
    m = model(name)
    w, alternative, all_on = wiring(m), writes(m, ALT), torch.ones(wiring(m).heard.shape, dtype=torch.bool)
    cut = [all_on.clone() for _ in range(12)]
    for mask, (u, v) in zip(cut, w.pairs[:: len(w.pairs) // 12].tolist(), strict=False):
        mask[u, v] = False
    last = all_on.clone()
    last[:, -1] = False
    masks = [*cut, all_on, last, *random_masks(m, 2)]
    want = torch.stack([masked(m, k[None].float(), alternative)[0, :, -1, 3] for k in masks])
    for budget in (None, 12):
        got = sweep_masks(m, w, m.tokens(IDS), masks, alternative, lambda x, _: x[:, 3], budget=budget)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert (want - want[12]).abs().amax(1).gt(1e-6).sum() > 10


def test_padded_prompts_run_as_alone():
    m, long, short = model("llama_gqa"), [5, 9, 2, 11, 7, 3], [1, 4, 8]
    mask = random_masks(m, 1)[0]
    values = [writes(m, torch.tensor([ids[::-1]])) for ids in (long, short)]
    metric = lambda x, _: x[:, 3]  # noqa: E731
    alone = [
        sweep_masks(m, wiring(m), m.tokens(torch.tensor([ids])), [mask], v, metric)
        for ids, v in zip((long, short), values, strict=True)
    ]
    for side in ("left", "right"):
        front = 3 if side == "left" else 0
        pad = {a: torch.zeros(2, 6, *x.shape[2:]) for a, x in values[0].items()}
        for a, x in pad.items():
            x[0], x[1, front : front + 3] = values[0][a][0], values[1][a][0]
        got = sweep_masks(m, wiring(m), batch([long, short], side=side), [mask], pad, metric)
        torch.testing.assert_close(got, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_a_mask_of_another_wiring_is_refused():
    m = model("gpt2")
    with pytest.raises(Refused, match="16 writers and 40 readers"):
        sweep_masks(m, wiring(m), m.tokens(IDS), [torch.ones(3, 4)], writes(m, ALT), lambda x, _: x[:, 3])
