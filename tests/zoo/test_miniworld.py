"""The shipped weights keep the bars of their card, on a small sample of other prompts than the card's."""

from __future__ import annotations

import json

import pytest
import torch

from cutaway.zoo import miniworld
from cutaway.zoo.miniworld import card as cards
from cutaway.zoo.miniworld.behaviours import ROWS

CARD = json.loads((miniworld.path() / "card.json").read_text())
PASSED = {row["name"] for row in CARD["behaviours"] if row["passed"]}


@pytest.fixture(scope="module")
def measured():
    return cards.card(n=25, seed=7)


def test_the_card_names_every_row():
    assert [row["name"] for row in CARD["behaviours"]] == [row.name for row in ROWS]
    text = (miniworld.path() / "CARD.md").read_text()
    assert text == cards.render(CARD, CARD.get("training"))


def test_weights_are_small():
    assert sum(f.stat().st_size for f in miniworld.path().iterdir()) <= 6 * 2**20


def test_bars_hold_on_fresh_prompts(measured):
    for row in measured["behaviours"]:
        if row["name"] in PASSED:
            assert row["model"]["high"] >= row["bar"], row


def test_the_untrained_control_knows_nothing(measured):
    assert all(row["control"]["accuracy"] <= 0.15 for row in measured["behaviours"])


def test_steps_help(measured):
    rows = {row["name"]: row["model"]["accuracy"] for row in measured["behaviours"]}
    assert rows["chain of thought, steps given"] > rows["the same sum without steps (contrast)"] + 0.3


def test_it_writes_a_text_and_stops():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(miniworld.path())
    model = AutoModelForCausalLM.from_pretrained(miniworld.path())
    ids = tokenizer("The capital of Norway is", return_tensors="pt").input_ids
    with torch.random.fork_rng():
        out = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).strip() == "the capital of norway is oslo."
