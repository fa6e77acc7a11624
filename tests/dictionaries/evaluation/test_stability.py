"""Seeds, pairs of dictionaries, widths and features, on codes made by hand."""

from dataclasses import replace

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.dictionaries import SparseCode, load, save
from cutaway.dictionaries.evaluation.compare import comparison, overlap
from cutaway.dictionaries.evaluation.evidence import EncodedEvidence, Evidence, encode_evidence
from cutaway.dictionaries.evaluation.features import Passage, concentration, context, features_of
from cutaway.dictionaries.evaluation.geometry import cosines, decoder_rows
from cutaway.dictionaries.evaluation.matching import mcc
from cutaway.dictionaries.evaluation.splitting import splitting, splitting_of
from cutaway.dictionaries.evaluation.stability import stability, stability_of
from tests.dictionaries.evaluation import made


def with_rows(rows: torch.Tensor):
    d = made.random_autoencoder(len(rows), rows.shape[1])
    return replace(d, decoder=({made.SITE: rows},))


def with_code(f: torch.Tensor, rows: torch.Tensor, **given) -> EncodedEvidence:
    """A dictionary that has just this code."""
    e = Evidence({made.SITE: torch.zeros(len(f), rows.shape[1])}, **given)
    return EncodedEvidence(with_rows(rows), e, SparseCode.from_dense(f), {})


def test_seed_stability_is_mcc_of_every_pair():
    g = generator(0)
    a = torch.randn(12, 6, generator=g)
    b = a[torch.randperm(12, generator=g)] * 2
    c = torch.randn(12, 6, generator=g)
    got = stability_of([with_rows(r) for r in (a, b, c)], samples=3)
    assert got.alike[0, 1] == pytest.approx(1.0, abs=1e-5)
    assert float(got.alike[0, 2]) == pytest.approx(mcc(a, c), abs=1e-6)
    assert torch.equal(got.alike, got.alike.T)
    assert got.alike_null.shape == (3, 3, 3)
    assert got.alike_null[0, 1].max() < 0.9
    assert (got.alike_interval[2, 0, 0] <= got.alike[2, 0]) & (got.alike[2, 0] <= got.alike_interval[2, 0, 1])
    for wrong in ([with_rows(a)], [with_rows(a), with_rows(a[:, :5])]):
        with pytest.raises(Refused):
            stability_of(wrong)


def test_stability_takes_a_list_and_its_record_says_how_to_load_each(tmp_path):
    files = [save(made.random_autoencoder(seed=i), tmp_path / f"{i}.safetensors") for i in range(2)]
    found = stability([load(f) for f in files])
    assert found.record["command"].endswith(f"--dictionaries {files[0]},{files[1]}")
    names: dict = {}
    exec(found.record["python"], names)
    assert torch.equal(names["result"].alike, found.alike)
    odd = save(made.random_autoencoder(), tmp_path / "a,b.safetensors")
    assert "has a comma" in stability([load(odd), load(files[0])]).record["command"]


def test_a_comparison_matches_partners_and_sees_whether_they_fire_together():
    g = generator(1)
    rows = torch.randn(6, 5, generator=g)
    f = torch.rand(200, 6, generator=g) * (torch.rand(200, 6, generator=g) < 0.3)
    order = torch.tensor([3, 1, 0, 5, 2])  # the other has five of the six, in another order
    other = f[:, order].clone()
    other[:100, 0] = 0  # partner of latent 3 misses half of its tokens
    got = comparison(with_code(f, rows), with_code(other, rows[order]), samples=2)
    assert got.partner.tolist() == [2, 1, 4, 0, -1, 3]
    assert torch.allclose(got.cosine.nan_to_num(0), torch.tensor([1.0, 1, 1, 1, 0, 1]), atol=1e-5)
    want = float((f[100:, 3] > 0).sum() / (f[:, 3] > 0).sum())
    assert got.overlap.nan_to_num(-1).tolist() == pytest.approx([1, 1, 1, want, -1, 1], abs=1e-6)
    assert got.overlap_null[:3].max() < 0.5
    assert got.record["left over"] == {"first": 1, "second": 0}
    short = with_code(f[:50], rows)
    for function in (comparison, splitting_of):
        with pytest.raises(Refused):
            function(short, with_code(f, rows))


