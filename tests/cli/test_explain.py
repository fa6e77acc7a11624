"""`cutaway explain` as people type it: wrong input is refused in words, right input answered, nothing half-written."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser

import pytest

import cutaway as ca
from cutaway.cli import app
from cutaway.cli import explain as command
from cutaway.cli.subjects import load_model
from cutaway.dictionaries.opening import open_dictionary
from tests.conformance import subjects

CAPITAL = "The capital of Norway is"


@pytest.fixture(autouse=True)
def _one_load(monkeypatch):
    """The bundled model is loaded once for all tests here; every other name goes the real way."""
    real = load_model
    monkeypatch.setattr(
        command, "load_model", lambda name, *rest: subjects.miniworld() if name == "miniworld" else real(name, *rest)
    )


def run(capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `cutaway explain` with these words."""
    code = app.main(["explain", *words])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *words: str) -> str:
    """The refusal of a call, held to its form: exit code 2, nothing on stdout, three lines on stderr."""
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    said = err[err.index("refused: ") :].strip()
    assert re.search(r"\n  why: .+", said)
    assert re.search(r"\n  instead: .+", said)
    assert "Traceback" not in err
    return said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([""], "it is empty"),
        (["  \n "], "it is empty"),
        (["..."], "no word of it has a replacement"),
        (["🙂"], "no word of it has a replacement"),
        (["日本の首都は"], "no word of it has a replacement"),
        ([CAPITAL + " "], "take the space off its end"),
        ([CAPITAL, "--target", "oslo paris", "--foil", "oslo"], "beginning of the other"),
        (["--chat", "Hello"], "no chat template"),
        ([CAPITAL, "--target", ""], "no token"),
        ([CAPITAL, "--target", "oslo", "--foil", "oslo"], "same token"),
        ([CAPITAL, "--foil", "oslo"], "less likely"),
        ([CAPITAL, "--corrupt", "The capital is"], "tokens"),
        ([CAPITAL, "--corrupt", CAPITAL], "does not change"),
        ([CAPITAL, "--corrupt", ""], "it is empty"),
        (["word " * 500], "the model takes 256"),
        (["word " * 40_000], "the model takes 256"),
        ([CAPITAL, "--effort", "huge"], "quick"),
        ([CAPITAL, "--seed", "-1"], "outside"),
        ([CAPITAL, "--seed", "9" * 30], "outside"),
        ([CAPITAL, "--seed", "one"], "one"),
        ([CAPITAL, "surplus"], "surplus"),
        ([CAPITAL, "--modle", "x"], "--modle"),
        ([CAPITAL, "--model", "no_such_model"], "no such zoo model"),
        (["--model", "gpt2"], "only the bundled model knows"),
        ([CAPITAL, "--model", "miniwrld/"], "miniwrld"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_words(capsys, words, says):
    assert says in refused(capsys, *words)


@pytest.mark.parametrize("where", ["no/such/folder/r.html", ".", "file/r.html"])
def test_a_report_that_cannot_be_written_is_refused_before_any_work(capsys, tmp_path, monkeypatch, where):
    (tmp_path / "file").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_model", lambda *a: pytest.fail("the model was loaded first"))
    assert "no file can be written there" in refused(capsys, CAPITAL, "--html", where)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def told():
    """An explanation made once."""
    from cutaway.suites.explain import explain

    return explain(subjects.miniworld(), CAPITAL, effort="quick")


def test_a_disk_that_fills_leaves_the_old_report(capsys, tmp_path, monkeypatch, told):
    monkeypatch.setattr("cutaway.suites.explain.explain", lambda *a, **k: told)
    target = tmp_path / "r.html"
    target.write_text("old")

    def full(*a: object, **k: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cutaway.core.files.os.replace", full)
    said = refused(capsys, CAPITAL, "--effort", "quick", "--html", str(target))
    assert "No space left" in said
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_a_chat_is_shown_as_what_each_role_says():
    chat = "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\n"
    assert command._answer(chat, "yes").plain == "\nuser: Is it?\nassistant: yes"
    assert command._answer(f"{chat}It is", "so").plain == "\nuser: Is it?\nassistant: It is so"
    assert command._answer("It is", "so").plain == "\nIt is so"


@pytest.mark.parametrize(("prompt", "begins"), [(CAPITAL, f"\n{CAPITAL} oslo\n"), ("", "")])
def test_a_terminal_shows_the_answer_first(prompt, begins):
    """Of a prompt that will be refused nothing is shown; off a terminal, as in a pipe, neither."""
    from rich.console import Console

    out = io.StringIO()
    for terminal in (False, True):
        command.Shown(Console(file=out, force_terminal=terminal, no_color=True, width=80)).begin(
            subjects.miniworld(), prompt, None
        )
        assert re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()) == (begins if terminal else "")


def test_an_interrupted_question_keeps_what_was_found(capsys, tmp_path, monkeypatch):
    def interrupted(*a: object, **k: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cutaway.suites.explain.lenses.logit_lens", interrupted)
    target = tmp_path / "r.html"
    code, out, _ = run(capsys, CAPITAL, "--effort", "quick", "--html", str(target))
    assert code == 130
    assert "Restored one at a time" in " ".join(out.split())
    assert out.count("not tokyo") <= 1, "each part is shown once"
    assert "Interrupted" in out
    assert "Which heads carry it" in target.read_text("utf-8")
    assert "Where along depth" not in target.read_text("utf-8")
    code, out, _ = run(capsys, CAPITAL, "--effort", "quick", "--json")
    assert code == 130
    assert json.loads(out)["complete"] is False


def test_an_answer_of_several_tokens_is_explained(capsys):
    code, out, _ = run(capsys, CAPITAL, "--target", "oslo paris", "--effort", "quick", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["answer"].strip() == "oslo paris"
    assert "oslo paris" in said["command"]
    assert any("log P(oslo paris)" in text for text in (said["corruption"],))


def test_what_a_user_says_is_put_in_the_models_template(capsys, tmp_path):
    model = subjects.chatting()
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    told = "Mary and John went to the store, John gave a drink to Mary."
    asked = ["--chat", told, "Then John gave the drink to", "--target", "Mary", "--foil", "John"]
    code, out, err = run(capsys, *asked, "--model", str(tmp_path), "--effort", "quick", "--json")
    assert code == 0, err
    said = json.loads(out)
    messages = [{"role": "user", "content": told}, {"role": "assistant", "content": "Then John gave the drink to"}]
    assert said["prompt"] == ca.chat(model, messages)
    words = shlex.split(said["command"])
    assert words[words.index("--chat") + 1] == told
    assert "Then John gave the drink to" in words
    assert "<|im_start|>" not in said["command"]


def test_a_refused_question_writes_no_report(capsys, tmp_path):
    refused(capsys, CAPITAL, "--target", "", "--html", str(tmp_path / "r.html"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["empty", "no weights", "cut weights", "bad json", "pickle", "remote code"])
def test_a_broken_folder_is_refused(capsys, tmp_path, broken):
    config = subjects.config().to_json_string()
    files = {
        "empty": {}, "no weights": {"config.json": config}, "bad json": {"config.json": "{", "model.safetensors": "x"},
        "cut weights": {"config.json": config, "model.safetensors": "x" * 20},
        "pickle": {"config.json": config, "pytorch_model.bin": "x"},
        "remote code": {"config.json": '{"auto_map": {"AutoModel": "x.Y"}}', "model.safetensors": "x"},
    }[broken]  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert str(tmp_path) in refused(capsys, CAPITAL, "--model", str(tmp_path))


def test_a_refusal_with_json_is_json_on_stderr(capsys):
    code, out, err = run(capsys, "", "--json")
    assert (code, out) == (2, "")
    assert set(json.loads(err)["refused"]) == {"what", "why", "instead"}


class Reader(HTMLParser):
    """Tags and attributes of a page, and whether everything is closed."""

    void = frozenset(
        {"meta", "br", "hr", "img", "input", "link", "rect", "line", "path", "circle", "polyline", "polygon"}
    )

    def __init__(self, page: str):
        super().__init__()
        self.scripts: list[str] = []
        self.links: list[tuple[str, str, str]] = []
        self.here: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.here.append(tag)
        self.links += [
            (tag, n, v or "") for n, v in attrs if n in ("src", "href", "srcset", "data", "action", "poster")
        ]
        self.links += [(tag, n, v or "") for n, v in attrs if n.startswith("on")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.here and self.here[-1] == "script" and self.scripts:
            self.scripts[-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self.here and self.here.pop() != tag:
            pass


def check_page(page: str) -> None:
    """One file that asks for nothing: no address, no outside reference, one script, a policy that forbids the rest."""
    read = Reader(page)
    assert len(read.scripts) == 1
    assert all(tag == "a" and name == "href" and value.startswith("#") for tag, name, value in read.links), read.links
    assert "default-src 'none'" in page
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.S))
    assert not re.search(r"url\((?!['\"]?data:)|@import", styles)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|EventSource|sendBeacon", read.scripts[0])


def test_strange_text_is_answered_and_stays_text(capsys, tmp_path):
    prompt = "<script>alert(1)</script> & 🙂 né ist"
    target = tmp_path / "r.html"
    code, out, err = run(capsys, prompt, "--effort", "quick", "--html", str(target), "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["prompt"] == prompt
    page = target.read_text("utf-8")
    check_page(page)
    assert "<script>alert" not in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html"]
    assert shlex.split(data["command"])[:3] == ["cutaway", "explain", prompt]


def test_the_terminal_shows_every_claim_that_is_made_and_names_those_that_are_not(capsys, monkeypatch, told):
    monkeypatch.setattr("cutaway.suites.explain.explain", lambda *a, **k: told)
    found = json.loads(run(capsys, CAPITAL, "--effort", "quick", "--json")[1])
    code, out, _ = run(capsys, *shlex.split(found["command"])[2:])
    assert code == 0
    flat = " ".join(out.split())
    for claim in found["claims"]:
        assert not claim["supported"] or " ".join(claim["text"].split()) in flat
        assert claim["supported"] or claim["about"] in flat
    assert f"{CAPITAL} oslo" in flat
    assert found["command"] in flat
    assert "agrees with the known truth" in flat
    assert all(v["agrees"] for v in found["verdicts"])


def test_the_program_itself_keeps_stdout_for_json(tmp_path, told):
    target = tmp_path / "r.html"
    code = "import sys; from cutaway.cli import main; sys.exit(main())"
    words = ["explain", CAPITAL, "--effort", "quick", "--html", str(target), "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["summary"] == told.summary, "another process, the same numbers in the same words"
    assert done.stdout.count("\n") == 1
    assert (data["answer"], data["html"]) == ("oslo", str(target))
    page = target.read_text("utf-8")
    check_page(page)
    for line in data["summary"]:
        assert line.replace("'", "&#x27;") in page.replace("&quot;", '"').replace("&nbsp;", " "), line
    assert data["command"].startswith("cutaway explain")
    json.dumps(data, allow_nan=False)


def test_the_graph_of_the_sentence_is_traced_and_tested_on_request(capsys, tmp_path):
    page = tmp_path / "why.html"
    words = [CAPITAL, "--effort", "quick", "--graph", "miniworld/transcoders"]
    code, out, _ = run(capsys, *words, "--json", "--html", str(page))
    said, text = json.loads(out), page.read_text("utf-8")
    assert (code, {"graph", "removed"} - said["own"].keys()) == (0, set())
    assert shlex.split(said["command"])[2:] == words
    task = ca.tasks.from_sentence(subjects.miniworld(), CAPITAL)
    graph = ca.graphs.trace(subjects.miniworld(), task, open_dictionary("miniworld/transcoders"))
    edges = ca.graphs.prune(graph).weight.tolist()
    assert said["own"]["graph"]["fields"]["weight"]["values"] == pytest.approx(edges, rel=1e-3, abs=1e-4)
    assert "Along which features" in text
    assert f"replacement score {float(graph.replacement):.2f} (rotated decoders: at most" in text
    assert "there is nothing" in refused(capsys, CAPITAL, "--graph", str(tmp_path / "none.safetensors"))


def test_the_circuit_is_found_judged_and_certified_on_request(capsys, tmp_path):
    page = tmp_path / "why.html"
    code, out, _ = run(capsys, CAPITAL, "--effort", "quick", "--circuit", "--html", str(page), "--json")
    said, text = json.loads(out), page.read_text("utf-8")
    assert (code, {"circuit", "carried", "certificate"} - said["results"].keys()) == (0, set())
    claim = next(c for c in said["claims"] if c["about"] == "the circuit")
    carried = said["results"]["carried"]["fields"]
    assert f"carry {carried['faithfulness']['values'][0]:.0%}".replace("%", " %") in claim["text"]
    assert re.search(r"certificate(: | level [ABC])", claim["text"])
    assert re.search(r"^10 random circuits of equal size: at most [\d.]+ %$", claim["control"])
    assert claim["supported"]
    assert "Along which edges" in text
    assert "on which it would be judged" in refused(capsys, "The the", "--corrupt", "The a", "--circuit")
