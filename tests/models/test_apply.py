"""A user's function as an edit: exact in every plan that takes it, refused by those that cannot keep it."""

import sys

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.models import Apply
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit, of_prompts
from cutaway.models.edits.library import Replace, Scale
from cutaway.models.sweep.cache import resuming
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import batch
from tests.models.common import IDS, PADDED, gap, model
from tests.models.test_executor import metric, one_by_one

KINDS = ["gpt2", "gemma2", "bloom", "mixtral"]


def centred(x: torch.Tensor) -> torch.Tensor:
    """Each value without its mean over the batch: reads across prompts."""
    return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize("name", KINDS)
def test_a_function_does_what_the_edit_of_its_name_does(name):
    m = model(name)
    for place in ("z.1", "z.1.2", "z.1@2", "z.1.2@-1", "resid_mid.1@0", "logits"):
        assert torch.equal(m.run(IDS, Apply(place, lambda x: 2 * x)), m.run(IDS, Scale(place, 2.0))), place
    for t in PADDED.values():
        assert torch.equal(m.run(t, Apply("z.1", lambda x: 2 * x, (0, -1))), m.run(t, Scale("z.1", 2.0, (0, -1))))
    z = m.capture(IDS, "z.1")["z.1"]
    assert gap(m.run(IDS, Apply("z.1", centred)), m.run(IDS, Replace("z.1", centred(z)))) < 1e-6
    if name != "bloom":
        twice = m.generate(IDS, 3, Apply("z.1", lambda x: 2 * x))
        assert twice == m.generate(IDS, 3, Scale("z.1", 2.0))


def test_it_runs_eagerly_and_may_write_into_what_it_gets(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "breakpointhook", lambda: seen.append(sys._getframe(1).f_locals["x"].shape))

    def halved(x):
        breakpoint()
        x *= 0.5
        return x

    m = model("gpt2")
    assert torch.equal(m.run(IDS, Apply("z.1.2@3", halved)), m.run(IDS, Scale("z.1.2@3", 0.5)))
    assert seen == [(2, m.shape.d_head)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("t", [IDS, PADDED["left"]], ids=["even", "padded"])
def test_a_sweep_runs_it_on_whole_batches(name, t):
    """Neither the budget nor lengths divide the prompts, no other variant is seen, and nothing is merged."""
    m = model(name)
    shapes = set()

    def watched(x):
        shapes.add(tuple(x.shape[:2]))
        return centred(x)

    variants: list[list[Edit]] = [
        [Apply(f"{site}.{i}", watched)] for i in range(m.shape.n_layers) for site in ("z", "mlp_out", "resid_post")
    ]
    variants += [[Scale("z.0@-1", 0.5), Apply("resid_mid.1@-1", centred)], [Scale("z.1", 0.5)]]
    made = sweep(m, t, variants, metric, budget=1)
    assert shapes == {tuple(t.ids.shape)}
    torch.testing.assert_close(made, one_by_one(m, t, variants), rtol=1e-4, atol=1e-5)
    both: list[list[Edit]] = [[Apply("z.0", centred), Scale("z.1.0", 0.5)]]
    based = sweep(m, t, [[Scale("z.1.0", 0.5)]], metric, base=[Apply("z.0", watched)], budget=1)
    assert shapes == {tuple(t.ids.shape)}
    torch.testing.assert_close(based, one_by_one(m, t, both), rtol=1e-4, atol=1e-5)


def test_what_cannot_keep_it_exact_refuses_it(tmp_path):
    m, edit = model("gpt2"), Apply("z.1", torch.relu)
    with pytest.raises(Refused, match=r"user function .*relu at z.1 in a sweep that is kept"):
        sweep(m, IDS, [[edit]], metric, resume=tmp_path / "sweep.safetensors")
    with resuming(tmp_path), pytest.raises(Refused, match="sweep that is kept"):
        sweep(m, IDS, [[Scale("z.0", 0.5)]], metric, base=[edit])
    with m.edited(edit), pytest.raises(Refused, match="sweep that is kept"):
        sweep(m, IDS, [[Scale("z.0", 0.5)]], metric, resume=tmp_path / "sweep.safetensors")
    assert not list(tmp_path.iterdir())
    apart = batch([[5, 6, 7, 8], [9, 10]])
    with pytest.raises(Refused, match="in parts"):
        of_prompts([edit], BatchSlice.of(apart, [0], True))
    assert "user function" in repr(edit)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: None, "NoneType"),
        (lambda x: x[:1], r"\(1, 7, 4, 8\)"),
        (lambda x: x.double(), "float64"),
        (lambda x: x.to("meta"), "on meta"),
    ],
)
def test_what_a_function_may_not_return_is_refused(function, word):
    with pytest.raises(Refused, match=word):
        model("gpt2").run(IDS, Apply("z.1", function))


def test_gradients_pass_through_it():
    m = model("gpt2")
    ours = m.gradients(IDS, "z.0", lambda x: x[:, 3], Apply("z.1", lambda x: 2 * x))
    theirs = m.gradients(IDS, "z.0", lambda x: x[:, 3], Scale("z.1", 2.0))
    assert torch.equal(ours[1]["z.0"], theirs[1]["z.0"])
