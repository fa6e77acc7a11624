"""Prompts: their tokens, and what the model expects next."""

from __future__ import annotations

from cutaway.studio.messages import Guess, Predicted, Prompt, Token
from cutaway.studio.session import Session


def predict(session: Session, request: Prompt) -> Predicted:
    """Return the tokens of a prompt and the most likely next ones."""
    model = session.model
    tokens = model.tokens([request.prompt])
    logits = model.run_last(tokens)[0].float().cpu()
    chosen = logits.topk(min(request.top, len(logits)))
    probability = logits.softmax(-1)[chosen.indices]
    ids = tokens.ids[0].tolist()
    texts = model.text.token_texts(ids)
    return Predicted(
        tokens=[Token(id=i, text=t) for i, t in zip(ids, texts, strict=True)],
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
