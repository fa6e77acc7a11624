"""Tasks from JSON lines: what is read, and which line is refused."""

import json

import pytest

from cutaway import Refused, tasks
from cutaway.tasks import Pair

GOOD = {"clean": "The capital of Norway is", "corrupt": "The capital of Japan is", "answer": "Oslo", "foil": "Tokyo"}


def written(tmp_path, *lines):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return path


def test_lines_become_pairs(tmp_path, model):
    full = {**GOOD, "subject": "Norway", "group": "g", "answers": ["Oslo"], "foils": ["Tokyo", "Rome"], "joined": False}
    task = tasks.from_jsonl(written(tmp_path, GOOD, "", full), metric="prob", corruption="another country")
    assert task.pairs[0] == Pair(**GOOD)
    assert task.pairs[1].foils == ("Tokyo", "Rome")
    assert (task.name, task.metric, task.corruption) == ("mine", "prob", "another country")
    assert task.bind(model).answers.shape == (2,)


def test_a_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_text("\ufeff" + json.dumps(GOOD), encoding="utf-8")
    assert len(tasks.from_jsonl(path)) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ({k: GOOD[k] for k in ("clean", "answer")}, "no 'corrupt', 'foil'"),
        ({**GOOD, "answr": "x"}, "did you mean answer"),
        ({**GOOD, "answer": 4}, "'answer' is 4, not text"),
        ({**GOOD, "answers": "Oslo"}, "not a list of texts"),
        ({**GOOD, "joined": "yes"}, "not true or false"),
        ({**GOOD, "foil": "Oslo"}, "the foil is the same word"),
        ({**GOOD, "clean": ""}, "empty"),
    ],
)
def test_a_broken_line_is_refused_by_its_number(tmp_path, line, words):
    with pytest.raises(Refused) as error:
        tasks.from_jsonl(written(tmp_path, GOOD, "", line))
    assert "line 3" in error.value.what
    assert words in str(error.value)


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(Refused, match="cannot be read"):
        tasks.from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(Refused, match="no lines"):
        tasks.from_jsonl(written(tmp_path, "", " "))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(Refused, match="cannot be read"):
        tasks.from_jsonl(binary)
