"""The board of methods that score edges: what it says of programs whose circuits are known."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.cli.app import main
from cutaway.core.refuse import Refused
from cutaway.suites.known_circuits import METHODS, KnownCircuits, known_circuits

NAMES = list(METHODS)


@pytest.fixture(scope="module")
def plain() -> KnownCircuits:
    return known_circuits(["reverse", "majority"], n=16)


def test_the_exact_method_reaches_the_ceiling_and_chance_is_half(plain):
    assert torch.equal(plain.auroc[:, NAMES.index("exact")], torch.ones(2))
    assert torch.equal(plain.ceiling, torch.ones(2))
    assert bool((plain.auroc[:, NAMES.index("eap_ig")] >= 0.9).all())
    assert bool(((plain.null.mean(1) - 0.5).abs() < 0.06).all())
    assert torch.equal(plain.accuracy, torch.ones(2))
    assert plain.edges.tolist() == [[75, 8, 5], [75, 5, 3]]


def test_a_search_is_judged_by_the_losses_it_measured_and_shares_of_a_stream_by_no_effect(plain):
    acdc, pruning, flow = (NAMES.index(m) for m in ("acdc", "edge_pruning", "information_flow"))
    assert torch.equal(plain.auroc[:, acdc], torch.ones(2))
    assert torch.equal(plain.seen[:, acdc], torch.ones(2))
    assert (plain.auroc[:, flow] < plain.auroc[:, pruning]).all()
    assert plain.seen[:, [pruning, flow]].isnan().all()


def test_the_exact_method_reaches_the_ceiling_of_means_too():
    board = known_circuits(["parity"], n=8, how="mean")
    assert float(board.auroc[0, NAMES.index("exact")]) == float(board.ceiling[0]) == 1


def test_what_no_two_prompts_differ_in_is_lost_to_the_exact_method_too(plain):
    assert float(plain.structural[0, NAMES.index("exact")]) < 0.85, "three of eight edges, to the exact one too"


def test_traces_of_a_gradient_rank_above_nothing_and_not_above_noise(plain):
    exact, eap, ig = (NAMES.index(m) for m in ("exact", "eap", "eap_ig"))
    assert (float(plain.auroc[0, eap]), float(plain.seen[0, exact])) == (1.0, 1.0)
    assert float(plain.seen[0, eap]) < 0.5
    noisy = known_circuits(["reverse"], n=16, noise=0.003)
    assert float(noisy.accuracy) == 1
    assert float(noisy.auroc[0, exact]) == 1
    assert float(noisy.auroc[0, eap]) < float(noisy.auroc[0, ig]) < 1


def test_the_command_prints_the_board_and_saves_it(tmp_path, capsys):
    file = tmp_path / "board.safetensors"
    assert main(["zoo", "circuits", "shift", "--n", "4", "--out", str(file)]) == 0
    assert "1.000 (100%)" in capsys.readouterr().out
    assert ca.open(file).labels["program"] == ["shift"]
    with pytest.raises(Refused, match="did you mean reverse"):
        known_circuits(["revers"])
