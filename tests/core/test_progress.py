"""Progress: who listens is told, and parts of a work are one bar."""

from itertools import pairwise

import pytest

from cutaway.core.progress import advance, listening, part


def test_parts_are_told_as_one_work():
    heard: list[float] = []
    with listening(lambda done, total: heard.append(done / total)):
        advance(1, 4)
        for n in range(2):
            with part(n, 2):
                advance(1, 2)
                with part(1, 4):
                    advance(5, 10)
        advance(4, 4)
    advance(9, 9)
    assert heard == pytest.approx([0.25, 0.25, 0.1875, 0.75, 0.6875, 1])


def test_a_part_that_fails_leaves_no_trace():
    heard: list[tuple[float, float]] = []
    with listening(lambda *told: heard.append(told)):
        with pytest.raises(KeyboardInterrupt), part(1, 2):
            raise KeyboardInterrupt
        advance(1, 3)
    assert heard == [(1, 3)]


@pytest.mark.parametrize("method", ["patching.causal_trace", "patching.activation", "patching.knockout_curve"])
def test_the_bar_of_a_method_runs_once(method):
    import cutaway as ca
    from tests.conformance import subjects

    options = {
        "patching.causal_trace": {"corruption": "noise", "draws": 2, "samples": 2},
        "patching.activation": {"samples": 1},
        "patching.knockout_curve": {"top": 2, "samples": 2, "order": "greedy"},
    }
    heard: list[float] = []
    with listening(lambda done, total: heard.append(done / total)):
        ca.methods()[method].function(subjects.family("gpt2"), subjects.numbered_task(), **options[method])
    falls = [b for a, b in pairwise(heard) if b < a - 1e-9]
    assert heard
    assert heard[-1] == pytest.approx(1)
    assert len(falls) <= (1 if method == "patching.knockout_curve" else 0), heard  # it ranks first, then measures
