"""Answers as tokens: how an answer continues its prompt, and which single token that makes it."""

from __future__ import annotations

from collections.abc import Sequence

from cutaway.core.refuse import Code, Refused
from cutaway.models.model import Model
from cutaway.models.spacing import forms


def continuation(prompt: str, answer: str, joined: bool = False) -> str:
    """Return the text that usually follows `prompt` when a model says `answer`: with a space between words.

    Where the text leaves two ways (see `models.spacing.forms`) the model decides, when a task is bound to it.
    """
    return forms(prompt, answer, joined)[0]


def check_predicts(model: Model) -> None:
    """Refuse a model that does not predict a next token."""
    if not model.family.causal:
        raise Refused(f"a task for {model.name}", "it is an encoder and predicts no next token", "use a causal model")


def token_rows(model: Model, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without padding."""
    tokens = model.tokens(list(texts))
    return [ids[mask].tolist() for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def next_tokens(model: Model, prompts: Sequence[str], continuations: Sequence[str]) -> list[list[int] | None]:
    """Return the tokens that each continuation adds to its prompt; None where it changes the prompt's own last tokens.

    Raises:
        Refused: the model does not predict a next token.
    """
    check_predicts(model)
    n = len(prompts)
    if not n:
        return []
    rows = token_rows(model, [*prompts, *(p + c for p, c in zip(prompts, continuations, strict=True))])
    return [w[len(b) :] if w[: len(b)] == b else None for b, w in zip(rows[:n], rows[n:], strict=True)]


def single_tokens(
    model: Model, prompts: Sequence[str], continuations: Sequence[str], role: str = "answer", task: bool = True
) -> list[int]:
    """Return the one token that each continuation is; `role` names it in a refusal, which points to `narrow` for a
    `task`.

    Raises:
        Refused: a continuation is several tokens, none, or merges with the end of its prompt.
    """
    found = []
    for prompt, text, ids in zip(prompts, continuations, next_tokens(model, prompts, continuations), strict=True):
        if ids is None or len(ids) != 1:
            refused = _not_single(model, prompt, text, ids, role)
            more = (refused.instead, ", or let ", Code("task.narrow(model)"), " take the first that differs")
            raise Refused(refused.what, refused.why, more) if task and ids is not None else refused
        found.append(ids[0])
    return found


def whole_answers(
    model: Model, prompts: Sequence[str], continuations: Sequence[str], role: str = "answer"
) -> list[list[int]]:
    """Return the tokens, one or more, that each continuation is.

    Raises:
        Refused: a continuation adds nothing, or merges with the end of its prompt.
    """
    found = []
    for prompt, text, ids in zip(prompts, continuations, next_tokens(model, prompts, continuations), strict=True):
        if not ids:
            raise _not_single(model, prompt, text, ids, role)
        found.append(ids)
    return found


def single_words(model: Model, words: Sequence[str], before: str = "We saw the") -> dict[str, int]:
    """Return the words that are one token in the middle of a sentence, each with its id."""
    found = next_tokens(model, [before] * len(words), [f" {w}" for w in words])
    return {w: ids[0] for w, ids in zip(words, found, strict=True) if ids is not None and len(ids) == 1}


def _not_single(model: Model, prompt: str, text: str, ids: list[int] | None, role: str) -> Refused:
    what = f"{role} {text!r} after the prompt {prompt!r}"
    if ids is None:
        why = "its first letters merge with the prompt's last token, so the model never stands before it"
        return Refused(what, why, "end the prompt at the end of a word, without a trailing space")
    pieces = [repr(p) for p in model.text.token_texts(ids)]
    why = (
        f"it is {len(ids)} tokens ({', '.join(pieces)}), and one next token is measured" if ids else "it adds no token"
    )
    return Refused(what, why, f"choose a {role} of one token")
