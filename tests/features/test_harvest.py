"""A harvest against activations by hand; interrupted, shared out and merged it is the same; nothing foreign is read."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cutaway.core.files import read_json, write_json
from cutaway.core.refuse import Refused
from cutaway.dictionaries.gates import BatchTopK
from cutaway.features import FeatureStore, Keep, merge
from cutaway.features import harvest as room
from cutaway.features.store.corpus import COUNTED, SCORE, SPECIAL
from cutaway.features.store.dictionaries import named
from cutaway.features.store.hashes import Seen, mix
from cutaway.features.store.partners import partners
from cutaway.features.store.shelf import by_latent
from cutaway.features.store.tally import LEAST, bin_of, edges
from cutaway.streams import Masking, Packing, from_texts
from cutaway.streams.folders import MANIFEST
from tests.conformance import subjects
from tests.features.common import KEEP, MASKING, PACKING, WIDTH, brute, dictionaries, found, made, model, texts

module = sys.modules["cutaway.features.harvest"]  # the room offers the function under this name


def files(folder):
    """The bytes of all files but the manifest, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST}


def same(a, b):
    """Two stores hold the same: whole numbers to the bit, others within rounding."""
    assert a.names == b.names
    for name in a.names:
        x, y = a.latents(name), b.latents(name)
        assert x.tensors.keys() == y.tensors.keys()
        for n, t in x.tensors.items():
            if t.is_floating_point():
                torch.testing.assert_close(t, y.tensors[n], rtol=2e-3 if "window" in n else 1e-5, atol=1e-5)
            elif not n.endswith("key"):  # keys of examples hold the bits of their values
                assert torch.equal(t, y.tensors[n]), n
        for i in range(len(x)):
            (p, v), (q, w) = x.codes(i), y.codes(i)
            assert torch.equal(p, q)
            torch.testing.assert_close(v, w, rtol=1e-5, atol=1e-5)
            assert x.partners(i) == y.partners(i)
    for column in ("ids", "document", "flags", "hash"):
        assert torch.equal(a.column(column), b.column(column)), column


@pytest.mark.parametrize("name", ["some", "few"])
def test_statistics_are_those_of_all_activations(store, name):
    code, held = found(brute().codes[name], store).flatten(0, 1), store.latents(name)
    assert len(code) == store.manifest["counts"]["contexts"] * WIDTH
    assert torch.equal(held.count, (code != 0).sum(0))
    torch.testing.assert_close(held.tensors["total"], code.double().sum(0))
    torch.testing.assert_close(held.tensors["square"], code.double().square().sum(0))
    torch.testing.assert_close(held.tensors["largest"], code.abs().amax(0))
    assert torch.equal(held.density, ((code != 0).double().sum(0) / store.counted).float())
    ends = edges()
    for i, column in enumerate(code.T):
        at = torch.bucketize(column[column != 0].abs(), ends, right=True) - 1
        assert torch.equal(held.tensors["histogram"][i], torch.bincount(at, minlength=64))
        place, value = held.codes(i)
        assert torch.equal(place, (column != 0).nonzero()[:, 0])
        torch.testing.assert_close(value, column[column != 0])


@pytest.mark.parametrize("name", ["some", "few"])
def test_examples_are_the_largest_of_their_contexts_with_what_is_around_them(store, name):
    code, held = found(brute().codes[name], store), store.latents(name)
    for i in range(len(held)):
        best = code[..., i].abs().amax(1).sort(descending=True)
        top = held.top(i)
        assert len(top) == min(KEEP.top, int((best.values > 0).sum()))
        assert len({e.context for e in top}) == len(top)
        assert [e.value for e in top] == pytest.approx(best.values[: len(top)].tolist(), rel=1e-5, abs=1e-5)
        for e in (*top, *held.sampled(i)):
            assert e.value == pytest.approx(float(code[e.context, e.position, i]), rel=1e-5, abs=1e-5)
            around = torch.nn.functional.pad(code[e.context, :, i], (3, 3))[e.position : e.position + 7]
            torch.testing.assert_close(e.window, around, rtol=2e-3, atol=1e-6)


