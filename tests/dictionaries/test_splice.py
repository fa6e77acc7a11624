"""Splicing: against hooks written out by hand, under the executor and under generation, error and latents."""

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.dictionaries.gates import BatchTopK
from cutaway.dictionaries.norms import TokenLayerNorm
from cutaway.dictionaries.splice import (
    LatentChange,
    Splice,
    ablate_latents,
    add_to_latents,
    scale_latents,
    set_latents,
)
from cutaway.models.edits.library import Ablate, Add, Replace, Scale
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import batch
from tests.dictionaries.common import dictionary
from tests.models.common import model

IDS = batch([[5, 6, 7, 8, 9, 10], [31, 32, 33, 34, 35, 36]])
PADDED = {side: batch([[5, 6, 7, 8, 9, 10], [21, 22, 23]], side=side) for side in ("left", "right")}
M = model("llama_gqa")
D, LAST = M.shape.d_model, M.shape.n_layers - 1
W = {s: D for i in range(LAST + 1) for s in (f"resid_pre.{i}", f"resid_post.{i}", f"mlp_in.{i}", f"mlp_out.{i}")}
W |= {"z.1": M.shape.n_heads * M.shape.d_head, "z.1.2": M.shape.d_head, "attn_out.1": D}
CLT = [(9, [f"mlp_in.{i}"], [f"mlp_out.{j}" for j in range(i, LAST + 1)]) for i in range(LAST + 1)]
SHAPES = {
    "autoencoder": ([(40, ["resid_post.1"], ["resid_post.1"])], []),
    "entering": ([(40, ["resid_pre.1"], ["resid_pre.1"])], []),
    "heads": ([(30, ["z.1"], ["z.1"])], []),
    "one head": ([(30, ["z.1.2"], ["z.1.2"])], []),
    "skip transcoder": ([(40, ["mlp_in.1"], ["mlp_out.1"])], [("mlp_in.1", "mlp_out.1")]),
    "set": ([(20, [f"mlp_in.{i}"], [f"mlp_out.{i}"]) for i in range(LAST + 1)], []),
    "cross-layer": (CLT, []),
    "across": ([(20, ["resid_pre.0"], ["resid_pre.0", "resid_post.1"])], []),
}  # fmt: skip


def made(name: str, kind: str = "topk", **settings):
    blocks, skip = SHAPES[name]
    return dictionary(blocks, W, kind, skip, dtype=torch.float32, **settings)


def by_hand(m, tokens, d, change=lambda code: code, error=False):
    """Every written site replaced in the order of the forward, by what captures of the model so far imply."""
    done = []
    for w in sorted(d.writes, key=lambda w: (int(w.split(".")[1]), "out" in w, "post" in w)):
        reads = dict.fromkeys(
            [*(r for b in d.blocks if w in b.writes for r in b.reads), *(r for r, to in d.skip if to == w)]
        )
        seen = {r: m.capture(tokens, r, edits=[e for e in done if e.address != r])[r] for r in {**reads, w: None}}
        flat = {r: seen[r].flatten(2) for r in reads}
        codes = {b: d.encode(flat, block=b).dense() for b, block in enumerate(d.blocks) if w in block.writes}
        y = kept = d.b_dec[w]
        for b, f in codes.items():
            whole = torch.zeros(len(f), d.n_latents)
            whole[:, d.starts[b] : d.starts[b + 1]] = f
            changed = change(whole)[:, d.starts[b] : d.starts[b + 1]]
            y, kept = y + changed @ d.decoder[b][w], kept + f @ d.decoder[b][w]
        for (r, to), matrix in d.skip.items():
            y = y + flat[r].reshape(-1, flat[r].shape[-1]) @ matrix.T if to == w and not error else y
        y = (y - kept if error else y).reshape(seen[w].shape)
        done.append(Replace(w, seen[w] + y if error else y))
    return m.run(tokens, edits=done)


def near(a, b, tolerance=2e-5):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


@pytest.mark.parametrize(("name", "kind"), [*((name, "topk") for name in SHAPES), ("across", "relu"), ("set", "jump")])
def test_one_call_puts_the_reconstruction_there(name, kind):
    d = made(name, kind)
    wanted = by_hand(M, IDS, d)
    assert near(M.run(IDS, edits=Splice(d)), wanted)
    assert not near(M.run(IDS), wanted, 1e-2)
    with M.edited(Splice(d)):
        assert near(M.hf(IDS.ids).logits, wanted)
        assert near(M.hf(IDS.ids).logits, wanted)
        assert near(M.run(IDS), wanted)


