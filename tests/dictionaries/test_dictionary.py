"""The one Dictionary against its definition, written out with sums; folding; files."""

import pytest
import torch

import cutaway as ca
from cutaway import dictionaries
from cutaway.core.files import write_tensors
from cutaway.core.refuse import Refused
from cutaway.dictionaries.code import SparseCode
from cutaway.dictionaries.dictionary import place_of
from cutaway.dictionaries.gates import TopK
from cutaway.dictionaries.norms import Scale, TokenLayerNorm, TokenNorm, Whitening
from cutaway.dictionaries.transforms import alone, fold
from tests.dictionaries.common import TOPOLOGIES, WIDTHS, A, B, C, Draw, dictionary

DRAW = Draw(100)
ACTS = {site: DRAW(2, 3, width) for site, width in WIDTHS.items() if site != "z.0"}


def invertible(n: int) -> Whitening:
    matrix = torch.eye(n).double() + 0.2 * DRAW(n, n)
    return Whitening(DRAW(n), matrix, torch.linalg.inv(matrix).contiguous())


def into(norm, x):
    """What a normalisation makes of one token, and the way back."""
    n = len(x)
    if norm is None:
        return x, lambda y: y
    if isinstance(norm, Scale):
        return x * norm.factor, lambda y: y / norm.factor
    if isinstance(norm, Whitening):
        return norm.matrix.T @ (x - norm.mean), lambda y: torch.linalg.solve(norm.matrix.T, y) + norm.mean
    if isinstance(norm, TokenNorm):
        length = (x @ x) ** 0.5
        return x * n**0.5 / length, lambda y: y * length / n**0.5
    mean = x.sum() / n
    std = (((x - mean) ** 2).sum() / (n - 1)) ** 0.5
    return (x - mean) / (std + 1e-5), lambda y: y * std + mean


def by_definition(d, acts):
    """Codes and outputs, one token at a time."""
    tokens = {s: x.reshape(-1, x.shape[-1]) for s, x in acts.items()}
    codes, outs = [], {w: [] for w in d.writes}
    for t in range(len(next(iter(tokens.values())))):
        seen = {s: into(d.reading.get(s), tokens[s][t]) for s in d.reads}
        fs = []
        for b, block in enumerate(d.blocks):
            pre = d.b_enc[b].clone()
            for s in block.reads:
                p = d.b_dec[s] if d.subtract_b_dec else 0
                pre += d.encoder[b][s] @ (seen[s][0] - p)
            n = sum((d.decoder[b][w] ** 2).sum(1) for w in block.writes) ** 0.5 if d.norm_aware else 1
            fs.append(d.gates[b].apply((pre * n)[None]).dense()[0] / n)
        codes.append(torch.cat(fs))
        for w in d.writes:
            y = d.b_dec[w].clone()
            for b, block in enumerate(d.blocks):
                if w in block.writes:
                    y += fs[b] @ d.decoder[b][w]
            for (r, to), matrix in d.skip.items():
                y += matrix @ seen[r][0] if to == w else 0
            readers = [r for block in d.blocks if w in block.writes for r in block.reads]
            norm, fixed = d.writing.get(w), (Scale, Whitening)
            back = into(norm, torch.zeros(len(y)).double())[1] if isinstance(norm, fixed) or norm is None else \
                seen[w if w in readers else readers[0]][1]  # fmt: skip
            outs[w].append(back(y))
    return torch.stack(codes), {w: torch.stack(ys) for w, ys in outs.items()}


def agree(d, acts, tolerance=1e-10):
    codes, outs = by_definition(d, acts)
    assert torch.allclose(d.encode(acts).dense(), codes, atol=tolerance)
    got = d.forward(acts)
    assert set(got) == set(outs)
    for w, y in outs.items():
        assert torch.allclose(got[w].reshape(y.shape), y, atol=tolerance), w