def test_random_examples_are_the_first_of_their_octave_in_a_keyed_order(store):
    code, held, hashes = found(brute().codes["some"], store), store.latents("some"), store.column("hash")
    octaves = (bin_of(code.abs().clamp_min(1e-30)) // 2).masked_fill(code == 0, -1)
    where = torch.arange(WIDTH).expand(len(code), -1)
    for i in (2, 11):
        key = mix(hashes[:, None] ^ mix(where * len(held) + i))
        for octave in set(octaves[..., i].flatten().tolist()) - {-1}:
            at = (octaves[..., i] == octave).nonzero()
            first = at[key[at[:, 0], at[:, 1]].argsort(descending=True)][: KEEP.samples].tolist()
            assert [[e.context, e.position] for e in held.sampled(i) if e.octave == octave] == first
            shares = held.band(i, octave)
            low = 2.0 ** (octave + LEAST)
            values = code[..., i][code[..., i] != 0].abs()
            assert shares[0] == pytest.approx(float((values < low).double().mean()))
            assert shares[1] == pytest.approx(float((values < 2 * low).double().mean()))


def test_quantiles_lie_in_their_bins(store):
    code, held = found(brute().codes["some"], store).flatten(0, 1), store.latents("some")
    shares = torch.tensor([0.05, 0.5, 0.93, 1.0])
    for i in range(len(held)):
        values = code[:, i][code[:, i] != 0].abs().double()
        low, high = held.quantile(i, shares).unbind(-1)
        if not len(values):
            assert bool(low.isnan().all() and high.isnan().all()), "a latent that never fires has none"
            continue
        exact = torch.from_numpy(np.quantile(values.numpy(), shares.double().numpy(), method="inverted_cdf"))
        assert bool((low <= exact * 1.0001).all() and (exact <= high * 1.0001).all())
        assert bool((high <= low.clamp_min(2.0**LEAST) * 1.4143).all())


def test_partners_are_those_of_largest_mutual_information(store):
    active = (found(brute().codes["some"], store).flatten(0, 1) != 0).double()
    held, tokens = store.latents("some"), store.counted
    assert held.paired_tokens == tokens
    both, own = active.T @ active, active.sum(0)
    score = (both * tokens / (own[:, None] * own)).log() / -(both / tokens).log()
    score = score.masked_fill(both < 3, -torch.inf).fill_diagonal_(-torch.inf)
    for i in range(len(held)):
        rows = held.partners(i)
        assert [n for _, n, _ in rows] == [int(both[i, j]) for j, *_ in rows]
        assert [n for *_, n in rows] == [int(own[j]) for j, *_ in rows]
        best = score[i].sort(descending=True).values
        assert [float(score[i, j]) for j, *_ in rows] == pytest.approx(best[: len(rows)].tolist())
    codes = [store.folder / f["file"] for f in held.row["codes"]]
    among = partners(codes, len(held), 1 << 40, 3)["partner"]  # as if all other tokens of so many were empty
    score = (both * 2.0**40 / (own[:, None] * own)).log() / -(both / 2.0**40).log()
    best = score.masked_fill(both < 3, -torch.inf).fill_diagonal_(-torch.inf).topk(3)
    assert torch.equal(among >= 0, best.values.isfinite())
    assert_close(score.gather(1, among.long().clamp(min=0))[among >= 0], best.values[among >= 0])


def test_tokens_are_masked_counted_and_parted_by_document(store):
    counts, flags = store.manifest["counts"], store.column("flags")
    lengths = [len(row) for row in brute().ids]
    assert counts["tokens"] == sum(lengths)
    assert counts["special"] == len(lengths) == int((flags & SPECIAL > 0).sum())
    assert counts["counted"] == counts["tokens"] - counts["special"] == counts["explain"] + counts["score"]
    assert counts["contexts"] * WIDTH == counts["tokens"] + counts["padding"]
    held_out = {}
    for document, flag in zip(store.column("document").flatten().tolist(), flags.flatten().tolist(), strict=True):
        if document >= 0:
            assert held_out.setdefault(document, flag & SCORE) == flag & SCORE, "a document is in one half"
    assert 0.25 < sum(map(bool, held_out.values())) / len(held_out) < 0.75
    first = store.context(0)
    assert texts()[0].startswith("".join(store.texts(first["ids"][first["flags"] & COUNTED > 0])))


def test_halves_and_random_examples_depend_on_content_alone(store, tmp_path):
    turned = made(tmp_path / "turned", texts()[::-1], packing=replace(PACKING, rows=3))

    def by_content(s):
        flags, ids = s.column("flags"), s.column("ids")
        return {tuple(row): f for row, f in zip(ids.tolist(), (flags & SCORE).tolist(), strict=True)}

    def chosen(s, i):
        ids = s.column("ids").tolist()
        return {(tuple(ids[e.context]), e.position, e.octave) for e in s.latents("some").sampled(i)}

    assert by_content(turned) == by_content(store)
    assert all(chosen(turned, i) == chosen(store, i) for i in range(24))


def test_documents_that_were_seen_before_are_left_out(store, tmp_path):
    doubled = [t for pair in zip(texts(), texts(), strict=True) for t in pair]
    again = made(tmp_path / "doubled", doubled)
    assert again.manifest["counts"]["duplicates"] == store.manifest["counts"]["contexts"]
    assert torch.equal(again.latents("some").count, store.latents("some").count)
    whole = " ".join(texts())
    shifted = [whole, f"Tom Paul Emma Tom {whole}"]
    counts = made(tmp_path / "across", shifted, packing=Packing(64, rows=4)).manifest["counts"]
    assert counts["duplicates"] > 0.7 * counts["contexts"], "most of a copy that begins elsewhere in its contexts"


@pytest.mark.parametrize("after", [0, 1, 7, 11])
def test_an_interrupted_harvest_ends_with_the_same_bits(store, tmp_path, monkeypatch, after):
    out, take, left = tmp_path / "out", module._Harvest._take, [after]
    monkeypatch.setattr(module, "_EVERY", -1.0 if after != 7 else 1e9)  # at 7 only the first note is there
    monkeypatch.setattr(module, "ENTRIES", 2000)

    def dies(self, group):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        take(self, group)

    monkeypatch.setattr(module._Harvest, "_take", dies)
    with pytest.raises(KeyboardInterrupt):
        made(out)
    monkeypatch.setattr(module._Harvest, "_take", take)
    again, whole = made(out), made(tmp_path / "whole")
    assert len(again.manifest["dictionaries"][0]["codes"]) > 1
    assert files(out) == files(tmp_path / "whole")
    assert again.manifest["counts"] == whole.manifest["counts"] == store.manifest["counts"]
    same(again, store)
    assert made(out).manifest["key"] == again.manifest["key"], "what is finished is given back"
    with pytest.raises(Refused, match="something else"):
        made(out, seed=1)


def test_parts_of_several_processes_are_one_harvest(store, tmp_path):
    out = tmp_path / "out"
    job = module._Job(model(), named(dictionaries()), from_texts(texts()), PACKING, MASKING, None, KEEP, None, 0)
    for i in range(3):
        module._Harvest(job, out / module.PART.format(i), (i, 3)).run()
    module._join(out, 3)
    assert not list(out.glob("part-*")), "only the joined store is left"
    assert FeatureStore(out).manifest["counts"] == store.manifest["counts"]
    same(FeatureStore(out), store)


def test_stores_of_parts_of_the_documents_merge_into_that_of_all(store, tmp_path):
    cut = 24  # the contexts of the first sentences fill whole groups
    parts = [made(tmp_path / n, some) for n, some in (("a", texts()[:cut]), ("b", texts()[cut:]))]
    both = merge(parts, tmp_path / "both")
    same(both, store)
    assert both.manifest["counts"] == store.manifest["counts"]
    with pytest.raises(Refused, match="count twice"):
        merge([parts[0], made(tmp_path / "c", texts()[cut - 1 :])], tmp_path / "no")
    with pytest.raises(Refused, match="seed differ"):
        merge([parts[0], made(tmp_path / "d", texts()[cut:], seed=1)], tmp_path / "no")
    with pytest.raises(Refused, match="at least two"):
        merge(parts[:1], tmp_path / "no")


def test_thresholds_of_sinks_come_from_another_store(tmp_path):
    usual = Masking(sinks=1.2)
    first = made(tmp_path / "a", texts()[:24], masking=usual)
    assert first.manifest["counts"]["sinks"] > 0
    alone, alike = (made(tmp_path / n, texts()[24:], masking=usual, like=s) for n, s in (("b", None), ("c", first)))
    with pytest.raises(Refused, match="masking differ"):
        merge([first, alone], tmp_path / "no")
    assert merge([first, alike], tmp_path / "both").manifest["masking"] == first.manifest["masking"]


def test_a_number_of_tokens_and_a_share_of_the_codes(tmp_path):
    few = made(tmp_path / "a", tokens=100, keep=replace(KEEP, codes=0.5))
    counts = few.manifest["counts"]
    assert 100 <= counts["read"] == counts["tokens"] < 100 + 4 * WIDTH
    assert 0 < counts["coded"] < counts["counted"]
    assert 0 < len(few.latents("some").codes(2)[0]) < int(few.latents("some").count[2])


def test_a_model_without_a_tokenizer_is_shown_in_numbers(tmp_path):
    from tests.streams.common import lettered
    from tests.streams.common import texts as letters

    d = subjects.dictionary(lettered().shape.d_model)
    store = room(lettered(), d, from_texts(letters(9)), tmp_path / "a", packing=Packing(9), keep=KEEP)
    assert store.names == ["resid_post.1"]
    assert store.texts(torch.tensor([11, 12])) == ["11", "12"]
    with pytest.raises(Refused, match="no tokenizer"):
        store.token_ids("ab")


def test_what_is_broken_or_foreign_is_refused(store, tmp_path):
    def broken(change):
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(store.folder, folder)
        change(folder)
        return folder

    def longer(folder):
        with (folder / "latents-0.safetensors").open("ab") as f:
            f.write(b"x")

    def changed(folder):
        path = folder / "codes-0-00000.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")

    def renamed(folder):
        write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"width": 7})

    cases = [
        (lambda f: (f / MANIFEST).unlink(), "no harvest has finished"),
        (lambda f: (f / MANIFEST).write_text("{", "utf-8"), "cannot be read as JSON"),
        (lambda f: write_json(f / MANIFEST, {"kind": "activations"}), "not of features"),
        (lambda f: write_json(f / MANIFEST, {"kind": "features", "version": 99}), "version 99"),
        (renamed, "was changed"),
        (lambda f: (f / "corpus-00000.safetensors").unlink(), "missing"),
        (longer, "bytes instead of"),
    ]
    for change, why in cases:
        with pytest.raises(Refused, match=why):
            FeatureStore(broken(change))
    with pytest.raises(Refused, match="SHA-256"):
        FeatureStore(broken(changed)).verify()
    with pytest.raises(Refused, match="missing or was changed"):
        FeatureStore(broken(lambda f: (f / "tokenizer.json").write_text("{}", "utf-8"))).texts(torch.tensor([1]))
    store.verify()
    with pytest.raises(Refused, match="other weights"):
        FeatureStore(store.folder, subjects.random_llama(1))
    with pytest.raises(Refused, match="this one"):
        store.check_dictionary(dictionaries()["few"], "some")
    with pytest.raises(Refused, match="the store has several"):
        store.latents()
    with pytest.raises(Refused, match="near: some"):
        store.latents("sone")
    with pytest.raises(Refused, match="use 0 to 23"):
        store.latents("some").top(24)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tokens": 0}, "at least 1"),
        ({"packing": Packing(1)}, "too small"),
        ({"documents": [""]}, "every token is masked"),
    ],
)
def test_what_cannot_be_harvested_is_refused(tmp_path, options, why):
    with pytest.raises(Refused, match=why):
        made(tmp_path / "a", **options)


