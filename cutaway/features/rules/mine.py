"""The search for a rule, and its exact scores on held-out documents.

A rule is a family and some of its literals: it fires where one of them holds. On the explain half, each literal that
holds on at least four of up to 400 active tokens is judged by F1, with its precision at the latent's own density from
8,000 tokens that all latents share. A literal must hold on more active tokens than chance allows: the binomial
probability of as many, at its share of all these tokens, is at most 0.05 over the number of literals of all families
that hold on four of them (Bonferroni), so of 100 random features at most five have a rule. Literals are joined greedily
while F1 grows by 0.01, twelve at most. The family of largest F1 wins, an earlier one unless a later is better by 0.02.
On the score half every token is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cutaway.features.rules.families import FAMILIES, Corpus

ACTIVE, OTHERS, LEAST, LITERALS, CANDIDATES = 400, 8000, 4, 12, 40
Counts = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes, and the active and other rows that have each
GROUPS = 1024  # of documents that are resampled, at most
LEVEL = 0.05  # share of random features that have a rule, at most
_GROWTH, _MARGIN = 0.01, 0.02


@dataclass(frozen=True)
class Rule:
    """An executable explanation.

    Attributes:
        family: one of `families.FAMILIES`.
        literals: codes of the family at which it fires.
        f1: F1 on the explain half.
    """

    family: str
    literals: tuple[int, ...]
    f1: float

    def says(self, corpus: Corpus) -> str:
        """Return the rule in words."""
        return FAMILIES[self.family].says(corpus, list(self.literals))


class Miner:
    """The search for rules of many latents over one corpus; codes of families are computed once.

    Attributes:
        corpus: the tokens.
        explain: rows of the half that rules are found on.
        score: rows of the half that they are scored on.
    """

    def __init__(self, corpus: Corpus, g: np.random.Generator):
        self.corpus, self.g = corpus, g
        self.explain, self.score = np.flatnonzero(~corpus.held_out), np.flatnonzero(corpus.held_out)
        n = min(OTHERS, len(self.explain))
        self.others = g.choice(self.explain, n, replace=False) if n else self.explain
        names = [n for n in FAMILIES if n != "document"]
        self.numbers = {n: np.unique(corpus.codes(n), return_inverse=True) for n in names}  # values, and each row's
        of = np.unique(corpus.document[self.score], return_inverse=True)[1]
        count = int(of.max(initial=-1)) + 1
        self.groups = min(count, GROUPS)
        self.group = of * self.groups // max(count, 1)

    def fires(self, rule: Rule, rows: np.ndarray) -> np.ndarray:
        """Return True where a rule fires, for some rows of the corpus."""
        if rule.family == "document":
            number, document, token = self.corpus.presence
            holds = np.zeros(int(number.max(initial=-1)) + 1, dtype=bool)
            holds[document[np.isin(token, rule.literals)]] = True
            return holds[number[rows]]
        values, number = self.numbers[rule.family]
        return np.isin(values, rule.literals)[number[rows]]

    def rule(self, active: np.ndarray, families: Iterable[str] = FAMILIES) -> Rule | None:
        """Return the best rule for a latent that is active on some rows; None without active ones to learn from.

        Args:
            active: True for each row of the corpus on which the latent is active.
            families: names of the families that are searched.
        """
        rows = self.explain[active[self.explain]]
        if len(rows) < LEAST:
            return None
        prior = len(rows) / len(self.explain)
        rows = rows if len(rows) <= ACTIVE else self.g.choice(rows, ACTIVE, replace=False)
        others = self.others[~active[self.others]]
        counted = {f: self._counted(f, rows, others) for f in families}
        tried = sum(int((hits + false >= LEAST).sum()) for _, hits, false in counted.values())
        best: Rule | None = None
        for family, counts in counted.items():
            found = _of_family(family, counts, (len(rows), len(others)), prior, LEVEL / max(tried, 1))
            if found is not None and (best is None or found.f1 > best.f1 + _MARGIN):
                best = found
        return best

    def _counted(self, family: str, rows: np.ndarray, others: np.ndarray) -> Counts:
        """Return the codes of a family, and how many active and other rows have each."""
        if family == "document":
            return self._documents(rows, others)
        values, number = self.numbers[family]
        n = len(values)
        return values, np.bincount(number[rows], minlength=n), np.bincount(number[others], minlength=n)

    def _documents(self, rows: np.ndarray, others: np.ndarray) -> Counts:
        """Return the tokens of documents, and how many active and other rows stand in documents with each."""
        number, document, token = self.corpus.presence
        n, tokens = int(number.max(initial=0)) + 1, len(self.corpus.strings)
        mine, theirs = (np.bincount(number[r], minlength=n)[document].astype(float) for r in (rows, others))
        hits, false = (np.bincount(token, weights=w, minlength=tokens) for w in (mine, theirs))
        return np.arange(tokens), hits, false

    def counts(self, rule: Rule | None, active: np.ndarray) -> np.ndarray:
        """Return the true positives, false positives, false and true negatives of groups of documents of the score
        half; without a rule nothing fires.
        """
        real = active[self.score]
        fires = np.zeros_like(real) if rule is None else self.fires(rule, self.score)
        kind = np.where(fires, np.where(real, 0, 1), np.where(real, 2, 3))
        return np.bincount(self.group * 4 + kind, minlength=4 * self.groups).reshape(self.groups, 4)

    def interval(self, counts: np.ndarray, samples: int) -> np.ndarray:
        """Return the 95 % intervals of the measures: percentiles over groups of documents drawn with replacement."""
        drawn = self._drawn(samples) @ counts
        return np.quantile(measures(drawn), [0.025, 0.975], axis=0).T

    @lru_cache(1)  # noqa: B019 (one miner lives as long as its explanations)
    def _drawn(self, samples: int) -> np.ndarray:
        n = self.groups
        return self.g.multinomial(n, np.full(n, 1 / n), size=samples).astype(float)


def _of_family(family: str, counts: Counts, sizes: tuple[int, int], prior: float, level: float) -> Rule | None:
    """Return the best rule of a family, if there is one.

    Args:
        family: its name.
        counts: its codes, and how many active and other rows have each.
        sizes: the number of active rows and of others.
        prior: density of the latent.
        level: probability by chance from which on a literal does not count.
    """
    from scipy.special import bdtrc

    codes, hits, false = counts
    often = hits >= LEAST
    often[often] = bdtrc(hits[often] - 1, sizes[0], (hits + false)[often] / sum(sizes)) <= level
    codes, recall, alarm = codes[often], hits[often] / sizes[0], (false[often] + 0.5) / max(sizes[1], 1)
    order = np.lexsort((codes, -recall))[:CANDIDATES]
    order = order[np.argsort(-_f1(recall[order], alarm[order], prior), kind="stable")][:LITERALS]
    chosen, f1, r, a = list[int](), 0.0, 0.0, 0.0
    for at in order:
        more = (r + recall[at], a + alarm[at])
        new = float(_f1(min(more[0], 1.0), more[1], prior))
        if new > f1 + _GROWTH:
            f1, (r, a) = new, more
            chosen.append(int(codes[at]))
        if family == "document":  # documents that hold several tokens would count several times
            break
    return Rule(family, tuple(chosen), f1) if chosen else None


def measures(counts: np.ndarray) -> np.ndarray:
    """Return precision, recall, F1 and AUROC of true positives, false positives, false and true negatives.

    A rule that never fires has precision 0; AUROC is that of a score of two values, (1 + recall − false alarms) / 2.
    """
    tp, fp, fn, tn = np.moveaxis(counts.astype(float), -1, 0)
    recall = tp / np.maximum(tp + fn, 1)
    out = [tp / np.maximum(tp + fp, 1), recall, 2 * tp / np.maximum(2 * tp + fp + fn, 1)]
    return np.stack([*out, (1 + recall - fp / np.maximum(fp + tn, 1)) / 2], -1)


def chance_f1(counts: np.ndarray) -> float:
    """Return the F1 by chance of a rule that fires on a share q of tokens, for a latent active on p: 2pq / (p + q)."""
    tp, fp, fn, tn = counts.astype(float)
    p, q = tp + fn, tp + fp
    return float(2 * p * q / max(p + q, 1) / max(tp + fp + fn + tn, 1))


def _f1(recall: np.ndarray | float, alarm: np.ndarray | float, prior: float) -> np.ndarray:
    precision = recall * prior / (recall * prior + alarm * (1 - prior))
    return np.asarray(2 * precision * recall / (precision + recall))
