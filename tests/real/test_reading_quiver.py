"""Probes on a dictionary's latents beside probes without one, on three properties, with a dictionary trained here.

The dictionary (TopK, 1024 latents, 32 active) is of a middle layer, trained on 16,000 tokens of the text that
`tools.real_dictionary` reads: nothing of the properties. All probes see the same vectors and folds of whole groups.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import cutaway as ca
from cutaway.dictionaries import Dictionary
from cutaway.tasks import read_labelled
from tests.real import sets
from tests.real.written import measure
from tools.real_dictionary import tell, written

SECTION = "probes on latents and without them"
SITE, LATENTS, K, TOKENS = "resid_post.15", 1024, 32, 16_000
PROBES = ("mean difference", "logistic", "1 latent", "16 latents", "all latents", "reconstruction", "words")

pytestmark = [pytest.mark.wide, pytest.mark.parametrize("name", ["smollm2"], indirect=True)]


@pytest.fixture(scope="module")
def dictionary(folder: Path, tmp_path_factory) -> Dictionary:
    """A small dictionary of a middle layer, trained for a minute."""
    own = tmp_path_factory.mktemp("dictionary")
    written(own / "train.jsonl", "train")
    tell("dict", "train", "--model", folder, "--context", 96, "--site", SITE, "--text", own / "train.jsonl", "--out",
         own / "run", "--gate", "topk", "--latents", LATENTS, "--k", K, "--tokens", TOKENS, "--batch", 1024, "--rate",
         "1e-3", "--threads", 1)  # fmt: skip
    return ca.dictionaries.open(own / "run" / "dictionary.safetensors")


@pytest.mark.parametrize("what", ["sentiment", "register", "tense"])
def test_the_gain_by_latents_is_reported_whoever_wins(model, dictionary, what, results):
    labelled = read_labelled(sets.FOLDER / "labelled" / f"{what}.jsonl", model)
    found = ca.dictionaries.quiver(model, dictionary, labelled, probes=PROBES)
    cells = {
        name: measure(found.auroc[i], found.interval[i], found.null[i])
        for i, name in enumerate(found.labels["probe"])
        if name in ("logistic", "1 latent", "all latents", "words")
    }
    cells["gain"] = measure(found.gain, found.gain_interval, found.gain_null)
    assert found.lost is not None
    assert found.lost_interval is not None
    cells["lost by reconstruction"] = measure(found.lost, found.lost_interval)
    results.row(SECTION, what, len(labelled.texts), **cells)
    best = dict(zip(found.labels["probe"], found.auroc.tolist(), strict=True))
    assert max(best["logistic"], best["all latents"]) > float(found.null.max())
