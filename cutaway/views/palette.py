"""The colour scale of every medium: orange below zero, neutral at zero, blue above; safe for colour-blind readers.

A value becomes a whole step from −STEPS to +STEPS. Mixing is done in OKLab (Ottosson 2020), so that equal steps look
equally far apart, and the ink on each step is black or white, whichever contrasts more.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Literal

Theme = Literal["light", "dark"]
STEPS = 10

_ANCHORS: dict[Theme, tuple[str, ...]] = {
    "light": ("#a04a00", "#f0ad6d", "#f3f2ee", "#8cb8e2", "#1a5a9e"),
    "dark": ("#ffb469", "#9a5a1f", "#24272d", "#2c639c", "#84c3ff"),
}


def step(value: float, limit: float) -> int:
    """Return the colour step of `value` on a scale that ends at ±`limit`; small values are never drawn as zero steps
    away.
    """
    if math.isnan(value) or limit <= 0:
        return 0
    return max(-STEPS, min(STEPS, round(STEPS * max(-1.0, min(1.0, value / limit)))))


@cache
def colour(number: int, theme: Theme = "light") -> str:
    """Return the hex colour of a step."""
    anchors = _ANCHORS[theme]
    place = (number + STEPS) / (2 * STEPS) * (len(anchors) - 1)
    first = min(int(place), len(anchors) - 2)
    return _mix(anchors[first], anchors[first + 1], place - first)


@cache
def ink(number: int, theme: Theme = "light") -> str:
    """Black or white, whichever reads better on a step."""
    ground = colour(number, theme)
    return max(("#000000", "#ffffff"), key=lambda c: contrast(c, ground))


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours (WCAG 2), 1 to 21."""
    x, y = sorted((_luminance(a), _luminance(b)))
    return (y + 0.05) / (x + 0.05)


def name(number: int) -> str:
    """CSS class of a step: `n10` … `z0` … `p10`."""
    return "z0" if number == 0 else f"{'p' if number > 0 else 'n'}{abs(number)}"


def css(theme: Theme) -> str:
    """Custom properties of every step in one theme: grounds (`--p3`) and their inks (`--p3i`)."""
    numbers = range(-STEPS, STEPS + 1)
    return "".join(f"--{name(n)}:{colour(n, theme)};--{name(n)}i:{ink(n, theme)};" for n in numbers)


def rules() -> str:
    """Return the CSS, one rule per step, over the custom properties that the theme sets."""
    names = [name(n) for n in range(-STEPS, STEPS + 1)]
    return "".join(f".cw .{n}{{background:var(--{n});color:var(--{n}i)}}" for n in names)


def _channels(colour_: str) -> list[float]:
    parts = [int(colour_[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]


def _luminance(colour_: str) -> float:
    r, g, b = _channels(colour_)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _oklab(colour_: str) -> list[float]:
    r, g, b = _channels(colour_)
    long = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)
    middle = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    short = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return [
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    ]


def _mix(a: str, b: str, share: float) -> str:
    light, green, blue = (x + (y - x) * share for x, y in zip(_oklab(a), _oklab(b), strict=True))
    long = (light + 0.3963377774 * green + 0.2158037573 * blue) ** 3
    middle = (light - 0.1055613458 * green - 0.0638541728 * blue) ** 3
    short = (light - 0.0894841775 * green - 1.2914855480 * blue) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, c)))):02x}" for c in linear)


def _gamma(c: float) -> float:
    return 12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055
