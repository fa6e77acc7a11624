"""SHIFT: planted latents are found, and ablating them mends a probe; erasure; equality with an edited run; refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

from cutaway.core.refuse import Refused
from cutaway.core.stats import generator
from cutaway.core.subject import subject
from cutaway.dictionaries import Splice, ablate_latents, shift
from cutaway.dictionaries.evaluation.shift import PROBES, ROWS, Means, means, shift_of, without
from cutaway.dictionaries.gates import Relu
from cutaway.dictionaries.transforms import autoencoder
from cutaway.interventions.erasure import leace, mean_projection
from cutaway.tasks.labelled import Labelled
from tests.conformance import subjects

LABEL, SPURIOUS, LATENTS, WIDTH = (0, 1), (2, 3), 40, 30


def planted(texts=400, seed=0):
    """Latents of an intended and, louder, of an unintended concept, which is gone without its words."""
    g = generator(seed)
    y, z = (torch.rand(texts, generator=g) < 0.5 for _ in range(2))
    f = torch.rand(texts, LATENTS, generator=g) * (torch.rand(texts, LATENTS, generator=g) < 0.3)
    f[:, LABEL] += 1.0 * y[:, None]
    f[:, SPURIOUS] = (0.5 + 2.0 * torch.rand(texts, 2, generator=g)) * z[:, None]
    rows = normalize(torch.randn(LATENTS, WIDTH, generator=g), dim=1)
    bare = f.clone()
    bare[:, SPURIOUS] = 0
    noise = 0.3 * torch.randn(texts, WIDTH, generator=g)
    return [Means(x @ rows + noise, x) for x in (f, bare)], rows, y, z


@pytest.mark.parametrize("named", [(), SPURIOUS])
def test_planted_latents_are_ablated_and_the_probe_generalises(named):
    read, rows, y, z = planted()
    found = shift_of(*read, rows, y, z, latents=named)
    assert found.labels["latent"] == [str(i) for i in SPURIOUS]
    assert found.with_words.tolist() == [1.0, 1.0]
    worst = {r: dict(zip(PROBES, found.worst[i].tolist(), strict=True)) for i, r in enumerate(ROWS)}
    assert worst["nothing"]["kept"] < 0.4
    for row in ("SHIFT", "words deleted"):
        assert worst[row]["refitted"] > worst["balanced"]["refitted"] - 0.12
        assert worst[row]["refitted"] > float(found.worst_null.max()) + 0.3, "random latents change nothing"
    assert worst["balanced"]["kept"] > 0.85
    low, high = found.worst_interval.unbind(-1)
    assert bool((low <= found.worst).all())
    assert bool((found.worst <= high).all())
    assert torch.equal(found.worst, found.group.amin(-1))
    assert torch.allclose(found.accuracy, found.group.mean(-1))
    reading = found.reading[:, PROBES.index("refitted")].tolist()
    assert reading[ROWS.index("nothing")] > 0.6
    assert max(reading[1:]) < 0.15, "what is left reads the intended concept"
    assert float(found.reading_null.min()) > 0.5


def test_a_concept_in_other_latents_is_not_taken_out():
    read, rows, y, z = planted()
    found = shift_of(*read, rows, y, z, latents=(5, 6))
    at = ROWS.index("SHIFT")
    assert float(found.worst[at].max()) <= float(found.worst_null[at].max()) + 0.1


def test_erased_means_carry_no_linear_trace():
    g = generator(1)
    z = torch.rand(60, generator=g) < 0.4
    x = torch.randn(60, 80, generator=g) * torch.linspace(0.2, 3, 80) + 2.0 * z[:, None] * torch.randn(80, generator=g)
    for fit in (leace, mean_projection):
        erased = fit(x, z)(x)
        gap = (erased[z].mean(0) - erased[~z].mean(0)).abs().max()
        assert float(gap) < 1e-4
        assert torch.linalg.matrix_rank(erased - x, atol=1e-3) == 1
    even = torch.cat([torch.eye(8), -torch.eye(8)])  # all directions alike: the metric of LEACE is the plain one
    on = torch.arange(16) < 4
    assert_close(leace(even, on)(even), mean_projection(even, on)(even), atol=1e-5, rtol=0)


def test_words_are_taken_out_as_words():
    assert without("She said that he, HERSELF, shed it.", ("she", "herself")) == "said that he,, shed it."
    assert without("Marys mary Mary-Ann", ("Mary",)) == "Marys-Ann"


@pytest.fixture(scope="module")
def given():
    model = subjects.random_llama()
    g = generator(2)
    width, latents = model.shape.d_model, 64
    rows = normalize(torch.randn(latents, width, generator=g), dim=1)
    d = autoencoder("resid_post.1", rows, rows, torch.zeros(latents), torch.zeros(width), Relu())
    return model, d, subject("labelled").example({"model": model})


def test_ablation_is_that_of_a_run_with_spliced_latents(given):
    model, d, labelled = given
    chosen = [1, 4, 9, 30]
    edit = Splice(d, error=True, changes=(ablate_latents(*chosen),))

    def run(text, *edits):
        tokens = model.tokens(text)
        with model.edited(*edits):
            x = model.capture(tokens, "resid_post.1", logits=False)["resid_post.1"][0]
        return x[~torch.isin(tokens.ids[0], torch.tensor(model.tokenizer.all_special_ids))].mean(0)

    texts = labelled.texts[:6]
    found = means(model, d, texts)
    assert_close(found.site, torch.stack([run(t) for t in texts]))
    edited = torch.stack([run(t, edit) for t in texts])
    assert float((edited - found.site).norm()) > 0.01
    assert_close(found.site - found.latents[:, chosen] @ d.decoder[0]["resid_post.1"][chosen], edited)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"intended": "river"}, "labelled with park, Mary"),
        ({"intended": "park", "unintended": "park"}, "must read another one"),
        ({"words": ("submarine",)}, "no text holds them"),
        ({"latents": (64,)}, "there are 64"),
    ],
)
def test_what_cannot_be_asked_is_refused(given, change, why):
    with pytest.raises(Refused, match=why):
        shift(*given, **change)


def test_texts_of_too_few_groups_are_refused(given):
    model, d, labelled = given
    same = Labelled(labelled.texts, labelled.concepts, labelled.shown[:, :1].expand(-1, 2))
    with pytest.raises(Refused, match="at least 8 texts of each"):
        shift(model, d, same)
    with pytest.raises(Refused, match="two concepts"):
        shift(model, d, Labelled(labelled.texts, ("park",), labelled.shown[:, :1]))
