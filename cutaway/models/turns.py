"""Turns of a chat in the text of a prompt: whose each is, and what its template has put around the words.

A template is recognised by its marks (`<|im_start|>`, `<start_of_turn>`, `[INST]`, `<|assistant|>`, `</s>`) and the
names of roles in or behind them; without such a role a text has no turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

MARK = re.compile(r"<\|[^<>|\n]{1,40}\|>|</?[A-Za-z_]{1,30}>|\[/?[A-Z_]{3,30}\]|<</?SYS>>")
ROLE = r"system|developer|user|human|assistant|model|bot|gpt|chatbot|tool|function|ipython|environment|observation"
_NAMED = re.compile(rf"\s*({ROLE})(?=\s*(?:\n|:|<|\[|$))", re.I)
_ENDS = re.compile(r"end|eot|eom|/|eos|return", re.I)
_HEADER = re.compile(r"end_header|end_role|message|channel", re.I)
_SAME = {"human": "user", "model": "assistant", "bot": "assistant", "gpt": "assistant", "chatbot": "assistant",
         "developer": "system", "inst": "user", "sys": "system"}  # fmt: skip
_GOES_ON = {"[/INST]": "assistant", "<</SYS>>": "user"}  # marks behind which another turn begins, without a name
_CHATS = re.compile(r"\||turn|role|INST|SYS|im_")  # in marks of templates, and not in those of HTML


@dataclass(frozen=True)
class Part:
    """A piece of a chat's text.

    Attributes:
        start: its first character.
        end: the character behind its last.
        role: whose turn it belongs to: user, assistant, system, or the template's own name; "" before the first.
        name: what a template has put there (`user turn`, `end of user`); "" for the words of the turn.
    """

    start: int
    end: int
    role: str
    name: str


def parts(text: str) -> list[Part]:
    """Return the pieces of a chat in order, words and template alike; none if the text has no turns."""
    marks = list(MARK.finditer(text))
    if not any(_role(text, m)[0] for m in marks):
        return []
    found, role, at, closed = list[Part](), "", 0, True
    for m in marks:
        if m.start() < at:
            continue
        found += _words(text, at, m.start(), role, closed)
        said, end = _role(text, m)
        if said and m[0][1:2] != "/" and not m[0].startswith("<</"):
            role, closed = said, False
            name = m.end() if end > m.end() else m.start()
            found.append(Part(m.start(), m.end(), role, f"{role} turn"))
            found += [Part(name, end, role, role)] if end > m.end() else []
            at = end
        elif _HEADER.search(m[0]):
            found.append(Part(m.start(), m.end(), role, f"{role} header"))
            at = m.end()
        elif _ENDS.search(m[0]) or m[0] == "</s>":
            found.append(Part(m.start(), m.end(), role, f"end of {role}" if role else "end"))
            at, closed = m.end(), m[0] not in _GOES_ON
            role = _GOES_ON.get(m[0], role)
        else:
            found.append(Part(m.start(), m.end(), role, m[0]))
            at = m.end()
    found += _words(text, at, len(text), role, closed and role != "assistant")
    return [p for p in found if p.start < p.end]


def turns(text: str) -> dict[str, list[tuple[int, int]]]:
    """Return the places of the words of each role, without what the template has put around them."""
    out: dict[str, list[tuple[int, int]]] = {}
    for p in parts(text):
        if p.role and not p.name:
            out.setdefault(p.role, []).append((p.start, p.end))
    return out


def _words(text: str, start: int, end: int, role: str, closed: bool) -> Iterator[Part]:
    """Yield the text between two marks: white space at its ends is the template's."""
    piece = text[start:end]
    body = piece.strip()
    if not body or closed:
        yield Part(start, end, role, f"after {role}" if closed and role else f"{role} line" if role else "start")
        return
    first = start + piece.index(body[0])
    yield Part(start, first, role, f"{role} line")
    yield Part(first, first + len(body), role, "")
    yield Part(first + len(body), end, role, f"{role} line")


def _role(text: str, mark: re.Match[str]) -> tuple[str, int]:
    """Return the role that a mark opens, in the mark or behind it, and where its name ends; "" if it opens none."""
    if not _CHATS.search(mark[0]):
        return "", mark.end()
    inside = re.search(rf"(?<![A-Za-z])({ROLE}|inst|sys)(?![A-Za-z])", mark[0], re.I)
    behind = None if inside or _ENDS.search(mark[0]) else _NAMED.match(text, mark.end())
    found = inside or behind
    if found is None:
        return "", mark.end()
    name = found[1].lower()
    return _SAME.get(name, name), mark.end() if inside else found.end(1)
