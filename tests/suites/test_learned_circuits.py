"""The board of models that learned programs: rankings on prompts that made none of them, beside random circuits."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.circuits.circuit import mask_of
from cutaway.cli.app import main
from cutaway.models.edits.wiring import wiring
from cutaway.suites.known_circuits import METHODS
from cutaway.suites.learned_circuits import LearnedCircuits, learned_circuits, shared
from cutaway.zoo.compiled import structural


@pytest.fixture(scope="module")
def board() -> LearnedCircuits:
    return learned_circuits(["shift", "reverse"], n=8)


def test_estimates_find_what_cuts_find_and_random_circuits_carry_less(board):
    exact, ig = (list(METHODS).index(m) for m in ("exact", "eap_ig"))
    assert board.first_tenth[:, exact].tolist() == [1.0, 1.0]
    assert bool((board.first_tenth[:, ig] >= 0.5).all())
    two_fifths = board.labels["share"].index("0.4")
    carried = board.faithfulness[:, exact, two_fifths]
    assert bool((carried > board.null[:, two_fifths].mean(-1)).all())
    assert board.edges.tolist() == [[75, 2], [75, 5]]


def test_scores_are_made_on_other_prompts_than_those_that_are_cut(board):
    """A ranking's own faithfulness by the method itself, on the prompts of the next seed."""
    model = ca.load("learned/shift")
    scores = ca.circuits.exact(model, ca.tasks.load("shift", model, n=8, seed=0), samples=1, null_cells=1)
    other = ca.circuits.faithfulness(
        model, ca.tasks.load("shift", model, n=8, seed=1), ca.circuits.open(scores), samples=1
    )
    assert float(other.absolute[other.labels["share"].index("0.2")]) == pytest.approx(
        float(board.faithfulness[0, 0, 1]), abs=1e-5
    )


def test_the_compiled_circuit_under_other_names_of_its_heads_is_all_shared():
    model = ca.load("compiled/palindrome", check=False)
    w = wiring(model)
    known = structural(model, w)
    renamed = {"z.0.0": "z.0.2", "z.0.2": "z.0.0", "z.2.0": "z.2.1", "z.2.1": "z.2.0"}

    def other(edge: str) -> str:
        for a, b in renamed.items():
            tail = a.removeprefix("z")
            for site in ("z", "q_in", "k_in", "v_in"):
                if edge == f"{site}{tail}":
                    return site + b.removeprefix("z")
        return edge

    index = {f"{e.source}→{e.target}": i for i, e in enumerate(w.edges)}
    moved = [index[f"{other(str(e.source))}→{other(str(e.target))}"] for e in w.edges]
    own = mask_of(w, torch.tensor([moved[i] for i in range(len(moved)) if known[tuple(w.pairs[i])]]))
    assert not torch.equal(own, known)
    assert shared(w, own, known) == 1.0
    assert shared(w, torch.zeros_like(known), known) == 0.0


def test_the_command_prints_the_board_and_refuses_noise(tmp_path, capsys):
    file = tmp_path / "board.safetensors"
    assert main(["zoo", "circuits", "shift", "--learned", "--n", "4", "--out", str(file)]) == 0
    assert "the first fifth of the edges" in " ".join(capsys.readouterr().out.split())
    assert ca.open(file).labels["program"] == ["shift"]
    assert main(["zoo", "circuits", "shift", "--learned", "--noise", "0.1"]) != 0
    assert "compiled weights alone" in capsys.readouterr().err
