"""Results of every shape with plausible numbers, for the tests of views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.result import Result

PROMPT = "When Mary and John went to the store , John gave a drink to"
WORDS = [" " + w for w in PROMPT.split()]
RECORD = {
    "method": "patching.activation", "answers": "Which activations carry the answer?", "paper": "Wang et al. 2023",
    "control": "random heads", "subjects": {"model": {"name": "miniworld", "family": "gpt2", "hash": "0f3a9c21d4e5b677",
    "dtype": "float32"}, "task": {"name": "ioi", "prompts": 32, "hash": "77aa01b2c3d4e5f6"}},
    "options": {"direction": "denoise", "seed": 0}, "cost": {"declared": "heads * F", "forwards": 26.5, "backwards": 0,
    "seconds": 0.81}, "python": "ca.patching.activation(model, task, direction='denoise')",
    "command": "cutaway patching activation --model miniworld --task ioi",
    "versions": {"cutaway": "0.1.0", "torch": "2.13.0"},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Heads(Result, kind="views_heads"):
    """Layer by head, with interval and null."""

    effect: Float[Tensor, "layer head"]
    interval: Float[Tensor, "layer head bound"] | None = None
    null: Float[Tensor, "layer head sample"] | None = None


@dataclass(frozen=True, kw_only=True)
class Places(Result, kind="views_places"):
    """Layer by position, with interval and null."""

    effect: Float[Tensor, "layer position"]
    interval: Float[Tensor, "layer position bound"] | None = None
    null: Float[Tensor, "layer position sample"] | None = None


@dataclass(frozen=True, kw_only=True)
class Sites(Result, kind="views_sites"):
    """Three layer-by-position maps."""

    effect: Float[Tensor, "site layer position"]
    null: Float[Tensor, "sample"] | None = None


@dataclass(frozen=True, kw_only=True)
class Lens(Result, kind="views_lens"):
    """A logit lens: top words, their probability, and the target over depth."""

    probability: Float[Tensor, "layer position"]
    token: Int[Tensor, "layer position rank"]
    target: Float[Tensor, "layer"]
    target_interval: Float[Tensor, "layer bound"] | None = None
    rank: Float[Tensor, "layer"] | None = None
    answer: Float[Tensor, "layer candidate"] | None = None


@dataclass(frozen=True, kw_only=True)
class Parts(Result, kind="views_parts"):
    """Signed contributions of components, with their residual."""

    contribution: Float[Tensor, "component"]
    interval: Float[Tensor, "component bound"] | None = None
    null: Float[Tensor, "component sample"] | None = None
    residual: Float[Tensor, ""] | None = None


@dataclass(frozen=True, kw_only=True)
class Answers(Result, kind="views_answers"):
    """Most probable next tokens."""

    probability: Float[Tensor, "token"]


@dataclass(frozen=True, kw_only=True)
class Shapes(Result, kind="views_shapes"):
    """Further axes, each optional."""

    strip: Float[Tensor, "position"] | None = None
    strips: Float[Tensor, "batch position"] | None = None
    pattern: Float[Tensor, "q_pos k_pos"] | None = None
    patterns: Float[Tensor, "head q_pos k_pos"] | None = None
    edges: Float[Tensor, "edge"] | None = None
    curve: Float[Tensor, "step"] | None = None
    odd: Float[Tensor, "site method"] | None = None
    deep: Float[Tensor, "batch layer head position"] | None = None
    neurons: Float[Tensor, "layer neuron"] | None = None
    count: Int[Tensor, ""] | None = None
    flags: Int[Tensor, "head"] | None = None


def _g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _around(x: Tensor, width: float, seed: int = 1) -> Tensor:
    gap = width * (0.4 + torch.rand(x.shape, generator=_g(seed)))
    return torch.stack([x - gap, x + gap], -1)


def heads(layers: int = 6, n: int = 8) -> Heads:
    """A layer × head sweep in which four heads matter."""
    x = 0.04 * torch.randn(layers, n, generator=_g())
    for (a, b), v in {(4, 1): 1.9, (4, 5): 1.1, (3, 2): 0.8, (5, 6): -1.3, (2, 7): 0.4}.items():
        if a < layers and b < n:
            x[a, b] = v
    null = 0.09 * torch.randn(layers, n, 60, generator=_g(3))
    return Heads(effect=x, interval=_around(x, 0.12), null=null, units={"effect": "logits"}, record=RECORD)


def places(layers: int = 6, words: list[str] | None = None) -> Places:
    """A layer × position sweep whose path moves from the second name to the end."""
    words = WORDS if words is None else words
    x = 0.03 * torch.randn(layers, len(words), generator=_g(5))
    s2, end, half = len(words) - 5, len(words) - 1, layers // 2
    for layer in range(layers):
        x[layer, s2] += 2.2 / (1 + 2.7 ** (2.2 * (layer - half)))
        x[layer, end] += 2.4 / (1 + 2.7 ** (-2.2 * (layer - half - 0.6)))
        x[layer, s2 + 1] -= 0.5 if layer == half else 0.0
    null = 0.07 * torch.randn(layers, len(words), 12, generator=_g(3))
    return Places(
        effect=x, interval=_around(x, 0.1), null=null, labels={"position": words}, units={"effect": "logits"},
        record=RECORD,
    )  # fmt: skip


def sites() -> Sites:
    """The same for three sites, with one null for all cells."""
    one = places().effect
    return Sites(
        effect=torch.stack([one, one * 0.5 - 0.02, one.flip(0) * 0.3]), null=0.1 * torch.randn(40, generator=_g(8)),
        labels={"site": ["resid_pre", "attn_out", "mlp_out"], "position": WORDS},
        units={"effect": "logits"}, record=RECORD,
    )  # fmt: skip


def lens(layers: int = 7, words: list[str] | None = None) -> Lens:
    """A logit lens in which the answer appears at two thirds of the depth."""
    words = WORDS if words is None else words
    pool = [" the", " a", " store", " John", " Mary", " drink", " to", " gave", ",", " lives", " in", " restaurant"]
    ids = torch.randint(len(pool), (layers, len(words), 3), generator=_g(2))
    p = torch.rand(layers, len(words), generator=_g(4)) * torch.linspace(0.1, 0.75, layers)[:, None]
    target = torch.tensor([0.002, 0.004, 0.01, 0.06, 0.31, 0.79, 0.86, 0.9, 0.9, 0.9, 0.9, 0.9][:layers])
    ids[-3:, -1, 0], p[:, -1] = 4, target
    label = [[[pool[k] for k in cell] for cell in row] for row in ids.tolist()]
    rank = torch.tensor([1210.0, 420, 77, 9, 2, 1, 1, 1, 1, 1, 1, 1][:layers])
    answer = torch.stack([target, (0.5 - target).abs() * 0.4], -1)
    return Lens(
        probability=p, token=ids, target=target, rank=rank, answer=answer,
        target_interval=(_around(target, 0.05)).clamp(0, 1),
        labels={
            "position": words, "token": label, "layer": ["embed", *range(layers - 1)], "candidate": [" Mary", " John"],
        },
        units={"probability": "probability", "target": "probability", "rank": "rank", "answer": "probability"},
        record=RECORD | {"method": "lenses.logit_lens", "answers": "Where along depth does the answer appear?"},
    )  # fmt: skip


def parts() -> Parts:
    """Direct logit attribution over heads and MLPs."""
    names = [
        *(f"head {layer}.{h}" for layer in range(6) for h in range(4)),
        *(f"mlp {i}" for i in range(6)),
        "embed",
        "bias",
    ]
    x = 0.05 * torch.randn(len(names), generator=_g(6))
    x[[17, 18, 14, 26, 22]] = torch.tensor([2.31, 1.12, 0.64, 0.52, -0.91])
    return Parts(
        contribution=x, interval=_around(x, 0.13), null=0.11 * torch.randn(len(names), 100, generator=_g(7)),
        residual=torch.tensor(-1.2e-6), labels={"component": names}, record=RECORD,
        units={"contribution": "logits", "residual": "logits"},
    )  # fmt: skip


def answers() -> Answers:
    """Top tokens of a prediction."""
    return Answers(
        probability=torch.tensor([0.902, 0.061, 0.011, 0.006, 0.004, 0.001]),
        labels={"token": [" Mary", " John", " the", " Sarah", " him", "\n"]}, units={"probability": "probability"},
    )  # fmt: skip


def shapes() -> Shapes:
    """Everything else."""
    g = _g(9)
    r = torch.randn
    return Shapes(
        strip=r(13, generator=g), strips=r(3, 13, generator=g), pattern=r(13, 13, generator=g).softmax(-1),
        patterns=r(4, 13, 13, generator=g).softmax(-1), edges=r(30, generator=g), curve=r(40, generator=g).cumsum(0),
        odd=r(3, 8, generator=g), deep=r(3, 4, 4, 13, generator=g), neurons=r(4, 700, generator=g),
        count=torch.tensor(7),
        flags=torch.tensor([0, 1, 1, 0]), labels={"edge": [f"{i}.1 → {i + 1}.0" for i in range(30)]},
    )  # fmt: skip


def every() -> list[Result]:
    """One result of every kind above."""
    return [heads(), places(), sites(), lens(), parts(), answers(), shapes()]
