"""Numbers that are written down: rows of tables, each measure with its interval and its control."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.frame import machine
from cutaway.core.stats import mean_interval, wilson

Measure = dict[str, Any]  # value, and where there are any: interval, control (the range of what chance gives)


class Results:
    """Rows of tables: what was measured, on how many prompts, and each measure with its interval and control."""

    def __init__(self, path: Path):
        self.path = path
        self.sections: dict[str, dict[str, Any]] = {}

    def row(self, section: str, what: str, n: int, **measures: dict[str, Any]) -> None:
        """Write a row down; a row of the same name is replaced."""
        kept = {m: {k: _rounded(v) for k, v in parts.items()} for m, parts in measures.items()}
        self.sections.setdefault(section, {})[what] = {"n": n, "measures": kept}

    def write(self) -> None:
        """Rows that were measured take the place of what an earlier run left in the file."""
        old = json.loads(self.path.read_text("utf-8"))["sections"] if self.path.is_file() else {}
        merged = old | {section: old.get(section, {}) | rows for section, rows in self.sections.items()}
        merged = {section: dict(sorted(merged[section].items())) for section in sorted(merged)}  # workers end by chance
        self.path.parent.mkdir(parents=True, exist_ok=True)
        here = {**machine(), "cutaway": version("cutaway")}
        self.path.write_text(text({"machine": here, "sections": merged}), encoding="utf-8")


def share(right: Iterable[Any]) -> Measure:
    """A share of prompts with its Wilson interval."""
    hits = [bool(r) for r in right]
    return {"value": sum(hits) / len(hits), "interval": list(wilson(sum(hits), len(hits)))}


def mean(values: torch.Tensor, control: torch.Tensor | None = None) -> Measure:
    """A mean over prompts with its interval, and the range of what a control gave."""
    return measure(values.float().mean(), mean_interval(values.float()), control)


def measure(value: torch.Tensor, interval: torch.Tensor, control: torch.Tensor | None = None) -> Measure:
    """A number with its interval, and the range of what a control gave."""
    found = {"value": float(value), "interval": interval.tolist()}
    assert control is None or bool(control.isfinite().all()), "no control was made here"
    return found if control is None else found | {"control": [float(control.min()), float(control.max())]}


def _rounded(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [_rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) and math.isfinite(x) else x


def text(found: dict[str, Any]) -> str:
    """Return JSON with a line for each row, so that a change of one number is a change of one line."""
    sections = [
        f"  {_line(key)}: {{\n" + ",\n".join(f"   {_line(what)}: {_line(row)}" for what, row in rows.items()) + "\n  }"
        for key, rows in found["sections"].items()
    ]
    body = ",\n".join(sections)
    return f'{{\n "machine": {_line(found["machine"])},\n "sections": {{\n{body}\n }}\n}}\n'


def _line(x: Any) -> str:
    return json.dumps(x, ensure_ascii=False)
