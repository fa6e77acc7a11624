"""Conditional steering: of chosen prompts alone, in sweeps, completions and files, with its random control."""

import pytest
import torch

import cutaway as ca
from cutaway.tasks import Labelled
from tests.conformance.subjects import chatting, miniworld
from tests.directions.made import asked, reviews, seeded, sentiment


@pytest.fixture(scope="module")
def found():
    """The threshold of sentiment at the last token behind block 2."""
    positive, negative = reviews(30)
    shown = torch.tensor([True] * 30 + [False] * 30)[:, None]
    labelled = Labelled((*positive, *negative), ("positive",), shown, tuple(str(i // 5) for i in [*range(30)] * 2))
    return ca.directions.threshold(
        miniworld(), labelled, sentiment().select(address="resid_post.2"), reading="last", samples=2
    )


def test_only_prompts_that_satisfy_the_condition_are_steered_and_so_at_random(found):
    model, task, neutral = miniworld(), asked(12), ["Anna and Tom went to the park."]
    steering = sentiment().select(address=["resid_post.3", "resid_post.4"])
    some = ca.directions.ConditionalSteering(steering, found.condition())
    one, other = (
        ca.directions.steer(model, task, s, neutral, strengths=(-6.0, 0.0, 6.0), samples=3) for s in (steering, some)
    )
    prompts = [p.clean for p in task]
    x = model.capture(prompts, "resid_post.2")["resid_post.2@-1"]
    holds = found.condition().holds(x)
    assert 0 < int(holds.sum()) < len(holds)
    torch.testing.assert_close(other.slope, torch.where(holds, one.slope, 0.0), atol=1e-4, rtol=1e-3)
    assert not bool(other.slope[~holds].any())
    said = ca.directions.complete(model, some, prompts, strengths=(-6.0,), new_tokens=3, samples=1)
    whole = ca.directions.complete(model, steering, prompts, strengths=(-6.0,), new_tokens=3, samples=1)
    want = [b if h else a for a, b, h in zip(whole.texts("plain"), whole.texts("-6"), holds, strict=True)]
    assert said.texts("-6") == want != said.texts("plain")
    randomly = [r.condition for r in some.random(2)]
    assert randomly == [some.condition] * 2
    assert [r.steering.norm.tolist() for r in some.random(1)] == [pytest.approx(steering.norm.tolist())]


def test_a_file_of_a_threshold_makes_what_a_direction_is_conditional(tmp_path, found):
    model, steering = miniworld(), sentiment().select(address="resid_post.4")
    file, limit = steering.save(tmp_path / "mood.safetensors"), found.save(tmp_path / "limit.safetensors")
    some = ca.directions.open(file, condition=str(limit))
    texts = [t for pair in reviews(3) for t in pair]
    by_hand = ca.edits.Conditional(steering.add(3.0), found.condition("resid_post.2"))
    assert torch.equal(model.run_last(texts, some.add(3.0)), model.run_last(texts, by_hand))
    assert some.identity()["condition"]["address"] == "resid_post.2"
    assert some.identity() != steering.identity()
    assert f"condition={str(limit)!r}" in some.made.python
    assert some.made.flags["condition"] == str(limit)
    with pytest.raises(ca.Refused, match="it holds a direction"):
        ca.directions.open(file, condition=str(file))
    with pytest.raises(ca.Refused, match="no latents are steered"):
        ca.directions.open(file, dictionary="miniworld/resid_post.3")


def test_thresholds_of_several_addresses_name_one(found):
    two = ca.directions.threshold(
        miniworld(), ca.tasks.read_labelled("world/sentiment", miniworld()), sentiment(), samples=1
    )
    with pytest.raises(ca.Refused, match="at 6 addresses, and one is meant"):
        two.condition()
    assert str(two.condition("resid_post.1").address) == "resid_post.1"


def test_prompts_can_be_what_the_user_of_a_chat_says():
    model, said = chatting(), ["Anna gave the letter", "When Tom"]
    way = ca.directions.direction({"resid_post.0": seeded(3, 32)})
    given = {"strengths": (2.0,), "new_tokens": 4, "samples": 1, "instruction": "Then "}
    chats = ca.tasks.prompts.Prompts(tuple(ca.chat(model, t) for t in said))
    wrapped, written, again = (
        ca.directions.complete(model, way, prompts, chat=chat, **given)
        for prompts, chat in ((said, True), (chats, False), (chats, True))
    )
    for other in (written, again):
        assert torch.equal(wrapped.each, other.each)
        assert wrapped.labels["each"] == other.labels["each"]
