"""Numbers, names and labels as the text of pictures."""

from __future__ import annotations

import math
from typing import Any


def amount(value: float, unit: str = "", sign: bool = False) -> str:
    """Return a number with three significant digits and its unit; probabilities as percentages."""
    if math.isnan(value):
        return "no value"
    if unit == "probability":
        return f"{number(100 * value, sign=sign)} %"
    return f"{number(value, sign=sign)} {unit}".rstrip() if unit != "rank" else number(value)


def number(value: float, sign: bool = False, digits: int = 3) -> str:
    """Format a number with `digits` significant digits, a true minus sign, and no needless exponent."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == int(value) and abs(value) < 1e6:
        text = str(int(value))
    else:
        text = f"{value:.{digits}g}"
        if "e" in text and 1e3 <= abs(value) < 1e7:
            text = f"{value:.0f}"
        elif "e" in text:
            mantissa, exponent = text.split("e")
            text = f"{mantissa}e{int(exponent)}"
    text = text.replace("-", "−")
    return f"+{text}" if sign and value > 0 else text


def span(low: float, high: float, unit: str = "") -> str:
    """Return an interval as text."""
    if math.isnan(low + high):
        return "none (too few prompts)"
    if unit == "probability":
        return f"[{number(100 * low)}, {number(100 * high)}] %"
    return f"[{number(low)}, {number(high)}]"


def spoken(name: str) -> str:
    """Return a field or axis name as words."""
    return {"q_pos": "query", "k_pos": "key"}.get(name, name.replace("_", " "))


def visible(label: Any) -> str:
    """Return a label that can be seen: no leading space, control characters shown, nothing empty."""
    if isinstance(label, float):
        return number(label)
    text = str(label)
    if not text.strip(" "):
        return "␣" * len(text) if text else "∅"
    text = text.removeprefix(" ").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "↵")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers that cover a range."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    gap = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [round(i * gap, 12) for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]
