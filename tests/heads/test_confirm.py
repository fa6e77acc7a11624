"""Joint removal of claimed heads, against hooks on plain transformers and the circuit of the bundled model."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

import cutaway as ca
from cutaway.cli import app
from cutaway.core.refuse import Refused
from cutaway.heads import confirm
from cutaway.tasks import Repeats
from tests.conformance import subjects

ROWS = ([0, 9, 8, 7, 9, 8, 4, 5, 9, 8], [0, 5, 6, 5, 6, 7], [0, 7, 9, 4, 6])


def again(ids: list[int], q: int) -> bool:
    """An earlier token equals the query's, and its follower comes next."""
    return any(ids[k] == ids[q] and ids[k + 1] == ids[q + 1] for k in range(q))


def losses(hf: torch.nn.Module, ids: list[int]) -> tuple[list[float], list[float], list[bool]]:
    """Losses of repeated tokens and of others, and hits at the former."""
    with torch.no_grad():
        logits = hf(torch.tensor([ids])).logits[0].double()
    each = [float(-logits[q].log_softmax(-1)[ids[q + 1]]) for q in range(len(ids) - 1)]
    said = [q for q in range(1, len(ids) - 1) if again(ids, q)]
    rest = [each[q] for q in range(1, len(ids) - 1) if q not in said]
    return [each[q] for q in said], rest, [int(logits[q].argmax()) == ids[q + 1] for q in said]


def mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_losses_are_those_under_hand_written_hooks():
    model = subjects.random_llama()
    hf, heads = model.hf, ((0, 1), (0, 3), (1, 2))
    kept: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    watch = [hf.model.layers[i].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args, i=i: kept[i].append(args[0][0, 1:].detach())) for i in kept]  # fmt: skip
    before = [losses(hf, ids) for ids in ROWS]
    for handle in watch:
        handle.remove()
    mean = {i: torch.cat(z).mean(0).unflatten(0, (4, 8)) for i, z in kept.items()}  # without first tokens

    def removed(i: int):
        def hook(_, args):
            z = args[0].unflatten(-1, (4, 8)).clone()
            for layer, h in heads:
                if layer == i:
                    z[:, 1:, h] = mean[i][h]
            return (z.flatten(-2),)

        return hook

    for i in kept:
        hf.model.layers[i].self_attn.o_proj.register_forward_pre_hook(removed(i))
    after = [losses(hf, ids) for ids in ROWS]
    for i in kept:
        hf.model.layers[i].self_attn.o_proj._forward_pre_hooks.clear()
    got = confirm(model, ca.tasks.as_prompts([*ROWS]), heads=("0.1", "0.3", "1.2"), samples=2)
    both = [i for i in range(len(ROWS)) if before[i][0]]
    assert both == [0, 1], "the last sequence says nothing again"
    rise = mean_of([mean_of(after[i][0]) - mean_of(before[i][0]) for i in both])
    assert float(got.effect[0]) == pytest.approx(rise, abs=1e-5)
    with_all = mean_of([mean_of(before[i][0]) for i in both])
    assert got.record["loss with all heads"][0] == pytest.approx(with_all, abs=1e-5)
    elsewhere = mean_of([mean_of(a[1]) - mean_of(b[1]) for a, b in zip(after, before, strict=True)])
    assert float(got.effect[1]) == pytest.approx(elsewhere, abs=1e-5)
    assert float(got.accuracy[0]) == pytest.approx(mean_of([mean_of(after[i][2]) for i in both]))


def test_induction_and_previous_token_heads_of_the_bundled_model_carry_what_is_said_again():
    types = ("previous token", "induction", "duplicate token")
    got = confirm(subjects.miniworld(), Repeats(8, 10), types=types, samples=4)
    for t in (0, 1):
        assert float(got.interval[0, t, 0]) > float(got.null[0, t].max()) + 2, "nats"
        assert float(got.accuracy[0, t]) < 0.2 < 0.9 < float(got.accuracy_null[0, t].min())
        assert abs(float(got.effect[1, t])) < 0.5, "nothing can be known at the first saying"
    assert got.record["heads"].keys() == {"previous token", "induction"}
    assert got.effect[:, 2].isnan().all()
    assert got.reasons["duplicate token"] == "no head is claimed to be of it"


def test_what_cannot_be_asked_is_refused(capsys):
    model = subjects.random_llama()
    with pytest.raises(Refused, match="did you mean induction"):
        confirm(model, Repeats(2, 4), types=("inductive",))
    with pytest.raises(Refused, match="give one of the two"):
        confirm(model, Repeats(2, 4), types=("induction",), heads=("0.0",))
    with pytest.raises(Refused, match="three tokens"):
        confirm(model, ca.tasks.as_prompts([0, 5]), heads=("0.0",))
    fresh = confirm(model, ca.tasks.as_prompts([0, 5, 6, 7, 8]), heads=("0.0",), samples=2)
    assert fresh.effect[0].isnan()
    assert fresh.effect[1].isfinite()
    assert fresh.reasons["said before"] == "no sequence has such tokens"
    line = "heads confirm --model miniworld --heads 4.0,4.3 --repeats 2 --repeats-length 6 --samples 2 --json"
    assert app.main(line.split()) == 0
    assert json.loads(capsys.readouterr().out)["record"]["heads"] == {"named heads": ["4.0", "4.3"]}
