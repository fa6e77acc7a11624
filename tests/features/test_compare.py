"""Matches of latents by where they fire: against dense matrices, over one store and over two."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.features import compare
from cutaway.features import harvest as room
from cutaway.streams import from_texts
from tests.features.common import KEEP, MASKING, PACKING, brute, dictionaries, found, made, model, texts


def by_hand(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Jaccard indices of all pairs of columns."""
    a, b = (x != 0).double(), (y != 0).double()
    both = a.T @ b
    return both / (a.sum(0)[:, None] + b.sum(0) - both).clamp_min(1)


def test_matches_are_the_best_pairs(store):
    got = compare(store, names=("some", "few"), samples=3)
    want = by_hand(*(found(brute().codes[n], store).flatten(0, 1) for n in ("some", "few")))
    torch.testing.assert_close(got.jaccard, want.amax(1).float())
    at = got.match.clamp_min(0)
    torch.testing.assert_close(want[torch.arange(24), at].float() * (got.match >= 0), got.jaccard)
    assert int(got.match[23]) == -1, "it never fires"
    assert bool((got.interval[:, 0] <= got.jaccard + 1e-6).all() and (got.jaccard <= got.interval[:, 1] + 1e-6).all())
    assert got.record["tokens"] == store.counted
    again = compare(store, names=("some", "few"), samples=3)
    assert torch.equal(again.null, got.null)


def test_the_same_latents_in_another_order_are_found_in_another_store(store, tmp_path):
    d = dictionaries()["some"]
    turned = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    other = Dictionary(
        d.blocks,
        tuple({s: w[turned] for s, w in e.items()} for e in d.encoder),
        tuple({s: w[turned] for s, w in e.items()} for e in d.decoder),
        tuple(b[turned] for b in d.b_enc),
        d.b_dec,
        d.gates,
    )
    mixed = [*texts()[30:], *texts()[:25], "Tom Tom Tom Tom"]
    second = room(model(), other, from_texts(mixed), tmp_path / "a", packing=PACKING, masking=MASKING, keep=KEEP)
    got = compare(store, second, names=("some", None))
    alive = got.match >= 0
    assert int(alive.sum()) == 23
    assert torch.equal(turned[got.match[alive]], torch.arange(24)[alive])
    assert float(got.jaccard[alive].min()) > 0.99
    assert float(got.null[alive].max()) < 0.7
    few = compare(store, second, names=("some", None), tokens=200)
    assert few.record["tokens"] == 200


def test_what_cannot_be_compared_is_refused(store, tmp_path):
    with pytest.raises(Refused, match="one dictionary"):
        compare(store, names=("some", "some"))
    with pytest.raises(Refused, match="its control"):
        compare(store, names=("some", "few"), samples=0)
    with pytest.raises(Refused, match="no tokens in common"):
        compare(store, made(tmp_path / "a", ["store store park river Tom Tom Tom Tom"]), names=("some", "few"))
