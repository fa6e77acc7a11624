"""Numbers on named axes, as the HTML that a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.refuse import Refused
from cutaway.core.result import Result
from cutaway.views.draw.markup import draw, legend
from cutaway.views.frame import framed
from cutaway.views.html import fold, numbers
from cutaway.views.spec import pictures

_PANELS = 64  # heads of a layer that are drawn side by side


@dataclass(frozen=True, kw_only=True)
class Shown(Result):
    """Numbers to draw, and what they are."""

    value: Float[Tensor, "*cell"]
    title: str = ""


class RenderedHTML:
    """Pictures of some numbers as self-contained HTML; `ends` are those of the colour scale, where they are known."""

    def __init__(self, *shown: Shown, ends: Sequence[float | None] = ()):
        self.shown, self.limit = shown, max((abs(end) for end in ends if end is not None), default=None)

    def _repr_html_(self) -> str:
        parts = []
        for one in self.shown:
            found = pictures(one, title=one.title, panels=_PANELS)
            panels = [replace(p, limit=self.limit or p.limit) for p in found]
            drawn = "".join(draw(p, key=False) for p in panels)
            parts.append(f"<div class=cw-panels>{drawn}</div>{legend(panels[0])}{fold('Numbers', numbers(one))}")
        return framed("".join(parts), self.shown[0].title or "numbers")

    __html__ = __str__ = show_code = _repr_html_


def shown(values: Any, axes: dict[str, Sequence[Any] | None], title: str = "", words: list[Any] | None = None) -> Shown:
    """Return numbers to draw, given their axes with the names of the entries, and the words of the cells.

    Raises:
        Refused: other axes than the numbers have, or names of another number of entries.
    """
    value = torch.as_tensor(values).detach().float().cpu()
    sizes = dict(zip(axes, value.shape, strict=False))
    wrong = ["they have other axes"] * (value.ndim != len(axes))
    wrong += [f"{len(names)} names of a {a}" for a, names in axes.items() if names and len(names) != sizes.get(a)]
    if wrong:
        said = f"values [{' '.join(map(str, value.shape))}] of [{' '.join(axes)}]"
        raise Refused(said, wrong[0], "give one name an entry, and no batch axis")
    labels: dict[str, list[Any]] = {a: list(map(str, names)) for a, names in axes.items() if names}
    return Shown(value=value, grid=tuple(axes), title=title, labels=labels | ({"value": words} if words else {}))
