"""The control beside a picture: the band of its null, what that band is in words, and how often chance leaves it.

A mark must mean something. Outside of the range of 4 samples is where chance puts 40 % of all cells, so few samples are
pooled over the cells of a field, each in its own and its layer's scale (`core.stats.null_band`). Curves keep each
point's own range: they carry no marks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cutaway.core.stats import null_band

_APART = ("metric", "statistic")  # axes whose entries have each a unit of its own
_MOST = 0.1  # a band that chance leaves more often marks nothing


@dataclass(frozen=True)
class Band:
    """Bounds with the field's shape, what they are, and what chance does; `chance` is empty where they mark nothing."""

    low: Tensor
    high: Tensor
    says: str
    chance: str


def band(null: Tensor, axes: tuple[str, ...], shape: dict[str, int], control: str, curves: bool = False) -> Band:
    """Return the band beside a field of this shape (axis → length) from its null, whose axes end with `sample`."""
    own = axes[:-1]
    samples, cells = null.shape[-1], math.prod(n for a, n in shape.items() if a not in _APART)
    what = f"range of {samples} {plural(control, samples)}"
    apart = math.prod(n for a, n in zip(own, null.shape, strict=False) if a in _APART)  # these axes come first
    groups = _layers(own, null.shape)
    parts = [null_band(part, cells, groups) for part in null.reshape(apart, -1, samples)]
    share, pooled = max(p[1] for p in parts), parts[0][2]
    few = share > _MOST
    bounds = _range(null) if curves or few else torch.stack([p[0] for p in parts])
    here = [n if a in own else 1 for a, n in shape.items()]
    low, high = bounds.reshape(*here, 2).expand(*shape.values(), 2).unbind(-1)
    if curves:
        return Band(
            low, high, f"{what} at each point, left by chance at {2 / (samples + 1):.0%}".replace("%", " %"), ""
        )
    if few:
        return Band(low, high, f"{what}, too few to mark cells", "")
    says = what.replace("range", "pooled band" if own else "band") + " a cell" * bool(own) if pooled else what
    return Band(low, high, says, _chance(share, cells))


def _layers(own: tuple[str, ...], shape: torch.Size) -> Tensor | None:
    """Return the layer of every cell of one part, whose nulls are alike in scale; None where no axis says it."""
    kept = [(a, n) for a, n in zip(own, shape, strict=False) if a not in _APART]
    lengths = [n for _, n in kept]
    for d, (axis, n) in enumerate(kept):
        if axis == "layer":
            return torch.arange(n).reshape(*[1] * d, n, *[1] * (len(kept) - d - 1)).expand(lengths).flatten()
    return None


def _range(null: Tensor) -> Tensor:
    none = null.isnan()
    bounds = [null.masked_fill(none, math.inf).amin(-1), null.masked_fill(none, -math.inf).amax(-1)]
    return torch.stack(bounds, -1).masked_fill(none.all(-1, keepdim=True), math.nan)


def plural(control: str, n: int) -> str:
    """Return a control's name as words for `n` of them: `random_direction` → random directions."""
    words = control.replace("_", " ")
    if n == 1:
        return words.removesuffix("s") if words.startswith("random ") else words
    if words.endswith("basis"):
        return f"{words.removesuffix('is')}es"
    return words if words.endswith("s") else f"{words}s"


def _chance(share: float, cells: int) -> str:
    if cells == 1:
        return f"chance alone: {100 * share:.0f} %"
    expected = round(share * cells)
    return f"chance alone marks at most {f'about {expected}' if expected else 'one'} of {cells} cells"
