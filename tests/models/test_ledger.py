"""A sweep that is interrupted goes on where it stopped, and nothing else is ever taken for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.core.files import read_tensors
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models.edits import Ablate, Scale
from cutaway.models.executor import sweep
from cutaway.models.ledger import resuming
from tests.models.common import IDS, model
from tests.models.test_executor import metric

VARIANTS: list[list[Any]] = [[Ablate(f"z.{i}.{h}")] for i in range(3) for h in range(4)]


def stops(after: int) -> Any:
    """The metric, which the user interrupts at its call number `after`."""
    calls: list[int] = []

    def measure(logits: Tensor, prompt: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return metric(logits, prompt)

    return measure


def run(measure: Any = metric, **more: Any) -> tuple[Tensor, float]:
    """The sweep in batches of one variant, unembedded at once, and the forwards that it took."""
    m = model("bloom")  # its variants are restarted one by one, so the metric is asked after each
    with counting() as spent:
        values = sweep(m, IDS, VARIANTS, measure, budget=1, **more)
    return values, spent.forwards


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    whole, cost = run()
    path = tmp_path / "sweep.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(stops(6), resume=path)  # one call makes the key, five variants are done
    assert int(read_tensors(path)[0]["done"].sum()) == 5
    again, rest = run(resume=path)
    assert torch.equal(again, whole)
    assert rest < 0.8 * cost
    last, none = run(resume=path)
    assert torch.equal(last, whole)
    assert none == 0


def test_a_folder_keeps_every_sweep_under_its_own_name(tmp_path):
    whole, _ = run()
    with resuming(tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            run(stops(4))
        again, _ = run()
        other, cost = run(lambda logits, prompt: 2 * metric(logits, prompt))
    assert torch.equal(again, whole)
    assert cost > 0, "another metric is another sweep"
    torch.testing.assert_close(other, 2 * whole)
    assert len(list((tmp_path / "new").iterdir())) == 2
    with resuming(tmp_path / "new"):
        assert run()[1] == 0
    assert run()[1] > 0, "outside nothing is kept"


@pytest.mark.parametrize("change", ["model", "prompts", "edits", "metric"])
def test_another_sweeps_file_is_refused(tmp_path, change):
    path = tmp_path / "sweep.safetensors"
    m, measure, variants, tokens = model("gpt2"), metric, VARIANTS[:2], IDS
    sweep(m, tokens, variants, measure, resume=path)
    m = model("llama_gqa") if change == "model" else m
    tokens = IDS.rows([0]) if change == "prompts" else tokens
    variants = [[Scale("z.0.0", 0.5)], *variants[1:]] if change == "edits" else variants
    measure = (lambda logits, prompt: -metric(logits, prompt)) if change == "metric" else measure
    with pytest.raises(Refused, match="another sweep"):
        sweep(m, tokens, variants, measure, resume=path)


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match="no folder"), resuming(tmp_path / "file"):
        pass
