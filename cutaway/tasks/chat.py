"""Chats as prompts: messages in the model's own template, and which words of a prompt its writer wrote.

What a template puts around the words is never exchanged, and of a chat only what its user says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.models.model import Model
from cutaway.models.turns import MARK, ROLE, turns

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_AFTER_MARK = re.compile(rf"\s*(?:{ROLE})(?=\s*(?:\n|:|<|\[|$))", re.I)
_LINE_ROLE = re.compile(rf"^[ \t]*(?:#+[ \t]*\w+|{ROLE})[ \t]*:", re.I | re.M)
_SYSTEM = re.compile(r"system|developer|SYS", re.I)


_FORM = 'give a text, or messages such as {"role": "user", "content": "Hello"}'
_ROLES = ("system", "developer", "user", "assistant", "tool")


class Chat(str):
    """A chat as a prompt: a text that tasks, lenses and `model.generate` take as any other.

    Attributes:
        messages: the messages that it was made of, each with its role and content.
    """

    messages: tuple[dict[str, str], ...]

    @classmethod
    def of(cls, text: str, messages: Sequence[Mapping[str, str]]) -> Chat:
        """Return a chat of a text and the messages in it."""
        made = cls(text)
        made.messages = tuple(map(dict, messages))
        return made

    @property
    def turns(self) -> dict[str, list[str]]:
        """The words of each role, without what the template has put around them."""
        return {role: [self[a:z] for a, z in places] for role, places in turns(self).items()}


def chat(model: Model, messages: str | Mapping[str, Any] | Sequence[Mapping[str, Any]], **options: Any) -> Chat:
    """Return messages as a prompt, in the model's own chat template, up to where its reply begins.

        prompt = ca.chat(model, "What is the capital of France?")
        prompt = ca.chat(model, [{"role": "user", "content": "…"}, {"role": "assistant", "content": "The capital is"}])

    Messages that end with the assistant's are a reply that has begun, with which the model goes on. The prompt's tokens
    are those of the template: a beginning of text that it writes is not put in front once more. Results call its
    positions by what they are there (`user turn`, `end of user`, `assistant turn`).

    Args:
        model: a loaded model.
        messages: what the user says, or messages with `role` and `content`, one or several in order.
        options: of the template (`enable_thinking=False`), and `tools` and `documents`.

    Raises:
        Refused: a tokenizer without a template, messages of another form, or some that the template refuses.
    """
    template = getattr(model.tokenizer, "chat_template", None)
    if not template:
        why = "its tokenizer has no chat template, so nobody says how its turns are written"
        raise Refused(f"a chat with {model.name}", why, "give a plain text, or load the chat version of the model")
    one = {"role": "user", "content": messages} if isinstance(messages, str) else messages
    given = _checked([one] if isinstance(one, Mapping) else one)
    begun = given[-1]["role"] == "assistant"
    how = {"continue_final_message": True} if begun else {"add_generation_prompt": True}
    if taken := sorted({"tokenize", "return_dict", *how} & options.keys()):
        raise Refused(f"chat({taken[0]}=…)", "the prompt is a text up to where the reply begins", "leave it out")
    try:
        text = model.tokenizer.apply_chat_template(given, tokenize=False, **how, **options)
    except Exception as error:  # a template may raise anything
        said = str(error).strip().rstrip(".") or type(error).__name__
        raise Refused(f"these messages for {model.name}", f"its chat template says: {said}", _FORM) from error
    return Chat.of(text, given)


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return messages, each with a role and a text.

    Raises:
        Refused: none, or one of another form.
    """
    if not messages:
        raise Refused("a chat without messages", "there is nothing to reply to", _FORM)
    for m in messages:
        if not isinstance(m, Mapping) or not {"role", "content"} <= m.keys():
            raise Refused(f"message {m!r}", "it has no role and content", _FORM)
        if m["role"] not in _ROLES:
            raise Refused(f"message {m!r}", f"{m['role']!r} is no role", f"use one of {', '.join(_ROLES)}")
        if not isinstance(m["content"], str) or not m["content"].strip():
            why = "its content is empty" if isinstance(m["content"], str) else "its content is no text"
            raise Refused(f"message {m!r}", why, _FORM)
    return [dict(m) for m in messages]


def words_of(sentence: str, tokenizer: Any = None) -> list[re.Match[str]]:
    """Return the words of a prompt, without special tokens, marks, names of roles and the system's message; of a chat
    the words that its user says, wherever they stand (a reply that has begun may repeat them).
    """
    kept = template(sentence, tokenizer)
    found = [m for m in _WORD.finditer(sentence) if not _overlaps(m, kept)]
    asked = turns(sentence).get("user", [])
    said = {m[0].lower() for m in found if _overlaps(m, asked)}
    return [m for m in found if m[0].lower() in said] if asked else found


def _overlaps(word: re.Match[str], places: Sequence[tuple[int, int]]) -> bool:
    return any(word.start() < end and word.end() > start for start, end in places)


def template(sentence: str, tokenizer: Any = None) -> list[tuple[int, int]]:
    """Return the places of a prompt that are its template's: marks, special tokens, names of roles, the system's
    message.
    """
    marks = [m.span() for m in MARK.finditer(sentence)]
    for text in _specials(tokenizer):
        marks += [m.span() for m in re.finditer(re.escape(text), sentence)]
    marks.sort()
    found = [*marks, *(m.span() for m in _LINE_ROLE.finditer(sentence))]
    for n, (start, end) in enumerate(marks):
        role = _AFTER_MARK.match(sentence, end)
        found += [role.span()] if role else []
        opens = sentence[start:end] + (role[0] if role else "")
        if _SYSTEM.search(opens) and "/" not in opens:  # up to the next mark that does not close the role's name
            name = role[0].strip() if role else ""
            later = [s for s, _ in marks[n + 1 :] if sentence[end:s].strip() not in ("", name)]
            found.append((end, later[0] if later else len(sentence)))
    return found


def _specials(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {t.content for t in added if getattr(t, "special", False) and t.content.strip()}
