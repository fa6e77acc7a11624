"""Kinds of probes beside the plain logistic one: components, neighbours, a hidden layer, attention over tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from cutaway.core.stats import generator
from cutaway.interventions.probes import STRENGTH, Scorer, choose, logistic_scores, scaled

_STEPS, _RATE = 120, 0.05  # of Adam, for the attention probe


def estimator_scores(make: Callable[[], Any]) -> Scorer:
    """Return the scorer by an estimator of scikit-learn, on coordinates of unit spread: log odds, around 0."""

    def one(fit: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
        fitted = make().fit(fit, y)
        if hasattr(fitted, "decision_function"):
            return fitted.decision_function(test)
        p = fitted.predict_proba(test)[:, 1].clip(1e-6, 1 - 1e-6)
        return np.log(p) - np.log1p(-p)

    def scores(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        a, b = (x.numpy() for x in scaled(fit, test))
        with warnings.catch_warnings():  # that few steps end before convergence is a part of the regularisation
            warnings.simplefilter("ignore")
            return torch.from_numpy(np.stack([one(a, y.numpy(), b) for y in labels])).float()

    return _of_both_classes(scores)


def mean_difference_scores(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
    """Score by the component along the difference of the class means, from the middle between them."""

    def one(y: Tensor) -> Tensor:
        a, b = fit[y].mean(0), fit[~y].mean(0)
        return (test - (a + b) / 2) @ normalize(a - b, dim=0)

    return torch.stack([one(y) for y in labels])


def sparse_scores(k: int, strength: float = 1.0) -> Scorer:
    """Return the scorer by logistic regression on the k coordinates whose means differ most (Gurnee et al. 2023)."""
    inner = logistic_scores(strength)

    def scores(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        chosen = [choose(fit, y, k) for y in labels]
        return torch.cat([inner(fit[:, c], y[None], test[:, c]) for c, y in zip(chosen, labels, strict=True)])

    return _of_both_classes(scores)


def component_scores(k: int) -> Scorer:
    """Return the scorer by logistic regression on the first k principal components of what it is fitted on."""
    inner = logistic_scores(1.0)

    def scores(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        centre = fit.mean(0)
        rows = torch.linalg.svd(fit - centre, full_matrices=False).Vh[:k]
        return inner((fit - centre) @ rows.T, labels, (test - centre) @ rows.T)

    return scores


def random_direction_scores(seed: int) -> Scorer:
    """Return the scorer by the component along a random direction, from the middle of the texts."""

    def scores(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        along = torch.randn(fit.shape[1], generator=generator(seed))
        return ((test - fit.mean(0)) @ along).expand(len(labels), -1)

    return scores


def neighbour_scores(k: int = 8) -> Scorer:
    """Return the scorer by the k nearest neighbours."""
    from sklearn.neighbors import KNeighborsClassifier

    return estimator_scores(lambda: KNeighborsClassifier(k))


def mlp_scores(hidden: int = 32, seed: int = 0) -> Scorer:
    """Return the scorer by a perceptron with one hidden layer."""
    from sklearn.neural_network import MLPClassifier

    return estimator_scores(
        lambda: MLPClassifier((hidden,), alpha=1.0, solver="lbfgs", max_iter=60, tol=1e-3, random_state=seed)
    )


def lasso_scores(strength: float = 1.0) -> Scorer:
    """Return the scorer by logistic regression with an L1 penalty."""
    from sklearn.linear_model import LogisticRegression

    return estimator_scores(lambda: LogisticRegression(l1_ratio=1.0, C=strength, solver="liblinear", max_iter=200))


def attention_scores(strength: float = STRENGTH) -> Scorer:
    """Return the scorer by a logistic probe of an average over tokens, weighted by one learned attention query.

    Rows are texts of tokens [text position width], with NaN where a text has no token.
    """

    def scores(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        real = ~fit.isnan().any(-1)
        mean, spread = fit[real].mean(0), fit[real].std(0).clamp_min(1e-6)
        a, b = ((x - mean) / spread for x in (fit, test))
        return torch.stack([_attention(a, y, b, strength) for y in labels])

    return _of_both_classes(scores)


@torch.enable_grad()
def _attention(
    fit: Float[Tensor, "fit position width"],
    y: Bool[Tensor, "fit"],
    test: Float[Tensor, "test other width"],
    strength: float,
) -> Float[Tensor, "test"]:
    query, readout = (torch.zeros(fit.shape[-1], requires_grad=True) for _ in range(2))
    bias = torch.zeros((), requires_grad=True)
    optimiser = torch.optim.Adam([query, readout, bias], lr=_RATE)

    def odds(x: Tensor) -> Tensor:
        real = ~x.isnan().any(-1)
        x = x.nan_to_num()
        weight = (x @ query / x.shape[-1] ** 0.5).masked_fill(~real, -torch.inf).softmax(-1)
        return torch.einsum("tp,tpw,w->t", weight, x, readout) + bias

    for _ in range(_STEPS):
        penalty = (query.square().sum() + readout.square().sum()) / (2 * strength * len(fit))
        loss = binary_cross_entropy_with_logits(odds(fit), y.float()) + penalty
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return odds(test).detach()


def _of_both_classes(scorer: Scorer) -> Scorer:
    """Return the same scorer, which scores by the class where labels have one class only."""

    def scores(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        out = torch.where(labels.all(1), 1.0, -1.0)[:, None].repeat(1, len(test))
        both = labels.any(1) & ~labels.all(1)
        if bool(both.any()):
            out[both] = scorer(fit, labels[both], test)
        return out

    return scores
