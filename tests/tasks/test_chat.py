"""Chats as prompts: the template's tokens, one beginning of text, names of positions, and what is exchanged."""

from __future__ import annotations

import pytest

import cutaway as ca
from cutaway import Refused, tasks
from cutaway.lenses import logit_lens
from cutaway.models.turns import parts, turns
from cutaway.patching import activation
from cutaway.tasks.chat import words_of
from cutaway.tasks.pair import Pair
from tests.conformance import subjects

TOLD = "Mary and John went to the store, John gave a drink to Mary."
REPLY = "assistant line"
ASKED = [
    {"role": "system", "content": "Anna is in the park."},
    {"role": "user", "content": TOLD},
    {"role": "assistant", "content": "Then John gave the drink to"},
]


def test_a_chat_is_the_templates_own_text_with_one_beginning():
    model = subjects.chatting()
    prompt = ca.chat(model, TOLD)
    assert prompt == f"<s><|im_start|>user\n{TOLD}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.messages == ({"role": "user", "content": TOLD},)
    assert prompt.turns == {"user": [TOLD]}
    assert ca.chat(model, {"role": "user", "content": TOLD}) == prompt
    ids = model.tokens(prompt).ids[0].tolist()
    wanted = model.tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, return_dict=False)
    assert ids == list(wanted)
    assert ids.count(model.tokenizer.bos_token_id) == 1


def test_a_reply_that_has_begun_is_gone_on_with():
    model = subjects.chatting()
    prompt = ca.chat(model, ASKED)
    assert prompt.endswith("<|im_start|>assistant\nThen John gave the drink to")
    assert len(model.generate(prompt, 3)) == 1
    lens = logit_lens(model, prompt, samples=1)
    assert lens.record["subjects"]["prompts"]["prompts"] == 1
    assert list(prompt.turns) == ["system", "user", "assistant"]


def test_positions_have_the_names_of_their_roles():
    model = subjects.chatting()
    labels = model.tokens(ca.chat(model, "Mary is in the park.")).labels()
    assert labels[:3] == ["<s>", "user turn", labels[2]]
    assert labels[2].startswith("user")
    ends = [n for n in labels if "assistant line" in n or "end of user" in n or "assistant turn" in n]
    assert ends == ["end of user", "assistant turn", "assistant line"]
    assert labels[-1] == "assistant line"
    other = TOLD.replace("John gave", "Mary gave")
    clean, corrupt = (ca.chat(model, text) for text in (TOLD, other))
    task = ca.Task("chat", [Pair(clean, corrupt, "Mary", "John", joined=True)])
    got = activation(model, task, site="resid_pre", samples=1)
    assert got.labels["position"][-1] == "assistant line"
    assert "end of user" in got.labels["position"]
    bound = task.bind(model)
    columns = bound.span("user")[0].nonzero()[:, 0].tolist()
    words = "".join(bound.clean.pieces[0][c] for c in columns)
    assert words == TOLD
    assert not bool(bound.span("system").any())
    with pytest.raises(Refused, match="assistant"):
        bound.span("nobody")


def test_counterfactuals_and_siblings_stay_with_what_the_user_says():
    model = subjects.chatting()
    prompt = ca.chat(model, ASKED)
    assert {m[0] for m in words_of(prompt)} == set(TOLD.rstrip(".").replace(",", "").split())
    task = tasks.with_siblings(model, tasks.from_sentence(model, prompt, target="Mary", foil="John"), 6)
    for pair in task.pairs:
        for text in (pair.clean, pair.corrupt):
            assert turns(text).keys() == turns(prompt).keys()
            assert text.startswith("<s><|im_start|>system\nAnna is in the park.<|im_end|>\n<|im_start|>user\n")
            assert "<|im_end|>\n<|im_start|>assistant\nThen " in text
    with pytest.raises(Refused, match="has a replacement"):
        tasks.from_sentence(model, prompt, target="Mary", subject="Anna")


@pytest.mark.parametrize(
    ("text", "words", "last"),
    [
        ("<bos><start_of_turn>user\nHi you<end_of_turn>\n<start_of_turn>model\n", {"user": ["Hi you"]}, REPLY),
        ("<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nHi [/INST] Good day </s><s>[INST] And now? [/INST]",
         {"system": ["Be kind"], "user": ["Hi", "And now?"], "assistant": ["Good day"]}, "end of user"),
        ("<|system|>\nBe.</s>\n<|user|>\nHi</s>\n<|assistant|>\n", {"system": ["Be."], "user": ["Hi"]}, REPLY),
        ("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
         {"user": ["Hi"]}, REPLY),
        ("<|user|>\nHi<|end|>\n<|assistant|>\nYes, I", {"user": ["Hi"], "assistant": ["Yes, I"]}, ""),
    ],
)  # fmt: skip
def test_turns_of_the_templates_in_use(text, words, last):
    assert turns(text) == {role: [_place(text, w) for w in said] for role, said in words.items()}
    found = parts(text)
    assert "".join(text[p.start : p.end] for p in found) == text
    assert found[-1].name == last


def _place(text: str, word: str) -> tuple[int, int]:
    return text.index(word), text.index(word) + len(word)


@pytest.mark.parametrize("text", ["The <b>user</b> said", "a < b and c > d", "<user> went home", "System: be kind"])
def test_other_texts_are_no_chats(text):
    assert parts(text) == []


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "nothing to reply to"),
        ({"role": "user", "text": "Hi"}, "no role and content"),
        ([{"role": "user"}], "no role and content"),
        ([{"role": "poet", "content": "Hi"}], "is no role"),
        ([{"role": "user", "content": " "}], "empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], "no text"),
        ([{"role": "tool", "content": "4"}], "no tools here"),
    ],
)
def test_messages_that_are_none_are_refused(messages, says):
    with pytest.raises(Refused, match=says):
        ca.chat(subjects.chatting(), messages)


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(Refused, match="no chat template"):
        ca.chat(subjects.random_llama(), "Hello")
    with pytest.raises(Refused, match="where the reply begins"):
        ca.chat(subjects.chatting(), "Hello", tokenize=True)
