"""Live streams: the model's own activations, each token once, windows shuffled by the seed, exact continuation."""

from copy import deepcopy

import pytest
import torch

from cutaway.core.address import parse
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.streams import LiveStream, Masking, Packing, Stream, from_ids, from_texts
from cutaway.streams.packing import Cursor, Packer
from tests.models.common import gap
from tests.models.common import model as tiny
from tests.streams.common import SITES, Letters, brute, ids, lettered, texts

NONE = Masking(special=False, sinks=None)


def everything(stream):
    """All batches of a stream as one, and their lengths."""
    batches = list(stream)
    acts = {a: torch.cat([b.acts[a] for b in batches]) for a in batches[0].acts}
    words = [torch.cat([getattr(b, n) for b in batches]) for n in ("ids", "document", "position", "mask")]
    return acts, words, [len(b) for b in batches]


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_activations_are_those_of_each_context_alone(name):
    m, rows = tiny(name), ids(9, 12)
    stream = LiveStream(
        m, from_ids(rows), [*SITES, "q.2"], packing=Packing(12, rows=4), masking=NONE, batch=10, window=30
    )
    acts, (found, document, position, _), lengths = everything(stream)
    assert lengths == [10] * 10 + [8]
    order = (document * 12 + position).argsort()
    assert torch.equal(found[order], rows.reshape(-1))
    assert stream.widths == {a: x.shape[1] for a, x in acts.items()}
    for a, x in acts.items():
        assert gap(x[order], brute(m, rows.tolist(), a)) < 1e-5


@pytest.mark.parametrize("across", [True, False])
def test_padding_and_special_tokens_are_left_out_or_masked(across):
    m, docs = lettered(), from_texts(texts(30))
    packing = Packing(16, eos=True, across=across, rows=4)
    contexts = list(Packer(docs, Letters(), packing).contexts(Cursor()))
    rows = [i[r].tolist() for c in contexts for i, r in zip(c.ids, c.real, strict=True)]
    flat, want = torch.tensor([t for r in rows for t in r]), brute(m, rows, "z.1")
    kept = LiveStream(m, docs, "z.1", packing=packing, masking=Masking(sinks=None), batch=1 << 20, window=1 << 20)
    both = LiveStream(
        m, docs, "z.1", packing=packing, masking=Masking(True, None, False), batch=1 << 20, window=1 << 20
    )
    usual = flat > 2
    for stream, there in ((kept, usual), (both, torch.ones_like(usual))):
        acts, (found, _, _, mask), _ = everything(stream)
        back = torch.empty_like(stream._order).scatter_(0, stream._order, torch.arange(len(stream._order)))
        assert torch.equal(found[back], flat[there])
        assert torch.equal(mask[back], usual[there])
        assert gap(acts["z.1"][back], want[there]) < 1e-5
        counts = stream.masked["counts"]
        assert counts["tokens"] == len(flat)
        assert counts["special"] == counts["masked"] == int((~usual).sum())
        assert counts["padding"] == len(rows) * 16 - len(flat)
        assert counts["contexts"] == len(rows)


def test_sinks_are_tokens_far_above_the_median_norm_at_any_site():
    hf = tiny("llama").hf
    rows = ids(40, 8)
    rows[:, 3] = 50
    base = hf.get_input_embeddings().weight[50].clone()
    with torch.no_grad():
        hf.get_input_embeddings().weight[50] *= 1000
    try:
        stream = LiveStream(Model(hf), from_ids(rows), ["resid_pre.0", "z.1"], packing=Packing(8), batch=64, window=64)
        _, (found, *_), lengths = everything(stream)
    finally:
        hf.get_input_embeddings().weight[50] = base
    often = int((rows == 50).sum())
    assert not (found == 50).any()
    assert sum(lengths) == rows.numel() - often
    assert stream.masked["counts"]["sinks"] == stream.masked["counts"]["masked"] == often
    assert "10 × the median" in stream.masked["masked"][-1]


def test_the_model_stops_after_the_deepest_site_and_no_context_runs_twice():
    m, begun = lettered(), []
    hook = m.anatomy.blocks[2].register_forward_pre_hook(lambda *_: begun.append(1))
    with counting() as spent:
        options = {"packing": Packing(8, rows=4), "batch": 16, "window": 64, "fast_kernels": False}
        list(LiveStream(m, from_ids(ids(40, 8)), "resid_post.0", **options))
    hook.remove()
    assert not begun
    assert spent.forwards == pytest.approx(40 / 3)


@pytest.mark.parametrize("after", [0, 6, 7, 15])
def test_a_restored_stream_goes_on_with_the_same_bits(after):
    def fresh(seed=5):
        return LiveStream(lettered(), from_texts(texts(24)), SITES, packing=Packing(12, rows=3), batch=20, window=130,
                          seed=seed, epochs=2)  # fmt: skip

    whole, stream = list(fresh()), fresh()
    assert isinstance(stream, Stream)
    for _ in range(after):
        next(stream)
    state = stream.state()
    rest = list(fresh().restore(state))
    assert len(rest) == len(whole) - after
    for a, b in zip(rest, whole[after:], strict=True):
        assert all(torch.equal(a.acts[s], b.acts[s]) for s in SITES)
        assert torch.equal(a.ids, b.ids)
    with pytest.raises(Refused, match="another stream"):
        fresh(seed=6).restore(state)


def pair(tokenizer=None, weight=0.3):
    """A tiny model and a copy of it whose weights were changed a little."""
    one = lettered()
    hf = deepcopy(one.hf)
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(p * weight)
    return {"base": one, "tuned": Model(hf, tokenizer or Letters(), "changed")}