@pytest.mark.parametrize("name", SHAPES)
def test_the_error_makes_the_splice_whole_and_lets_changes_through(name):
    d = made(name)
    assert torch.equal(M.run(IDS, edits=Splice(d, error=True)), M.run(IDS))
    neutral = Splice(d, error=True, changes=(LatentChange((1, 2)),))
    assert near(M.run(IDS, edits=neutral), M.run(IDS))
    changes = (
        ablate_latents(0, 3),
        scale_latents(1, factor=2.5),
        set_latents(2, value=1.5),
        add_to_latents(4, value=-1.0),
        add_to_latents(5, 6, value=(-0.5, 0.5), silencing=True),
    )

    def change(f):
        f = f.clone()
        f[:, [0, 3]], f[:, 1], f[:, 2] = 0.0, f[:, 1] * 2.5, 1.5
        f[:, 4] -= 1.0
        f[:, 5], f[:, 6] = torch.maximum(f[:, 5] - 0.5, f[:, 5].clamp(max=0)), f[:, 6] + 0.5
        return f

    for error in (False, True):
        wanted = by_hand(M, IDS, d, change, error)
        assert near(M.run(IDS, edits=Splice(d, error=error, changes=changes)), wanted), error
        assert not near(M.run(IDS, edits=Splice(d, error=error)), wanted, 1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["autoencoder", "cross-layer"])
def test_positions_are_those_of_the_prompts(name, side):
    d, t = made(name), PADDED[side]
    spliced = M.run_last(t, Splice(d, positions=(1, -1)))
    for row, ids in enumerate(([5, 6, 7, 8, 9, 10], [21, 22, 23])):
        assert near(spliced[row], M.run_last(batch([ids]), Splice(d, positions=(1, -1)))[0])
        for error in (False, True):
            held = Splice(d, error=error, changes=(set_latents(3, value=2.0, positions=(-2,)),))
            assert near(M.run_last(t, held)[row], M.run_last(batch([ids]), held)[0])
    everywhere = M.run(IDS, edits=Splice(d, positions=tuple(range(6))))
    assert near(everywhere, M.run(IDS, edits=Splice(d)))
    at = M.run(IDS, edits=Splice(d, error=True, changes=(set_latents(3, value=2.0, positions=(-2,)),)))
    assert near(at[:, :4], M.run(IDS)[:, :4])
    assert not near(at[:, 4:], M.run(IDS)[:, 4:], 1e-3)


def metric(logits, prompt):
    return logits[torch.arange(len(logits)), prompt + 3] - logits[:, 9]


@pytest.mark.parametrize("tokens", [IDS, PADDED["left"], PADDED["right"]], ids=["even", "left", "right"])
def test_sweeps_are_one_run_a_variant(tokens):
    shared = Splice(made("cross-layer"))
    shapes = SHAPES if not tokens.padded else ["entering", "one head", "skip transcoder"]
    variants = [[Splice(made(n)), Ablate("z.2.0")] for n in shapes]
    variants += [[shared, Scale(f"mlp_out.{i}", 0.5)] for i in range(LAST + 1)] + [[shared]]
    variants += [
        [Splice(made("autoencoder"), error=True, changes=(ablate_latents(i, positions=(-1,)),))] for i in (1, 5)
    ]
    variants += [[Splice(made("set"), positions=(-1,))], [Add("resid_pre.2", torch.ones(D))], []]
    wanted = torch.stack([metric(M.run_last(tokens, v), torch.arange(2)) for v in variants])
    assert near(sweep(M, tokens, variants, metric), wanted)
    assert near(sweep(M, tokens, variants, metric, budget=24), wanted)


@pytest.mark.parametrize("name", SHAPES)
def test_a_splice_can_be_the_base_of_a_sweep(name):
    base = [Splice(made(name))]
    variants = [[Ablate(f"z.{i}.1")] for i in range(LAST + 1)] + [
        [Add(f"resid_pre.{i}@-1", torch.ones(D))] for i in (0, 1, 2)
    ]
    wanted = torch.stack([metric(M.run_last(IDS, [*base, *v]), torch.arange(2)) for v in variants])
    assert near(sweep(M, IDS, variants, metric, base=base), wanted)


