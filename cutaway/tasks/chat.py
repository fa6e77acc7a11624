"""Which words of a prompt its writer wrote: what a chat template puts around them is never exchanged."""

from __future__ import annotations

import re
from typing import Any

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_MARK = re.compile(r"<\|[^<>|\n]{1,40}\|>|</?[A-Za-z_]{2,30}>|\[/?[A-Z_]{3,30}\]|<</?SYS>>")
_ROLE = r"system|developer|user|human|assistant|model|bot|gpt|chatbot|tool|function|ipython|environment|observation"
_AFTER_MARK = re.compile(rf"\s*(?:{_ROLE})(?=\s*(?:\n|:|<|\[|$))", re.I)
_LINE_ROLE = re.compile(rf"^[ \t]*(?:#+[ \t]*\w+|{_ROLE})[ \t]*:", re.I | re.M)
_SYSTEM = re.compile(r"system|developer|SYS", re.I)


def words_of(sentence: str, tokenizer: Any = None) -> list[re.Match[str]]:
    """Return the words of a prompt, without special tokens, marks, names of roles and the system's message."""
    kept = template(sentence, tokenizer)
    return [m for m in _WORD.finditer(sentence) if not any(m.start() < end and m.end() > start for start, end in kept)]


def template(sentence: str, tokenizer: Any = None) -> list[tuple[int, int]]:
    """Return the places of a prompt that are its template's: marks, special tokens, names of roles, the system's
    message.
    """
    marks = [m.span() for m in _MARK.finditer(sentence)]
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
