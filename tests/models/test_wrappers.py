"""Wrappers of live models: the model inside is taken, or the wrapper is refused and the way to the model is named."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cutaway.core.refuse import Refused
from cutaway.models.loading.load import load
from tests.models.common import IDS, bare, model
from tests.models.tiny import build


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone, as torchrun makes it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_wrappers(one_process):
    hf = build("llama")
    assert load(nn.parallel.DistributedDataParallel(hf), check=False).hf is hf
    sharded, mesh = build("llama"), init_device_mesh("cpu", (1,))
    for part in (*sharded.model.layers, sharded):
        fully_shard(part, mesh=mesh)
    with pytest.raises(Refused, match=r"sharded by FSDP"):
        load(sharded)


class Engine(nn.Module):
    """DeepSpeed's wrapper by its name, as a model whose weights are partitioned would look in it."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config = module, {"zero_optimization": {"stage": 3}}


Engine.__module__ = "deepspeed.runtime.engine"


def test_the_engine_of_deepspeed_is_taken_off_unless_it_holds_a_part():
    hf = build("llama")
    assert load(Engine(hf), check=False).hf is hf
    for p in hf.parameters():
        p.ds_id = 0
    with pytest.raises(Refused, match="partitioned by DeepSpeed"):
        load(Engine(hf))


def test_accelerate_in_another_precision_is_refused_and_its_unwrapped_model_is_taken():
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        prepared = accelerator.prepare(build("llama"))
        with pytest.raises(Refused, match="mixed_precision") as refusal:
            load(prepared)
        assert "unwrap_model(model, keep_fp32_wrapper=False)" in refusal.value.instead
        whole = load(accelerator.unwrap_model(prepared, keep_fp32_wrapper=False))
        assert torch.equal(whole.run(IDS), bare(model("llama").hf))
        assert whole.disabled == {}
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_that_accelerate_keeps_elsewhere_is_read_and_its_weights_are_refused():
    m = load(cpu_offload(build("llama")))
    assert m.device.type == "cpu"
    assert torch.equal(m.run(IDS), bare(model("llama").hf))
    sites = ["resid_pre", "z", "mlp_post", "resid_post"]
    got, want = m.capture(IDS, sites), model("llama").capture(IDS, sites)
    assert all(torch.equal(got[str(a)], want[str(a)]) for a in m.places(sites))
    assert "weights.q" in m.disabled
    with pytest.raises(Refused):
        _ = m.weights.q[1]


def test_a_wrapper_of_ones_own_is_refused_with_the_path_to_the_model():
    with pytest.raises(Refused, match=r"give the model inside it \(1\.0\)"):
        load(nn.Sequential(nn.Identity(), nn.Sequential(build("llama"))))
