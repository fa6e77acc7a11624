"""`cutaway harvest`: text to shards in one command, as text and as JSON, with refusals as exit codes."""

import json
import shlex

import pytest

from cutaway.cli import main
from cutaway.streams import Shards


def run(capsys, *words):
    """Exit code, stdout and stderr of one command line."""
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [{"body": f"mary gave {n} apples to john at the market ."} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return path


def test_text_becomes_shards_and_a_second_call_finds_them(capsys, tmp_path, text):
    out = tmp_path / "out"
    words = (
        "--field body --sites resid_post.1 --sites z.* --context 32 --tokens 300 --dtype bfloat16 --sinks 0 --seed 3"
    )
    line = ["harvest", "--text", str(text), "--out", str(out), *words.split()]
    code, said, err = run(capsys, *line, "--json")
    assert (code, err) == (0, "")
    manifest, shards = json.loads(said), Shards(out)
    assert manifest.pop("folder") == str(out)
    command = manifest.pop("command")
    assert manifest == shards.manifest
    assert (shards.tokens, manifest["dtype"], manifest["seed"]) == (300, "bfloat16", 3)
    assert list(shards.widths) == ["resid_post.1", *(f"z.{i}" for i in range(6))]
    assert len(next(shards.stream())) == 300
    code, said, _ = run(capsys, *shlex.split(command)[1:])
    assert code == 0
    assert f"again: {command}" in said
    assert "300 tokens of miniworld" in said
    assert "resid_post.1  width 128, bfloat16" in said


def test_a_world_has_text_of_its_own(capsys, tmp_path):
    line = ["harvest", "--sites", "embed", "--out", str(tmp_path / "out"), "--context", "32"]
    code, _, err = run(capsys, *line)
    assert code == 2
    assert "no end" in err
    code, said, _ = run(capsys, *line, "--tokens", "100", "--json")
    assert code == 0
    assert json.loads(said)["documents"]["kind"] == "world documents"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--sites", "resid_post.9"], "outside this model"),
        (["--sites", "pattern.1"], "no vector a token"),
        (["--sites", "z.1", "--field", "title"], "no field 'title'"),
        (["--sites", "z.1", "--context", "1000"], "takes 256 tokens"),
        (["--sites", "z.1", "--dtype", "int8"], "not kept"),
    ],
)
def test_what_cannot_be_harvested_is_refused(capsys, tmp_path, text, more, words):
    more = more if "--field" in more else [*more, "--field", "body"]
    code, out, err = run(capsys, "harvest", "--text", str(text), "--out", str(tmp_path / "o"), *more)
    assert (code, out) == (2, "")
    assert words in err
