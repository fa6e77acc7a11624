"""Requests: the layouts of files, what a world gives, and what is refused with its line."""

import json

import pytest

from cutaway.core.refuse import Refused
from cutaway.core.subject import subject
from cutaway.editing import Probe, Request, Requests, from_jsonl, from_world, open_requests
from tests.conformance.subjects import miniworld, random_llama

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is", "subject": "Danielle Darrieux",
        "target_new": {"str": "English"}, "target_true": {"str": "French"},
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The native language of Montesquieu is", "Raymond Barre spoke"],
}  # fmt: skip
ZSRE = {
    "subject": "Watts Humphrey", "src": "What university did Watts Humphrey attend?", "pred": "Trinity College",
    "rephrase": "Where did Watts Humphrey study?", "alt": "University of Michigan",
    "answers": ["Illinois Institute of Technology"], "loc": "nq question: who played desmond doss father",
    "loc_ans": "Hugo Weaving", "cond": "…",
}  # fmt: skip
MQUAKE = {
    "case_id": 1,
    "requested_rewrite": [
        {"prompt": "{} is married to", "subject": "Carl Sagan", "question": "Who is Carl Sagan married to?",
         "target_new": {"str": "James Heckman"}, "target_true": {"str": "Ann Druyan"}},
        {"prompt": "{} is a citizen of", "subject": "James Heckman",
         "target_new": {"str": "France"}, "target_true": {"str": "America"}},
    ],
    "questions": ["What country is Carl Sagan's spouse from?"], "answer": "America", "new_answer": "France",
}  # fmt: skip
OWN = {"subject": "Norway", "prompt": "The capital of Norway is", "new": "Bergen", "old": "Oslo",
       "paraphrase": ["Norway's capital is"], "same_subject": [["People in Norway speak", "Norwegian"]]}  # fmt: skip


def written(tmp_path, *lines):
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


def test_every_layout_is_read_by_its_keys(tmp_path):
    found = from_jsonl(written(tmp_path, COUNTERFACT, "", ZSRE, MQUAKE, OWN))
    counterfact, zsre, one, two, own = found
    assert counterfact.prompt == "The mother tongue of Danielle Darrieux is"
    assert (counterfact.new, counterfact.old, counterfact.group) == ("English", "French", "7")
    assert [(p.kind, p.answer) for p in counterfact.probes] == [
        ("paraphrase", "English"), ("neighbourhood", "French"), ("neighbourhood", "French"),
    ]  # fmt: skip
    assert (zsre.old, zsre.probes[1].prompt) == ("Illinois Institute of Technology", "who played desmond doss father")
    assert one.group == two.group == "1"
    assert one.of_kind("portability")[0].answer == two.new == "France"
    assert not two.probes
    assert own.of_kind("same_subject") == (Probe("same_subject", "People in Norway speak", "Norwegian"),)
    assert len(from_jsonl(written(tmp_path, COUNTERFACT, ZSRE), n=1)) == 1


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "line 2 .* not JSON|line 2"),
        ("[1]", "line 2"),
        ({"prompt": "x"}, "keys 'prompt' are those of no layout"),
        ({**COUNTERFACT, "requested_rewrite": {"subject": "x"}}, "line 2.*|no 'prompt'"),
        ({**COUNTERFACT, "paraphrase_prompts": [3]}, "3 is no text"),
        ({**OWN, "subject": "Sweden"}, "'Sweden' is not in the prompt"),
        ({**OWN, "new": "Oslo"}, "is the old one"),
        ({**OWN, "colour": "red"}, "no 'colour'"),
        ({**MQUAKE, "requested_rewrite": []}, "list of rewrites is empty"),
    ],
)
def test_a_line_without_a_request_is_refused_with_its_number(line, word, tmp_path):
    with pytest.raises(Refused, match=word) as refused:
        from_jsonl(written(tmp_path, OWN, line))
    assert "line 2" in refused.value.what


def test_a_world_asks_for_false_objects_with_probes_of_every_kind():
    model = miniworld()
    found, again = (from_world(model, 40, seed=3) for _ in range(2))
    assert found.identity() == again.identity() != from_world(model, 40, seed=4).identity()
    people = {p.name: p for p in model.world.people}
    kinds = set()
    for r in found:
        person = people[r.subject]
        assert r.old == person.facts[r.group]
        assert r.new != r.old
        kinds |= {p.kind for p in r.probes}
        assert all(p.answer == r.old and r.subject not in p.prompt for p in r.of_kind("neighbourhood"))
        assert all(p.answer in person.facts.values() for p in r.of_kind("same_subject"))
    assert kinds == {"paraphrase", "neighbourhood", "same_subject", "name_overlap", "portability"}


def test_requests_open_from_flags_and_what_cannot_be_is_refused(tmp_path):
    row, model = subject("requests"), miniworld()
    flags = {"requests": "facts", "requests_n": 3, "requests_seed": 5}
    assert row.open(flags, {"model": model}).identity() == from_world(model, 3, 5).identity()
    assert len(row.example({"model": random_llama()})) == 2
    for call, word in [
        (lambda: open_requests(model, "nobody"), "neither"),
        (lambda: from_world(random_llama()), "none"),
        (lambda: from_world(model, 10_000), "facts about people"),
        (lambda: from_jsonl(tmp_path / "no.jsonl"), "cannot be read"),
        (lambda: from_jsonl(written(tmp_path, OWN), n=2), "it has 1"),
        (lambda: from_jsonl(written(tmp_path, "")), "no lines"),
        (lambda: Requests(()), "there is none"),
        (lambda: Requests(tuple(Request("a", "a is", x) for x in "bc")), "two of them"),
        (lambda: Probe("rumour", "a", "b"), "no such kind"),
    ]:
        with pytest.raises(Refused, match=word):
            call()
