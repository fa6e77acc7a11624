"""The sentiment direction of the bundled model, found by hand: positive minus negative reviews, per layer."""

from __future__ import annotations

from functools import cache

import torch

import cutaway as ca
from cutaway.directions.direction import Direction
from cutaway.models.model import Model
from cutaway.tasks.task import Task
from tests.conformance.subjects import miniworld

POSITIVE = {" happy", " loved", " positive", " gladly"}


def reviews(n: int, split: str = "test", seed: int = 0) -> tuple[list[str], list[str]]:
    """Reviews of the bundled model's world: positive ones, and each with the opposite adjectives."""
    pairs = miniworld().world.prompts("sentiment", n, seed, split)
    sides = [(p.clean, p.corrupt) if p.meta["positive"] else (p.corrupt, p.clean) for p in pairs]
    return [a for a, _ in sides], [b for _, b in sides]


def difference(model: Model, positive: list[str], negative: list[str], sites: list[str]) -> Direction:
    """Return the difference of means at the last token."""
    one, other = (model.capture(texts, sites, logits=False) for texts in (positive, negative))
    vectors = {s: one[f"{s}@-1"].mean(0) - other[f"{s}@-1"].mean(0) for s in sites}
    return ca.directions.direction(vectors, "sentiment", "positive", "negative", model.family.name)


@cache
def sentiment() -> Direction:
    """Return the direction of training reviews, behind every block."""
    model = miniworld()
    return difference(model, *reviews(120, "train"), [f"resid_post.{i}" for i in range(model.shape.n_layers)])


@cache
def asked(n: int = 16) -> Task:
    """Held-out reviews, with the positive verdict as the answer and the negative one as the foil of each."""
    pairs = list(ca.tasks.load("sentiment", miniworld(), n=n))
    turned = [p if p.answer in POSITIVE else type(p)(p.clean, p.corrupt, p.foil, p.answer) for p in pairs]
    return Task("verdict", tuple(turned), corruption="every adjective becomes its opposite")


def seeded(seed: int, *shape: int) -> torch.Tensor:
    """Return normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
