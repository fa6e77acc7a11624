"""Sparse dictionaries: latents that read and write sites; encode, decode, splice, load and judge them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutaway.dictionaries.code import SparseCode
    from cutaway.dictionaries.dictionary import Block, Dictionary
    from cutaway.dictionaries.forms import autoencoder, one_block, together
    from cutaway.dictionaries.store import open_dictionary as open
    from cutaway.dictionaries.store import save

# Where each public name lives; modules load when a name of theirs is first used.
_LAZY = {
    "Block": ("dictionary", "Block"),
    "Dictionary": ("dictionary", "Dictionary"),
    "SparseCode": ("code", "SparseCode"),
    "autoencoder": ("forms", "autoencoder"),
    "one_block": ("forms", "one_block"),
    "open": ("store", "open_dictionary"),
    "save": ("store", "save"),
    "together": ("forms", "together"),
}

__all__ = ["Block", "Dictionary", "SparseCode", "autoencoder", "one_block", "open", "save", "together"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        module, attribute = _LAZY[name]
        return getattr(import_module(f"cutaway.dictionaries.{module}"), attribute)
    raise AttributeError(f"module 'cutaway.dictionaries' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