@pytest.mark.parametrize("name", ["autoencoder", "cross-layer"])
def test_generation_continues_under_a_splice(name):
    d = made(name)
    changes = (add_to_latents(3, value=4.0),)
    for splice in (Splice(d), Splice(d, error=True, changes=changes), Splice(d, changes=changes, positions=(-1,))):
        ids = IDS.ids[:1]
        for _ in range(3):
            fixed = splice if splice.positions is None else Splice(d, changes=changes, positions=(5,))
            ids = torch.cat([ids, M.run_last(ids, fixed).argmax(-1, keepdim=True)], 1)
        said = M.generate(IDS.ids[:1], 3, splice, eos_token_id=-1)
        assert said == [" ".join(map(str, ids[0, 6:].tolist()))]


def test_gradients_pass_through_a_splice():
    d = made("skip transcoder", "relu")
    place, prompt = "resid_pre.1", IDS

    def value(logits):
        return logits[:, 3] - logits[:, 7]

    _, slopes, acts = M.gradients(prompt, place, value, Splice(d))
    step = 1e-2 * slopes[place] / slopes[place].norm()
    ends = [value(M.run_last(prompt, [Splice(d), Replace(place, acts[place] + s * step)])).sum() for s in (1, -1)]
    assert float((ends[0] - ends[1]) / 2) == pytest.approx(float((slopes[place] * step).sum()), rel=2e-2)


def test_miniworld_keeps_its_answers_with_the_error_and_loses_them_without():
    m = ca.load("miniworld")
    d = dictionary([(64, ["resid_post.1"], ["resid_post.1"])], {"resid_post.1": m.shape.d_model}, "topk",
                   dtype=torch.float32, reading={"resid_post.1": TokenLayerNorm()},
                   writing={"resid_post.1": TokenLayerNorm()})  # fmt: skip
    t = m.tokens(torch.arange(10, 26)[None])
    assert torch.equal(m.run(t, edits=Splice(d, error=True)), m.run(t))
    assert not near(m.run(t, edits=Splice(d)), m.run(t), 1e-2)
    x = m.capture(t, "resid_post.1")["resid_post.1"]
    assert near(m.run(t, edits=Splice(d)), m.run(t, edits=Replace("resid_post.1", d.forward(x))))
    assert m.run(t, edits=Splice(d, error=True, changes=(set_latents(3, value=0.1),))).isfinite().all()


def test_what_cannot_be_spliced_is_refused(tmp_path):
    d = made("cross-layer")
    with pytest.raises(Refused, match="written before"):
        Splice(dictionary([(4, ["mlp_in.1"], ["mlp_out.0"])], W, dtype=torch.float32))
    with pytest.raises(Refused, match="no such latent"):
        Splice(d, changes=(ablate_latents(d.n_latents),))
    with pytest.raises(Refused, match="does not write"):
        Splice(d, writes=("resid_post.0",))
    with pytest.raises(Refused, match="name models"):
        Splice(dictionary([(4, ["a:mlp_in.1"], ["b:mlp_in.1"])], {"a:mlp_in.1": D, "b:mlp_in.1": D}))
    loose = made("autoencoder")
    loose = type(loose)(loose.blocks, loose.encoder, loose.decoder, loose.b_enc, loose.b_dec, (BatchTopK(2),))
    with pytest.raises(Refused, match="threshold"):
        Splice(loose)
    with pytest.raises(Refused, match="outside"):
        M.run(IDS, edits=Splice(dictionary([(4, ["resid_post.9"], ["resid_post.9"])], {"resid_post.9": D})))
    with pytest.raises(Refused, match="wide"):
        M.run(IDS, edits=Splice(dictionary([(4, ["resid_post.1"], ["resid_post.1"])], {"resid_post.1": D + 1})))
    only = Splice(d, writes=(f"mlp_out.{LAST}",))
    assert not near(M.run(IDS, edits=only), M.run(IDS, edits=Splice(d)), 1e-3)
    file = tmp_path / "sweep.safetensors"
    one = sweep(M, IDS, [[Splice(made("set"))]], metric, resume=file)
    assert torch.equal(sweep(M, IDS, [[Splice(made("set"))]], metric, resume=file), one)
    with pytest.raises(Refused, match="another sweep"):
        sweep(M, IDS, [[Splice(made("set", seed=1))]], metric, resume=file)
