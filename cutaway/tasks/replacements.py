"""Replacements for a word of a sentence that keep its number of tokens.

Three sorts, from the textbook's to the last resort: `exchange` (the last mention of a repeated word becomes another
word of its kind in the sentence: Mary and John …, John → Mary) and `kind` (another word of its kind at large);
`expected` (what the model itself expects in its place, of the same look and whole: not followed by the rest of a word);
`form` (numbers aside, tokens of the vocabulary near the word's own that look like it).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from cutaway.models.model import Model
from cutaway.models.tokens import known
from cutaway.tasks import world
from cutaway.tasks.answers import next_tokens, token_rows
from cutaway.tasks.kinds import FUNCTION_WORDS, Kinds, cased

Sort = Literal["given", "exchange", "kind", "expected", "form"]
_SPACE_MARKS = "Ġ▁ "  # how byte-level and sentencepiece tokenizers write a leading space
_EACH = 8  # words the model expects in the place of one


@dataclass(frozen=True)
class Replacement:
    """A proposed corruption.

    Attributes:
        text: the changed sentence.
        old: the word before.
        new: the word after.
        sort: where the new word comes from.
    """

    text: str
    old: str
    new: str
    sort: Sort


def of_kind(sentence: str, spans: Sequence[re.Match[str]], kinds: Kinds, rng: random.Random) -> list[list[Replacement]]:
    """For each word, others of its kind: those in the sentence, then those at large."""
    said, out = [m[0].lower() for m in spans], []
    for word, places in _places(spans):
        mine = sorted(kinds.of(word), key=len)[:1]  # a doctor is a person before a thing
        inside = dict.fromkeys(m[0] for m in spans if m[0] != word and any(m[0].lower() in f for f in mine))
        made = []
        for new in inside:
            # of a repeated word the last mention: it says who acts, and the first ones only who is there
            once = len(places) > 1 and said.count(new.lower()) == 1
            made += [Replacement(_replaced(sentence, places[-1:], new), word, new, "exchange")] if once else []
            made += [Replacement(_replaced(sentence, [p], new), word, new, "kind") for p in places]
        fresh = sorted({w for f in mine for k, w in f.items() if k not in said})
        picked = [cased(w, word) for w in rng.sample(fresh, min(24, len(fresh)))]
        if word.isdigit():
            picked += [n for n in _numbers(word, rng) if n not in said]
        made += [Replacement(_replaced(sentence, places, new), word, new, "kind") for new in picked]
        out.append(list(dict.fromkeys(made)))
    return out


def expected(model: Model, sentence: str, spans: Sequence[re.Match[str]], kinds: Kinds) -> list[list[Replacement]]:
    """For each word of no known kind, what the model expects in its place."""
    said = {m[0].lower() for m in spans}
    asked = [(w, p) for w, p in _places(spans) if not kinds.of(w) and not w.isdigit() and sentence[: p[0][0]].strip()]
    if not asked:
        return []
    before = [sentence[: places[0][0]].rstrip() for _, places in asked]
    tops = model.run_last(before).topk(min(60, len(model.tokenizer))).indices.tolist()
    tried: list[tuple[int, str]] = []
    for n, ((word, _), ids) in enumerate(zip(asked, tops, strict=True)):
        texts = dict.fromkeys(t.strip() for t in model.text.token_texts(ids) if t[:1] == " ")
        alike = [t for t in texts if _like(t, word) and t.lower() not in said]
        tried += [(n, t) for t in alike[:_EACH]]
    whole = _whole(model, [f"{before[n]} {t}" for n, t in tried])
    out: list[list[Replacement]] = [[] for _ in asked]
    for (n, new), fits in zip(tried, whole, strict=True):
        word, places = asked[n]
        out[n] += [Replacement(_replaced(sentence, places, new), word, new, "expected")] if fits else []
    return out


def of_form(model: Model, sentence: str, spans: Sequence[re.Match[str]], rng: random.Random) -> list[list[Replacement]]:
    """For each word, words of the same form: tokens of the vocabulary near the word's own, whole words first."""
    said, out = {m[0].lower() for m in spans}, []
    for word, places in _places(spans):
        found = [w for w in dict.fromkeys(_alike(model, sentence, word, places[0], rng)) if w.lower() not in said]
        fits = _whole(model, [sentence[: places[0][0]] + w for w in found])
        made = [Replacement(_replaced(sentence, places, w), word, w, "form") for w in found]
        out.append([r for r, fit in zip(made, fits, strict=True) if fit] or made)
    return out


