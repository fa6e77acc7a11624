"""Two corpora by the rates of latents: against sums by hand, planted shifts, and corpora without a difference."""

from __future__ import annotations

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.features import corpora
from tests.features.common import WORDS, documents, made, of_tokens, texts


def test_rates_and_their_standard_errors_are_sums_over_documents(tmp_path):
    a, b = (made(tmp_path / n, texts()[part]) for n, part in (("a", slice(0, 25)), ("b", slice(25, 60))))
    got = corpora(a, b, dictionary="some", samples=19)
    rates, variance = list[torch.Tensor](), torch.zeros(24, dtype=torch.double)
    for store in (a, b):
        document, flags = store.column("document").flatten(), store.column("flags").flatten()
        counted, active = flags & 1 > 0, torch.zeros(24, len(flags), dtype=torch.double)
        for i in range(24):
            active[i, store.latents("some").codes(i)[0]] = 1
        each = [
            (active[:, (document == n) & counted].sum(1), ((document == n) & counted).sum())
            for n in document[counted].unique()
        ]
        hits, tokens = torch.stack([x for x, _ in each]), torch.stack([n for _, n in each]).double()
        rate, n = hits.sum(0) / tokens.sum(), len(tokens)
        rates.append(rate)
        variance += ((hits - tokens[:, None] * rate) ** 2).sum(0) * n / (n - 1) / tokens.sum() ** 2
    torch.testing.assert_close(got.rate, torch.stack(rates, -1).float())
    torch.testing.assert_close(got.difference, (rates[1] - rates[0]).float())
    reach = (got.interval[:, 1] - got.interval[:, 0]) / 2
    torch.testing.assert_close(reach, (1.96 * variance.sqrt()).float(), rtol=1e-4, atol=1e-7)
    assert float(got.q[23]) == 1.0, "it never fires"
    assert torch.equal(corpora(a, b, dictionary="some", samples=19).null, got.null)


def test_planted_shifts_are_found_and_no_others(tmp_path):
    planted = (WORDS[1], WORDS[-2])
    plain, shifted = of_tokens(tmp_path / "a", documents(0)), of_tokens(tmp_path / "b", documents(1, planted))
    got = corpora(plain, shifted)
    up = got.q <= 0.05
    found = {WORDS[i] for i in (up & (got.difference > 0)).nonzero()[:, 0].tolist()}
    assert found == set(planted)
    assert got.record["called"]["latents"] == int(up.sum())
    back = corpora(shifted, plain)
    torch.testing.assert_close(back.difference, -got.difference)


def test_corpora_without_a_difference_are_called_alike(tmp_path):
    first = of_tokens(tmp_path / "a", documents(0))
    called = []
    for seed in range(2, 6):
        got = corpora(first, of_tokens(tmp_path / f"b{seed}", documents(seed)), samples=60)
        called.append(got.record["called"]["latents"])
        assert sum(got.record["called"]["in permutations"]) <= 3
    assert sum(called) <= 1


def test_corpora_that_cannot_be_compared_are_refused(store, tmp_path):
    with pytest.raises(Refused, match="they are one"):
        corpora(store, store, dictionary="some")
    with pytest.raises(Refused, match="19"):
        corpora(store, store, dictionary="some", samples=5)
    with pytest.raises(Refused, match="dictionaries differ"):
        corpora(*(of_tokens(tmp_path / f"{x}", documents(0, n=5), x) for x in (0.9, 0.8)))
    with pytest.raises(Refused, match="codes are kept of 2"):
        corpora(store, made(tmp_path / "b", texts()[:2]), dictionary="some")
