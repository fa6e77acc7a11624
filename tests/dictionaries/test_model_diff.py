"""A crosscoder of two models on one stream: what was changed gets latents of its own, the rest is shared."""

from copy import deepcopy

import pytest
import torch

import cutaway as ca
from cutaway.dictionaries import training as tr
from cutaway.dictionaries.transforms import fold
from cutaway.models.model import Model
from cutaway.streams import LiveStream, Packing
from cutaway.zoo.miniworld.documents import WorldDocuments

SITE = "resid_post.0"


@pytest.fixture(scope="module")
def made():
    """A crosscoder of the miniworld and a copy that writes one more direction on a fifth of its vocabulary."""
    base, (first, second) = ca.load("miniworld"), (torch.Generator().manual_seed(s) for s in (0, 1))
    hf = deepcopy(base.hf)
    rows = hf.get_input_embeddings().weight
    new = torch.nn.functional.normalize(torch.randn(rows.shape[1], generator=first), dim=0)
    with torch.no_grad():
        rows[torch.randperm(len(rows), generator=second)[: len(rows) // 5]] += 3 * rows.norm(dim=1).mean() * new
    both = {"base": base, "tuned": Model(hf, base.tokenizer, "changed", base.world)}
    stream = LiveStream(both, WorldDocuments(base.world), SITE, packing=Packing(64), batch=256, window=1024)
    sites = [f"{n}:{SITE}" for n in both]
    plan = tr.Plan(tokens=256 * 60, select="float32", products="plain")
    return tr.train(stream, tr.crosscoder(sites, 96, tr.TrainBatchTopK(8), rate=3e-2), plan).dictionary, stream, new


def test_the_changed_part_has_a_latent_of_one_model_and_the_rest_is_shared(made):
    dictionary, stream, new = made
    assert dictionary.models == ("base", "tuned")
    d = fold(dictionary)  # rows in each site's own units
    base, tuned = (d.decoder[0][f"{n}:{SITE}"] for n in ("base", "tuned"))
    used = d.encode(next(stream).acts).fires() > 0
    share = (tuned.norm(dim=1) / (base.norm(dim=1) + tuned.norm(dim=1)))[used]
    (first, second), (own, _) = share.topk(2)
    assert 0.48 < float(share.median()) < 0.52
    assert float(first) > 0.7
    assert float(second) < 0.57
    assert float(torch.nn.functional.cosine_similarity(tuned[used][own], new, dim=0)) > 0.85
