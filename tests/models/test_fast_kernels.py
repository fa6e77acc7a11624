"""Fast kernels: within rounding of the model's own, refused where it is not, and nothing left behind."""

import pytest
import torch

from cutaway.models.access import fast_kernels
from cutaway.models.access.fast_kernels import OWN, TOLERANCE, FastKernels, KernelChoice
from tests.models.common import IDS, bare, gap, model

SWITCH = torch.backends.mkldnn.matmul


def read(m, site="mlp_post.1"):
    return lambda: [m.capture(IDS, site, logits=False)[site]]


@pytest.mark.parametrize("name", ["gpt2", "gptj", "phi", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_chosen_way_reads_what_the_model_reads_and_leaves_it_as_it_was(name, dtype):
    m = model(name, dtype)
    plain, before = bare(m.hf), (SWITCH.fp32_precision, [dict(x.__dict__) for x in m.hf.modules()])
    kernels = FastKernels(m.anatomy)
    chosen = kernels.choose(read(m))
    assert dtype == torch.float32 or not chosen.onednn  # some processors round in it, and are found out
    assert chosen.fused == (name != "llama")
    with kernels.running(chosen):
        error = gap(read(m)()[0].float(), m.capture(IDS, "mlp_post.1")["mlp_post.1"].float())
    assert error <= TOLERANCE[dtype]
    assert chosen.error <= TOLERANCE[dtype]
    assert (SWITCH.fp32_precision, [dict(x.__dict__) for x in m.hf.modules()]) == before
    assert torch.equal(bare(m.hf), plain)
    with FastKernels(m.anatomy).running(OWN):
        assert torch.equal(bare(m.hf), plain)


def test_what_is_not_within_rounding_is_not_taken(monkeypatch):
    m = model("gpt2")
    monkeypatch.setitem(fast_kernels._FUSED, "NewGELUActivation", torch.relu)
    assert not FastKernels(m.anatomy).choose(read(m)).fused
    monkeypatch.setitem(fast_kernels.TOLERANCE, torch.float32, 0.0)
    monkeypatch.setattr(fast_kernels, "_apart", lambda x, y: 1e-3)
    assert FastKernels(m.anatomy).choose(read(m)) == OWN


def test_a_failing_run_leaves_nothing_behind():
    m = model("gpt2")
    before = SWITCH.fp32_precision
    with pytest.raises(MemoryError), FastKernels(m.anatomy).running(KernelChoice(True, True)):
        raise MemoryError
    assert SWITCH.fp32_precision == before
    assert not any("forward" in x.__dict__ for x in m.hf.modules())


def test_layouts_follow_weights_that_change():
    m = model("gpt2")
    kernels, laid_out = FastKernels(m.anatomy), KernelChoice(onednn=True, laid_out=True)
    with kernels.running(laid_out):
        first = read(m)()[0]
    weight = m.anatomy.blocks[0].mlp.c_fc.weight
    with torch.no_grad():
        weight.mul_(1.5)
    try:
        with kernels.running(laid_out):
            second = read(m)()[0]
        with FastKernels(m.anatomy).running(laid_out):  # made now; some processors round in it, so it is compared
            assert torch.equal(second, read(m)()[0])
        assert gap(first, second) > 1e-2
    finally:
        with torch.no_grad():
            weight.div_(1.5)
