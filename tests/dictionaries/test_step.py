"""One training step against a dense float64 oracle: loss and every gradient, for each gate and objective."""

import pytest
import torch

from cutaway.dictionaries import gates as gt
from cutaway.dictionaries import objectives as ob
from cutaway.dictionaries.training import recipe as rc
from cutaway.dictionaries.training.learner import Learner, SiteMoments

A, B, C, Z = "resid_post.0", "mlp_out.1", "mlp_out.2", "mlp_out.3"
D, F, N = 12, 320, 60


def data(seed=0, sites=(A,), n=N):
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(64, D, generator=g))
    out = {}
    for s in sites:
        amount = torch.rand(n, 64, generator=g) * (torch.rand(n, 64, generator=g) < 0.1)
        out[s] = amount @ rows * 3 + 0.1 * torch.randn(n, D, generator=g) + 0.5
    return out


def learner(recipe, seed=0):
    """A learner away from its start, so that nothing is zero by symmetry."""
    made = Learner(recipe, SiteMoments.of(data(7, (*recipe.reads, *recipe.writes), 500)))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, w in made.weights.items():
            w.add_(0.1 * torch.randn(w.shape, generator=g))
            if n.startswith("decoder") and recipe.decoder == "unit":
                w.div_(w.norm(dim=1, keepdim=True))
    for b in range(len(recipe.blocks)):
        made.buffers[f"silent.{b}"][::3] = 10**9
    return made


def oracle(made, acts, done):
    """Loss and gradients from dense float64 formulas, written from the papers and not from the learner."""
    r = made.recipe
    w = {n: t.detach().double().requires_grad_() for n, t in made.weights.items()}
    xs = {s: acts[s].double() * made.scale[s] for s in acts}
    ys = {s: w[f"b_dec.{s}"] for s in r.writes}
    blocks, penalty = [], 0.0
    for b, block in enumerate(r.blocks):
        x = torch.cat([xs[s] for s in block.reads], 1)
        p = torch.cat([w[f"b_dec.{s}"] for s in block.reads]) if r.subtract else 0
        wd = w[f"decoder.{b}"]
        we = w.get(f"encoder.{b}", wd)
        be = w.get(f"b_enc.{b}", torch.zeros(len(we), dtype=torch.double))
        pi = (x - p) @ we.T + be
        norm = wd.norm(dim=1)
        if isinstance(r.gating, gt.TrainMatchingPursuit):
            f, extra = greedy(x - p, wd, r.gating.k), {}
        else:
            f, extra = dense_gate(r, w, b, pi, norm.detach() if r.decoder == "norm_aware" else 1.0)
        blocks.append((wd, pi, norm, f, extra))
        sizes = [len(made.mean[s]) for s in block.writes]
        for s, part in zip(block.writes, (f @ wd).split(sizes, 1), strict=True):
            ys[s] = ys[s] + part
            if r.skip:
                for read in block.reads:
                    ys[s] = ys[s] + xs[read] @ w[f"skip.{read}>{s}"].T
    loss = sum((xs[s] - ys[s]).pow(2).sum() for s in ys) / N
    for b, parts in enumerate(blocks):
        target = torch.cat([xs[s] for s in r.blocks[b].writes], 1)
        out = torch.cat([ys[s] for s in r.blocks[b].writes], 1)
        for term in r.terms:
            penalty = penalty + dense_term(term, made, b, parts, target, out, done)
    total = loss + penalty
    names = list(w)
    grads = torch.autograd.grad(total, [w[n] for n in names], allow_unused=True)
    return total, dict(zip(names, grads, strict=True)), w


class Rectangle(torch.autograd.Function):
    """1[π > θ] and its estimated gradient, K(|π − θ| < ε/2) / ε."""

    @staticmethod
    def forward(ctx, pi, theta, width, to_input):
        ctx.save_for_backward(pi, theta)
        ctx.more = width, to_input
        return (pi > theta).double()

    @staticmethod
    def backward(ctx, grad):
        pi, theta = ctx.saved_tensors
        width, to_input = ctx.more
        k = ((pi - theta).abs() < width / 2).double() / width * grad
        return k if to_input else None, -k.sum(0), None, None


def greedy(rest, rows, k):
    f = torch.zeros(len(rest), len(rows), dtype=rest.dtype)
    for _ in range(k):
        value, index = (rest @ rows.T).relu().max(1)
        step = torch.zeros_like(f).scatter(1, index[:, None], value[:, None])
        f, rest = f + step, rest - step @ rows
    return f