def test_overlap_by_brute_force():
    g = generator(2)
    a, b = (torch.randn(50, 4, generator=g) * (torch.rand(50, 4, generator=g) < 0.4) for _ in range(2))
    partner = torch.tensor([2, 0, -1, 1])
    got = overlap(SparseCode.from_dense(a), SparseCode.from_dense(b), partner)
    for i, j in enumerate(partner.tolist()):
        if j < 0:
            assert torch.isnan(got[i])
        else:
            x, y = a[:, i] != 0, b[:, j] != 0
            assert float(got[i]) == pytest.approx(float((x & y).sum() / (x | y).sum()))


def test_splitting_finds_the_parts_and_what_they_cover():
    """Latent 0 splits into two that share its tokens but a few; latent 1 stays; latent 2 is gone."""
    g = generator(3)
    f = (torch.rand(400, 3, generator=g) < 0.3).float()
    coin = torch.rand(400, generator=g) < 0.5
    missed = torch.arange(400) < 80
    wide = torch.stack([f[:, 0] * coin * ~missed, f[:, 0] * ~coin * ~missed, f[:, 1]], 1)
    rows = torch.eye(3)
    large = torch.stack([rows[0] + 0.5 * rows[2], rows[0] - 0.5 * rows[2], rows[1]])
    got = splitting_of(with_code(f, rows), with_code(wide, large))
    assert got.parts.tolist() == [2, 1, 0]
    want = float(f[80:, 0].sum() / f[:, 0].sum())
    assert got.covered.tolist() == pytest.approx([want, 1, 0])
    assert got.covered_null.max() < 0.5
    assert got.nearest[:2].tolist() == pytest.approx([1 / 1.25**0.5, 1], abs=1e-5)


def test_splitting_asks_for_the_narrower_dictionary_first():
    wide, narrow = (with_rows(torch.randn(n, 5, generator=generator(n))) for n in (9, 6))
    evidence = Evidence({made.SITE: torch.randn(50, 5, generator=generator(1))})
    assert splitting(narrow, wide, evidence).parts.shape == (6,)
    with pytest.raises(Refused, match="9 latents, and the second one 6"):
        splitting(wide, narrow, evidence)


def test_splitting_by_brute_force():
    g = generator(8)
    f = (torch.rand(150, 6, generator=g) < 0.3).float()
    wide = f[:, torch.randint(0, 6, (15,), generator=g)] * (torch.rand(150, 15, generator=g) < 0.6)
    small, large = torch.randn(6, 3, generator=g), torch.randn(15, 3, generator=g)
    got = splitting_of(with_code(f, small), with_code(wide, large), within=0.7, alike=0.2)
    near = cosines(small, large)
    for i in range(6):
        parts = [j for j in range(15) if wide[:, j].any() and near[i, j] >= 0.2
                 and (wide[:, j] * f[:, i]).sum() >= 0.7 * wide[:, j].sum()]  # fmt: skip
        reached = (wide[:, parts].sum(1) > 0) & (f[:, i] > 0)
        assert int(got.parts[i]) == len(parts)
        assert float(got.covered[i]) == pytest.approx(float(reached.sum() / f[:, i].sum()), abs=1e-6)
        assert float(got.nearest[i]) == pytest.approx(float(near[i].max()), abs=1e-6)
    assert got.parts.sum() > 3


