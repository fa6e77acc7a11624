"""Every gate against its formula, token by token and latent by latent, in float64."""

import math

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.dictionaries.gates import (
    AbsTopK,
    BatchTopK,
    Gated,
    GroupMax,
    JumpRelu,
    MatchingPursuit,
    Relu,
    TopK,
    gate_of,
)
from cutaway.dictionaries.gates.shared.gate import moved, numbers_of, tensors_of

N, F = 7, 12


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


PRE, THETA, R, B_GATE, B_MAG = numbers(N, F), numbers(F, seed=1) * 0.5, *(numbers(F, seed=s) for s in (2, 3, 4))


def largest(row: list[float], k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda i: -row[i])[:k])


def by_token(function) -> torch.Tensor:
    return torch.tensor([function(row) for row in PRE.tolist()], dtype=torch.float64)


def topk(row, k=3):
    return [max(v, 0.0) if i in largest(row, k) else 0.0 for i, v in enumerate(row)]


def abs_topk(row, k=3):
    return [v if i in largest([abs(v) for v in row], k) else 0.0 for i, v in enumerate(row)]


def group_max(row, k=3):
    groups = [range(g * F // k, (g + 1) * F // k) for g in range(k)]
    best = {max(g, key=lambda i: row[i]) for g in groups}
    return [max(v, 0.0) if i in best else 0.0 for i, v in enumerate(row)]


def gated(row):
    return [
        max(math.exp(r) * v + m, 0.0) if v + g > 0 else 0.0
        for v, r, g, m in zip(row, R.tolist(), B_GATE.tolist(), B_MAG.tolist(), strict=True)
    ]


def jump(row, signed=False):
    return [(v if signed else max(v, 0.0)) if v > t else 0.0 for v, t in zip(row, THETA.tolist(), strict=True)]


def batch_topk(k=2):
    flat = [max(v, 0.0) for row in PRE.tolist() for v in row]
    kept = largest(flat, k * N)
    return torch.tensor([v if i in kept else 0.0 for i, v in enumerate(flat)], dtype=torch.float64).reshape(N, F)


@pytest.mark.parametrize(
    ("gate", "wanted"),
    [
        (Relu(), by_token(lambda row: [max(v, 0.0) for v in row])),
        (JumpRelu(THETA), by_token(jump)),
        (JumpRelu(THETA, signed=True), by_token(lambda row: jump(row, signed=True))),
        (TopK(3), by_token(topk)),
        (TopK(3, multi=True), by_token(topk)),
        (TopK(F), by_token(lambda row: topk(row, F))),
        (BatchTopK(2), batch_topk()),
        (BatchTopK(2, 0.4), by_token(lambda row: [v if v > 0.4 else 0.0 for v in row])),
        (Gated(R, B_GATE, B_MAG), by_token(gated)),
        (AbsTopK(3), by_token(abs_topk)),
        (GroupMax(3), by_token(group_max)),
    ],
    ids=lambda x: repr(numbers_of(x)) if hasattr(x, "apply") else "",
)
def test_gates_are_their_formulas(gate, wanted):
    assert torch.allclose(gate.apply(PRE).dense(), wanted, atol=1e-14)
    again = gate_of(numbers_of(gate), tensors_of(gate))
    assert torch.equal(again.apply(PRE).dense(), gate.apply(PRE).dense())
    alone = torch.cat([gate.apply(PRE[i : i + 1]).dense() for i in range(N)])
    assert gate.whole_batch == (not torch.equal(alone, gate.apply(PRE).dense()))


def test_gradients_reach_active_latents_only():
    for gate in (Relu(), JumpRelu(THETA.abs()), TopK(3), BatchTopK(2), AbsTopK(3), GroupMax(3)):
        pre = PRE.clone().requires_grad_()
        gate.apply(pre).dense().sum().backward()
        assert torch.equal(pre.grad, (gate.apply(PRE).dense() != 0).double()), gate


def pursuit(x: torch.Tensor, rows: torch.Tensor, residual: float, steps: int | None, stop: bool) -> list[float]:
    """One token, with plain lists."""
    code, rest, done = [0.0] * len(rows), x.clone(), 0
    while steps is None or done < steps:
        products = [float(rest @ row) for row in rows]
        best = max(range(len(rows)), key=lambda i: products[i])
        gain, known = max(products[best], 0.0), code[best] != 0
        code[best] += gain
        rest = rest - gain * rows[best]
        done += 1
        if float(rest.norm()) < residual or (stop and (known or gain == 0.0)):
            break
    return code


@pytest.mark.parametrize(("residual", "steps", "stop"), [(0.3, None, True), (0.0, 2, False), (1e-3, 9, False)])
def test_matching_pursuit_is_the_greedy_search(residual, steps, stop):
    rows = torch.nn.functional.normalize(numbers(F, 5, seed=6), dim=1)
    x = numbers(N, 5, seed=7)
    wanted = torch.tensor([pursuit(t, rows, residual, steps, stop) for t in x], dtype=torch.float64)
    assert torch.allclose(MatchingPursuit(residual, steps, stop).pursue(x, rows).dense(), wanted, atol=1e-12)


def test_thresholds_stay_in_float32():
    assert moved(JumpRelu(THETA), None, torch.bfloat16).threshold.dtype == torch.float32


def test_gates_refuse_nonsense():
    with pytest.raises(Refused, match="nothing would ever be active"):
        TopK(0)
    with pytest.raises(Refused, match="smaller k"):
        TopK(13).apply(PRE)
    with pytest.raises(Refused, match="equal groups"):
        GroupMax(5).apply(PRE)
    with pytest.raises(Refused, match="bounds"):
        MatchingPursuit(stop_on_repeat=False).pursue(PRE, PRE)
    with pytest.raises(Refused, match="no gate has that name"):
        gate_of({"kind": "Sigmoid"}, {})