def dense_gate(r, w, b, pi, scale):
    g = r.gating
    ranked = pi * scale
    match g:
        case gt.TrainTopK():

            def top(k):
                return pi.relu() * torch.zeros_like(pi).scatter(1, ranked.topk(k).indices, 1.0)

            return top(g.k), {"wide": top(g.wide)} if g.wide else {}
        case gt.TrainBatchTopK():
            least = ranked.relu().reshape(-1).topk(g.k * len(pi)).values[-1]
            return pi.relu() * (ranked >= least), {}
        case gt.TrainAbsTopK():
            return pi * torch.zeros_like(pi).scatter(1, pi.abs().topk(g.k).indices, 1.0), {}
        case gt.TrainGroupMax():
            groups = pi.unflatten(1, (g.k, -1))
            return (groups.relu() * (groups == groups.amax(-1, keepdim=True))).flatten(1), {}
        case gt.TrainRelu():
            return pi.relu(), {}
        case gt.TrainJumpRelu():
            theta = w[f"gate.{b}.log_threshold"].exp()
            step = Rectangle.apply(pi, theta, g.width, g.to_input)
            # the value π · step: the step's estimate stands at θ, not at π
            value = pi * (pi > theta) + (theta.detach() * (step - step.detach()))
            return value, {"step": step, "theta": theta}
        case gt.TrainGated():
            r_, gate, mag = (w[f"gate.{b}.{n}"] for n in ("r_mag", "b_gate", "b_mag"))
            return (r_.exp() * pi + mag).relu() * (pi + gate > 0), {"opened": (pi + gate).relu()}


def dense_term(t, made, b, parts, target, out, done):
    wd, pi, norm, f, extra = parts
    sizes = [len(made.mean[s]) for s in made.recipe.blocks[b].writes]
    unit = made.recipe.decoder == "unit"
    norms = {"together": 1.0 if unit else norm, "none": 1.0, "sum": sum(q.norm(dim=1) for q in wd.split(sizes, 1))}
    size = f.abs() * norms[t.norms] if hasattr(t, "norms") else None
    now = t.weight * min(1.0, done / t.rise) if t.rise else t.weight
    match t:
        case ob.L1():
            power = 1 + (t.power - 1) * (done - t.rise) / t.anneal if t.anneal else t.power  # `done` is in between
            return now * size[size > 0].pow(power).sum() / N
        case ob.Tanh():
            return now * torch.tanh(t.c * size).sum() / N
        case ob.L0():
            return now * extra["step"].sum() / N
        case ob.L0Target():
            return now * (extra["step"].sum() / N / t.target - 1) ** 2
        case ob.Frequency():
            phi = torch.tanh(t.c * size).mean(0)
            return now * (phi * (1 + phi / t.scale)).sum()
        case ob.PreActivation():
            pays = (made.buffers[f"silent.{b}"] >= t.silent_after) if t.silent_only else torch.ones(F)
            return now * ((extra.get("theta", 0) - pi).relu() * norms["together"] * pays).sum() / N
        case ob.OpenGate():
            opened = extra["opened"]
            b_dec = (out - f @ wd).detach()
            return (
                now * (opened * norms["together"]).sum() / N + (target - b_dec - opened @ wd.detach()).pow(2).sum() / N
            )
        case ob.MultiTopK():
            return now * (target - (out - f @ wd) - extra["wide"] @ wd).pow(2).sum() / N
        case ob.Matryoshka():
            rest = out - f @ wd
            return now * sum((target - rest - f[:, :m] @ wd[:m]).pow(2).sum() / N for m in t.widths)
        case ob.AuxK():
            dead = made.buffers[f"silent.{b}"] >= t.after
            k = min(t.k, int(dead.sum()))
            hidden = pi.relu()[:, dead]
            hidden = hidden * torch.zeros_like(hidden).scatter(1, hidden.topk(k).indices, 1.0)
            e = (target - out).detach()
            return now * made.variance * (e - hidden @ wd[dead]).pow(2).sum() / e.pow(2).sum()


