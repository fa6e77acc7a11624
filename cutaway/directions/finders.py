"""Finders: ways to find the direction of a concept in vectors of labelled texts; each is one row of the table.

A finder returns a line; its length and sign are those of the difference of the class means along it, so that adding the
direction once moves the mean of the texts without the concept level with the mean of those with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from cutaway.core.stats import generator
from cutaway.interventions.probes import STRENGTH, logistic


@dataclass(frozen=True)
class Sample:
    """Vectors of one address, of which a direction is found.

    Attributes:
        x: the vectors.
        y: True for texts that show the concept.
        pairs: texts with and without the concept that belong together.
        seed: seed of what is drawn.
    """

    x: Float[Tensor, "text width"]
    y: Bool[Tensor, "text"]
    pairs: Int[Tensor, "pair 2"]
    seed: int = 0

    @property
    def difference(self) -> Float[Tensor, "width"]:
        """The mean of the texts with the concept minus that of those without."""
        return self.x[self.y].mean(0) - self.x[~self.y].mean(0)

    @property
    def of_pairs(self) -> Float[Tensor, "pair width"]:
        """The differences of the pairs, with the concept minus without."""
        return self.x[self.pairs[:, 0]] - self.x[self.pairs[:, 1]]


@dataclass(frozen=True)
class Finder:
    """A way to find a direction.

    Attributes:
        line: returns a vector along the direction, of any length and sign.
        paper: where it is described.
        warning: the reason why its directions may say little; empty without one.
        paired: True if it reads pairs of texts.
    """

    line: Callable[[Sample], Float[Tensor, "width"]]
    paper: str
    warning: str = ""
    paired: bool = False

    def find(self, sample: Sample) -> Float[Tensor, "width"]:
        """Return the direction, as long as the classes' means are apart along it; zeros where they do not differ."""
        unit = normalize(self.line(sample).double(), dim=0)
        return ((unit @ sample.difference.double()) * unit).float()


def _logistic(sample: Sample) -> Tensor:
    scaler, probe = logistic(sample.x, sample.y, STRENGTH)
    return torch.from_numpy(probe.coef_[0] / scaler.scale_)


def _ridge(sample: Sample) -> Tensor:
    from sklearn.linear_model import Ridge

    x, y = sample.x.double(), sample.y.double() - sample.y.double().mean()
    penalty = float(x.var(0).sum()) * len(x) / x.shape[1]  # as much as a coordinate of mean spread weighs
    return torch.from_numpy(Ridge(alpha=max(penalty, 1e-12)).fit(x.numpy(), y.numpy()).coef_)


def _reading_vector(sample: Sample) -> Tensor:
    """Return the first component of differences between texts paired at random, in a random order of each pair."""
    g = generator(sample.seed)
    order = torch.randperm(len(sample.x), generator=g)
    half = len(order) // 2
    return _first_component(sample.x[order[:half]] - sample.x[order[half : 2 * half]], centred=True)


def _centred_pairs(sample: Sample) -> Tensor:
    return _first_component(sample.of_pairs, centred=True)


def _uncentred_pairs(sample: Sample) -> Tensor:
    return _first_component(sample.of_pairs, centred=False)


def _first_component(x: Float[Tensor, "row width"], centred: bool) -> Float[Tensor, "width"]:
    x = x.double() - (x.double().mean(0) if centred else 0.0)
    return torch.linalg.svd(x, full_matrices=False).Vh[0]


_TAKEN_OUT = (
    "PCA on centred differences takes their mean out, which is the direction sought; what is left is how pairs differ"
)

#: every finder by its name
FINDERS: dict[str, Finder] = {
    "mean_difference": Finder(lambda s: s.difference, "Marks & Tegmark 2023, arXiv:2310.06824"),
    "contrastive_pairs": Finder(lambda s: s.of_pairs.mean(0), "Rimsky et al. 2023, arXiv:2312.06681", paired=True),
    "logistic": Finder(_logistic, "Alain & Bengio 2016, arXiv:1610.01644"),
    "ridge": Finder(_ridge, "Hoerl & Kennard 1970"),
    "reading_vector": Finder(_reading_vector, "Zou et al. 2023, arXiv:2310.01405"),
    "pca_pairs": Finder(_uncentred_pairs, "steering-vectors, uncentred PCA of pairs' differences", paired=True),
    "pca_centred_pairs": Finder(_centred_pairs, "repeng, pca_diff", _TAKEN_OUT, paired=True),
}  # fmt: skip


def pairs_of(y: Bool[Tensor, "text"], group: Int[Tensor, "text"]) -> Int[Tensor, "pair 2"]:
    """Pair the texts with the concept with those without, in their order within each group; the rest stays single.

    Without groups, where every text is one of its own, all texts are paired in their order.
    """
    group = group if len(group.unique()) < len(group) else torch.zeros_like(group)
    found = list[Tensor]()
    for g in group.unique():
        one, other = ((own & (group == g)).nonzero()[:, 0] for own in (y, ~y))
        n = min(len(one), len(other))
        found.append(torch.stack([one[:n], other[:n]], 1))
    return torch.cat(found)
