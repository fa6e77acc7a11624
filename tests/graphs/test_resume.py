"""A graph whose sweep was killed goes on from the rows that are done, with the same bits."""

import signal
import subprocess
import sys

import pytest
import torch

import cutaway as ca
from cutaway.core.files import read_tensors, write_tensors
from cutaway.core.refuse import Refused
from cutaway.graphs.sweep import Sweep
from tests.graphs.made import IDS, model, transcoders

LIVED = 5  # chunks of rows that a killed sweep computes
KILLED = f"""
import os, signal, sys
import cutaway as ca
from cutaway.graphs.sweep import Sweep
from cutaway.models.sweep import parts
from tests.graphs.test_resume import counted, traced

parts._EVERY = -1.0
seen = counted(lambda n: n > {LIVED} and os.kill(os.getpid(), signal.SIGKILL))
with ca.resuming(sys.argv[1]):
    traced()
"""


def traced(ids=IDS, nodes=24):
    return ca.graphs.trace(model("gemma2"), ca.tasks.as_prompts(ids), transcoders("gemma2"), samples=3, nodes=nodes)


def counted(then=lambda n: None):
    """Count the chunks of rows that are computed from now on, and call `then` with the number before each."""
    seen, plain = [0], Sweep._at

    def at(self, p, readers):
        seen[0] += 1
        then(seen[0])
        return plain(self, p, readers)

    Sweep._at = at
    return seen


@pytest.fixture
def computed(monkeypatch):
    monkeypatch.setattr(Sweep, "_at", Sweep._at)  # put back at the end
    return counted()


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("influence", "influence_null", "weight", "value"))


def test_a_killed_sweep_goes_on_with_the_same_bits(tmp_path, computed):
    whole, cost = traced(), computed[0]
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    with ca.resuming(tmp_path):
        assert same(traced(), whole)
        assert computed[0] == 2 * cost - LIVED, "what was done before it was killed is not done again"
        again = traced()
    assert same(again, whole)
    assert computed[0] == 2 * cost - LIVED, "nor is anything else"
    assert again.labels == whole.labels


def test_an_interrupted_sweep_keeps_what_is_done_and_another_one_takes_nothing_of_it(tmp_path, computed, monkeypatch):
    def stops(sweep, p, readers):
        if computed[0] > 3:
            raise KeyboardInterrupt
        return counting(sweep, p, readers)

    counting = Sweep._at
    monkeypatch.setattr(Sweep, "_at", stops)
    with pytest.raises(KeyboardInterrupt), ca.resuming(tmp_path):
        traced()
    monkeypatch.setattr(Sweep, "_at", counting)
    (folder,) = tmp_path.iterdir()
    assert sum(len(read_tensors(f)[0]) for f in folder.iterdir()) == computed[0] == 4
    with ca.resuming(tmp_path):
        other = traced(IDS.flip(1))
    assert same(other, traced(IDS.flip(1)))
    assert len(list(tmp_path.iterdir())) == 2


def test_rows_of_another_graph_are_refused(tmp_path):
    with ca.resuming(tmp_path):
        traced()
        (file,) = next(tmp_path.iterdir()).iterdir()
        tensors, header = read_tensors(file)
        write_tensors(file, tensors, header | {"parts": "another"})
        with pytest.raises(Refused, match="another computation"):
            traced()
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(Refused, match="safetensors"):
            traced()
