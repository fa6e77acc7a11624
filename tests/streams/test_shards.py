"""Activations on disk: all of them once, in a uniformly random order; exact reading; nothing false is read."""

import json
import sys
from collections import Counter

import pytest
import torch
from scipy import stats

from cutaway.core.files import read_tensors, write_json, write_tensors
from cutaway.core.refuse import Refused
from cutaway.streams import LiveStream, Masking, Packing, Shards, Stream, from_ids, from_texts, harvest
from cutaway.streams.buckets import Buckets, Column
from cutaway.streams.folders import manifest_key
from cutaway.streams.harvest import _Harvest
from tests.models.common import model as tiny
from tests.streams.common import SITES, ids, lettered, texts

PACKING = Packing(12, rows=4)
MODULE = sys.modules["cutaway.streams.harvest"]  # the room offers the function under this name
NONE = Masking(special=False, sinks=None)


def made(out, **options):
    """A small harvest in several shards."""
    given = {"packing": PACKING, "shard": 1 << 15, "covariance": True, **options}
    return harvest(lettered(), from_texts(texts(36)), SITES, out, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("harvest") / "one"
    made(out)
    return out


def joined(batches):
    """Batches as one: activations, and document, position and id of every token."""
    acts = {a: torch.cat([b.acts[a] for b in batches]) for a in batches[0].acts}
    return acts, torch.stack([torch.cat([getattr(b, n) for b in batches]) for n in ("document", "position", "ids")], 1)


def ordered(acts, words):
    """The same by document, then as the tokens stood in it (a document's contexts begin anew, so by value)."""
    keys = torch.cat([words.double(), acts[SITES[0]].double()], 1)
    order = torch.tensor(sorted(range(len(keys)), key=lambda n: keys[n].tolist()))
    return {a: x[order] for a, x in acts.items()}, words[order]


@pytest.mark.parametrize(("dtype", "drop"), [("float32", True), ("bfloat16", False), ("float16", True)])
def test_the_shards_hold_what_the_live_stream_gives(tmp_path, dtype, drop):
    masking = Masking(drop=drop)
    shards = made(tmp_path / "out", dtype=dtype, masking=masking)
    live = LiveStream(lettered(), from_texts(texts(36)), SITES, packing=PACKING, masking=masking, dtype=dtype)
    batches = list(shards.stream(batch=50))
    assert len(shards.manifest["shards"]) > 3
    (a, m), (b, n) = ordered(*joined(batches)), ordered(*joined(list(live)))
    assert torch.equal(m, n)
    assert all(x.dtype == shards.dtype == b[s].dtype and torch.equal(x, b[s]) for s, x in a.items())
    assert shards.manifest["masking"] == live.masked
    assert shards.manifest["computed"] == live.state()["way"]
    assert bool(torch.cat([b.mask for b in batches]).all()) == drop
    assert isinstance(shards.stream(), Stream)
    assert not [p for p in shards.folder.iterdir() if p.suffix not in (".json", ".safetensors") or "part" in p.name]


def test_moments_are_those_of_all_that_was_kept(folder):
    shards = Shards(folder)
    acts, _ = joined(list(shards.stream()))
    for a, m in shards.moments().items():
        x = acts[a].double()
        assert m.count == len(x) == shards.tokens
        assert torch.allclose(m.mean, x.mean(0), atol=1e-12)
        assert torch.allclose(m.covariance, torch.cov(x.T, correction=0), atol=1e-12)
        assert shards.manifest["mean_norm"][a] == m.mean_norm == pytest.approx(float(x.norm(dim=1).mean()))


def test_the_seed_decides_the_order_and_the_same_call_gives_the_same_files(folder, tmp_path):
    again, other = made(tmp_path / "a"), made(tmp_path / "b", seed=1)
    assert again.content == Shards(folder).content != other.content
    (a, m), (b, n) = (ordered(*joined(list(s.stream()))) for s in (again, other))
    assert torch.equal(m, n)
    assert all(torch.equal(a[s], b[s]) for s in SITES)


def test_manifest_and_stream_say_what_contexts_begin_with(tmp_path):
    said = "contexts and documents begin with '<1>', which the tokenizer itself does not put before a prompt"
    shards = harvest(lettered(), from_texts(texts(9)), "z.1", tmp_path / "a", packing=Packing(9))
    assert shards.beginning.startswith(said)
    live = LiveStream(lettered(), from_texts(texts(9)), "z.1", packing=Packing(9))
    assert shards.stream().beginning == live.beginning == shards.beginning
    assert shards.stream().identity()["packing"]["bos"] == "both"
    assert harvest(lettered(), from_ids(ids(5, 9)), "z.1", tmp_path / "b", packing=Packing(9)).beginning.startswith(
        "no beginning"
    )


def test_a_number_of_tokens_is_kept_to(tmp_path):
    shards = made(tmp_path / "a", tokens=137)
    assert shards.tokens == 137 == sum(len(b) for b in shards.stream(batch=9))
    short = made(tmp_path / "b", tokens=10**5)
    assert (short.manifest["asked"], short.tokens) == (10**5, Shards(tmp_path / "b").tokens)
    assert short.tokens < 10**5


def test_every_place_of_every_row_is_equally_likely(tmp_path):
    """Over many seeds, each row lands in each place alike (χ²), and neighbours are not kept together."""
    rows, seeds = 9, 300
    seen, together = torch.zeros(rows, rows), 0
    column = [Column("n", 0, torch.int64)]
    for seed in range(seeds):
        b = Buckets(tmp_path, column, [0] * 3, seed)
        b.trim()
        for at in range(0, rows, 3):
            b.put(at, [torch.arange(at, at + 3)])
            b.flush()
        order = torch.cat([t["n"] for t in b.shuffled(0, 5)])
        seen[order, torch.arange(rows)] += 1
        together += int((order[1:] == order[:-1] + 1).sum())
    assert stats.chisquare(seen.flatten()).pvalue > 1e-3
    assert stats.poisson.sf(together, seeds * (rows - 1) / rows) > 1e-3  # in random orders n − 1 of n · (n − 1) pairs
    assert stats.poisson.cdf(together, seeds * (rows - 1) / rows) > 1e-3


def test_buckets_give_the_same_from_any_row_on(tmp_path):
    b = Buckets(tmp_path, [Column("x", 3, torch.bfloat16), Column("n", 0, torch.int32)], [0] * 4, seed=0)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    b.trim()
    b.put(0, [x, torch.arange(50)])
    b.flush()
    whole = list(b.shuffled(0, 7))
    assert [len(t["n"]) for t in whole] == [7] * 7 + [1]
    order = torch.cat([t["n"] for t in whole]).long()
    assert torch.equal(torch.cat([t["x"] for t in whole]), x[order])
    for first in (7, 21, 49):
        assert torch.equal(torch.cat([t["n"] for t in b.shuffled(first, 7)]).long(), order[first:])


@pytest.mark.parametrize("after", [0, 9, 16])
@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_a_restored_stream_goes_on_with_the_same_bits(folder, after, part):
    shards = Shards(folder)

    def fresh(batch=48):
        return shards.stream(SITES[:2], batch=batch, epochs=3, seed=4, part=part)

    whole, stream = list(fresh()), fresh()
    for _ in range(after):
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    rest = list(Shards(folder).stream(SITES[:2], batch=48, epochs=3, seed=4, part=part).restore(state))
    assert len(rest) == len(whole) - after > 0
    for a, b in zip(rest, whole[after:], strict=True):
        assert a.acts.keys() == set(SITES[:2])
        assert all(torch.equal(a.acts[s], b.acts[s]) for s in a.acts)
    with pytest.raises(Refused, match="another stream"):
        fresh(batch=32).restore(state)


def test_epochs_hold_the_same_tokens_in_other_orders_and_parts_are_the_whole(folder):
    shards, n = Shards(folder), Shards(folder).tokens
    _, words = joined(list(shards.stream(batch=48, epochs=3)))
    epochs = [[tuple(w) for w in words[e * n : (e + 1) * n].tolist()] for e in range(3)]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    parts = [list(shards.stream(batch=48, epochs=2, part=(i, 4))) for i in range(4)]
    for batch, *quarters in zip(shards.stream(batch=48, epochs=2), *parts, strict=True):
        assert torch.equal(batch.acts["z.1"], torch.cat([q.acts["z.1"] for q in quarters]))


def test_batches_are_nobodys_memory_but_the_callers(folder):
    shards = Shards(folder)
    first = next(shards.stream())
    kept = first.acts["z.1"].clone()
    first.acts["z.1"].zero_()
    assert torch.equal(next(shards.stream()).acts["z.1"], kept)


class Stop(Exception):
    """What ends a harvest in these tests."""


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [(Buckets, "put", 1), (Buckets, "put", 5), (_Harvest, "_note", 3), (MODULE, "about", 2),
     (_Harvest, "_write_manifest", 1)],
)  # fmt: skip
def test_an_interrupted_harvest_goes_on_and_ends_with_the_same_bits(folder, tmp_path, monkeypatch, where, name, calls):
    run, made_calls = getattr(where, name), []

    def stopping(*args):
        result = run(*args)
        made_calls.append(name)
        if len(made_calls) == calls:
            raise Stop
        return result

    monkeypatch.setattr(MODULE, "_EVERY", 0.0)
    with monkeypatch.context() as m:
        m.setattr(where, name, stopping)
        with pytest.raises(Stop):
            made(tmp_path)
    assert made(tmp_path).content == Shards(folder).content
    for a, m in Shards(tmp_path).moments().items():
        assert all(torch.equal(t, Shards(folder).moments()[a].tensors()[n]) for n, t in m.tensors().items())
    assert Shards(tmp_path).manifest["masking"] == Shards(folder).manifest["masking"]
    Shards(tmp_path).verify()


