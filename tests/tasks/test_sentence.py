"""One sentence: the proposed corruption, its target and foil, its cost, and what is refused."""

import random

import pytest
import torch

import cutaway as ca
from cutaway import Refused, tasks
from cutaway.core.record import counting
from cutaway.tasks import siblings, words
from cutaway.tasks.chat import words_of
from cutaway.tasks.kinds import kinds_of
from cutaway.tasks.pair import Pair
from cutaway.tasks.task import Task

MET = "When Mary and John went to the store, John gave a book to"


def lengths(model, *texts):
    return {len(model.tokenizer(t)["input_ids"]) for t in texts}


def test_a_corruption_of_equal_length_is_found_and_told(model):
    with counting() as spent:
        task = tasks.from_sentence(model, MET, target="Mary", foil="John", candidates=20)
    assert spent.forwards < 250
    (pair,) = task.pairs
    assert len(lengths(model, pair.clean, pair.corrupt)) == 1
    assert (pair.answer, pair.foil) == (" Mary", " John")
    old, new = pair.changes()[0]
    assert f"“{old}” → “{new}”" in task.corruption
    bound = task.bind(model)
    shift = bound.metric(model.run_last(bound.clean)) - bound.metric(model.run_last(bound.corrupt))
    assert float(shift) > 0
    assert f"−{float(shift):.2f}" in task.corruption


def said_next(model, monkeypatch, **answers):
    """Run as a model that says these words, by the sentences that end so: text at the end → words, likeliest first."""

    def run_last(prompts, edits=()):
        texts = list(getattr(prompts, "texts", [prompts] if isinstance(prompts, str) else prompts))
        out = torch.zeros(len(texts), len(model.tokenizer))
        for row, text in zip(out, texts, strict=True):
            said = next((w for end, w in answers["said"].items() if text.endswith(end)), ["the"])
            for n, word in enumerate(said):
                row[model.text.token_id(f" {word}")] = 9.0 - 2 * n
        return out

    monkeypatch.setattr(model, "run_last", run_last)


def test_the_textbook_contrast_of_two_names_is_their_exchange(model, monkeypatch):
    """Mary over John, never over a third name, however far that one moves the logits."""
    said_next(model, monkeypatch, said={"John gave a book to": ["Mary"], "Mary gave a book to": ["the", "John"]})
    (pair,) = (task := tasks.from_sentence(model, MET)).pairs
    assert (pair.answer, pair.foil) == (" Mary", " John")
    assert pair.corrupt == MET.replace("John gave", "Mary gave")
    assert "the last mention of the repeated word" in task.corruption


def test_a_subject_becomes_another_of_its_kind_with_another_answer_of_the_kind(model, monkeypatch):
    said_next(model, monkeypatch, said={f"king of {c} is": ["the", a] for c, a in (("Japan", "Tokyo"),)} | {
        "France is": ["Paris", "the"], "Italy is": ["the", "Rome"]})  # fmt: skip
    task = tasks.from_sentence(model, "We know that the king of France is", target="Paris")
    (pair,) = task.pairs
    assert (pair.answer, pair.foil) in ((" Paris", " Rome"), (" Paris", " Tokyo")), "no capital over “the”"
    assert "another word of its kind" in task.corruption


def test_where_no_contrast_is_the_textbooks_the_largest_shift_is_taken_and_called_so(model, monkeypatch):
    said_next(model, monkeypatch, said={"is": ["Paris"]})
    with pytest.raises(Refused, match="less likely against another answer"):
        tasks.from_sentence(model, "We know that the king of France is")
    monkeypatch.undo()
    assert "the largest shift of" in tasks.from_sentence(model, MET, target="Mary", foil="John").corruption


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "Who"),
        ("<start_of_turn>user\nName a city<end_of_turn>\n<start_of_turn>model\nA city is", "Name a city A city"),
        ("[INST] <<SYS>>\nBe nice\n<</SYS>>\n\nThe king [/INST]", "The king"),
        ("<|start_header_id|>system<|end_header_id|>\nB<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi", "Hi"),
        ("User: hello there\nAssistant: The", "hello there The"),
        ("The system and the model of the user", "The system and the model of the user"),
    ],
)  # fmt: skip
def test_the_words_of_a_chat_template_are_nobodys(prompt, words):
    assert " ".join(m[0] for m in words_of(prompt)) == words


def test_target_and_foil_default_to_predictions(model):
    sentence = "We know that the dog near the boats"
    task = tasks.from_sentence(model, sentence)
    bound = task.bind(model)
    clean, corrupt = model.run_last(bound.clean)[0], model.run_last(bound.corrupt)[0]
    answer, foil = int(bound.answers[0]), int(bound.foils[0])
    assert answer != foil
    stronger = (clean > clean[answer]).nonzero().flatten().tolist()
    assert not any(says(model, sentence, i) for i in stronger)
    stronger = [i for i in (corrupt > corrupt[foil]).nonzero().flatten().tolist() if says(model, sentence, i)]
    kinds, (said, other) = kinds_of(model), (model.text.token_texts([i])[0] for i in (answer, foil))
    assert all(
        i == answer or (kinds.alike(said, other) and not kinds.alike(said, model.text.token_texts([i])[0]))
        for i in stronger
    )


