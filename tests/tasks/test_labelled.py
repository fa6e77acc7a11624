"""Labelled texts and words: from files, and of the world of a model."""

import json

import pytest
import torch

from cutaway.core.refuse import Refused
from cutaway.tasks import Labelled, read_labelled, read_words
from tests.conformance.subjects import miniworld, random_llama


def written(path, rows):
    path.write_text("\n".join(json.dumps({"text": t, "label": label}) for t, label in rows), "utf-8")
    return path


def test_the_frequent_labels_of_a_file_are_concepts(tmp_path):
    rows = [(f"a {i}", ["a", "even"] if i % 2 == 0 else "b") for i in range(30)] + [("rare", "c")]
    found = read_labelled(written(tmp_path / "l.jsonl", rows), random_llama())
    assert found.concepts == ("a", "even", "b")
    assert found.shown[:2].tolist() == [[True, True, False], [False, False, True]]
    assert found.sizes() == {"texts": 31, "concepts": 3, "bytes": sum(len(t) for t, _ in rows)}
    other = Labelled(found.texts, found.concepts, ~found.shown)
    assert other.identity()["hash"] != found.identity()["hash"]


def test_a_line_may_be_a_prompt_and_a_response(tmp_path):
    rows = [{"prompt": f"say {i}:", "response": " yes" if i % 2 else " no", "label": i % 2 == 0} for i in range(24)]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    found = read_labelled(tmp_path / "l.jsonl", random_llama())
    assert found.texts[:2] == ("say 0: no", "say 1: yes")
    assert found.prompts[:2] == ("say 0:", "say 1:")
    whole = Labelled(found.texts, found.concepts, found.shown)
    assert whole.identity()["hash"] != found.identity()["hash"]
    rows[3] = {"text": "whole", "label": True}
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(Refused, match="23 of 24 lines have a prompt"):
        read_labelled(tmp_path / "l.jsonl", random_llama())
    rows[3] = {"prompt": [{"role": "user", "content": "Hello"}], "response": "yes", "label": True}
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    with pytest.raises(Refused, match="no chat template"):
        read_labelled(tmp_path / "l.jsonl", random_llama())


def test_of_two_labels_that_exclude_each_other_one_is_a_concept(tmp_path):
    rows = [(f"a {i}", i % 3 == 0) for i in range(60)]
    found = read_labelled(written(tmp_path / "l.jsonl", rows), random_llama())
    assert found.concepts == ("False",)
    assert found.shown[:, 0].tolist() == [i % 3 != 0 for i in range(60)]


def test_a_world_gives_its_facts_and_its_words():
    found = read_labelled("world", miniworld())
    person = miniworld().world.person[found.texts[0].split()[0]]
    assert [c for c, y in zip(found.concepts, found.shown[0].tolist(), strict=True) if y] == [
        person.facts["instrument"]
    ]
    assert len(found.concepts) == 4
    assert torch.equal(found.shown.sum(1), torch.ones(len(found.texts), dtype=torch.long))
    assert "banjo" in read_words("world", miniworld()).words


def test_what_cannot_be_read_is_refused(tmp_path):
    few = written(tmp_path / "few.jsonl", [("a", "x"), ("b", "y")])
    (tmp_path / "plain.txt").write_text("no labels", "utf-8")
    for source, why in [("world", "only models of the zoo"), (tmp_path / "none", "cannot be read"), (few, "12 texts"),
                        (tmp_path / "plain.txt", "line 1")]:  # fmt: skip
        with pytest.raises(Refused, match=why):
            read_labelled(source, random_llama())
    with pytest.raises(Refused, match="only models of the zoo"):
        read_words("world", random_llama())
    with pytest.raises(Refused, match="labelled texts"):
        Labelled(("one",), ("a", "b"), torch.zeros(1, 1, dtype=torch.bool))
