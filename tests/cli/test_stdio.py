"""Where a command writes: other encodings, closed, full and broken streams, widths of nothing, texts with a hyphen."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import pytest

from cutaway.cli import app, stdio
from cutaway.cli.shell import Reply, console, deliver
from cutaway.core.json_lines import written

ODD = "a\ud83d b\u2028c\u0085d né 🙂"


def through(monkeypatch, encoding: str, *words: str) -> tuple[int, bytes]:
    """Exit code and what is written to a stdout of an encoding."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    code = app.main(list(words))
    stream.flush()
    return code, raw.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_letters_that_an_encoding_lacks_are_replaced(monkeypatch, encoding):
    words = ("lenses", "logit_lens", "--task", "ioi", "--task-n", "1", "--samples", "1")
    code, out = through(monkeypatch, encoding, *words)
    assert code == 0
    assert "lenses.logit_lens" in out.decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_json_is_one_line_to_every_reader(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    deliver(Reply({"a": ODD, ODD: float("nan"), "b": [float("-inf")]}, lambda console: None), True)
    text = raw.getvalue().decode(encoding)
    assert len(text.splitlines()) == 1
    assert json.loads(text) == {"a": ODD, ODD: None, "b": [None]}
    assert len(written({"a": ODD}).splitlines()) == 1


def program(line: str) -> subprocess.CompletedProcess[bytes]:
    """One line of a shell in which `cutaway` is this program."""
    line = line.replace("cutaway", f"'{sys.executable}' -m cutaway")
    return subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("line", "code", "why"),
    [
        ("cutaway zoo list >&-", 2, b"stdout is closed"),
        ("cutaway zoo list --json >/dev/full", 2, b"stdout takes no more: No space left on device"),
        ("cutaway --help >/dev/full 2>&-", 2, b""),
        ("cutaway zoo list | true", 0, b""),
        ("COLUMNS=0 cutaway sites", 0, b""),
    ],
)
def test_a_stdout_that_takes_nothing_is_said_in_words(line, code, why):
    done = program(line)
    assert done.returncode == code, done.stderr
    assert why in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    if "COLUMNS" in line:
        assert max(map(len, done.stdout.decode().splitlines())) == 80


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (
            ["explain", "--", "-5 plus 3 is", "--effort", "quick"],
            ["explain", "--effort", "quick", "--", "-5 plus 3 is"],
        ),
        (["explain", "-5 plus 3 is", "--effort", "quick"], ["explain", "--effort", "quick", "--", "-5 plus 3 is"]),
        (["x", "--json", "-- is a dash", "--foil=-a b"], ["x", "--json", "--foil=-a b", "--", "-- is a dash"]),
        (["x", "--task", "-5 plus 3 is", "--n", "-3"], ["x", "--task=-5 plus 3 is", "--n", "-3"]),
        (["x", "a", "--", "--help", "b", "--k", "c"], ["x", "a", "--k", "c", "--", "--help", "b"]),
        (["x", "a b", "--k"], ["x", "a b", "--k"]),
    ],
)
def test_texts_may_begin_with_a_hyphen(words, meant):
    assert stdio.ordered(words) == meant


@pytest.mark.parametrize(
    ("words", "said", "unsaid"),
    [
        (["explain", "-foo"], ["no option -foo", "goes behind --"], []),
        (["explain", "x", "--efort", "quick"], ["did you mean --effort?"], []),
        (["explain", "a b", "--", "-5 plus 3 is"], ["-5 plus 3 is"], ["Did you mean"]),
    ],
)
def test_unknown_options_are_answered_with_known_ones(capsys, words: list[str], said: Any, unsaid: Any):
    assert app.main(words) == 2
    err = capsys.readouterr().err
    assert all(w in err for w in said)
    assert not any(w in err for w in unsaid)


@pytest.mark.parametrize(
    ("said", "ground"), [("0;15", "white"), ("15;default;0", "black"), ("7;8", "black"), ("", "black")]
)
def test_the_console_knows_the_ground_of_the_terminal(monkeypatch, said, ground):
    monkeypatch.setenv("COLORFGBG", said)
    assert console().get_style("ground").bgcolor.name == ground