def says(model, sentence, token):
    """Whether a token can be written after the sentence, so that it is read as that token."""
    base = model.tokenizer(sentence)["input_ids"]
    text = model.tokenizer.decode([token])
    return any(model.tokenizer(sentence + t)["input_ids"] == [*base, token] for t in (text, f" {text}"))


def test_the_same_seed_proposes_the_same(model):
    a, b = (tasks.from_sentence(model, MET, target="Mary", foil="John", seed=3) for _ in range(2))
    assert a == b


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
        ({"target": "Mary", "foil": "Mary"}, "same token"),
        ({"target": "Mary", "subject": "Norway"}, "Norway"),
        ({"target": "Mary", "subject": " "}, "quote a part"),
    ],
)
def test_wrong_requests_are_refused(model, options, words):
    with pytest.raises(Refused) as error:
        tasks.from_sentence(model, MET, **options)
    assert words in str(error.value)
    assert "narrow" not in str(error.value), "there is no task yet"


@pytest.mark.parametrize("given", [{}, {"foil": "John Mary"}, {"foil": "Tom"}])
def test_targets_of_several_tokens(model, given):
    """What the corruption is said to move is what the task measures."""
    task = tasks.from_sentence(model, MET, target="Mary John", **given)
    pair, bound = task.pairs[0], task.bind(model)
    assert pair.answer == " Mary John"
    assert not given or pair.foil == f" {given['foil']}"
    assert bound.clean.tails == ((2, len(pair.foil.split())),)
    clean, corrupt = (float(model.measure(t, bound.measure)) for t in (bound.clean, bound.corrupt))
    said = f"it moves log P(Mary John) − log P({pair.foil.strip()}) by {corrupt - clean:+.2f}"
    assert said.replace(" by -", " by −") in task.corruption
    assert clean > corrupt


def test_siblings_of_answers_of_several_tokens(worldly, monkeypatch):
    """A sibling's answer is the words with which the model goes on, and its pair is told apart as the first is."""
    capitals = {row[0]: row[1] for row in words.table("countries").rows}

    def generate(prompts, most):
        return [f" New {capitals[p.split()[-2]]}, said {most}" for p in prompts]

    monkeypatch.setattr(worldly, "generate", generate)
    clean, corrupt = "We know that the king of France is", "We know that the king of Italy is"
    pair = Pair(clean, corrupt, " New Paris", " New Rome", joined=True)
    task = tasks.with_siblings(worldly, Task("made", (pair,)), 16)
    assert len(task) > 4
    for p in task.pairs:
        told = (capitals[t.split()[-2]] for t in (p.clean, p.corrupt))
        assert (p.answer, p.foil) == tuple(f" New {c}" for c in told)
        assert siblings._whole_signs(worldly, p) == siblings._whole_signs(worldly, pair)
    assert len(task.bind(worldly).clean.tails) == len(task)
    assert siblings._phrase(" new york is", " buenos") == " new"
    assert siblings._phrase("\n- 3", " Oslo") == ""


def test_empty_sentences_and_unreplaceable_ones_are_refused(model):
    with pytest.raises(Refused, match="empty"):
        tasks.from_sentence(model, " ")
    with pytest.raises(Refused, match="has a replacement"):
        tasks.from_sentence(model, ". , .", target="Mary")


@pytest.mark.parametrize(
    ("clean", "corrupt", "answer", "foil", "whole"),
    [("Monday, Tuesday,", "Monday, Friday,", "Wednesday", "Saturday", words.series()[0].words),
     ("The king of France is", "The king of Italy is", "Paris", "Rome", None)],
)  # fmt: skip
def test_siblings_have_one_answer_each(worldly, clean, corrupt, answer, foil, whole):
    """A series moves as a whole, and a capital follows its country, whatever the model thinks of either."""
    clean, corrupt = f"We know that {clean}", f"We know that {corrupt}"
    one = Task("made", (Pair(clean, corrupt, f" {answer}", f" {foil}", joined=True),))
    drafts = siblings._drafts(worldly, one.pairs[0], kinds_of(worldly), 12, random.Random(0))
    assert drafts or whole is None
    for d in drafts:
        said = [m[0] for m in words_of(d.clean)][-2:]
        if whole is None:
            assert {r[0]: r[1] for r in words.table("countries").rows}[said[0]] == d.answer.strip()
        else:
            first, second, third = (whole.index(w.strip()) for w in (*said, d.answer))
            assert (second - first, third - second) in ((1, 1), (1, -6), (-6, 1))
    assert len({d.clean for d in drafts} | {clean}) == len(drafts) + 1


@pytest.mark.parametrize(
    ("name", "sentence", "answer", "siblings"),
    [
        ("compiled/reverse", "a b c =", " c", 4),
        ("learned/reverse", "a b c =", " c", 2),
        ("compiled/parity", "1 0 1", " even", 1),
        ("induction", "w03 w17 w22 w05 w03 w17", " w22", 1),
    ],
)
def test_replacements_are_words_of_a_small_vocabulary(name, sentence, answer, siblings):
    """Letters, numbers and words at large are not in it, and a word that stands close to another is none."""
    of = ca.load(name, check=False)
    task = tasks.with_siblings(of, tasks.from_sentence(of, sentence), 12)
    assert task.pairs[0].answer == answer
    assert len(task) >= siblings
    for pair in task:
        assert of.tokenizer.unk_token_id not in of.tokens([pair.clean, pair.corrupt]).ids
        assert pair.clean.split() != pair.corrupt.split()