RECIPES = {
    "topk": rc.autoencoder(A, F, gt.TrainTopK(8), ()),
    "topk, AuxK": rc.autoencoder(A, F, gt.TrainTopK(8), (ob.AuxK(k=20, after=10**6),)),
    "topk, sparse AuxK": rc.autoencoder(A, F, gt.TrainTopK(8), (ob.AuxK(k=2, after=10**6, weight=0.5),)),
    "topk, free": rc.autoencoder(A, F, gt.TrainTopK(8), (), decoder="free", subtract=False),
    "topk, norm-aware": rc.autoencoder(A, F, gt.TrainTopK(8), (), decoder="norm_aware"),
    "topk, wide": rc.autoencoder(A, F, gt.TrainTopK(4, wide=16), (ob.MultiTopK(),)),
    "topk, nested": rc.autoencoder(A, F, gt.TrainTopK(8), (ob.Matryoshka((10, 100)),)),
    "batch": rc.autoencoder(A, F, gt.TrainBatchTopK(8), ()),
    "batch, nested, norm-aware": rc.autoencoder(
        A, F, gt.TrainBatchTopK(8), (ob.Matryoshka((20, 90)), ob.AuxK(k=9, after=10**6)), decoder="norm_aware"
    ),
    "absolute": rc.autoencoder(A, F, gt.TrainAbsTopK(8), ()),
    "groups": rc.autoencoder(A, F, gt.TrainGroupMax(16), ()),
    "pursuit": rc.autoencoder(A, F, gt.TrainMatchingPursuit(5)),
    "pursuit, others": rc.autoencoder(A, F, gt.TrainMatchingPursuit(4), (ob.L1(0.3), ob.Matryoshka((60,)))),
    "relu": rc.autoencoder(A, F, gt.TrainRelu(), (ob.L1(3.0),)),
    "relu, unit": rc.autoencoder(A, F, gt.TrainRelu(), (ob.L1(0.3, norms="none"),), decoder="unit", subtract=True),
    "relu, power": rc.autoencoder(A, F, gt.TrainRelu(), (ob.L1(0.3, power=0.5),)),
    "relu, annealed": rc.autoencoder(A, F, gt.TrainRelu(), (ob.L1(0.3, power=0.2, anneal=0.9),)),
    "relu, others": rc.autoencoder(A, F, gt.TrainRelu(), (ob.Frequency(0.3), ob.PreActivation(0.01), ob.Tanh(0.2))),
    "jump": rc.autoencoder(A, F, gt.TrainJumpRelu(0.3, 0.4), (ob.L0(0.7),)),
    "jump, input": rc.autoencoder(
        A, F, gt.TrainJumpRelu(0.3, 0.4, True),
        (ob.Tanh(0.7), ob.PreActivation(0.02), ob.PreActivation(0.05, silent_only=True, silent_after=10**6)),
    ),
    "jump, target": rc.autoencoder(A, F, gt.TrainJumpRelu(0.3, 0.4), (ob.L0Target(0.7, 20.0), ob.Frequency(0.1))),
    "gated": rc.autoencoder(A, F, gt.TrainGated(), (ob.OpenGate(2.0),)),
    "transcoder with skip": rc.transcoder(A, B, F, gt.TrainTopK(8), (ob.AuxK(k=20, after=10**6),), skip=True),
    "crosscoder": rc.crosscoder([A, B], F, gt.TrainRelu(), (ob.L1(1.0, norms="sum"),)),
    "weakly causal": rc.crosscoder([A], F, gt.TrainBatchTopK(8), (), [A, B]),
    "across layers": rc.cross_layer([A, B], [C, Z], F, gt.TrainJumpRelu(0.3, 0.4), (ob.Tanh(0.7), ob.L0(0.1))),
    "across layers, nested": rc.cross_layer([A, B], [C, Z], F, gt.TrainTopK(6), (ob.Matryoshka((30,)),)),
}  # fmt: skip


def along_rows(grad, w):
    return grad - w * (grad * w).sum(1, keepdim=True)


#: gates of a fixed width have no dense form, the others no candidates to choose in bfloat16; pursuit has neither
CASES = [
    (n, form) for n, r in RECIPES.items() for form in ("sparse", "bfloat16" if r.gating.fixed else "dense")
    if form == "sparse" or r.gating.encodes
]  # fmt: skip


@pytest.mark.parametrize(("name", "form"), CASES)
def test_loss_and_gradients_are_those_of_dense_formulas(name, form):
    recipe = RECIPES[name]
    made = learner(recipe)
    made.dense = [form == "dense"] * len(recipe.blocks)
    made.shadowed(form == "bfloat16")
    acts = data(1, dict.fromkeys((*recipe.reads, *recipe.writes)))
    p = made.forward(acts, 0.5)
    _, loss = made.losses(p)
    names = list(made.weights)
    got = torch.autograd.grad(loss, [made.weights[n] for n in names], allow_unused=True)
    true, grads, w = oracle(made, acts, 0.5)
    assert abs(loss.item() - true.item()) <= 1e-5 * abs(true.item())
    for n, g in zip(names, got, strict=True):
        expected = grads[n]
        if expected is None or g is None:
            assert g is None or not g.any()
            assert expected is None or not expected.any()
            continue
        if n.startswith("decoder") and recipe.decoder == "unit":
            expected = along_rows(expected, w[n].detach())
        far = (g.double() - expected).norm() / expected.norm()
        assert float(far) <= 1e-5, (n, float(far))
