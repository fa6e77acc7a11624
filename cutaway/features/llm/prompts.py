"""Prompts for descriptions and their judges, and the strict reading of answers: JSON of the right form or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from cutaway.features.llm.windows import LEVELS, Window

_JSON = re.compile(r"\[[^\[\]]*\]|\{[^{}]*\}", re.DOTALL)


def describe(windows: Sequence[Window], largest: float) -> str:
    """Return the prompt that asks for a description."""
    texts = list[str]()
    for w in windows:
        parts = [f"«{t}»({x})" if x else t for t, x in zip(w.tokens, w.levels(largest), strict=True)]
        texts.append("".join(parts).replace("\n", "↵"))
    return f"""A unit of a language model is active on some tokens. In each text below, tokens on which it is active
stand in « », with its strength from 1 to {LEVELS} behind them. Say in at most 20 words on which tokens it is active.

{_numbered(texts)}

Answer with JSON only: {{"label": "…"}}"""


def detect(label: str, windows: Sequence[Window]) -> str:
    """Return the prompt that asks in which texts a described unit is active."""
    return f"""A unit of a language model is active on: {label}

In which of these texts is it active on at least one token?

{_numbered([w.marked() for w in windows])}

Answer with JSON only: a list of {len(windows)} numbers, 1 for yes and 0 for no."""


def fuzz(label: str, texts: Sequence[str]) -> str:
    """Return the prompt that asks in which texts the marked tokens are those of a described unit."""
    return f"""A unit of a language model is active on: {label}

In each text some tokens stand in « ». In which texts is the unit active on these tokens?

{_numbered(texts)}

Answer with JSON only: a list of {len(texts)} numbers, 1 for yes and 0 for no."""


def simulate(label: str, window: Window) -> str:
    """Return the prompt that asks how strongly a described unit is active on each token."""
    tokens = "\n".join(f"{i}. {t!r}" for i, t in enumerate(window.tokens, 1))
    return f"""A unit of a language model is active on: {label}

How strongly is it active on each token of this text, from 0 (not) to {LEVELS}?

{tokens}

Answer with JSON only: a list of {len(window.tokens)} whole numbers."""


def label_of(answer: str) -> str | None:
    """Return the description in an answer; None where it cannot be read."""
    for found in reversed(_JSON.findall(answer)):
        data = _read(found)
        if isinstance(data, dict) and isinstance(data.get("label"), str) and data["label"].strip():
            return " ".join(data["label"].split())
    return None


def numbers_of(answer: str, length: int, most: int) -> list[int] | None:
    """Return the whole numbers from 0 to `most` in an answer; None where there are not exactly `length` of them."""
    for found in reversed(_JSON.findall(answer)):
        data = _read(found)
        if isinstance(data, list) and len(data) == length and all(type(x) is int and 0 <= x <= most for x in data):
            return data
    return None


def _read(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{n}. {t}" for n, t in enumerate(texts, 1))
