"""Detection, fuzzing and simulation: material of a latent from held-out documents, and what a judge makes of a label.

* Detection (Paulo et al. 2024, arXiv:2410.13928): in which of n windows with activity and n without is it active?
* Fuzzing: the same for marked tokens, of n windows whose active tokens are marked, and n others with activity where as
  many random silent tokens are: so that neither a text nor a place says which.
* Simulation (Bills et al. 2023): the activation of each token, of windows with and without activity, half of each;
  Pearson's correlation over all tokens of all windows. Its further `READINGS`: the correlation with windows weighted as
  frequent as they are in the text; and, of simulated activations scaled by the least squares of the other documents,
  r2 = 1 − Σ(y − ŷ)² / Σ(y − ȳ)² and r2_zero = 1 − Σ(y − ŷ)² / Σy², OpenAI's `rsquared_score`.

An answer that cannot be read is wrong: every window of it counts as misjudged, and its simulated activations are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cutaway.features.llm import prompts
from cutaway.features.llm.client import Client
from cutaway.features.llm.windows import LEVELS, Window, Windows

MEASURES = ("detection", "fuzzing", "simulation")
READINGS = ("correlation at true density", "r2", "r2_zero")
LEAST = 4  # windows with activity that a half must have
_BATCH = 5  # texts of a prompt


@dataclass(frozen=True, eq=False)
class Verdict:
    """Answers about some items, beside the truth.

    Attributes:
        truth: True for items with activity; or the activation of each token.
        said: what the judge said, the opposite of the truth where it said nothing readable.
        document: the document of each item.
        failed: share of the answers that could not be read.
        within: True for the tokens of windows with activity, where items are tokens.
    """

    truth: np.ndarray
    said: np.ndarray
    document: np.ndarray
    failed: float
    within: np.ndarray | None = None

    @property
    def graded(self) -> bool:
        """True for activations, False for yes and no."""
        return self.truth.dtype != bool

    def score(self, weight: np.ndarray) -> np.ndarray:
        """Return the score [row] under weights [row item]: balanced accuracy, or the correlation."""
        if self.graded:
            return _correlation(weight, self.truth, self.said)
        return (self.rate(True, weight) + 1 - self.rate(False, weight)) / 2

    def rate(self, truth: bool, weight: np.ndarray) -> np.ndarray:
        """Return the share of items that are called active, among those that are (True) or are not (False)."""
        held = weight[:, self.truth == truth]
        with np.errstate(invalid="ignore"):
            return held @ self.said[self.truth == truth].astype(float) / held.sum(1)

    def readings(self, weight: np.ndarray, density: float) -> np.ndarray:
        """Return the `READINGS` [row reading] of a simulation under weights [row item]; NaN without any activity.

        Args:
            weight: of each token.
            density: share of the text's windows that have activity.
        """
        assert self.within is not None
        share = self.within.mean()
        seldom = np.where(self.within, density / share, (1 - density) / (1 - share))
        w, y = weight / weight.sum(1, keepdims=True), self.truth
        missed, square, mean = w @ (y - self.scaled()) ** 2, w @ y**2, w @ y
        r2 = [1 - missed / np.where(rest > 1e-12 * y.max() ** 2, rest, np.nan) for rest in (square - mean**2, square)]
        return np.stack([_correlation(weight * seldom, y, self.said), *r2], 1)

    def scaled(self) -> np.ndarray:
        """Return what was said in units of activation: a line fitted to the other documents; 0 without another."""
        out = np.zeros(len(self.said))
        for own in (self.document == d for d in np.unique(self.document)):
            x, y = self.said[~own], self.truth[~own]
            if len(x):
                slope = np.cov(x, y, bias=True)[0, 1] / x.var() if x.var() > 0 else 0.0
                out[own] = y.mean() + slope * (self.said[own] - x.mean())
        return out

    def shuffled(self, g: np.random.Generator) -> Verdict:
        """Return the same answers beside the truth of items in random order."""
        return replace(self, truth=g.permutation(self.truth))


@dataclass(frozen=True, eq=False)
class Material:
    """The windows that labels of one latent are scored on.

    Attributes:
        detection: windows with activity and without.
        marks: windows for fuzzing, the tokens that are marked, and whether these are the active ones.
        simulation: windows for simulation.
        density: share of the windows, and of the tokens, of the score half that are active.
    """

    detection: list[Window]
    marks: list[tuple[Window, np.ndarray, bool]]
    simulation: list[Window]
    density: tuple[float, float]

    @classmethod
    def of(cls, windows: Windows, values: dict[int, np.ndarray], n: int, g: np.random.Generator) -> Material | None:
        """Draw the material of a latent from the score half; None with fewer than four windows with activity."""
        half = windows.score
        active, silent = (g.permutation(half[np.isin(half, list(values), invert=i)]) for i in (False, True))
        n = min(n, len(active) // 2, len(silent))
        if 2 * n < LEAST:
            return None
        yes, more, no = (
            [windows.window(int(i), values) for i in x] for x in (active[:n], active[n : 2 * n], silent[:n])
        )
        chosen = [yes[i] if i < n else no[i - n] for i in g.permutation(2 * n)]
        right = [(w, np.flatnonzero(w.active), True) for w in more]
        wrong = [(w, at, False) for w in yes if len(at := _silent_tokens(w, g))]
        marks = [(right + wrong)[i] for i in g.permutation(len(right) + len(wrong))]
        k = max(2, n // 2)
        tokens = sum(int((values[int(i)] > 0).sum()) for i in active) / int(windows.counted[half].sum())
        return cls(chosen, marks, [*more[:k], *no[:k]], (len(active) / len(half), tokens))

    def judged(self, client: Client, label: str) -> dict[str, Verdict]:
        """Return the verdicts on a label, by measure."""
        seen, marked = self.detection, [w.marked(chosen) for w, chosen, _ in self.marks]
        truth = [bool(w.active.any()) for w in seen]
        return {
            "detection": _yes_or_no(
                client, seen, truth, [w.document for w in seen], lambda some: prompts.detect(label, some)
            ),
            "fuzzing": _yes_or_no(
                client,
                marked,
                [right for *_, right in self.marks],
                [w.document for w, *_ in self.marks],
                lambda some: prompts.fuzz(label, some),
            ),
            "simulation": self._simulated(client, label),
        }

    def _simulated(self, client: Client, label: str) -> Verdict:
        said, failed = list[list[int]](), 0
        for w in self.simulation:
            n = len(w.tokens)
            found = prompts.numbers_of(client.ask(prompts.simulate(label, w), 8 * n + 20), n, LEVELS)
            failed += found is None
            said.append(found or [0] * n)
        each = [len(x) for x in said]
        document = np.repeat([w.document for w in self.simulation], each)
        truth = np.concatenate([w.values for w in self.simulation])
        within = np.repeat([w.active.any() for w in self.simulation], each)
        return Verdict(truth, np.concatenate(said).astype(float), document, failed / len(said), within)


def _silent_tokens(w: Window, g: np.random.Generator) -> np.ndarray:
    """Return random tokens on which nothing is active, as many as there are active ones, or all there are."""
    silent = np.flatnonzero(~w.active & w.counted)
    return np.sort(g.permutation(silent)[: int(w.active.sum())])


def _yes_or_no(
    client: Client,
    items: Sequence[object],
    truth: Sequence[bool],
    documents: Sequence[int],
    prompt: Callable[[list], str],
) -> Verdict:
    said, failures, asked = list[bool](), 0, 0
    for first in range(0, len(items), _BATCH):
        some, right = list(items[first : first + _BATCH]), truth[first : first + _BATCH]
        found = prompts.numbers_of(client.ask(prompt(some), 60), len(some), 1)
        failures, asked = failures + (found is None), asked + 1
        said += [not x for x in right] if found is None else [x == 1 for x in found]
    return Verdict(np.array(truth), np.array(said), np.array(documents), failures / asked)


def _correlation(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation [row] under weights [row item]; 0 where one of the two is constant."""
    w = weight / weight.sum(1, keepdims=True)
    mean_x, mean_y = w @ x, w @ y
    both = w @ (x * y) - mean_x * mean_y
    size = np.sqrt(((w @ x**2 - mean_x**2) * (w @ y**2 - mean_y**2)).clip(min=0))
    return np.where(size > 1e-12 * max(float(np.abs(x).max()) * LEVELS, 1e-300), both / np.maximum(size, 1e-300), 0.0)
