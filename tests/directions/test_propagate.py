"""Growth of perturbations: by hand-written hooks, without any writing, of a trained model, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import cutaway as ca
from cutaway.directions.direction import Direction
from tests.conformance.subjects import random_llama
from tests.directions.made import seeded

PROMPTS = ["Mary and John went to the store", "Anna and Peter went to the park, Peter gave"]


def along(width: int, *sites: str) -> Direction:
    return ca.directions.direction({s: seeded(i, width) for i, s in enumerate(sites)})


def streams(model: Any, text: str, step: torch.Tensor, everywhere: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream behind layer 1 at the last position and the last logits, with a step behind layer 0."""

    def hook(module: Any, args: Any, out: Any) -> Any:
        h = (out if isinstance(out, torch.Tensor) else out[0]).clone()
        h[:, slice(None) if everywhere else -1] += step
        return h if isinstance(out, torch.Tensor) else (h, *out[1:])

    handle = model.hf.model.layers[0].register_forward_hook(hook)
    seen = list[torch.Tensor]()
    other = model.hf.model.layers[1].register_forward_hook(
        lambda m, a, out: seen.append((out if isinstance(out, torch.Tensor) else out[0])[0, -1])
    )
    try:
        logits = model.hf(model.tokens(text).ids).logits[0, -1]
    finally:
        handle.remove()
        other.remove()
    return seen[0], logits


@pytest.mark.parametrize("everywhere", [False, True])
def test_growth_is_what_plain_hooks_and_central_differences_show(everywhere):
    model = random_llama()
    model.hf.double()
    direction = along(32, "resid_post.0", "resid_post.1")
    got = ca.directions.propagate(model, PROMPTS, direction, sizes=(0.1, 1.0), everywhere=everywhere, samples=1)
    v = torch.nn.functional.normalize(direction.vector[0].double(), dim=0)
    gains, kls, cosines = list[list[float]](), list[float](), list[float]()
    with torch.no_grad():
        for text in PROMPTS:
            norm = model.capture(text, "resid_post.0")["resid_post.0@-1"].norm()
            base, own = streams(model, text, 0 * v, everywhere)
            change, row = torch.empty(0), list[float]()
            small = [streams(model, text, x * v, everywhere)[0] for x in (0.01, -0.01)]  # norms are in float32
            row.append(float((small[0] - small[1]).norm()) / 0.02)
            for length in (0.1 * float(norm), float(norm)):
                now, logits = streams(model, text, length * v, everywhere)
                change = now - base
                row.append(float(change.norm()) / length)
            p, q = own.log_softmax(-1), logits.log_softmax(-1)
            kls.append(float((p.exp() * (p - q)).sum()))
            cosines.append(float(change @ direction.vector[1].double() / change.norm() / direction.vector[1].norm()))
            gains.append(row)
    mean = torch.tensor(gains).mean(0)
    torch.testing.assert_close(got.gain[:, 0].double(), mean.double(), rtol=3e-4, atol=1e-6)
    torch.testing.assert_close(got.exponent.double(), torch.tensor(gains).double().log().mean(0), rtol=1e-3, atol=1e-5)
    assert float(got.kl[2]) == pytest.approx(sum(kls) / 2, rel=1e-4)
    assert float(got.aligned[2, 0]) == pytest.approx(sum(cosines) / 2, abs=1e-4)


def test_where_blocks_write_nothing_nothing_grows_in_any_direction():
    model = random_llama()
    with torch.no_grad():
        for layer in model.hf.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    got = ca.directions.propagate(model, PROMPTS, along(32, "resid_pre.0"), sizes=(0.5, 4.0), samples=2)
    assert got.labels["layer"] == ["resid_post.0", "resid_post.1"]
    for name in ("gain", "relative_gain", "cosine", "null", "control_gain"):
        torch.testing.assert_close(getattr(got, name), torch.ones_like(getattr(got, name)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.exponent, torch.zeros(3), atol=1e-5, rtol=0)
    assert got.linear_range.tolist() == [4.0, 4.0]
    assert bool(got.aligned.isnan().all())  # nothing is known of the layers behind


def test_small_sizes_tend_to_the_tangent_and_the_linear_range_is_the_last_of_those_near():
    model, sizes = random_llama(spread=6.0), (0.001, 0.3, 1.0, 3.0, 10.0)
    got = ca.directions.propagate(model, PROMPTS, along(32, "resid_pre.0"), sizes=sizes, samples=2)
    assert float((got.gain[1] / got.gain[0] - 1).abs().max()) < 5e-3
    for layer, last in enumerate(got.linear_range.tolist()):
        near = ((got.gain[1:, layer] / got.gain[0, layer] - 1).abs() < 0.1).tolist()
        assert last == sizes[near.index(False) - 1]  # the map bends within ten lengths of the stream
    assert float(got.kl[0]) == 0.0
    assert math.isclose(float(got.exponent[0]), float(got.gain[0, -1].log()) / 2, abs_tol=0.1)


@pytest.mark.parametrize(
    ("sites", "options", "match"),
    [
        (("resid_post.1",), {}, "no block follows it"),
        (("mlp_out.0",), {}, "not the residual stream"),
        (("resid_pre.0",), {"sizes": (1.0, 0.5)}, "not positive and ascending"),
        (("resid_pre.0",), {"sizes": (0.0, 0.5)}, "not positive and ascending"),
    ],
)
def test_what_cannot_be_followed_is_refused(sites, options, match):
    with pytest.raises(ca.Refused, match=match):
        ca.directions.propagate(random_llama(), PROMPTS, along(32, *sites), **options)


def test_other_widths_and_prompts_without_two_positions_are_refused():
    model = random_llama()
    with pytest.raises(ca.Refused, match="16 wide"):
        ca.directions.propagate(model, PROMPTS, along(16, "resid_pre.0"))
    with pytest.raises(ca.Refused, match="no difference of two"):
        ca.directions.propagate(model, [[5]], along(32, "resid_pre.0"))
