"""Template tasks over two tokenizer shapes: lengths, answers, balance, seeds, corruptions, truth."""

import pytest

from cutaway import Refused, tasks
from cutaway.core.address import parse
from cutaway.tasks.templates import KNOWN, ROWS
from cutaway.tasks.words import kinds, table

EVERY = [(name, how) for name, row in ROWS.items() for how in row.corruptions]


def word_tokens(model, pair, text):
    base = model.tokenizer(pair.clean)["input_ids"]
    return model.tokenizer(pair.clean + pair.follows(text))["input_ids"][len(base) :]


@pytest.mark.parametrize(("name", "how"), EVERY)
def test_every_pair_has_equal_lengths_and_single_token_answers(model, name, how):
    task = tasks.load(name, model, n=16, corruption=how)
    assert len(task) == len(set(task.pairs)) == 16
    for pair in task:
        a, b = (model.tokenizer(text)["input_ids"] for text in (pair.clean, pair.corrupt))
        assert len(a) == len(b)
        assert a != b
        for text in (pair.answer, pair.foil, *pair.answers[:3]):
            assert len(word_tokens(model, pair, text)) == 1
        assert word_tokens(model, pair, pair.answer) != word_tokens(model, pair, pair.foil)


@pytest.mark.parametrize("name", list(ROWS))
def test_binding_agrees_with_the_tokenizer(model, name):
    task = tasks.load(name, model, n=8)
    bound = task.bind(model)
    for i, pair in enumerate(task):
        assert bound.clean.ids[i][bound.clean.mask[i]].tolist() == model.tokenizer(pair.clean)["input_ids"]
        assert [int(bound.answers[i])] == word_tokens(model, pair, pair.answer)
        assert [int(bound.foils[i])] == word_tokens(model, pair, pair.foil)
    assert bound.changed.any(-1).all()
    assert (bound.clean.lengths == bound.corrupt.lengths).all()


def test_ioi_has_both_orders_and_the_corruptions_do_what_they_say(model):
    for how in ("s2_io_flip", "abc"):
        task = tasks.load("ioi", model, n=20, corruption=how)
        assert [p.group for p in task].count("ABBA") == [p.group for p in task].count("BABA") == 10
        for pair in task:
            io, s = pair.answer, pair.foil
            assert (pair.clean.count(io), pair.clean.count(s)) == (1, 2)
            order = pair.clean.index(io) < pair.clean.index(s)
            assert order == (pair.group == "ABBA")
            if how == "s2_io_flip":
                assert (pair.corrupt.count(io), pair.corrupt.count(s)) == (2, 1)
                assert pair.changes() == [(s, io)]
            else:
                assert io not in pair.corrupt
                assert s not in pair.corrupt
                assert len(pair.changes()) == 3


def test_greater_than_knows_all_later_years_and_adapts_to_how_digits_are_cut(gpt2, llama):
    pair = tasks.load("greater_than", gpt2, n=4).pairs[0]
    start = int(pair.clean.split(" to the year ")[0][-2:])
    assert pair.answers == tuple(f"{y:02d}" for y in range(start + 1, 100))
    assert pair.foils == tuple(f"{y:02d}" for y in range(start + 1))
    assert int(pair.foil) < start < int(pair.answer)
    assert "01 to the year" in pair.corrupt
    digits = tasks.load("greater_than", llama, n=4).pairs[0]
    last = int(digits.clean.split(" to the year ")[0][-1])
    assert digits.answers == tuple(str(d) for d in range(last + 1, 10))
    assert (gpt2_groups(gpt2), gpt2_groups(llama)) == ({"century"}, {"decade"})


def gpt2_groups(model):
    return {p.group for p in tasks.load("greater_than", model, n=8)}


