"""Probes on labelled texts: folds by group, logistic fits, accuracy and AUROC over groups, and baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.stats import mean_interval, ratio_interval, wilson_interval

Fold = tuple[Int[Tensor, "fit"], Int[Tensor, "test"]]
#: takes rows to fit on, several sets of labels for them and rows to score; returns a score per set of labels and row
Scorer = Callable[
    [Float[Tensor, "fit *width"], Bool[Tensor, "labels fit"], Float[Tensor, "test *width"]],
    Float[Tensor, "labels test"],
]
STRENGTH = 0.1  # the inverse of the L2 penalty on coordinates of unit spread


def folds(y: Bool[Tensor, "text"], group: Int[Tensor, "text"], most: int = 5, seed: int = 0) -> list[Fold]:
    """Divide texts into folds of whole groups, with shares of both classes as equal as groups allow.

    Raises:
        Refused: one class only, or a class that is in one group only.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    number, n = len(group.unique()), len(y)
    check_classes(y)
    for name, own in (("with", group[y]), ("without", group[~y])):
        if len(own.unique()) < 2:
            why = f"all texts {name} the concept are of one group, so none is left for a test on other groups"
            raise Refused(f"probes on {n} texts", why, "give texts of both classes in two groups or more")
    split = StratifiedGroupKFold(min(most, number), shuffle=True, random_state=seed)
    found = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in split.split(np.zeros(n), y.numpy(), group.numpy())]
    return [(a, b) for a, b in found if 0 < int(y[a].sum()) < len(a) and len(b)]


def check_classes(y: Bool[Tensor, "text"]) -> None:
    """Refuse labels of one class only.

    Raises:
        Refused: no text shows the concept, or every text does.
    """
    if bool(y.all()) or not bool(y.any()):
        why = f"{'every' if bool(y.any()) else 'no'} text shows the concept"
        raise Refused(f"labels of {len(y)} texts", why, "give texts of both classes")


def logistic(x: Float[Tensor, "text width"], y: Bool[Tensor, "text"], strength: float = 1.0) -> Any:
    """Fit a logistic probe on coordinates scaled to unit spread; `strength` is the inverse of its L2 penalty."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))
    return probe.fit(x.double().numpy(), y.numpy())


def logistic_scores(strength: float = STRENGTH) -> Scorer:
    """Return the scorer by logistic regression: log odds, of coordinates scaled to unit spread."""
    from sklearn.linear_model import LogisticRegression

    def scores(fit: Tensor, labels: Tensor, test: Tensor) -> Tensor:
        a, b = (x.numpy() for x in scaled(fit, test))
        out = []
        for y in labels:
            if bool(y.all()) or not bool(y.any()):
                out.append(np.full(len(b), 1.0 if bool(y.all()) else -1.0))
            else:
                out.append(LogisticRegression(C=strength, max_iter=500).fit(a, y.numpy()).decision_function(b))
        return torch.from_numpy(np.stack(out)).float()

    return scores


def scaled(
    fit: Float[Tensor, "fit width"], test: Float[Tensor, "test width"]
) -> tuple[Float[Tensor, "fit width"], Float[Tensor, "test width"]]:
    """Return rows with the coordinates of the first ones scaled to mean 0 and unit spread."""
    mean, spread = fit.mean(0), fit.std(0, correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    return ((fit - mean) / spread).float(), ((test - mean) / spread).float()


def held_out_scores(
    x: Float[Tensor, "text *width"], labels: Bool[Tensor, "labels text"], parts: Sequence[Fold], scorer: Scorer
) -> Float[Tensor, "labels text"]:
    """Score each text by fits on the other folds, once per set of labels; NaN for texts of no fold."""
    out = torch.full((len(labels), len(x)), torch.nan)
    for fit, test in parts:
        out[:, test] = scorer(x[fit], labels[:, fit], x[test])
    return out


def choose(x: Float[Tensor, "text width"], y: Bool[Tensor, "text"], k: int) -> Int[Tensor, "k"]:
    """Choose the k coordinates whose means differ most between the classes."""
    gap = (x[y].mean(0) - x[~y].mean(0)).abs()
    return gap.topk(min(k, x.shape[1])).indices


# --- accuracy and AUROC, over groups


def accuracy(scores: Float[Tensor, "*cell text"], y: Bool[Tensor, "*rest text"]) -> Float[Tensor, "*cell"]:
    """Return the share of texts whose score is positive if and only if they show the concept."""
    return ((scores > 0) == y).float().mean(-1)


def accuracy_interval(
    scores: Float[Tensor, "*cell text"], y: Bool[Tensor, "text"], group: Int[Tensor, "text"]
) -> Float[Tensor, "*cell bound"]:
    """Return the 95 % interval of the accuracy, over groups; where all groups agree, Wilson's over texts."""
    hits = ((scores > 0) == y).float()
    return _apart(mean_over_groups(hits, group, (0.0, 1.0)), hits.mean(-1), len(y))


def mean_over_groups(
    values: Float[Tensor, "*cell text"], group: Int[Tensor, "text"], within: tuple[float, float]
) -> Float[Tensor, "*cell bound"]:
    """Return the 95 % interval of the mean over texts, over groups of them; `within` are the bounds of a value."""
    x = values.movedim(-1, 0)
    return ratio_interval(_by_group(x, group), _by_group(torch.ones_like(x), group), within=within)


