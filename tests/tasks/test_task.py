"""Tasks, binding, spans, buckets, narrowing, and what is refused."""

import pytest
import torch

import cutaway as ca
from cutaway import Refused, tasks
from cutaway.core.record import counting
from cutaway.models.model import Model
from cutaway.tasks import Pair, Task
from cutaway.tasks.answers import continuation
from tests.models.tiny import build

NORWAY = Pair("The capital of Norway is", "The capital of Japan is", "Oslo", "Tokyo", "Norway", "a")
GREECE = Pair(
    "We know that the capital of Greece is", "We know that the capital of Egypt is", "Athens", "Cairo", None, "b"
)


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("gave it to", "Mary", " Mary"),
        ("gave it to", " Mary", " Mary"),
        ("gave it to ", "Mary", "Mary"),
        ("to the year 17", "42", "42"),
        ("the year", "42", " 42"),
        ("2 + 2 =", "4", " 4"),
        ("he said (", "yes", "yes"),
        ("the end", ".", "."),
        ("首都は", "東京", "東京"),
        ("the end", "\n", "\n"),
    ],
)
def test_continuation_puts_a_space_between_words_only(prompt, answer, expected):
    assert continuation(prompt, answer) == expected
    assert continuation(prompt, answer, joined=True) == answer


def test_identity_and_sizes():
    task = Task("t", (NORWAY, GREECE), corruption="another country", options={"n": 2})
    assert task.sizes() == {"prompts": 2}
    identity = task.identity()
    assert set(identity) == {"name", "hash", "prompts", "metric", "corruption", "options"}
    assert identity["hash"] != task.take(1).identity()["hash"]
    assert identity["hash"] != Task("t", (NORWAY, GREECE), "prob").identity()["hash"]
    assert identity["hash"] == Task("other", (NORWAY, GREECE)).identity()["hash"]


def test_take_and_split(model):
    task = tasks.load("ioi", model, n=20)
    assert task.take(3).pairs == task.pairs[:3]
    first, second = task.split(0.5, seed=1)
    assert {p.clean for p in first}.isdisjoint(p.clean for p in second)
    assert set(first.pairs) | set(second.pairs) == set(task.pairs)
    assert [p.group for p in first].count("ABBA") == [p.group for p in first].count("BABA")
    assert task.split(0.5, seed=1) == (first, second)
    assert task.split(0.5, seed=2) != (first, second)
    with pytest.raises(Refused, match="empty"):
        task.take(1).split()


def test_split_keeps_equal_clean_prompts_together():
    pairs = [Pair("a b", f"a {c}", "x", "y") for c in "cdef"] + [Pair("b b", "b c", "x", "y")]
    for seed in range(4):
        first, second = Task("t", tuple(pairs)).split(0.5, seed)
        assert {p.clean for p in first}.isdisjoint(p.clean for p in second)


def test_changes_name_the_replaced_words():
    assert NORWAY.changes() == [("Norway", "Japan")]


def test_bound_metric_measures_the_last_position(model):
    bound = Task("t", (NORWAY, GREECE)).bind(model)
    assert bound.unit == "logits"
    with counting() as spent:
        logits = model.run_last(bound.clean)
    assert spent.forwards == 2
    whole = model.run(bound.clean)
    for i in range(2):
        last = whole[i, int(bound.clean.last[i])]
        expected = last[bound.answers[i]] - last[bound.foils[i]]
        assert torch.allclose(bound.metric(logits)[i], expected, atol=1e-4)


def test_metric_is_differentiable_through_the_model(model):
    bound = Task("t", (NORWAY, GREECE)).bind(model)
    values, slopes, _ = model.gradients(bound.clean, ["resid_post.0"], bound.metric)
    assert torch.allclose(values, bound.metric(model.run_last(bound.clean)), atol=1e-4)
    assert slopes["resid_post.0"].abs().sum() > 0


def test_kl_compares_with_the_clean_run(model):
    bound = Task("t", (NORWAY, GREECE), "kl").bind(model)
    assert torch.allclose(bound.metric(model.run_last(bound.clean)), torch.zeros(2), atol=1e-4)
    assert (bound.metric(model.run_last(bound.corrupt)) < 0).all()
    for part in bound.buckets():
        assert torch.allclose(part.metric(model.run_last(part.clean)), torch.zeros(1), atol=1e-4)


def test_sets_of_answers_are_measured_together(gpt2):
    bound = tasks.load("greater_than", gpt2, n=4).bind(gpt2)
    logits = gpt2.run_last(bound.clean)
    p = logits.softmax(-1)
    for i, pair in enumerate(bound.pairs):
        ids = {y: gpt2.tokenizer(pair.clean + y)["input_ids"][-1] for y in (*pair.answers, *pair.foils)}
        expected = sum(p[i, ids[y]] for y in pair.answers) - sum(p[i, ids[y]] for y in pair.foils)
        assert torch.allclose(bound.metric(logits)[i], expected, atol=1e-5)


