"""Needles in texts: where they lie, what asks for them, and what around them says nothing of them."""

from __future__ import annotations

import json

import pytest

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.tasks.needles import DEPTHS, Asked, Needles, read_needles
from tests.conformance.subjects import corpus, miniworld, random_llama

ROWS = (Asked("Tom hid the ring in the garden.", "Where is the ring of Tom? It is near the", "garden"),
        Asked("Lucy said that the key is in the river.", "The key of Lucy is in the", "river"))  # fmt: skip


def of_file(tmp_path, *lines: str):
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    return path


def test_random_needles_stand_at_every_depth_and_nowhere_else():
    for model, front in ((miniworld(), 1), (random_llama(), 1), (ca.load("induction"), 0)):
        found = Needles(10, 20, 5).bind(model)
        rows = [ids[mask].tolist() for ids, mask in zip(found.tokens.ids, found.tokens.mask, strict=True)]
        for i, (row, start, end) in enumerate(zip(rows, found.start.tolist(), found.end.tolist(), strict=True)):
            needle, around = row[start:end], row[front:start] + row[end:-5]
            assert (end - start, len(around)) == (5, 20)
            assert len({*needle}) == 5
            assert not {*needle} & {*around}
            assert row[-5:] == needle
            asked = zip(found.key[i].tolist(), found.answer[i].tolist(), strict=True)
            assert [row[k] for k, _ in asked] == [row[a + 1] for a in found.answer[i]] == needle[2:]
            depth = (start - front) / 20
            assert abs(depth - DEPTHS[i % 5]) < (0.3 if model.world else 1e-6), "a sentence ends nearby"


def test_texts_are_a_worlds_own_or_the_users_and_needles_stand_between_sentences():
    model = miniworld()
    found = Needles(10, 24, 4).bind(model)
    said = model.tokenizer.decode(found.tokens.ids[0])
    names = {p.name.lower() for p in model.world.people} | {c.name.lower() for c in model.world.countries}
    assert {w.strip(".,") for w in said.lower().split()} & names
    mine = Needles(10, 24, 4, ca.tasks.as_prompts(corpus()[:6])).bind(random_llama())
    text = random_llama().tokenizer.decode(mine.tokens.ids[2][1 : mine.start[2]])
    assert text.strip().endswith(".")
    assert text.strip()[:6] in " ".join(corpus()[:6])


def test_sentences_are_asked_for_by_their_questions(tmp_path):
    lines = [json.dumps({k: getattr(a, k) for k in ("needle", "question", "answer")}) for a in ROWS]
    (tmp_path / "texts.txt").write_text("\n".join(corpus()[:4]), "utf-8")
    made = read_needles(10, 24, texts=tmp_path / "texts.txt", asked=of_file(tmp_path, *lines))
    assert made.asked == ROWS
    assert made.identity()["sentences"] == 2
    model = random_llama()
    found = made.bind(model)
    for i in range(4):
        row = found.tokens.ids[i][found.tokens.mask[i]].tolist()
        decoded = [model.tokenizer.decode(row[a:b]) for a, b in ((found.start[i], found.end[i]), (0, len(row)))]
        assert decoded[0].strip() == ROWS[i % 2].needle
        assert decoded[1].endswith(f"{ROWS[i % 2].question} {ROWS[i % 2].answer}")
        steps = int((found.key[i] >= 0).sum())
        assert row[found.key[i, 0] : found.key[i, 0] + steps] == row[-steps:]
        assert int(found.answer[i, 0]) == len(row) - steps - 1
    assert made.made is not None
    again = eval(made.made.python, {"ca": ca})
    assert (again, again.made) == (made, made.made)


def test_what_cannot_be_hidden_is_refused(tmp_path):
    llama = random_llama()
    for n, length, size in ((9, 8, 4), (10, 0, 4), (10, 8, 2)):
        with pytest.raises(Refused, match="needs two prompts"):
            Needles(n, length, size)
    with pytest.raises(Refused, match="neither special nor in the text"):
        Needles(10, 8, 60).bind(ca.load("induction"))
    with pytest.raises(Refused, match="those given have"):
        Needles(10, 40, 4, ca.tasks.as_prompts("Mary went.")).bind(llama)
    with pytest.raises(Refused, match="not in a row"):
        Needles(10, 8, 4, asked=(Asked("Tom has a ring.", "Tom has a", "key"),)).bind(llama)
    for lines, why in ((('{"needle": "a", "question": "b"}',), "line 1"), (("",), "no lines"), (("{",), "not JSON")):
        with pytest.raises(Refused, match=why):
            read_needles(asked=of_file(tmp_path, *lines))
    with pytest.raises(Refused, match="cannot be read"):
        read_needles(asked=tmp_path / "none.jsonl")