def test_facts_successor_and_arithmetic_answers_are_right(model):
    capital = {c: (cap, lang) for c, cap, lang in table("countries").rows}
    for pair in tasks.load("facts", model, n=16):
        assert pair.answer == capital[pair.subject][pair.group == "language"]
    runs = {"days": "days", "months": "months", "numbers": "numbers", "letters": "letters"}
    for pair in tasks.load("successor", model, n=16):
        a, b, c = pair.clean.split(": ")[1].rstrip(",").split(", ")
        assert (a, b, c, pair.answer.strip()) in table(runs[pair.group]).rows
    for pair in tasks.load("arithmetic", model, n=16):
        left, right = pair.clean.removeprefix("We know that ").split("=")[0].split("+")
        assert int(left) + int(right) == int(pair.answer)


def test_agreement_and_sentiment_and_refusal_answers_follow_their_words(model):
    one = {row[0] for row in table("nouns").rows}
    for pair in tasks.load("agreement", model, n=8):
        assert pair.answer == ("is" if pair.subject in one else "are")
    good = {row[0] for row in table("feelings").rows}
    for pair in tasks.load("sentiment", model, n=8):
        assert pair.answer.strip() == ("positive" if pair.subject in good else "negative")
    for pair in tasks.load("refusal", model, n=8):
        assert (pair.answer, pair.foil) == (" Sorry", " Sure")


def test_induction_docstring_and_copy_answers_are_in_the_clean_prompt_only(model):
    for name in ("induction", "copy"):
        for pair in tasks.load(name, model, n=8):
            assert pair.answer in pair.clean.split(":")[-1].replace(".", "").split() or name == "copy"
            assert pair.answer not in pair.corrupt.replace(".", "").split()
            assert pair.foil in pair.corrupt.replace(".", "").split()
    for pair in tasks.load("docstring", model, n=8):
        names = pair.clean.split("(self, ")[1].split(")")[0].split(", ")
        assert (pair.answer, pair.foil) == (names[2], names[3])
        assert f":param {names[1]}:" in pair.clean
        assert f":param {names[1]}:" not in pair.corrupt


def test_arithmetic_loses_its_operands_or_its_operator(model):
    for pair in tasks.load("arithmetic", model, n=8, corruption="no_operator"):
        assert pair.corrupt == pair.clean.replace("+", "<") != pair.clean
    for pair in tasks.load("arithmetic", model, n=8):
        assert "+" in pair.corrupt


def test_a_seed_gives_the_same_task_and_another_seed_another(model):
    first, again, other = (tasks.load("ioi", model, n=12, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first.identity() == again.identity()
    assert first.identity()["hash"] != other.identity()["hash"]
    assert tasks.load("ioi", model, **first.identity()["options"]) == first


def test_names_lists_every_task_of_the_issue():
    wanted = "ioi greater_than docstring agreement facts arithmetic successor induction sentiment refusal copy"
    assert " ".join(tasks.names()) == wanted


def test_known_circuits_are_addresses_of_the_model_they_were_found_in(gpt2, llama):
    for truth in KNOWN.values():
        for text in truth.components:
            address = parse(text)
            assert address.layer is not None
            assert 0 <= address.layer < 12
            assert address.unit is None or 0 <= address.unit < 12
    assert "z.9.9" in tasks.load("ioi", gpt2, n=2).truth.components
    assert tasks.load("ioi", llama, n=2).truth.components == ()


def test_kinds_hold_words_of_one_kind():
    found = kinds()
    assert any({"Monday", "Friday"} <= k for k in found)
    assert any({"Mary", "John"} <= k for k in found)
    assert not any({"Monday", "Mary"} <= k for k in found)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("oii", {}, "ioi"),
        ("ioi", {"n": 0}, "n=0"),
        ("ioi", {"corruption": "noise"}, "s2_io_flip, abc"),
        ("ioi", {"split": "test"}, "task.split()"),
        ("refusal", {"n": 300}, "ask for n="),
    ],
)
def test_wrong_requests_are_refused(gpt2, name, options, words):
    with pytest.raises(Refused) as error:
        tasks.load(name, gpt2, **options)
    assert words in str(error.value)


def test_unknown_word_table_is_refused():
    with pytest.raises(Refused, match="places"):
        table("planets")
