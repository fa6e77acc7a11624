"""Behaviours of prompts: the words that they begin with, their score, and streams at positions from the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.address import Pattern
from cutaway.core.record import note
from cutaway.core.refuse import Keyword, Refused
from cutaway.directions.direction import Direction
from cutaway.interventions.probes import check_classes, folds
from cutaway.models.access.reading import Measure, Reads, Seen
from cutaway.models.model import Model
from cutaway.models.sweep.executor import sweep
from cutaway.models.tokens import Tokens
from cutaway.tasks.answers import continuation, next_tokens
from cutaway.tasks.chat import Chat, chat
from cutaway.tasks.labelled import Labelled


def as_prompts(model: Model, texts: Sequence[str], chats: bool) -> list[str]:
    """Return texts as prompts: as what the user says in the model's chat template, or as they are without one, as are
    those that are chats already.

    Raises:
        Refused: an empty text, or one that the template refuses.
    """
    if empty := [i for i, t in enumerate(texts) if not t.strip()]:
        raise Refused(f"{len(texts)} texts", f"text {empty[0]} is empty", "give texts with at least a word each")
    chats = chats and bool(getattr(model.tokenizer, "chat_template", None))
    return [chat(model, t) if chats and not isinstance(t, Chat) else t for t in texts]


def first_tokens(model: Model, prompt: str, words: Sequence[str]) -> Int[Tensor, "first"]:
    """Return the different first tokens of words that follow a prompt.

    Raises:
        Refused: a word that adds no token to the prompt.
    """
    found = next_tokens(model, [prompt] * len(words), [continuation(prompt, w) for w in words])
    if wrong := [w for w, ids in zip(words, found, strict=True) if not ids]:
        raise Refused(Keyword("words", wrong[0]), f"it merges with the end of {prompt[-20:]!r}", "name another word")
    return torch.tensor(sorted({ids[0] for ids in found if ids}))


def log_odds(logits: Float[Tensor, "row token"], ids: Int[Tensor, "first"]) -> Float[Tensor, "row"]:
    """Return log p − log(1 − p) of the next token being one of some: the score of a behaviour that begins with them."""
    wide, ids = logits.float(), ids.to(logits.device)
    rest = wide.index_fill(-1, ids, -torch.inf)
    return wide[:, ids].logsumexp(-1) - rest.logsumexp(-1)


def divergence(own: Float[Tensor, "row token"], logits: Float[Tensor, "row token"]) -> Float[Tensor, "row"]:
    """Return KL(own ‖ edited) of next tokens, from log-probabilities and logits, in nats."""
    return (own.exp() * (own - logits.float().log_softmax(-1))).sum(-1)


def common_end(tokens: Tokens) -> tuple[int, ...]:
    """Return the positions from the end, −1 last, whose tokens are the same in all prompts; at least the last one.

    In prompts of one form they are what follows the instruction.
    """
    rows = [row[real].tolist()[::-1] for row, real in zip(tokens.ids.cpu(), tokens.mask.cpu(), strict=True)]
    same = 0
    while same < min(map(len, rows)) - 1 and len({row[same] for row in rows}) == 1:
        same += 1
    return tuple(range(-max(same, 1), 0))


def streams_at(
    model: Model, tokens: Tokens, sites: Sequence[Pattern], positions: Sequence[int]
) -> Float[Tensor, "position place text width"]:
    """Read vectors at all addresses that some patterns mean, at positions counted from the end of each prompt.

    Raises:
        Refused: a prompt that is too short, or an address that the model does not have.
    """
    places = tuple(model.places(sites))
    for p in positions:
        tokens.column(p)

    def read(seen: Seen, prompt: Tensor) -> Tensor:
        assert seen.activations is not None
        acts = seen.activations
        return torch.cat([acts[f"{a}@{p}"].float() for p in positions for a in places], -1)

    flat = sweep(model, tokens, [[]], Measure(read, Reads(last_logits=False, places=places)))[0].float().cpu()
    return flat.reshape(len(tokens), len(positions), len(places), -1).permute(1, 2, 0, 3).contiguous()


def unseen(labelled: Labelled, y: Bool[Tensor, "text"], direction: Direction, seed: int) -> Bool[Tensor, "text"]:
    """Return True for texts of groups that the direction was not found on.

    Raises:
        Refused: one class only, among the texts that were seen or the others.
    """
    seen = set(direction.record.get("groups", ()))
    test = torch.tensor([n not in seen for n in labelled.names])
    if not seen or bool(test.all()):
        test[folds(y, labelled.group_of, most=2, seed=seed)[0][0]] = False
        if not seen:
            note("the direction does not say on which groups it was found: half of the groups are tested")
    if not bool(test.any()):
        why = "the direction was found on all of their groups, so none is left for a test"
        raise Refused(f"{len(y)} labelled texts", why, "give texts of other groups, too")
    check_classes(y[test])
    check_classes(y[~test])
    return test
