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


def test_answers_of_several_tokens_are_read(tmp_path, model):
    lines = [GOOD, {**GOOD, "answer": "Oslo Tokyo", "foil": "Paris Rome Oslo"}]
    bound = tasks.from_jsonl(written(tmp_path, *lines)).bind(model)
    assert bound.clean.tails == ((1, 1), (2, 3))
    values = model.measure(bound.clean, bound.measure)
    single = tasks.from_jsonl(written(tmp_path, GOOD)).bind(model)
    assert float(values[0]) == pytest.approx(float(model.measure(single.clean, single.measure)), abs=1e-4)


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


def test_only_a_line_feed_ends_a_line(tmp_path):
    odd = {**GOOD, "clean": "one\u2028two\u0085three\x0cfour\x1cfive\u2029"}
    path = tmp_path / "odd.jsonl"
    lines = [json.dumps(odd, ensure_ascii=False), "  ", json.dumps(GOOD)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
    assert [p.clean for p in tasks.from_jsonl(path)] == [odd["clean"], GOOD["clean"]]


def test_escaped_pairs_of_surrogates_are_characters(tmp_path):
    line = json.dumps({**GOOD, "clean": "a \U0001d540 b \\ud83d"})
    assert tasks.from_jsonl(written(tmp_path, line)).pairs[0].clean == "a \U0001d540 b \\ud83d"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"clean": "a", "clean": "b", "corrupt": "c", "answer": "d", "foil": "e"}', "'clean' twice"),
        ('{"clean": "a \\ud83d b", "corrupt": "c", "answer": "d", "foil": "e"}', "holds \\ud83d, half of"),
        ('{"clean": "a", "corrupt": "c", "answer": "d", "foil": "e", "foils": ["\\udc00"]}', "holds \\udc00, half of"),
        ('{"clean": NaN}', "NaN is no number"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_what_a_reader_would_lose_is_refused_by_its_number(tmp_path, line, words):
    with pytest.raises(Refused) as error:
        tasks.from_jsonl(written(tmp_path, GOOD, line))
    assert "line 2" in error.value.what
    assert words in error.value.why


def test_the_first_pairs_of_a_file(tmp_path):
    path = written(tmp_path, *({**GOOD, "clean": f"{a} is"} for a in "abc"))
    assert [p.clean for p in tasks.from_jsonl(path, n=2)] == ["a is", "b is"]
    for n in (0, 4):
        with pytest.raises(Refused, match="ask for 1 to 3"):
            tasks.from_jsonl(path, n=n)
