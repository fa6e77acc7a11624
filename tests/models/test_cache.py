"""A sweep that is interrupted goes on where it stopped, and nothing else is ever taken for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cutaway.core.address import parse
from cutaway.core.files import read_tensors
from cutaway.core.record import counting
from cutaway.core.refuse import Refused
from cutaway.models.access.capture import Activations
from cutaway.models.access.positions import ForwardFrame
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Freeze, Scale
from cutaway.models.sweep.cache import resuming
from cutaway.models.sweep.executor import sweep
from tests.models.common import IDS, model
from tests.models.test_executor import metric

VARIANTS: list[list[Any]] = [[Ablate(f"z.{i}.{h}")] for i in range(3) for h in range(4)]


class Stops:
    """The metric, which the user may interrupt at its call number `after`; it says what it is, so the key is one."""

    def __init__(self, after: int = 1 << 30) -> None:
        self.left = after

    def identity(self) -> str:
        return "metric"

    def __call__(self, logits: Tensor, prompt: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return metric(logits, prompt)


def run(measure: Any = None, **more: Any) -> tuple[Tensor, float]:
    """The sweep in batches of one variant, unembedded at once, and the forwards that it took."""
    m = model("bloom")  # its variants are restarted one by one, so the metric is asked after each
    with counting() as spent:
        values = sweep(m, IDS, VARIANTS, measure or Stops(), budget=1, **more)
    return values, spent.forwards


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path):
    whole, cost = run()
    path = tmp_path / "sweep.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run(Stops(6), resume=path)  # one call makes the key, five variants are done
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
            run(Stops(4))
        again, _ = run()
        other, cost = run(lambda logits, prompt: 2 * metric(logits, prompt))
    assert torch.equal(again, whole)
    assert cost > 0, "another metric is another sweep"
    torch.testing.assert_close(other, 2 * whole)
    assert len(list((tmp_path / "new").iterdir())) == 2
    with resuming(tmp_path / "new"):
        assert run()[1] == 0
    assert run()[1] > 0, "outside nothing is kept"


def hits(answers: list[int]) -> Any:
    """Whether each prompt's answer comes first: 0 for any answers on random logits."""
    return lambda logits, prompt: (logits.argmax(-1) == torch.tensor(answers)[prompt]).float()


def around(value: float) -> list[list[Any]]:
    """An edit whose value differs in one entry, far inside."""
    there = torch.zeros(1, 40, 40)
    there[0, 20, 20] = value
    return [[Deep(Ablate("attn_out.1"), (there[0], {"deep": [there]}))]]


@dataclass(frozen=True, eq=False)
class Deep(Edit):
    """Another edit, which holds tensors in containers."""

    edit: Edit
    held: tuple[Any, ...]

    @property
    def address(self) -> Any:  # type: ignore[override]
        return self.edit.address

    positions = None

    def apply(self, x: Tensor, frame: ForwardFrame) -> Tensor:
        return self.edit.apply(x, frame) + self.held[1]["deep"][0].sum()


@pytest.mark.parametrize("change", ["model", "prompts", "edits", "metric", "answers", "deep", "frozen", "around"])
def test_another_sweeps_file_is_refused(tmp_path, change):
    path = tmp_path / "sweep.safetensors"
    m, measure, variants, tokens = model("gpt2"), metric, VARIANTS[:2], IDS
    measure = hits([1, 2]) if change == "answers" else measure
    source = m.capture(tokens, "z.0", logits=False)
    variants = around(0.0) if change == "deep" else [[Freeze("z.0", source)]] if change == "frozen" else variants
    sweep(m, tokens, variants, measure, resume=path)
    if change == "answers":
        measure = hits([1, 3])
    if change == "frozen":
        source = Activations({parse("z.0"): source["z.0"] + 1}, tokens)
    variants = around(1.0) if change == "deep" else [[Freeze("z.0", source)]] if change == "frozen" else variants
    m = model("llama_gqa") if change == "model" else m
    tokens = IDS.rows([0]) if change == "prompts" else tokens
    variants = [[Scale("z.0.0", 0.5)], *variants[1:]] if change == "edits" else variants
    measure = (lambda logits, prompt: -metric(logits, prompt)) if change == "metric" else measure
    outside = [Ablate("z.1.1")] if change == "around" else []
    with m.edited(*outside), pytest.raises(Refused, match="another sweep"):
        sweep(m, tokens, variants, measure, resume=path)


def test_a_folder_that_is_none_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match="no folder"), resuming(tmp_path / "file"):
        pass