def test_several_models_read_the_same_contexts():
    both, docs = pair(), from_texts(texts(20))
    options = {"packing": Packing(12, rows=3), "masking": NONE, "batch": 20, "window": 60, "epochs": 2}

    def fresh(model=both, sites=("z.1", "tuned:mlp_post.0")):
        return LiveStream(model, docs, list(sites), **options)

    stream, batches = fresh(), []
    assert list(stream.widths) == ["base:z.1", "tuned:z.1", "tuned:mlp_post.0"]
    assert fresh(sites=("z.1", parse("tuned:mlp_post.0"))).widths == stream.widths
    alone = {n: fresh(m, ("z.1", "mlp_post.0")) for n, m in both.items()}
    for batch in stream:
        batches.append(batch)
        for name, own in alone.items():
            other = next(own)
            assert torch.equal(batch.ids, other.ids)
            assert gap(batch.acts[f"{name}:z.1"], other.acts["z.1"]) < 1e-5
        assert gap(batch.acts["tuned:mlp_post.0"], other.acts["mlp_post.0"]) < 1e-5
    half, rest = fresh(), len(batches) // 2
    for _ in range(rest):
        next(half)
    for again, batch in zip(fresh().restore(half.state()), batches[rest:], strict=True):
        assert all(torch.equal(x, batch.acts[a]) for a, x in again.acts.items())


def test_a_sink_of_one_model_is_masked_in_all():
    both, rows = pair(), ids(40, 8)
    rows[:, 3] = 50
    with torch.no_grad():
        both["tuned"].hf.get_input_embeddings().weight[50] *= 1000
    stream = LiveStream(both, from_ids(rows), "resid_pre.0", packing=Packing(8), batch=64, window=64)
    _, (found, *_), lengths = everything(stream)
    assert not (found == 50).any()
    assert sum(lengths) == int((rows != 50).sum())


def test_models_that_do_not_fit_together_are_refused():
    class Shifted(Letters):
        def __call__(self, texts, **options):
            return {"input_ids": [[i + 1 for i in row] for row in super().__call__(texts, **options)["input_ids"]]}

    docs = from_texts(texts(3))
    for models, sites, words in [
        (pair(Shifted()), "z.1", "other ids"),
        (pair(Letters(eos=False)), "z.1", "other special tokens"),
        (pair(), "third:z.1", "no model is named third"),
        (pair(), "tuned:z.1", "nothing to read"),
        ({"a:b": lettered()}, "z.1", "named 'a:b'"),
        (lettered(), "base:z.1", "no model is named base"),
    ]:
        with pytest.raises(Refused, match=words):
            next(LiveStream(models, docs, sites, packing=Packing(8)))


def test_orders_differ_between_windows_epochs_and_seeds_and_hold_the_same_tokens():
    def order(seed):
        options = {"packing": Packing(8), "masking": NONE, "batch": 32, "window": 32}
        stream = LiveStream(lettered(), from_ids(ids(8, 8)), "embed", seed=seed, epochs=2, **options)
        return [(b.document * 8 + b.position).tolist() for b in stream]

    first, second = order(0), order(1)
    assert [sorted(b) for b in first] == [sorted(b) for b in second]
    assert sorted(first[0] + first[1]) == list(range(64))
    assert len({tuple(b) for b in first + second}) == 8
    assert order(0) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_computing_and_keeping(dtype):
    m, rows = tiny("gpt2", dtype), from_ids(ids(3, 8))
    for kept in (None, "float32", torch.bfloat16):
        options = {"packing": Packing(8, rows=3), "masking": NONE, "batch": 24, "window": 24, "fast_kernels": False}
        stream = LiveStream(m, rows, "mlp_post.1", dtype=kept, **options)
        batch = next(stream)
        want = dtype if kept is None else {"float32": torch.float32}.get(kept, kept)
        assert batch.acts["mlp_post.1"].dtype == want
        whole = m.capture(ids(3, 8), "mlp_post.1")["mlp_post.1"].flatten(0, 1)[stream._order]
        assert torch.equal(batch.acts["mlp_post.1"], whole.to(want))


def test_what_cannot_be_streamed_is_refused():
    m, docs = lettered(), from_texts(["abcdef"])

    def stream(sites="z.1", **options):
        return LiveStream(m, options.pop("docs", docs), sites, **{"packing": Packing(8), **options})

    for make, words in [
        (lambda: stream("pattern.1"), "no vector a token"),
        (lambda: stream("z.1@-1"), "every position"),
        (lambda: stream([]), "nothing to read"),
        (lambda: stream("z.9"), "outside this model"),
        (lambda: stream(packing=Packing(65)), "takes 64 tokens"),
        (lambda: stream(batch=0), "at least 1"),
        (lambda: stream(dtype="float64"), "not kept"),
        (lambda: stream(masking=Masking(sinks=0.5)), "usual norm"),
        (lambda: list(stream(docs=from_ids(torch.full((1, 9), 1)))), "special tokens only"),
        (lambda: list(stream(docs=from_ids(torch.full((1, 9), 101)), masking=NONE)), "token ids from 0 to 100"),
    ]:
        with pytest.raises(Refused, match=words):
            make()


def test_numbers_that_are_none_are_refused():
    hf = tiny("llama").hf
    weight = hf.model.layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    for value, dtype, words in ((float("nan"), None, "no finite norm"), (1e7, "float16", "ends at 65504")):
        with torch.no_grad():
            weight.fill_(value)
        try:
            with pytest.raises(Refused, match=words):
                list(
                    LiveStream(
                        Model(hf), from_ids(ids(2, 8)), "mlp_out.0", masking=NONE, packing=Packing(8), dtype=dtype
                    )
                )
        finally:
            with torch.no_grad():
                weight.copy_(kept)
