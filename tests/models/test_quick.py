"""The quicker way of forwards: within rounding of the model's own, refused where it is not, and nothing left behind."""

import pytest
import torch

from cutaway.models import quick
from cutaway.models.quick import OWN, TOLERANCE, Way, running, way
from tests.models.common import IDS, bare, gap, model

SWITCH = torch.backends.mkldnn.matmul


def read(m, site="mlp_post.1"):
    return lambda: [m.capture(IDS, site, logits=False)[site]]


@pytest.mark.parametrize("name", ["gpt2", "gptj", "phi", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_chosen_way_reads_what_the_model_reads_and_leaves_it_as_it_was(name, dtype):
    m = model(name, dtype)
    plain, before = bare(m.hf), (SWITCH.fp32_precision, [dict(x.__dict__) for x in m.hf.modules()])
    chosen = way(m.body, read(m))
    assert dtype == torch.float32 or not chosen.onednn  # some processors round in it, and are found out
    assert chosen.fused == (name != "llama")
    with running(m.body, chosen):
        error = gap(read(m)()[0].float(), m.capture(IDS, "mlp_post.1")["mlp_post.1"].float())
    assert error <= TOLERANCE[dtype]
    assert chosen.error <= TOLERANCE[dtype]
    assert (SWITCH.fp32_precision, [dict(x.__dict__) for x in m.hf.modules()]) == before
    assert torch.equal(bare(m.hf), plain)
    with running(m.body, OWN):
        assert torch.equal(bare(m.hf), plain)


def test_what_is_not_within_rounding_is_not_taken(monkeypatch):
    m = model("gpt2")
    monkeypatch.setitem(quick._FUSED, "NewGELUActivation", torch.relu)
    assert not way(m.body, read(m)).fused
    monkeypatch.setitem(quick.TOLERANCE, torch.float32, 0.0)
    monkeypatch.setattr(quick, "_apart", lambda x, y: 1e-3)
    assert way(m.body, read(m)) == OWN


def test_a_failing_run_leaves_nothing_behind():
    m = model("gpt2")
    before = SWITCH.fp32_precision
    with pytest.raises(MemoryError), running(m.body, Way(True, True)):
        raise MemoryError
    assert SWITCH.fp32_precision == before
    assert not any("forward" in x.__dict__ for x in m.hf.modules())