def test_a_finished_harvest_is_given_back_and_another_is_not_mixed_in(folder, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert made(folder).tokens == Shards(folder).tokens
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "begun").mkdir()
    for out, options in ((folder, {"seed": 3}), (folder, {"tokens": 5}), (tmp_path, {})):
        with pytest.raises(Refused, match="something else"):
            made(out, **options)
    with pytest.raises(Refused, match="cannot be made"):
        made(tmp_path / "notes")


def copied(folder, out):
    for p in folder.iterdir():
        out.mkdir(exist_ok=True)
        (out / p.name).write_bytes(p.read_bytes())
    return out


def test_damaged_and_foreign_files_are_refused(folder, tmp_path):
    def changed(name, change):
        out = copied(folder, tmp_path / name)
        change(out)
        return out

    def flip(out):
        data = bytearray((out / "shard-00001.safetensors").read_bytes())
        data[-5] ^= 1
        (out / "shard-00001.safetensors").write_bytes(data)

    def edit(out):
        m = json.loads((out / "manifest.json").read_text())
        write_json(out / "manifest.json", {**m, "tokens": m["tokens"] - 1})

    def newer(out):
        m = {**json.loads((out / "manifest.json").read_text()), "version": 3}
        write_json(out / "manifest.json", {**m, "key": manifest_key(m)})

    def exchange(out):
        a, b = out / "shard-00000.safetensors", out / "shard-00001.safetensors"
        one, two = a.read_bytes(), b.read_bytes()
        a.write_bytes(two)
        b.write_bytes(one)

    with pytest.raises(Refused, match="SHA-256"):
        list(Shards(changed("flip", flip)).stream())
    with pytest.raises(Refused, match=r"SHA-256|bytes instead"):
        list(Shards(changed("exchange", exchange)).stream())
    for name, change, words in [
        ("gone", lambda o: (o / "shard-00002.safetensors").unlink(), "is missing"),
        ("cut", lambda o: (o / "shard-00002.safetensors").write_bytes(b"x"), "bytes instead"),
        ("edit", edit, "was changed"),
        ("newer", newer, "version 3"),
        ("none", lambda o: (o / "manifest.json").unlink(), "no manifest"),
        ("other", lambda o: write_json(o / "manifest.json", {"kind": "x"}), "not of activations"),
    ]:
        with pytest.raises(Refused, match=words):
            Shards(changed(name, change))
    tensors, header = read_tensors(folder / "moments.safetensors")
    out = changed("moments", lambda o: write_tensors(o / "moments.safetensors", {n: t + 1 for n, t in tensors.items()}, header))  # fmt: skip  # noqa: E501
    with pytest.raises(Refused, match="SHA-256"):
        Shards(out).moments()