def test_gates_of_whole_batches_and_odd_sizes_are_refused(tmp_path):
    d = replace(dictionaries()["some"], gates=(BatchTopK(3),))
    with pytest.raises(Refused, match="others"):
        named({"a": d})
    with pytest.raises(Refused, match="nothing to harvest"):
        named({})
    with pytest.raises(Refused, match="at least 1"):
        Keep(top=0)
    with pytest.raises(Refused, match="share"):
        Keep(codes=2.0)
    assert list(named([dictionaries()["few"]] * 2)) == ["mlp_in.0>mlp_out.0 1", "mlp_in.0>mlp_out.0 2"]


def test_labels_lists_and_notes(store, tmp_path):
    from cutaway.features.store.meta import Label, Meta

    meta = Meta(tmp_path / "meta.sqlite", "one")
    assert meta.labels("some") == []
    rule = Label("some", 3, "rule", "fires on “ store”", {"f1": 0.8, "f1 interval": [0.7, 0.9]}, {"kind": "token"})
    meta.put([rule, Label("few", 3, "rule", "fires after “ the”"), Label("some", 4, "me", 'odd "words" here')])
    assert meta.labels("some", 3) == [rule]
    assert {(x.dictionary, x.latent) for x in meta.find("fires")} == {("few", 3), ("some", 3)}
    assert [x.latent for x in meta.find('"words" odd')] == [4]
    meta.put([replace(rule, text="fires on other things")])
    assert meta.find("store") == []
    assert meta.labels("some", 3)[0].text == "fires on other things"
    meta.add_to_list("good", [("some", 3), ("some", 3), ("few", 1)])
    assert meta.lists() == {"good": [("few", 1), ("some", 3)]}
    meta.add_note("some", 3, "look again")
    assert meta.notes("some", 3) == ["look again"]
    assert Meta(tmp_path / "meta.sqlite", "one").notes("some", 3) == ["look again"]
    with pytest.raises(Refused, match="another store"):
        Meta(tmp_path / "meta.sqlite", "two").notes("some", 3)
    (tmp_path / "bad.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(Refused, match="SQLite says"):
        Meta(tmp_path / "bad.sqlite", "one").labels("some")


def test_priorities_look_uniform():
    keys = mix(torch.arange(20000)).double() / 2**63
    assert 0 <= float(keys.min()) <= float(keys.max()) < 1
    counts = torch.histc(keys.float(), 20, 0, 1)
    assert float((counts - 1000).square().sum() / 1000) < 45  # χ² with 19 degrees of freedom, p ≈ 7e-4
    assert set(mix(torch.arange(99), 1).tolist()).isdisjoint(mix(torch.arange(99)).tolist())


def test_fingerprints_lie_in_few_sorted_runs_that_know_all_of_them():
    seen, g = Seen(), np.random.default_rng(0)
    parts = [np.unique(g.integers(0, 1 << 40, 1 + n % 5)) for n in range(200)]
    for part in parts:
        seen._add(part)
    every = np.concatenate(parts)
    assert len(seen.runs) <= 10
    assert all((np.diff(run) > 0).all() for run in seen.runs)
    assert all(len(a) > len(b) for a, b in pairwise(seen.runs))
    assert seen._known(every).all()
    assert not seen._known(every + (1 << 41)).any()
    assert Seen.of_tensor(seen.tensor())._known(every).all()
    assert not Seen.of_tensor(Seen().tensor())._known(every).any()


def test_entries_that_come_token_after_token_are_sorted_by_latent_and_place():
    g = torch.Generator().manual_seed(0)
    place = torch.arange(50).repeat_interleave(4)
    latent = torch.cat([torch.randperm(9, generator=g)[:4] for _ in range(50)])
    found = by_latent(9)({"latent": latent.int(), "place": place.int(), "value": place + latent / 16})
    order = (latent << 32 | place).argsort()
    assert found["place"].tolist() == place[order].tolist()
    assert found["value"].tolist() == (place + latent / 16)[order].tolist()
    assert found["first"].diff().tolist() == torch.bincount(latent, minlength=9).tolist()
    assert found["first"][0] == 0
