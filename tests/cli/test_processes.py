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

from cutaway.cli import main
from cutaway.core.files import read_tensors

WORDS = ["patching", "activation", "--task", "facts", "--site", "z", "--samples", "2", "--json"]
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


def said(capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    """What the command answers in this process."""
    assert main([*WORDS, *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.wide
def test_two_processes_give_the_numbers_of_one_and_save_them_once(tmp_path, capsys):
    both = answered(started(SHARED, "--task-n", "4", "--out", str(tmp_path / "a.safetensors")))
    assert both["fields"] == said(capsys, "--task-n", "4")["fields"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.wide
def test_an_interrupted_command_goes_on(tmp_path, capsys):
    """Interrupted in the midst of its sweep: what was done by then is written down, and not done again."""
    more = ["--task-n", "16", "--resume", str(tmp_path / "kept")]
    first = started(ALONE, *more)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and first.poll() is None and not (tmp_path / "kept").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    done = sum(int(read_tensors(p)[0]["done"].sum()) for p in (tmp_path / "kept").iterdir())
    again, whole = (said(capsys, *more[:-1], str(tmp_path / folder)) for folder in ("kept", "other"))
    assert again["fields"] == whole["fields"]
    saved = whole["record"]["cost"]["forwards"] - again["record"]["cost"]["forwards"]
    assert (saved > 0) == (done > 0)
