"""Words that stand in an order: days, months, numbers, letters; those of one token each in a model."""

from __future__ import annotations

from dataclasses import dataclass

from cutaway.core.refuse import Refused
from cutaway.models.model import Model

_LEAST = 4  # words of one token that an order needs

#: the orders by name: their words, and True if the first follows the last
ORDERS: dict[str, tuple[str, bool]] = {
    "days": ("Monday Tuesday Wednesday Thursday Friday Saturday Sunday", True),
    "months": (
        "January February March April May June July August September October November December",
        True,
    ),
    "numbers": (" ".join(map(str, range(1, 31))), False),
    "number words": (
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
        " eighteen nineteen twenty",
        False,
    ),
    "ordinals": ("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth", False),
    "letters": ("A B C D E F G H I J K L M N O P Q R S T U V W X Y Z", False),
}


@dataclass(frozen=True)
class Order:
    """Words of one token each that stand in an order.

    Attributes:
        name: the name of the order.
        words: the words, as they stand in a text.
        ids: their tokens.
        follows: the place among `ids` of the word that follows each; −1 where that is none of them.
    """

    name: str
    words: tuple[str, ...]
    ids: tuple[int, ...]
    follows: tuple[int, ...]


def orders(model: Model) -> list[Order]:
    """Return the orders of which a model has four words or more as one token each.

    Raises:
        Refused: it has none.
    """
    out = list[Order]()
    for name, (text, round_again) in ORDERS.items():
        every = text.split()
        found = max(({w: i for w in every if (i := _token(model, form + w)) >= 0} for form in (" ", "")), key=len)
        if len(found) < _LEAST:
            continue
        kept, after = list(found), dict(zip(every, every[1:] + every[:1] * round_again, strict=False))
        follows = tuple(kept.index(after[w]) if after.get(w) in found else -1 for w in kept)
        if max(follows) < 0:
            continue
        out.append(Order(name, tuple(kept), tuple(found.values()), follows))
    if not out:
        why = f"no order has {_LEAST} words of one token each"
        raise Refused(f"words in an order for {model.name}", why, "use a model with days, numbers or letters as tokens")
    return out


def _token(model: Model, text: str) -> int:
    """Return the one token of a text; −1 if it is several, or unknown."""
    if model.tokenizer is None:
        return -1
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and ids[0] != model.tokenizer.unk_token_id else -1
