"""The checker that the import hook of `conftest` puts on every function of the package: beartype."""

from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a fine float


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its types checked at every call; `Self`, which means nothing outside a class, is left out."""
    hints = getattr(function, "__annotations__", {})
    if any(hint in (Self, "Self") for hint in hints.values()):
        function.__annotations__ = {name: hint for name, hint in hints.items() if hint not in (Self, "Self")}
    return beartype(function, conf=_CONF)
