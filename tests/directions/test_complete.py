"""Completions: against generation and losses by hand, a trained model's verdicts turned, and refusals."""

import pytest
import torch

import cutaway as ca
from cutaway.directions.complete import _repeated
from cutaway.models.generate import generated_ids
from tests.conformance.subjects import miniworld, random_llama
from tests.directions.made import reviews, seeded, sentiment

PROMPTS = ["Mary and John went to the store", "Anna gave the letter to", "When Tom"]


def test_texts_are_generated_and_read_by_the_plain_model():
    model, direction = random_llama(), ca.directions.direction({"resid_post.0": seeded(3, 32)})
    found = ca.directions.complete(model, direction, PROMPTS, strengths=(-3.0, 9.0), new_tokens=7, samples=2,
                                   instruction="Then ")  # fmt: skip
    random = direction.random(2, 0)
    assert all(float(r.norm[0]) == pytest.approx(float(direction.norm[0]), rel=1e-5) for r in random)
    ways = {"plain": [], "-3": direction.add(-3.0), "9": direction.add(9.0), "random": random[0].add(9.0)}
    for way, edits in ways.items():
        assert found.texts(way) == model.generate(PROMPTS, 7, edits=edits)
    assert found.texts("instruction") == model.generate([f"Then {p}" for p in PROMPTS], 7)
    unit, loss, counts, along = direction.unit().vector[0], [], [], []
    for prompt in PROMPTS:
        own = model.tokens(prompt)
        new = generated_ids(model, own, 7, direction.add(9.0), {})
        n, t = own.ids.shape[1], model.tokens(torch.cat([own.ids, new], 1))
        said = model.run(t)[0].log_softmax(-1)[n - 1 : -1].gather(-1, t.ids[0, n:, None])
        loss.append(float(-said.sum()))
        counts.append(len(said))
        along.append(float((model.capture(t, "resid_post.0")["resid_post.0"][0, n:] @ unit).mean()))
    mean = torch.tensor(loss) / torch.tensor(counts)
    torch.testing.assert_close(found.each[:, 2], mean, atol=1e-4, rtol=1e-4)
    assert float(found.perplexity[2]) == pytest.approx(float(mean.mean().exp()), rel=1e-3)
    assert float(found.component[2] * direction.norm[0]) == pytest.approx(sum(along) / 3, rel=1e-3)
    assert found.null[1:4].isfinite().all()
    assert found.null[[0, 4]].isnan().all()
    assert found.no_effect("loss") == float(found.loss[0])
    lines = found.table().splitlines()
    assert lines[0] == PROMPTS[0]
    assert [line.split(" | ")[0].strip() for line in lines[1:6]] == [*ways, "instruction"]


def test_verdicts_of_a_trained_model_turn_with_its_direction_and_not_with_a_random_one():
    model, (_, negative) = miniworld(), reviews(12)
    direction = sentiment().select(address="resid_post.4")
    found = ca.directions.complete(model, direction, negative, strengths=(4.0,), new_tokens=4, samples=2)
    good = {way: sum(any(w in t for w in ("gladly", "positive", "loved", "happy")) for t in found.texts(way))
            for way in ("plain", "4", "random")}  # fmt: skip
    assert good["plain"] <= 1
    assert good["4"] >= 11
    assert good["random"] <= 1


def test_a_cap_at_chosen_positions_holds_while_text_is_generated():
    """A cap without positions keeps every token's component within limits, one at a position that of this alone."""
    model, text = random_llama(), PROMPTS[0]
    direction = ca.directions.direction({"resid_post.0": seeded(3, 32)})
    limits = {"min": -0.1, "max": 0.1}
    for positions in (None, (-1,), (1, 3)):
        seen = list[torch.Tensor]()
        edits = direction.cap(**limits, positions=positions)
        look = ca.edits.Apply("resid_post.0", lambda x, seen=seen: seen.append(x.clone()) or x)
        new = model.generate(text, 4, edits=[*edits, look], min_new_tokens=4)
        assert new == model.generate(text, 4, edits=edits, use_cache=False, min_new_tokens=4)
        along = direction.component(torch.cat(seen, 1))[0]
        n, inside = model.tokens(text).ids.shape[1], (along.abs() <= 0.1 + 1e-5)
        want = torch.zeros(n + 3, dtype=torch.bool)
        want[slice(None) if positions is None else [p % n for p in positions]] = True
        assert bool(inside[want].all())
        assert positions is None or not bool(inside[~want].all())


def test_repeats_are_counted_by_three_tokens():
    assert _repeated([1, 2, 3, 1, 2, 3, 1]) == pytest.approx(2 / 5)
    assert _repeated([1, 2]) == 0.0


def test_what_cannot_be_completed_is_refused():
    model, one = random_llama(), ca.directions.direction({"resid_post.0": seeded(3, 32)})
    for strengths in ((1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(ca.Refused, match="one is 0, or twice"):
            ca.directions.complete(model, one, PROMPTS, strengths=strengths)
    with pytest.raises(ca.Refused, match="they have no text"):
        ca.directions.complete(model, one, [[5, 6]])
    with pytest.raises(ca.Refused, match="16 wide"):
        ca.directions.complete(model, ca.directions.direction({"resid_post.0": seeded(0, 16)}), PROMPTS)
