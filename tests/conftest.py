"""The whole suite runs with shapes and types checked at every call, offline, on one thread a worker."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from tests.typecheck import install

install("cutaway")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("house", deadline=None, max_examples=60, derandomize=True, database=None)
settings.load_profile("house")


#: rooms whose tests share what they make of one method or model, which the parameter `name` names; others do in a file
NAMED = {"conformance", "real"}


def pytest_collection_modifyitems(items):
    """Keep tests that share what they make on one worker (`--dist loadgroup`)."""
    for item in items:
        file = item.path.relative_to(item.config.rootpath)
        given = item.callspec.params if hasattr(item, "callspec") else {}
        group = given.get("name", file) if file.parts[1] in NAMED else file
        item.add_marker(pytest.mark.xdist_group(str(group)))


def pytest_terminal_summary(terminalreporter):
    """The mutation score: how many of the faults that the tests plant the self-check has caught."""
    found = {k: terminalreporter.stats.get(k, []) for k in ("passed", "failed", "error")}
    planted = {k: sum("test_planted_faults.py" in str(r.nodeid) for r in rs) for k, rs in found.items()}
    if total := sum(planted.values()):
        terminalreporter.write_line(f"{planted['passed']} of {total} planted faults caught by the self-check")
