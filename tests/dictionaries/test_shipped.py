"""The dictionaries that ship with the miniworld: small, honest on text they have not seen, and usable by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cutaway as ca
from cutaway.core.files import read_json
from cutaway.core.refuse import Refused
from cutaway.dictionaries.formats import load
from cutaway.dictionaries.splice import Splice
from cutaway.streams import LiveStream, Packing
from cutaway.zoo.miniworld.dictionaries import RECIPE, shipped
from cutaway.zoo.miniworld.documents import WorldDocuments
from cutaway.zoo.miniworld.world import DATA
from tests.conformance import subjects

NEVER_TRAINED_ON = 77  # seed of documents


@pytest.fixture(scope="module")
def seen() -> dict[str, torch.Tensor]:
    """Activations of unseen documents at every site of the recipe."""
    model, sites = subjects.miniworld(), tuple(dict.fromkeys(s for r in RECIPE for s in (r.reads, r.writes)))
    source = WorldDocuments(model.world, NEVER_TRAINED_ON)
    stream = LiveStream(model, source, sites, packing=Packing(context=96), batch=2048, window=4096)
    return {s: x.float() for s, x in next(iter(stream)).acts.items()}


def fvu(x: torch.Tensor, y: torch.Tensor) -> float:
    """Fraction of variance unexplained, about the mean."""
    return float((x - y).double().square().sum() / (x - x.mean(0)).double().square().sum())


def test_they_are_small():
    assert sum(p.stat().st_size for p in shipped().values()) <= 12 << 20


@pytest.mark.parametrize("name", list(shipped()))
def test_they_reconstruct_what_they_have_not_seen(name, seen):
    d = load(f"miniworld/{name}").to(dtype=torch.float32)
    rows = [r for r in RECIPE if r.file == name]
    assert d.n_latents == sum(r.latents for r in rows)
    out = d.forward({s: seen[s] for s in d.reads})
    code = d.encode({s: seen[s] for s in d.reads})
    assert float(code.counts().float().mean()) == pytest.approx(sum(r.k for r in rows), rel=0.25)
    g = torch.Generator().manual_seed(0)
    for site, y in out.items():
        kept = fvu(seen[site], y)
        assert kept < 0.3, site
        stray = y[torch.randperm(len(y), generator=g)]
        assert fvu(seen[site], stray) > 3 * kept, "another token's reconstruction"
    cards = read_json(DATA / "dictionaries.json")["cards"]
    assert len(cards) == len(RECIPE)


def test_spliced_the_model_still_knows_its_facts():
    model, task = subjects.miniworld(), ca.tasks.load("facts", subjects.miniworld(), 8)
    bound, d = task.bind(model), load("miniworld/resid_post.3").to(dtype=torch.float32)
    clean, spliced, kept = (
        bound.metric(model.run_last(bound.clean, edits)) for edits in ((), Splice(d), Splice(d, error=True))
    )
    torch.testing.assert_close(kept, clean)
    assert float(spliced.mean()) > 0.25 * float(clean.mean()) > 0


def test_few_latents_carry_a_fact():
    model, task = subjects.miniworld(), ca.tasks.load("facts", subjects.miniworld(), 4)
    got = ca.features.latents(model, task, load("miniworld/resid_post.3").to(dtype=torch.float32), top=8, samples=2)
    assert float(got.whole) > abs(float(got.error)), "the latents carry more of the difference than the error"
    assert float(got.effect[0]) > float(got.null.abs().median())


def test_a_name_may_be_a_path_and_one_that_is_none_is_refused():
    assert load(Path("miniworld/resid_post.3")).fingerprint() == load("miniworld/resid_post.3").fingerprint()
    with pytest.raises(Refused, match=r"resid_post\.3"):
        load("miniworld/resid_post.4")
