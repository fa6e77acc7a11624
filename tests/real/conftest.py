"""Two real models, loaded once a session, and the numbers that are written down: `make real`, apart from the suite."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import cutaway as ca
from bench.frame import machine
from cutaway.core.stats import wilson
from tests.meta.tree import ROOT
from tools.real_models import MODELS, ready

REAL = Path(os.environ.get("REAL") or ROOT / "runs" / "real")
FOUND = ROOT / "runs" / "real" / "results"  # what this run measured; `python -m tools.real` publishes it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of one model in one process, which loads it once."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "name" in params:
            item.add_marker(pytest.mark.xdist_group(params["name"]))


@pytest.fixture(scope="session", params=tuple(MODELS))
def name(request) -> str:
    """Which model."""
    return request.param


@pytest.fixture(scope="session")
def folder(name: str) -> Path:
    """The model's folder, which must be there: a test that is skipped shows nothing."""
    there = REAL / name
    assert ready(there), f"there is no {name} in {REAL}: make it with `python -m tools.real_models {name}`"
    return there


@pytest.fixture(scope="session")
def model(folder: Path) -> ca.Model:
    """The model in float32, as a user loads it (but its self-check is a test of its own)."""
    return ca.load(folder, check=False)


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
        """Sections that ran take the place of what an earlier run left in the file."""
        old = json.loads(self.path.read_text("utf-8"))["sections"] if self.path.is_file() else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        here = {**machine(), "cutaway": version("cutaway")}
        text = json.dumps({"machine": here, "sections": old | self.sections}, indent=1, ensure_ascii=False)
        self.path.write_text(text + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def results(name: str) -> Iterator[Results]:
    """Where tests write down what they measure."""
    found = Results(FOUND / f"{name}.json")
    yield found
    found.write()


def share(right: torch.Tensor | list[bool]) -> dict[str, Any]:
    """A share of prompts with its Wilson interval, as a measure of a row."""
    hits = [bool(r) for r in right]
    return {"value": sum(hits) / len(hits), "interval": list(wilson(sum(hits), len(hits)))}


def _rounded(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        x = x.tolist()
    if isinstance(x, list | tuple):
        return [_rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) and math.isfinite(x) else x
