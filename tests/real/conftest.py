"""Two real models, loaded once a session, and the numbers that are written down: `make real`, apart from the suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import cutaway as ca
from tests.meta.tree import ROOT
from tests.real.written import Results
from tools.real_models import MODELS, ready

REAL = Path(os.environ.get("REAL") or ROOT / "runs" / "real")
FOUND = ROOT / "runs" / "real" / "results"  # what this run measured; `python -m tools.real` publishes it


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


@pytest.fixture(scope="session")
def results(name: str) -> Iterator[Results]:
    """Where tests write down what they measure."""
    found = Results(FOUND / f"{name}.json")
    yield found
    found.write()
