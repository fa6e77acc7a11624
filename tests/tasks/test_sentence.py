"""One sentence: the proposed corruption, its target and foil, its cost, and what is refused."""

import pytest

from cutaway import Refused, tasks
from cutaway.core.record import counting

MET = "When Mary and John went to the store, John gave a book to"


def lengths(model, *texts):
    return {len(model.tokenizer(t)["input_ids"]) for t in texts}


def test_one_batched_forward_finds_a_corruption_of_equal_length(model):
    with counting() as spent:
        task = tasks.from_sentence(model, MET, target="Mary", foil="John", candidates=20)
    assert spent.forwards == 21
    (pair,) = task.pairs
    assert len(lengths(model, pair.clean, pair.corrupt)) == 1
    assert (pair.answer, pair.foil) == (" Mary", " John")
    old, new = pair.changes()[0]
    assert f"“{old}” → “{new}”" in task.corruption
    assert "20 replacements" in task.corruption
    bound = task.bind(model)
    shift = bound.metric(model.run_last(bound.clean)) - bound.metric(model.run_last(bound.corrupt))
    assert float(shift) > 0
    assert f"{-float(shift):+.2f}" in task.corruption


def test_the_strongest_candidate_is_taken(model):
    """With one kind of candidate the chosen one has the largest shift of all that were run."""
    seen = []
    run = model.run_last
    model.run_last = lambda prompts, edits=(): seen.append(list(prompts)) or run(prompts, edits)
    try:
        task = tasks.from_sentence(model, MET, target="Mary", foil="John", subject="store", candidates=12)
    finally:
        del model.run_last
    bound = task.bind(model)
    logits = run(seen[0])
    diff = logits[:, bound.answers[0]] - logits[:, bound.foils[0]]
    shifts = diff[0] - diff[1:]
    flips = [float(s) for s, d in zip(shifts, diff[1:], strict=True) if d < 0]
    assert float(shifts[seen[0][1:].index(task.pairs[0].corrupt)]) == pytest.approx(max(flips or shifts.tolist()))
    assert task.pairs[0].subject == "store"


def test_target_and_foil_default_to_predictions(model):
    sentence = "We know that the dog near the boats"
    task = tasks.from_sentence(model, sentence)
    bound = task.bind(model)
    clean, corrupt = model.run_last(bound.clean)[0], model.run_last(bound.corrupt)[0]
    answer, foil = int(bound.answers[0]), int(bound.foils[0])
    assert answer != foil
    for chosen, logits in ((answer, clean), (foil, corrupt)):
        stronger = (logits > logits[chosen]).nonzero().flatten().tolist()
        assert all(i == answer or not says(model, sentence, i) for i in stronger)


def says(model, sentence, token):
    """Whether a token can be written after the sentence, so that it is read as that token."""
    base = model.tokenizer(sentence)["input_ids"]
    text = model.tokenizer.decode([token])
    return any(model.tokenizer(sentence + t)["input_ids"] == [*base, token] for t in (text, f" {text}"))


def test_the_same_seed_proposes_the_same(model):
    a, b = (tasks.from_sentence(model, MET, target="Mary", foil="John", seed=3) for _ in range(2))
    assert a == b


def test_names_may_be_replaced_by_each_other(model):
    seen = []
    run = model.run_last
    model.run_last = lambda prompts, edits=(): seen.append(list(prompts)) or run(prompts, edits)
    try:
        tasks.from_sentence(model, MET, target="Mary", foil="John")
    finally:
        del model.run_last
    assert "When Mary and John went to the store, Mary gave a book to" in seen[0]
    assert len(seen) == 1


def test_a_given_corrupt_prompt_is_used(model):
    corrupt = MET.replace("John gave", "Mary gave")
    task = tasks.from_sentence(model, MET, target="Mary", corrupt=corrupt)
    assert task.pairs[0].corrupt == corrupt
    assert "given" in task.corruption
    with pytest.raises(Refused, match="tokens"):
        tasks.from_sentence(model, MET, target="Mary", corrupt="When Mary gave a book to").bind(model)


def test_numbers_are_replaced_by_numbers(gpt2):
    task = tasks.from_sentence(gpt2, "We know that 42 + 7 =", subject="42")
    old, new = task.pairs[0].changes()[0]
    assert old == "42"
    assert new.isdigit()
    assert len(new) == 2


def test_years_stay_in_their_century(worldly):
    (pair,) = tasks.from_sentence(worldly, "The war lasted from the year 1742 to the year 17", subject="1742")
    old, new = pair.changes()[0]
    assert old == "1742"
    assert new[:2] == "17"
    assert new != old


def test_the_world_gives_kinds_and_truth(worldly):
    person = worldly.world.people[0]
    sentence = f"{person.name} lives in"
    task = tasks.from_sentence(worldly, sentence, target=person.facts["city"])
    assert len(lengths(worldly, sentence, task.pairs[0].corrupt)) == 1
    assert task.truth.answer == person.facts["city"]
    assert f"the city of {person.name} is {person.facts['city']}" in task.truth.note
    wrong = next(c.capital for c in worldly.world.countries if c.capital != person.facts["city"])
    other = tasks.from_sentence(worldly, sentence, target=wrong)
    assert other.truth.answer is None
    assert person.facts["city"] in other.truth.note
    land = worldly.world.countries[0]
    capital = tasks.from_sentence(worldly, f"The capital of {land.name} is", target=land.capital, subject=land.name)
    assert capital.truth.answer == land.capital
    assert tasks.from_sentence(worldly, "The dog near the car", target="is", foil="are").truth is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "Mary John"}, "tokens"),
        ({"target": "Mary", "foil": "Mary"}, "same token"),
        ({"target": "Mary", "subject": "Norway"}, "Norway"),
        ({"target": "Mary", "subject": " "}, "quote a part"),
    ],
)
def test_wrong_requests_are_refused(model, options, words):
    with pytest.raises(Refused) as error:
        tasks.from_sentence(model, MET, **options)
    assert words in str(error.value)


def test_empty_sentences_and_unreplaceable_ones_are_refused(model):
    with pytest.raises(Refused, match="empty"):
        tasks.from_sentence(model, " ")
    with pytest.raises(Refused, match="has a replacement"):
        tasks.from_sentence(model, ". , .", target="Mary")