@pytest.mark.parametrize("kind", ["relu", "topk", "jump", "gated"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_topology_is_its_definition(topology, kind):
    blocks, skip = TOPOLOGIES[topology]
    d = dictionary(blocks, WIDTHS, kind, skip)
    agree(d, ACTS)
    if {r for _, r, _ in blocks for r in r} <= set(d.b_dec):
        agree(dictionary(blocks, WIDTHS, kind, skip, subtract_b_dec=True), ACTS)
    if kind != "gated":
        agree(dictionary(blocks, WIDTHS, kind, skip, norm_aware=True), ACTS)


@pytest.mark.parametrize("kind", ["topk", "jump"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("aware", [False, True])
def test_folding_keeps_the_map(topology, kind, aware):
    blocks, skip = TOPOLOGIES[topology]
    norms = {A: Scale(0.7), B: invertible(4), C: Scale(1.9)}
    plain = dictionary(blocks, WIDTHS, kind, skip)
    settings = {
        "norm_aware": aware,
        "reading": {s: norms[s] for s in plain.reads},
        "writing": {s: norms[s] for s in plain.writes},
    }
    other = {s: Scale(3.0) for s in plain.writes}
    for subtract in {False, set(plain.reads) <= set(plain.b_dec)}:
        for writing in (settings["writing"], other):
            d = dictionary(blocks, WIDTHS, kind, skip, subtract_b_dec=subtract, **{**settings, "writing": writing})
            agree(d, ACTS)
            folded = fold(d)
            assert not folded.reading
            assert not folded.writing
            assert not folded.norm_aware
            for w, y in d.forward(ACTS).items():
                assert torch.allclose(folded.forward(ACTS)[w], y, atol=1e-10)
            same, new = d.encode(ACTS).dense(), folded.encode(ACTS).dense()
            assert torch.equal(same != 0, new != 0)
            assert aware or torch.allclose(same, new, atol=1e-10)


@pytest.mark.parametrize("norm", [TokenNorm(), TokenLayerNorm()])
def test_normalisations_of_single_tokens_stay_and_are_right(norm):
    sae = dictionary([(10, [A], [A])], WIDTHS, "topk", reading={A: norm}, writing={A: norm}, subtract_b_dec=True)
    coder = dictionary([(10, [A], [C])], WIDTHS, "topk", [(A, C)], reading={A: norm}, writing={C: norm})
    for d in (sae, coder):
        agree(d, ACTS)
        assert fold(d).reading == d.reading
        with pytest.raises(Refused, match=r"forward\(acts\)"):
            d.decode(d.encode(ACTS))
        assert torch.equal(d.decode(d.encode(ACTS[A]), ACTS[A]), d.forward(ACTS[A]))
    zero = sae.forward(torch.zeros(2, 5).double())
    assert bool(zero.isfinite().all())


def test_matching_pursuit_reads_through_its_decoder():
    d = dictionary([(10, [A], [A])], WIDTHS, "pursuit", subtract_b_dec=True)
    x = ACTS[A].reshape(-1, 5)
    wanted = d.gate.pursue(x - d.b_dec[A], d.decoder[0][A]).dense()
    assert torch.equal(d.encode(ACTS).dense(), wanted)
    assert torch.allclose(d.forward(x), wanted @ d.decoder[0][A] + d.b_dec[A])
    with pytest.raises(Refused, match="has none"):
        d.pre_activations(0, x)


def test_heads_may_be_flattened_or_not():
    d = dictionary([(10, ["z.0"], ["z.0"])], WIDTHS, "topk")
    z = DRAW(2, 4, 3, 2)
    assert torch.equal(d.forward(z).reshape(2, 4, 6), d.forward(z.reshape(2, 4, 6)))
    assert d.forward(z).shape == z.shape
    one = dictionary([(10, ["z.0.1"], ["z.0.1"])], {"z.0.1": 2})
    assert one.forward(z[:, :, 1]).shape == (2, 4, 2)


@pytest.mark.parametrize("norm", [None, Scale(0.7), invertible(5)])
def test_a_direction_is_what_one_unit_of_a_latent_adds(norm):
    settings = {} if norm is None else {"reading": {A: norm}, "writing": {A: norm}}
    d = dictionary([(10, [A], [A])], WIDTHS, "relu", **settings)
    code = d.encode(DRAW(1, 5)).dense()
    more = code.clone()
    more[0, 4] += 1
    step = d.decode(SparseCode.from_dense(more)) - d.decode(SparseCode.from_dense(code))
    assert (step[0] - d.direction(4)).abs().max() < 1e-12
    assert torch.equal(d.direction(4), d.direction(4, A))


def test_directions_of_several_blocks_and_sites():
    d = dictionary(TOPOLOGIES["cross-layer transcoder"][0], WIDTHS)
    block, row = place_of(d, 9)
    assert torch.equal(d.direction(9, d.blocks[block].writes[-1]), d.decoder[block][d.blocks[block].writes[-1]][row])
    several = next(i for i in range(d.n_latents) if len(d.blocks[place_of(d, i)[0]].writes) > 1)
    for latent, site in ((several, None), (several, "resid_pre.7"), (99, None)):
        with pytest.raises(Refused, match=r"name a site that it writes|use 0 to"):
            d.direction(latent, site)


def test_a_capture_is_encoded_and_a_direction_is_added_as_they_are():
    model = ca.load("miniworld")
    d = dictionaries.load("miniworld/resid_post.3")
    acts = model.capture(["Mary and John went", "the cat sat on the mat"], d.reads)
    assert torch.equal(d.encode(acts).dense(), d.encode(acts["resid_post.3"]).dense())
    step = model.capture("Mary and John", "resid_post.3", edits=ca.edits.Add("resid_post.3", d.direction(431), 6.0))
    plain = model.capture("Mary and John", "resid_post.3")
    assert (step["resid_post.3"] - plain["resid_post.3"] - 6 * d.direction(431)).abs().max() < 1e-5


def test_long_batches_are_encoded_in_parts(monkeypatch):
    d = dictionary([(10, [A], [A])], WIDTHS, "topk")
    x = DRAW(37, 5)
    whole = d.encode(x).dense()
    monkeypatch.setattr("cutaway.dictionaries.dictionary._CHUNK", 80)
    assert torch.equal(d.encode(x).dense(), whole)
    d = dictionary([(10, [A], [A])], WIDTHS, "jump")
    parts = d.encode(x).dense()
    monkeypatch.undo()
    assert torch.equal(d.encode(x).dense(), parts)


def test_blocks_places_and_parts():
    blocks, skip = TOPOLOGIES["cross-layer transcoder"]
    d = dictionary(blocks, WIDTHS, "relu", skip)
    assert d.starts == (0, 8, 15, 21)
    assert [place_of(d, i) for i in (0, 7, 8, 20)] == [(0, 0), (0, 7), (1, 0), (2, 5)]
    code = d.encode(ACTS)
    assert torch.equal(d.encode(ACTS, block=1).dense(), code.dense()[:, 8:15])
    assert torch.equal(alone(d, 1).encode(ACTS).dense(), code.dense()[:, 8:15])
    assert torch.equal(torch.relu(d.pre_activations(1, ACTS)), code.dense()[:, 8:15])
    sites = {A: (A, C), B: (B, B)}
    sets = dictionaries.together(
        [dictionary([(4, [r], [w])], WIDTHS, seed=i) for i, (r, w) in enumerate(sites.values())]
    )
    assert sets.forward(ACTS).keys() == {C, B}
    agree(sets, ACTS)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_files_give_back_every_bit(topology, tmp_path):
    blocks, skip = TOPOLOGIES[topology]
    plain = dictionary(blocks, WIDTHS)
    for kind in ("topk", "jump", "gated"):
        d = dictionary(
            blocks, WIDTHS, kind, skip, about={"declared_l0": 3}, reading={A: Scale(0.5)},
            writing={w: invertible(WIDTHS[w]) for w in plain.writes},
        )  # fmt: skip
        dictionaries.save(d, tmp_path / "d.safetensors")
        again = dictionaries.open(tmp_path / "d.safetensors")
        assert again.fingerprint() == d.fingerprint()
        assert (again.blocks, again.about, again.subtract_b_dec) == (d.blocks, d.about, d.subtract_b_dec)
        for w, y in d.forward(ACTS).items():
            assert torch.equal(again.forward(ACTS)[w], y)


def test_half_precision_on_disk_computes_in_single(tmp_path):
    d = dictionary([(10, [A], [A])], WIDTHS, "topk", dtype=torch.float32)
    path = dictionaries.save(d, tmp_path / "d.safetensors", dtype=torch.float16)
    assert dictionaries.open(path).dtype == torch.float32
    half = dictionaries.open(path, dtype=torch.float16)
    assert half.dtype == torch.float16
    x = ACTS[A].float()
    assert half.forward(x).dtype == torch.float32
    assert torch.equal(half.forward(x), dictionaries.open(path).forward(x))
    assert torch.allclose(half.forward(x), d.forward(x), atol=0.02)
    jump = dictionary([(10, [A], [A])], WIDTHS, "jump", dtype=torch.float32).to(dtype=torch.float16)
    assert jump.gate.threshold.dtype == torch.float32


def test_what_does_not_fit_is_refused(tmp_path):
    d = dictionary([(10, [A], [A])], WIDTHS)
    with pytest.raises(Refused, match="5 wide"):
        d.forward(DRAW(2, 4))
    with pytest.raises(Refused, match="move one"):
        d.forward(torch.empty(2, 5, device="meta"))
    with pytest.raises(Refused, match="missing"):
        d.forward({B: DRAW(2, 4)})
    with pytest.raises(Refused, match="latents"):
        d.decode(dictionary([(9, [A], [A])], WIDTHS).encode(ACTS[A]))
    with pytest.raises(Refused, match="different numbers of tokens"):
        dictionary(*TOPOLOGIES["crosscoder"][:1], WIDTHS).forward({**ACTS, B: DRAW(5, 4)})
    with pytest.raises(Refused, match="does not belong"):
        dictionary([(10, [A], [C])], WIDTHS, subtract_b_dec=True)
    with pytest.raises(Refused, match="norm-aware"):
        dictionary([(10, [A], [A])], WIDTHS, "gated", norm_aware=True)
    with pytest.raises(Refused, match="rows are latents"):
        dictionaries.autoencoder(A, DRAW(5, 10), DRAW(10, 5), DRAW(10), DRAW(5), TopK(2))
    with pytest.raises(Refused, match="taken back"):
        dictionary([(10, [A, B], [C])], WIDTHS, writing={C: TokenNorm()})
    with pytest.raises(Refused, match="undone"):
        Scale(0.0)
    with pytest.raises(Refused, match="exact inverse"):
        Whitening(DRAW(3), torch.eye(3).double(), 2 * torch.eye(3).double())
    with pytest.raises(Refused, match="written by two"):
        dictionaries.together([d, d])
    header = {"kind": "dictionary", "version": 1, "blocks": [{"n_latents": 1, "reads": [A], "writes": [A]}]}
    broken = write_tensors(tmp_path / "x.safetensors", {"a": DRAW(1)}, header)
    with pytest.raises(Refused, match="its header is damaged"):
        dictionaries.open(broken)
