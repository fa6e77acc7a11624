"""Prompts: their tokens, and what the model expects next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.studio.messages import Guess, Predicted, Prompt, Token
from cutaway.studio.session import Session


def predict(session: Session, request: Prompt) -> Predicted:
    """Return the tokens of a prompt and the most likely next ones."""
    model = session.model
    tokens = model.tokens([request.prompt])
    logits = model.run_last(tokens)[0].float().cpu()
    chosen = logits.topk(min(request.top, len(logits)))
    probability = logits.softmax(-1)[chosen.indices]
    return Predicted(
        tokens=tokens_of(model, tokens),
        next=[
            Guess(id=i, text=t, probability=p, logit=v)
            for i, t, p, v in zip(
                chosen.indices.tolist(),
                model.text.token_texts(chosen.indices),
                probability.tolist(),
                chosen.values.tolist(),
                strict=True,
            )
        ],
    )


def tokens_of(model: Model, tokens: Tokens) -> list[Token]:
    """Return the tokens of a single prompt with their texts."""
    ids = tokens.ids[0].tolist()
    return [Token(id=i, text=t) for i, t in zip(ids, model.text.token_texts(ids), strict=True)]


def apart(first: Sequence[Any], second: Sequence[Any]) -> str:
    """Return why two prompts cannot be compared token by token; "" if they can."""
    if len(first) == len(second):
        return ""
    return (
        f"Prompt A has {len(first)} tokens and prompt B {len(second)}: they do not line up, so there is no difference "
        "token by token. Give prompts of as many tokens, or look at each by itself."
    )