def test_spans(model):
    bound = Task("t", (NORWAY, GREECE)).bind(model)
    subject, changed, last = (bound.span(n) for n in ("subject", "changed", "last"))
    assert torch.equal(subject[0], changed[0])
    assert not subject[1].any()
    assert (last.sum(-1) == 1).all()
    assert [int(r.nonzero()) for r in last] == bound.clean.last.tolist()
    with pytest.raises(Refused, match="changed, subject, last"):
        bound.span("verb")


def test_the_subject_span_is_the_mention_that_the_corruption_changes(model):
    bound = tasks.load("ioi", model, n=8).bind(model)
    assert torch.equal(bound.span("subject"), bound.changed)


def test_a_subject_that_is_not_in_the_prompt_is_refused(model):
    bound = Task("t", (Pair("The king is", "The queen is", "here", "there", "Norway"),))
    with pytest.raises(Refused, match="Norway"):
        Task("t", (Pair(NORWAY.clean, NORWAY.corrupt, "Oslo", "Tokyo", "Sweden"),)).bind(model).span("subject")
    assert bound.pairs[0].subject == "Norway"


def test_buckets_have_no_padding_and_lose_nothing(model):
    whole = Task("t", (GREECE, NORWAY, GREECE)).bind(model)
    assert whole.clean.padded
    parts = whole.buckets()
    assert [len(p) for p in parts] == [1, 2]
    assert not any(p.clean.padded or p.corrupt.padded for p in parts)
    values = torch.cat([p.metric(model.run_last(p.clean)) for p in parts])
    assert torch.allclose(values, whole.metric(model.run_last(whole.clean))[[1, 0, 2]], atol=1e-4)


def test_unequal_lengths_are_refused_with_the_prompts(model):
    pair = Pair("The capital of Norway is", "The capital of the Norway is", "Oslo", "Tokyo")
    with pytest.raises(Refused) as error:
        Task("t", (NORWAY, pair)).bind(model)
    assert "capital of the Norway" in error.value.what
    assert "tokens" in error.value.why


def test_answers_of_several_tokens_count_whole(model):
    task = Task("t", (Pair(NORWAY.clean, NORWAY.corrupt, "Oslo Tokyo", "Tokyo"),))
    bound = task.bind(model)
    assert bound.clean.tails == ((2, 1),)
    assert bound.unit == "nats"
    assert model.text.token_texts(bound.answers)[0].strip() == "Oslo"
    with pytest.raises(Refused, match="one next token") as error:
        Task("t", task.pairs, "rank").bind(model)
    assert "narrow" in str(error.value)


def test_a_trailing_space_is_refused_where_it_merges_with_the_answer(gpt2):
    with pytest.raises(Refused, match="merge"):
        Task("t", (Pair("The capital of Norway is ", "The capital of Japan is ", "Oslo", "Tokyo"),)).bind(gpt2)


def test_narrow_takes_the_first_token_that_differs(model):
    task = Task("t", (Pair("We know that the king saw", "We know that the queen saw", "Mary Tom", "Mary Paul"), NORWAY))
    narrow = task.narrow(model)
    pair = narrow.pairs[0]
    assert (pair.clean, pair.corrupt) == ("We know that the king saw Mary", "We know that the queen saw Mary")
    assert (pair.answer, pair.foil) == (" Tom", " Paul")
    assert narrow.pairs[1] == NORWAY
    bound = narrow.bind(model)
    assert model.text.token_texts(bound.answers[:1])[0].strip() == "Tom"
    first = Task("t", (Pair("the king saw", "the queen saw", "Mary Tom", "Paul Mary"),)).narrow(model).pairs[0]
    assert (first.clean, first.answer, first.foil) == ("the king saw", " Mary", " Paul")
    with pytest.raises(Refused, match="beginning"):
        Task("t", (Pair("the king saw", "the queen saw", "Mary", "Mary Tom"),)).narrow(model)


def test_encoders_are_refused(gpt2):
    with pytest.raises(Refused, match="encoder"):
        Task("t", (NORWAY,)).bind(Model(build("bert"), gpt2.tokenizer, "bert"))


def test_answers_that_part_inside_a_letter_are_refused(gpt2):
    with pytest.raises(Refused, match="inside a letter"):
        Task("t", (Pair("the king saw", "the queen saw", "東", "棱"),)).narrow(gpt2)


def test_equal_tokens_are_refused():
    with pytest.raises(Refused, match="foil"):
        Pair("a", "b", "Oslo", " Oslo")
    with pytest.raises(Refused, match="empty"):
        Pair("a", "b", "", "Oslo")
    with pytest.raises(Refused, match="no prompts"):
        Task("t", ())
    with pytest.raises(Refused, match="metric"):
        Task("t", (NORWAY,), "best")


def test_answer_and_foil_of_one_token_in_another_case_are_refused(worldly):
    with pytest.raises(Refused, match="same token"):
        Task("t", (Pair("The capital of Norway is", "The capital of Japan is", "Oslo", "oslo"),)).bind(worldly)


def test_pairs_may_be_a_list():
    pair = ca.Pair("Mary and John", "Anna and John", "Mary", "Anna")
    assert ca.Task("mine", [pair]) == ca.Task("mine", (pair,))
    assert isinstance(ca.Task("mine", [pair]).pairs, tuple)
