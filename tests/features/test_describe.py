"""Labels by language models that answer over HTTP: an oracle, a babbler and one that always says no."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from cutaway.cli import main
from cutaway.core.refuse import Refused
from cutaway.features import Client, FeatureStore, card, describe
from cutaway.features.llm import client as module
from cutaway.features.llm import prompts
from cutaway.features.llm.judge import Verdict
from cutaway.features.llm.windows import Window, Windows
from cutaway.features.rules.mine import Miner
from cutaway.features.store.meta import Label
from tests.features.common import WORDS, documents, of_tokens

LATENT = 3


def oracle(prompt: str) -> str:
    """Labels by the marked token, and judgements by the words that a label has in quotation marks."""
    words = {w.strip() for w in re.findall("“([^”]*)”", prompt.split("\n")[0])}
    texts = re.findall(r"^\d+\. (.*)$", prompt, re.MULTILINE)
    if '"label"' in prompt:
        marked = re.findall("«([^»]*)»", "".join(texts))
        return json.dumps({"label": f"the token is “{max(marked, key=marked.count).strip()}”"})
    if "How strongly" in prompt:
        return json.dumps([10 * (t.strip("'\" ") in words) for t in texts])
    if "some tokens stand in" in prompt:
        return json.dumps([int(all(m.strip() in words for m in re.findall("«([^»]*)»", t))) for t in texts])
    return f"Let me see. {json.dumps([int(bool(words & set(t.split()))) for t in texts])}"


def babbler(prompt: str) -> str:
    return "I would rather talk about {something} else: [1, 2"


def denier(prompt: str) -> str:
    """Reads labels like the oracle, and calls nothing active."""
    found = oracle(prompt)
    return found if '"label"' in prompt else re.sub("[1-9]0?", "0", found)


@contextmanager
def served(brain: Callable[[str], str | dict], failures: int = 0) -> Iterator[tuple[str, list[dict]]]:
    """A server of the chat protocol, which fails some times at first; its address, and the requests that it got."""
    got: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            if len(got) <= failures:
                self.send_error(503)
                return
            if self.path != "/v1/chat/completions":
                self.send_error(404)
                return
            said = brain(body["messages"][0]["content"])
            message = {"choices": [{"message": {"role": "assistant", "content": said}}], "usage": {"total_tokens": 7}}
            reply = json.dumps(message if isinstance(said, str) else said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", got
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> FeatureStore:
    """A latent for each word."""
    return of_tokens(tmp_path_factory.mktemp("words") / "store", documents(0, n=120))


def test_an_oracle_is_right_everywhere_and_its_ladder_is_not(words):
    with served(oracle) as (url, got):
        found = describe(words, [LATENT, 5], Client("m", url, key="k"))
    assert found.labels["latent"][0] == f"{LATENT}: the token is “{WORDS[LATENT]}”"
    torch.testing.assert_close(found.score[0], torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.interval[0], torch.ones(3, 2), atol=1e-5, rtol=0)
    assert found.score[1, :2].tolist() == [1.0, 1.0]
    assert found.failed.sum() == 0
    assert found.precision.tolist() == [[1.0, 1.0]] * 2
    null = {name: found.null[0, :, i] for i, name in enumerate(found.labels["sample"])}
    assert null["empty label"].tolist() == [0.5, 0.5, 0.0]
    torch.testing.assert_close(found.simulation[0], torch.ones(3), atol=1e-5, rtol=0)
    beaten = dict(zip(found.labels["sample"], (found.rung_q[0] < 0.05).tolist(), strict=True))
    assert beaten["empty label"]
    assert beaten["shuffled activity"]
    assert not beaten["token rule"], "it is as good"
    rule = found.labels["sample"].index("token rule")
    torch.testing.assert_close(found.simulation_null[0, :, rule], torch.ones(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(null["token rule"], torch.ones(3), atol=1e-5, rtol=0)
    assert bool((null["another latent's label"] < 0.8).all())
    assert bool((null["shuffled activity"] < 0.95).all())
    assert found.lead.tolist() == [0.0, 0.0], "the rule is as good"
    (label,) = (x for x in words.meta.labels(words.names[0], LATENT) if x.source == "llm")
    assert label.details["leads"] is False
    assert label.scores["detection of empty label"] == 0.5
    assert {(r["temperature"], r["key"]) for r in got} == {(0.0, "Bearer k")}


def test_windows_are_of_one_half_and_their_density_is_exact(words):
    windows, known = Windows(words), words.latents()
    values = windows.values(known, LATENT)
    place, _ = known.codes(LATENT)
    assert sum(int((v > 0).sum()) for v in values.values()) == len(place)
    flags, halves = words.column("flags"), (windows.explain, windows.score)
    for half, held_out in zip(halves, (False, True), strict=True):
        for number in half.tolist():
            context, first = number // windows.rows, number % windows.rows * windows.width
            own = flags[context, first : first + windows.width]
            assert {bool(x & 8) for x in own[own & 1 > 0].tolist()} == {held_out}
    assert not set(halves[0].tolist()) & set(halves[1].tolist())


def test_unreadable_answers_are_wrong_and_counted(words):
    with served(babbler) as (url, _):
        found = describe(words, [LATENT], Client("m", url), write=False)
    assert found.score.tolist() == [[0.0, 0.0, 0.0]]
    assert found.failed.tolist() == [[1.0, 1.0, 1.0]]
    assert found.precision.tolist() == [[0.0, 0.0]]
    assert found.lead.tolist() == [-1.0]


def test_a_judge_that_always_says_no_is_at_chance(words):
    with served(oracle) as (url, _), served(denier) as (other, asked):
        found = describe(words, [LATENT], Client("m", url), judge=Client("j", other), write=False)
    assert found.score.tolist() == [[0.5, 0.5, 0.0]]
    assert found.labels["latent"][0].endswith("”"), "the writer wrote it"
    assert not any('"label"' in r["messages"][0]["content"] for r in asked)


def test_a_label_comes_first_only_where_it_beats_the_rule(words, monkeypatch):
    with served(oracle) as (url, _):
        describe(words, [LATENT], Client("m", url))
        own = card(words, LATENT).said
        monkeypatch.setattr(Miner, "rule", lambda *_: None)
        found = describe(words, [LATENT], Client("m", url))
    assert found.lead.tolist() == [0.5], "detection without a rule is at chance"
    assert float(found.q[0]) < 0.05
    words.meta.put([Label(words.names[0], LATENT, "rule", "a rule")])
    assert card(words, LATENT).said.startswith("the token is")
    monkeypatch.undo()
    with served(oracle) as (url, _):
        describe(words, [LATENT], Client("m", url))
    assert card(words, LATENT).said.startswith("a rule (rule)")
    assert own.startswith("the token is")


def test_a_cache_a_budget_and_a_dry_run(words, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.0)
    cache = tmp_path / "answers.sqlite"
    dry = Client("m", "http://127.0.0.1:9/v1", dry=True)
    describe(words, [LATENT], dry)
    with served(oracle, failures=2) as (url, got):
        with pytest.raises(Refused, match="budget of 3"):
            describe(words, [LATENT], Client("m", url, cache=cache, budget=3), write=False)
        first = Client("m", url, cache=cache)
        one = describe(words, [LATENT], first, write=False)
        assert len(got) == 3 + first.sent + 2, "two failures were tried again, three answers were kept"
        assert dry.sent == 3 + first.sent + 4 + 4 + 10, "the best token rule has the label's words, and is judged once"
        assert first.tokens == 7 * first.sent
        again = Client("m", url, cache=cache)
        two = describe(words, [LATENT], again, write=False)
        assert again.sent == 0
    assert torch.equal(one.score, two.score)
    assert dry.tokens > 0


def test_servers_that_do_not_answer_are_refused(monkeypatch):
    monkeypatch.setattr(module, "WAIT", 0.0)
    with served(lambda _: {"choices": []}) as (url, got):
        with pytest.raises(Refused, match="chat protocol"):
            Client("m", url).ask("hello")
        with pytest.raises(Refused, match="404"):
            Client("m", url.removesuffix("v1")).ask("hello")
        assert len(got) == 2, "what cannot succeed is not tried again"
    with pytest.raises(Refused, match="cannot be reached"):
        Client("m", url).ask("hello")
    done = threading.Event()
    with served(lambda _: str(done.wait(5))) as (url, got):
        with pytest.raises(Refused, match=r"no answer came within 0\.2 s"):
            Client("m", url, timeout=0.2).ask("hello")
        done.set()
        assert len(got) <= 1, "a server at work is not asked again"


def test_scores_are_those_of_the_definitions():
    g = np.random.default_rng(0)
    truth, said, w = g.random(40) < 0.4, g.random(40) < 0.6, g.integers(0, 4, (3, 40)).astype(float)
    got = Verdict(truth, said, np.arange(40), 0.0).score(w)
    for row, value in zip(w.astype(int), got, strict=True):
        t, s = np.repeat(truth, row), np.repeat(said, row)
        assert value == pytest.approx((s[t].mean() + (~s[~t]).mean()) / 2)
    x, y = g.random(40), g.random(40)
    got = Verdict(x, y, np.arange(40), 0.0).score(w)
    for row, value in zip(w.astype(int), got, strict=True):
        assert value == pytest.approx(np.corrcoef(np.repeat(x, row), np.repeat(y, row))[0, 1])
    window = Window(0, 0, ["a", " b\n", " c"], np.array([0.0, 0.5, 2.0]), np.ones(3, dtype=bool))
    assert window.levels(2.0) == [0, 2, 10]
    assert window.marked([2]) == "a b↵« c»"
    assert prompts.numbers_of("so [1, 2] or [0, 1, 1]", 3, 1) == [0, 1, 1]
    for broken in ("[1, 0]", "[1, 0, 2]", "[1, 0, true]", "[1.0, 0, 1]", "1 0 1", "[1, 0, 1"):
        assert prompts.numbers_of(broken, 3, 1) is None, broken
    assert prompts.label_of('{"label": " a  b "}') == "a b"
    assert prompts.label_of('{"label": ""} {"name": "x"}') is None


def test_a_latent_with_few_windows_is_refused(tmp_path):
    few = of_tokens(tmp_path / "few", documents(0, n=6))
    rare = int(few.latents().count.argmin())
    with pytest.raises(Refused, match="windows of a half"):
        describe(few, [rare], Client("m", dry=True))


def test_the_command_line(words, capsys):
    line = ["features", "describe", str(words.folder), str(LATENT), "--llm", "m"]
    assert main([*line, "--dry-run"]) == 0
    assert "nothing was sent" in capsys.readouterr().out
    with served(oracle) as (url, _):
        assert main([*line, "--url", url]) == 0
    said = capsys.readouterr().out
    assert f"the token is “{WORDS[LATENT]}”" in said
    assert "detection 1.00 [1.00, 1.00]" in said
    assert "lead over the rule +0.00" in said


def test_readings_of_a_simulation_are_those_of_the_definitions():
    g = np.random.default_rng(1)
    document, within = np.repeat(np.arange(6), 8), np.repeat(np.arange(12) % 2 == 0, 4)
    truth = np.where(within, g.random(48), 0.0)
    said = np.round(10 * truth + g.normal(0, 2, 48)).clip(0, 10)
    v, w = Verdict(truth, said, document, 0.0, within), g.integers(1, 4, (2, 48)).astype(float)
    found = v.readings(w, 0.1)
    fits = [np.polyfit(said[document != d], truth[document != d], 1) for d in range(6)]
    predicted = np.concatenate([np.polyval(fits[d], said[document == d]) for d in range(6)])
    for row, weight in enumerate(w):
        mean = np.average(truth, weights=weight)
        missed = np.average((truth - predicted) ** 2, weights=weight)
        assert found[row, 1] == pytest.approx(1 - missed / np.average((truth - mean) ** 2, weights=weight))
        assert found[row, 2] == pytest.approx(1 - missed / np.average(truth**2, weights=weight))
        copies = np.repeat(np.arange(48), (weight * np.where(within, 1, 9)).astype(int))  # one window in ten is active
        assert found[row, 0] == pytest.approx(np.corrcoef(truth[copies], said[copies])[0, 1])
    silent = Verdict(truth, np.zeros(48), document, 0.0, within).readings(w, 0.1)
    assert bool((silent[:, 0] == 0).all())
    assert bool((silent[:, 1] < 0.01).all()), "a constant of other documents explains nothing"
    alone = Verdict(truth, said, np.zeros(48, int), 0.0, within).readings(w, 0.1)
    assert alone[:, 2].tolist() == [0.0, 0.0], "nothing is fitted, and 0 explains nothing of it"