def test_features_are_ranked_by_how_clear_they_are():
    ids = torch.arange(100) % 5
    f = torch.zeros(100, 4)
    f[ids == 2, 0] = torch.arange(20.0) + 1  # knows token 2
    f[:, 1] = 0.5  # fires everywhere
    f[:3, 2] = 9  # too rare
    f[:50, 3] = 1
    s = with_code(f, torch.eye(4), ids=ids)
    got = features_of(s, n=2)
    assert got.latent.tolist() == [0, 1] or got.latent.tolist() == [0, 3]
    assert got.focus[0] == 1
    assert got.focus_null[0].max() < 0.6
    assert got.largest[0, :3].tolist() == [20, 19, 18]
    assert got.token[0, :2].tolist() == [97, 92]
    assert set(got.ids[0].tolist()) == {2}
    assert got.frequency[0] == pytest.approx(0.2)
    assert got.mean_active[0] == pytest.approx(10.5)
    assert features_of(s, n=1, by="frequency").latent.tolist() == [1]
    assert features_of(s, n=1, by="size", least=1).latent.tolist() == [0]
    assert features_of(s, n=9).latent.shape == (3,)
    assert features_of(s, n=3, least=1, contexts=200).largest.shape == (3, 200)
    with pytest.raises(Refused, match="no token ids"):
        features_of(with_code(f, torch.eye(4)))
    with pytest.raises(Refused, match="none does"):
        features_of(s, least=500)


def test_concentration_by_brute_force():
    g = generator(4)
    f = torch.randn(60, 3, generator=g) * (torch.rand(60, 3, generator=g) < 0.5)
    f[:, 2] = 0
    ids = torch.randint(0, 6, (60,), generator=g)
    got = concentration(SparseCode.from_dense(f), ids)
    for i in range(2):
        by_id = torch.stack([f[ids == t, i].abs().sum() for t in range(6)])
        assert float(got[i]) == pytest.approx(float(by_id.max() / by_id.sum()), abs=1e-5)
    assert got[2] == 0


def test_contexts_are_found_in_shuffled_evidence():
    order = torch.randperm(30, generator=generator(5))
    ids, sequence, position = torch.arange(30) + 100, torch.arange(30) // 10, torch.arange(30) % 10
    s = with_code(torch.ones(30, 1), torch.eye(1), ids=ids[order], sequence=sequence[order], position=position[order])
    row = int((order == 14).nonzero())
    assert context(s, row, 2) == Passage((112, 113, 114, 115, 116), 2, True, True)
    edge = int((order == 10).nonzero())
    assert context(s, edge, 2) == Passage((110, 111, 112), 0, False, True)
    whole = {1: torch.arange(10) + 110}
    gone = torch.arange(30) != 13  # a token that the evidence leaves out
    part = with_code(torch.ones(29, 1), torch.eye(1), ids=ids[gone], sequence=sequence[gone], position=position[gone],
                     context=sequence[gone])  # fmt: skip
    assert context(part, 13, 2) == Passage((112, -1, 114, 115, 116), 2, True, True)
    assert context(part, 13, 2, whole) == Passage((112, 113, 114, 115, 116), 2, True, True)
    assert context(part, 13, 20, whole) == Passage(tuple(range(110, 120)), 4, False, False)
    doubled = with_code(torch.ones(30, 1), torch.eye(1), ids=ids, sequence=sequence * 0, position=position)
    with pytest.raises(Refused, match="several tokens at one position"):
        context(doubled, 14)
    known = with_code(
        torch.ones(30, 1), torch.eye(1), ids=ids, sequence=sequence * 0, position=position, context=sequence
    )
    assert context(known, 14, 2) == Passage((112, 113, 114, 115, 116), 2, True, True)
    with pytest.raises(Refused, match="not all known"):
        context(with_code(torch.ones(3, 1), torch.eye(1)), 0)


def test_a_seen_dictionary_keeps_what_it_was():
    d = made.random_autoencoder()
    s = encode_evidence(d, Evidence({made.SITE: made.activations(5000)}))  # more than one part
    assert len(s.code) == 5000
    assert torch.allclose(s.output[made.SITE], d.forward(made.activations(5000)), atol=1e-5)
    assert decoder_rows(d).shape == (24, 8)
