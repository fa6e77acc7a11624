"""Sparse dictionaries: latents that read and write sites; encode, decode, splice, load and judge them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutaway.dictionaries.code import SparseCode
    from cutaway.dictionaries.dictionary import Dictionary
    from cutaway.dictionaries.evaluation import (
        compare,
        features,
        firing,
        geometry,
        letter_absorption,
        loss_recovered,
        probing,
        quiver,
        reconstruction,
        shift,
        splitting,
        stability,
    )
    from cutaway.dictionaries.formats import l0_check, load
    from cutaway.dictionaries.latent_readout import latent
    from cutaway.dictionaries.parts import Block
    from cutaway.dictionaries.splice import Splice, ablate_latents, add_to_latents, scale_latents, set_latents
    from cutaway.dictionaries.store import open_dictionary as open
    from cutaway.dictionaries.store import save
    from cutaway.dictionaries.subject import Dictionaries
    from cutaway.dictionaries.transforms import autoencoder, fold, one_block, together

# Where each public name lives; modules load when a name of theirs is first used.
_LAZY = {
    "Block": ("parts", "Block"),
    "Dictionaries": ("subject", "Dictionaries"),
    "Dictionary": ("dictionary", "Dictionary"),
    "SparseCode": ("code", "SparseCode"),
    "Splice": ("splice", "Splice"),
    "ablate_latents": ("splice", "ablate_latents"),
    "add_to_latents": ("splice", "add_to_latents"),
    "autoencoder": ("transforms", "autoencoder"),
    "compare": ("evaluation.compare", "compare"),
    "features": ("evaluation.features", "features"),
    "firing": ("evaluation.firing", "firing"),
    "fold": ("transforms", "fold"),
    "geometry": ("evaluation.geometry", "geometry"),
    "l0_check": ("formats", "l0_check"),
    "latent": ("latent_readout", "latent"),
    "letter_absorption": ("evaluation.letters", "letter_absorption"),
    "load": ("formats", "load"),
    "loss_recovered": ("evaluation.loss", "loss_recovered"),
    "one_block": ("transforms", "one_block"),
    "open": ("store", "open_dictionary"),
    "probing": ("evaluation.probing", "probing"),
    "quiver": ("evaluation.quiver", "quiver"),
    "reconstruction": ("evaluation.reconstruction", "reconstruction"),
    "save": ("store", "save"),
    "scale_latents": ("splice", "scale_latents"),
    "set_latents": ("splice", "set_latents"),
    "shift": ("evaluation.shift", "shift"),
    "splitting": ("evaluation.splitting", "splitting"),
    "stability": ("evaluation.stability", "stability"),
    "together": ("transforms", "together"),
}
_PACKAGES = ("benchmarks", "evaluation", "formats", "gates", "objectives", "training")

__all__ = [
    "Block", "Dictionaries", "Dictionary", "SparseCode", "Splice", "ablate_latents", "add_to_latents", "autoencoder",
    "compare", "features", "firing", "fold", "geometry", "l0_check", "latent", "letter_absorption", "load",
    "loss_recovered", "one_block", "open", "probing", "quiver", "reconstruction", "save", "scale_latents",
    "set_latents", "shift", "splitting", "stability", "together",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _PACKAGES:
        return import_module(f"cutaway.dictionaries.{name}")
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(import_module(f"cutaway.dictionaries.{module}"), attribute)
    raise AttributeError(f"module 'cutaway.dictionaries' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
