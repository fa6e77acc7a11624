"""Numbers that are none, as float16 makes of streams beyond 65504: refused by whatever would compute with them."""

from __future__ import annotations

import math

import pytest
import torch

import cutaway as ca
from cutaway.core.finite import finite, notice
from cutaway.core.refuse import Refused
from cutaway.models.anatomy.residual import decompose
from cutaway.models.edits.library import Ablate, Scale
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from tests.conformance.subjects import numbered_task, word_tokenizer
from tests.models.common import IDS
from tests.models.tiny import V, build


@pytest.fixture(scope="module")
def overflowing() -> Model:
    """A model in float16 whose stream passes 65504 after the word 7, as Gemma 3's does after its first token."""
    hf = build("llama_gqa")
    with torch.no_grad():
        hf.model.embed_tokens.weight[7] = 65504.0
        hf.model.layers[0].mlp.down_proj.weight.mul_(2e4)
    return Model(hf.half(), word_tokenizer(V), "overflowing")


def test_every_work_refuses_what_overflowed(overflowing):
    m, task, cut = overflowing, numbered_task(), [[Ablate("resid_pre.1@2")]]
    assert not m.run_last(IDS).isfinite().all(), "a run itself shows what the model says"
    works = [
        lambda: ca.lenses.logit_lens(m, task), lambda: ca.lenses.lens_grid(m, task),
        lambda: ca.lenses.direct_attribution(m, task), lambda: ca.patching.activation(m, task),
        lambda: ca.patching.attribution(m, task), lambda: ca.patching.ablate(m, task),
        lambda: ca.patching.knockout(m, task), lambda: m.generate("w5 w6 w7 w8", 2),
        lambda: m.generate("w5 w6 w7 w8", 2, do_sample=True), lambda: decompose(m, IDS),
        # a comparison makes an ordinary number of NaN
        lambda: sweep(m, IDS, cut, lambda logits, prompt: (logits[:, 3] > logits[:, 5]).float()),
    ]  # fmt: skip
    for work in works:
        with pytest.raises(Refused, match="numbers that are none") as refused:
            work()
        assert "bfloat16" in refused.value.instead


def test_a_wider_dtype_does_the_same_work(overflowing):
    m = Model(build("llama_gqa").bfloat16(), word_tokenizer(V), "wide")
    m.hf.load_state_dict(overflowing.hf.state_dict())
    assert bool(ca.lenses.logit_lens(m, numbered_task()).probability.isfinite().all())
    assert len(m.generate("w5 w6 w7 w8", 2)) == 1


def test_a_kept_sweep_with_numbers_that_are_none_is_refused_again(tmp_path, overflowing):
    for _ in range(2):
        with pytest.raises(Refused, match="numbers that are none"):
            sweep(overflowing, IDS, [[Scale("z.1", 2.0)]], lambda x, prompt: x[:, 3], resume=tmp_path / "kept")


def test_what_is_noticed():
    def work(*tensors: torch.Tensor, real: torch.Tensor | None = None) -> None:
        with finite("work"):
            for t in tensors:
                notice(t, real)

    fine = torch.tensor([[1.0, -math.inf], [3.0, 4.0]])  # tokens that a family never says
    work(fine, torch.empty(0), torch.tensor([1, 2]))
    for value in (math.nan, math.inf):
        bad = torch.tensor([[1.0, value], [3.0, 4.0]])
        work(bad, real=torch.tensor([[True, False], [True, True]]))
        with pytest.raises(Refused, match="infinite or undefined"):
            work(bad, fine)
    notice(torch.tensor(math.nan))  # outside of work that is watched


def test_an_error_of_such_numbers_is_told_by_its_cause():
    def work(value: float) -> None:
        with finite("work", torch.float16):
            notice(torch.tensor(value))
            raise ValueError("probabilities must be between 0 and 1")

    with pytest.raises(Refused, match="numbers that are none"):
        work(math.nan)
    with pytest.raises(ValueError, match="between 0 and 1"):
        work(0.5)
