"""Screens: their actions give the numbers of the library's own calls."""

from __future__ import annotations

import pytest
import torch

import cutaway as ca
from cutaway.core.refuse import Refused
from cutaway.dictionaries.opening import open_dictionary
from cutaway.studio.session import Session

PROMPT = "While Kate and Max were at the market, Max passed the book to"
ASKED = {"prompt": PROMPT, "other": PROMPT.replace(", Max", ", Kate"), "target": " Kate", "foil": " Max"}


@pytest.fixture(scope="module")
def session(folder, miniworld):
    made = Session(folder, "miniworld", "miniworld", {"miniworld": "miniworld"})
    made.__dict__["model"] = miniworld
    return made


def test_interventions_are_those_of_the_method_and_can_be_kept(session, miniworld):
    edits = [{"kind": "zero", "address": "z.4.0"}, {"kind": "patch", "address": "resid_post.2", "positions": [10, 11]}]
    said = session.do("intervene", {**ASKED, "edits": edits, "samples": 4, "words": 3})
    task = ca.tasks.from_sentence(miniworld, PROMPT, target=" Kate", foil=" Max", corrupt=ASKED["other"])
    texts = ("zero z.4.0", "patch resid_post.2@10", "patch resid_post.2@11")
    own = ca.patching.intervene(miniworld, task, edits=texts, top=8, words=3, samples=4)
    assert said["effect"]["value"] == pytest.approx(float(own.effect))
    assert [t["change"]["value"] for t in said["tokens"]] == pytest.approx(own.change.tolist())
    assert [t["probability"] for t in said["tokens"]] == [pytest.approx(p) for p in own.probability.T.tolist()]
    assert (said["text"], said["edited_text"]) == (own.text, own.edited_text)
    assert all(e["marked"] == (not e["low"] <= e["value"] <= e["high"]) for t in said["tokens"] for e in [t["change"]])
    kept = session.do("run", {"method": "patching.intervene", "values": said["values"]})
    data = session.do("data", {"result": kept["id"], "fields": ["change"]})
    assert data["fields"]["change"]["values"] == pytest.approx(own.change.tolist())


def test_a_latent_is_what_one_unit_of_it_adds(session, miniworld):
    d = open_dictionary("miniworld/resid_post.3")
    edit = {"kind": "latent", "address": "resid_post.3", "number": 6.0, "file": "miniworld/resid_post.3", "latent": 17}
    said = session.do("intervene", {**ASKED, "edits": [edit], "samples": 2})
    add = ca.edits.Add("resid_post.3", d.direction(17, "resid_post.3").float(), 6.0)
    own = miniworld.run_last([PROMPT], add)[0].softmax(-1)
    assert [t["probability"][1] for t in said["tokens"]] == pytest.approx(
        [float(own[t["id"]]) for t in said["tokens"]], rel=1e-4
    )
    assert said["values"]["edits"][0].startswith("steer resid_post.3 6 file:latent-")


@pytest.mark.parametrize("file", ["/etc/passwd", "../secret.jsonl", "secret.safetensors", "file:unknown"])
def test_edits_open_files_by_their_ids_only(session, file):
    edits = [{"kind": "steer", "address": "resid_post.2", "file": file}]
    with pytest.raises(Refused, match=r"by their id only|no file has that id"):
        session.do("intervene", {**ASKED, "edits": edits})
    values = {"task": PROMPT, "edits": f"zero z.0.0,steer resid_post.2 1 {file}"}
    with pytest.raises(Refused, match=r"by their id only|no file has that id"):
        session.do("run", {"method": "patching.intervene", "values": values})


def test_attention_is_the_pattern_in_tiles(session, miniworld):
    pattern = miniworld.capture([PROMPT], ["pattern.3"], logits=False)["pattern.3"][0]
    whole = session.do("attention", {"prompt": PROMPT, "layer": 3, "top": 3})
    assert [h["head"] for h in whole["heads"]] == list(range(len(pattern)))
    for h, said in enumerate(whole["heads"]):
        for q, (keys, weights) in enumerate(zip(said["keys"], said["weights"], strict=True)):
            torch.testing.assert_close(torch.tensor(weights), pattern[h, q, keys].cpu(), atol=1e-5, rtol=0)
            assert weights == sorted(weights, reverse=True)
            assert len(keys) == min(3, q + 1)
    tile = session.do("attention", {"prompt": PROMPT, "layer": 3, "head": 2, "top": 3, "start": 4, "count": 5})
    assert tile["start"] == 4
    assert tile["heads"] == [{**whole["heads"][2], **{n: whole["heads"][2][n][4:9] for n in ("keys", "weights")}}]
    with pytest.raises(Refused, match="tokens"):
        session.do("attention", {"prompt": PROMPT, "layer": 3, "start": 400})


def test_attention_of_two_prompts_is_both_and_their_difference(session, miniworld):
    asked = {"layer": 3, "top": 3}
    said = session.do("attention", {"prompt": PROMPT, "other": ASKED["other"], **asked})
    both = [session.do("attention", {"prompt": p, **asked}) for p in (PROMPT, ASKED["other"])]
    for mine, alone in zip((said, said["other"]), both, strict=True):
        assert {n: mine[n] for n in ("tokens", "heads")} == {n: alone[n] for n in ("tokens", "heads")}
    a, b = (miniworld.capture([p], ["pattern.3"], logits=False)["pattern.3"][0] for p in (PROMPT, ASKED["other"]))
    for h, looks in enumerate(said["difference"]):
        for q, (keys, weights) in enumerate(zip(looks["keys"], looks["weights"], strict=True)):
            torch.testing.assert_close(torch.tensor(weights), (a - b)[h, q, keys], atol=1e-5, rtol=0)
            largest = (a - b)[h, q].abs().topk(3).values
            assert [abs(w) for w in weights] == pytest.approx(
                [x for x in largest.tolist() if x][: len(weights)], abs=1e-5
            )
    longer = session.do("attention", {"prompt": PROMPT, "other": f"{PROMPT} the", **asked})
    assert longer["difference"] == []
    assert "15 tokens and prompt B 16" in longer["apart"]
