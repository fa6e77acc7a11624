"""A plan shared by two processes, and one that is interrupted: the same numbers as one process in one go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

WORDS = ["patching", "activation", "--task", "facts", "--task-n", "4", "--site", "z", "--samples", "2", "--json"]
ALONE = [sys.executable, "-m", "cutaway"]
SHARED = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
          "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "cutaway"]  # fmt: skip


def started(command: list[str], *more: str) -> subprocess.Popen[str]:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*command, *WORDS, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet
    )


def answered(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == 1, "only one process speaks"
    return json.loads(lines[0])


@pytest.fixture(scope="module")
def whole() -> Any:
    """What one process answers."""
    return answered(started(ALONE))


def test_two_processes_give_the_numbers_of_one_and_save_them_once(whole, tmp_path):
    both = answered(started(SHARED, "--out", str(tmp_path / "a.safetensors")))
    assert both["fields"] == whole["fields"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_interrupted_command_goes_on(whole, tmp_path):
    """Interrupted once something is written down, which here happens when it is interrupted, or at the end."""
    first = started(ALONE, "--resume", str(tmp_path), "--task-n", "64")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and first.poll() is None and not list(tmp_path.iterdir()):
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    again = answered(started(ALONE, "--resume", str(tmp_path)))
    assert again["fields"] == whole["fields"]
    third = answered(started(ALONE, "--resume", str(tmp_path)))
    assert third["fields"] == whole["fields"]
    costs = [r["record"]["cost"]["forwards"] for r in (whole, third)]
    assert costs[1] < 0.3 * costs[0], "nothing is swept twice"