def auroc(scores: Float[Tensor, "*cell text"], y: Bool[Tensor, "text"]) -> Float[Tensor, "*cell"]:
    """Return the share of pairs of a text with the concept and one without that are in order; ties count half."""
    return _placements(scores, y)[0].mean(-1)


def auroc_interval(
    scores: Float[Tensor, "*cell text"], y: Bool[Tensor, "text"], group: Int[Tensor, "text"]
) -> Float[Tensor, "*cell bound"]:
    """Return the 95 % interval of the AUROC over groups, from each text's share of it (Obuchowski 1997).

    Where all groups agree, it is Wilson's over the texts of the rarer class.
    """
    above, below = _placements(scores, y)
    value = above.mean(-1, keepdim=True)
    shares = scores.new_zeros(*scores.shape)
    shares[..., y] = (above - value) / above.shape[-1]
    shares[..., ~y] = (below - value) / below.shape[-1]
    apart = _by_group(shares.movedim(-1, 0), group)
    bounds = mean_interval(value.squeeze(-1) + len(apart) * apart, within=(0.0, 1.0))
    return _apart(bounds, value.squeeze(-1), min(above.shape[-1], below.shape[-1]))


def difference_interval(
    x: Float[Tensor, "text *cell"], y: Bool[Tensor, "text"], group: Int[Tensor, "text"]
) -> Float[Tensor, "*cell bound"]:
    """Return the 95 % interval, over groups, of the mean of texts with the concept − that of texts without it."""
    one, other = x[y].mean(0), x[~y].mean(0)
    shares = torch.empty_like(x)
    shares[y], shares[~y] = (x[y] - one) / int(y.sum()), (other - x[~y]) / int((~y).sum())
    apart = _by_group(shares, group)
    return mean_interval(one - other + len(apart) * apart)


def _apart(bounds: Float[Tensor, "*cell bound"], value: Float[Tensor, "*cell"], trials: int) -> Tensor:
    """Return bounds that are apart: those of a share of `trials` where both are the same."""
    return torch.where((bounds[..., 1] > bounds[..., 0])[..., None], bounds, wilson_interval(value, trials))


def _placements(scores: Tensor, y: Tensor) -> tuple[Float[Tensor, "*cell with"], Float[Tensor, "*cell without"]]:
    """Return for each text of a class the share of the other class's texts on the right side of it."""
    from scipy.stats import rankdata

    def ranks(x: Tensor) -> Tensor:
        return torch.from_numpy(rankdata(x.double().numpy(), axis=-1))

    one, other = scores[..., y], scores[..., ~y]
    every = ranks(torch.cat([one, other], -1))
    m, n = one.shape[-1], other.shape[-1]
    return ((every[..., :m] - ranks(one)) / n).float(), (1 - (every[..., m:] - ranks(other)) / m).float()


def _by_group(x: Float[Tensor, "text *cell"], group: Int[Tensor, "text"]) -> Float[Tensor, "group *cell"]:
    """Sum values over the texts of each group."""
    number = group.unique(return_inverse=True)[1]
    return x.new_zeros(int(number.max()) + 1, *x.shape[1:]).index_add_(0, number, x)


# --- baselines


def majority(y: Bool[Tensor, "text"], parts: Sequence[Fold]) -> float:
    """Return the share of texts that the more frequent class of the other folds is right about."""
    hits = torch.cat([y[test] == (y[fit].float().mean() > 0.5) for fit, test in parts])
    return float(hits.float().mean())


def bag_of_tokens(tokens: Sequence[Sequence[int]]) -> Float[Tensor, "text token"]:
    """Return how often each token that two texts or more have stands in each text."""
    texts = Counter(t for ids in tokens for t in set(ids))
    column = {t: i for i, t in enumerate(sorted(t for t, n in texts.items() if n > 1))}
    found = torch.zeros(len(tokens), len(column))
    for i, ids in enumerate(tokens):
        for t, n in Counter(t for t in ids if t in column).items():
            found[i, column[t]] = n
    return found


def word_types(tokens: Sequence[Sequence[int]], group: Int[Tensor, "text"]) -> Int[Tensor, "text"]:
    """Return the token of each text that a control task goes by: the rarest one that other groups have, too.

    A text without such a token goes by its rarest one.
    """
    texts = Counter(t for ids in tokens for t in set(ids))
    groups = {t: set[int]() for t in texts}
    for ids, g in zip(tokens, group.tolist(), strict=True):
        for t in set(ids):
            groups[t].add(g)
    out = [min(set(ids), key=lambda t: (len(groups[t]) < 2, texts[t], t)) for ids in tokens]
    return torch.tensor(out)


def control_labels(
    types: Int[Tensor, "text"], share: float, draws: int, g: torch.Generator
) -> Bool[Tensor, "draw text"]:
    """Draw a random label for each word type (Hewitt & Liang 2019), True with probability `share`.

    Each draw has both labels, if there are two types.
    """
    number = types.unique(return_inverse=True)[1]
    n = int(number.max()) + 1
    positive = min(max(round(share * n), 1), max(n - 1, 1))
    drawn = torch.stack([torch.randperm(n, generator=g) < positive for _ in range(draws)])
    return drawn[:, number]