def test_another_model_site_or_part_is_refused(folder, tmp_path):
    assert Shards(folder, lettered()).tokens
    for name in ("llama_gqa", "gpt2"):
        with pytest.raises(Refused, match=r"other (config|weights)"):
            Shards(folder, tiny(name))
    for options, words in [
        ({"sites": "z.2"}, "not harvested; near: z.1"),
        ({"batch": 5, "part": (0, 2)}, "cannot be cut"),
        ({"batch": 4, "part": (2, 2)}, "cannot be cut"),
        ({"batch": 0}, "cannot be cut"),
        ({"dtype": "float64"}, "not kept"),
    ]:
        with pytest.raises(Refused, match=words):
            Shards(folder).stream(**options)
    with pytest.raises(Refused, match="free"):
        made(tmp_path / "much", tokens=10**15)
    with pytest.raises(Refused, match="at least 1"):
        made(tmp_path / "none", tokens=0)
    rows = from_ids(torch.full((2, 6), 2))
    with pytest.raises(Refused, match="every token is masked"):
        harvest(lettered(), rows, "z.1", tmp_path / "masked", packing=PACKING, masking=Masking(sinks=None))


def test_parts_that_were_cut_short_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(_Harvest, "_write_shards", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            made(tmp_path)
    part = next((tmp_path / "parts").iterdir())
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(Refused, match="bytes where"):
        made(tmp_path)


def test_ids_without_tokenizer_and_masks_can_be_harvested(tmp_path):
    shards = harvest(tiny("gpt2"), from_ids(ids(5, 9)), "embed", tmp_path, packing=Packing(9), masking=NONE)
    acts, words = joined(list(shards.stream()))
    order = (words[:, 0] * 9 + words[:, 1]).argsort()
    assert torch.equal(words[order, 2], ids(5, 9).reshape(-1))
    assert torch.equal(acts["embed"][order], tiny("gpt2").hf.transformer.wte.weight.detach()[ids(5, 9).reshape(-1)])