def fitting(model: Model, per_word: Iterable[list[Replacement]], length: int, most: int) -> list[Replacement]:
    """Return those of equal token length that the vocabulary has, exchanges first, else dealt fairly over the words."""
    made = [_known(model, dict.fromkeys(r)) for r in per_word]
    flat = [r for word in made for r in word]
    long = dict(zip(flat, map(len, token_rows(model, [r.text for r in flat])), strict=True)) if flat else {}
    dealt = [r for turn in world.zip_turns([[r for r in word if long[r] == length] for word in made]) for r in turn]
    dealt.sort(key=lambda r: r.sort != "exchange")
    return list({r.text: r for r in reversed(dealt)}.values())[::-1][:most]


def _known(model: Model, made: Iterable[Replacement]) -> list[Replacement]:
    """Return the replacements that the tokenizer has tokens for."""
    found = list(made)
    return [r for r, fits in zip(found, known(model.tokenizer, [r.text for r in found]), strict=True) if fits]


def _places(spans: Sequence[re.Match[str]]) -> list[tuple[str, list[tuple[int, int]]]]:
    return [(word, [m.span() for m in spans if m[0] == word]) for word in dict.fromkeys(m[0] for m in spans)]


def _like(new: str, word: str) -> bool:
    """Return True if a word looks like another and is a content word."""
    upper = new[:1].isupper() == word[:1].isupper()
    return new.isalpha() and len(new) > 2 and upper and new.lower() not in FUNCTION_WORDS


def _whole(model: Model, texts: Sequence[str]) -> list[bool]:
    """For each text, True if the model takes its end for the end of a word, as it does not expect the rest of one."""
    if not texts:
        return []
    after = model.text.token_texts(model.run_last(list(texts)).argmax(-1))
    return [not a[:1].isalnum() for a in after]


def _numbers(word: str, rng: random.Random) -> list[str]:
    kept = word[: len(word) - 2]  # a year stays in its century
    low, size = 10 if len(word) == 2 else 0, len(word) - len(kept)
    return [f"{kept}{rng.randrange(low, 10**size):0{size}d}" for _ in range(12)]


def _alike(model: Model, sentence: str, word: str, place: tuple[int, int], rng: random.Random) -> list[str]:
    """Return the words made of a token of the vocabulary near the word's own first one, and of its rest."""
    tokens = model.tokens([sentence])
    covering = [n for n, o in enumerate(tokens.offsets[0]) if o is not None and o[0] < place[1] and o[1] > place[0]]
    if not covering or word.isdigit():
        return []
    first = int(tokens.ids[0][tokens.mask[0]][covering[0]])
    own = str(model.tokenizer.convert_ids_to_tokens(first))
    body = own.lstrip(_SPACE_MARKS)
    if not word.startswith(body):
        return []
    rest = word[len(body) :]
    size = len(model.tokenizer)
    # Byte-pair ids go roughly by frequency, so neighbours in the vocabulary are about as common.
    near = range(max(0, first - size // 8 - 64), min(size, first + size // 8 + 64))
    ids = rng.sample(near, min(400, len(near)))
    pieces = [str(p) for p in model.tokenizer.convert_ids_to_tokens(ids) if p]
    same = [p for p in pieces if p != own and _form(p) == _form(own)]
    return [p.lstrip(_SPACE_MARKS) + rest for p in same[:16]]


def _form(piece: str) -> tuple[bool, bool, bool, bool]:
    """Return the look of a token: leading space, letters only, capitalised, long."""
    body = piece.lstrip(_SPACE_MARKS)
    return piece != body, body.isalpha() and body.isascii(), body[:1].isupper(), len(body) > 2


def _replaced(sentence: str, places: Iterable[tuple[int, int]], new: str) -> str:
    for start, end in sorted(places, reverse=True):
        sentence = sentence[:start] + new + sentence[end:]
    return sentence


def usual(model: Model, sentence: str, ids: Sequence[int], said: Sequence[int] = ()) -> dict[int, str]:
    """Return the tokens that can be written after a sentence and are read as that one token, each with its text.

    Tokens that begin or fill a text are no words in its middle, unless they are `said` there.
    """
    none = {getattr(model.tokenizer, f"{n}_token_id", None) for n in ("bos", "unk", "pad")} - set(said)
    ids = [i for i in ids if i not in none]
    texts = model.text.token_texts(ids)
    forms = [(i, form) for i, t in zip(ids, texts, strict=True) for form in dict.fromkeys((f" {t.lstrip()}", t)) if t]
    whole = known(model.tokenizer, [sentence + form for _, form in forms])
    forms = [f for f, fits in zip(forms, whole, strict=True) if fits]
    found, out = next_tokens(model, [sentence] * len(forms), [form for _, form in forms]), dict[int, str]()
    for (i, form), row in zip(forms, found, strict=True):
        if row == [i]:
            out.setdefault(i, form)
    return out
