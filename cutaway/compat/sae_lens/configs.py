"""Configurations in SAELens' words of versions 0 to 6: old words are translated, words of no version are refused.

`words.json` holds the words with their defaults (of `version`), and the earlier ones with the versions that had them.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any, ClassVar

from cutaway.compat.words import Words
from cutaway.core.files import read_json
from cutaway.core.refuse import Refused
from cutaway.dictionaries.formats.saelens_old import modern

TABLE: dict[str, Any] = read_json(Path(__file__).with_name("words.json"))
VERSION, RENAMED, OLD = TABLE["version"], TABLE["renamed"], TABLE["old"]


def extract_layer_from_tlens_hook_name(hook_name: str) -> int | None:
    """Return the layer in the name of a hook point."""
    found = re.search(r"\.(\d+)(?:\.|$)", hook_name)
    return None if found is None else int(found[1])


class SAEMetadata(dict[str, Any]):
    """Facts of how an SAE is to be used, by attribute or by key; None where a fact is not known."""

    def __init__(self, **facts: Any):
        super().__init__({"sae_lens_version": VERSION, "sae_lens_training_version": VERSION} | facts)

    def __missing__(self, key: str) -> None:
        return None

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__
    to_dict = dict.copy


class Architecture(str):
    """The word of an architecture: an attribute in versions 3 to 5, a method in version 6."""

    def __call__(self) -> str:
        return str(self)


class Translated(Words):
    """A configuration whose words have other names in earlier versions."""

    old = OLD

    def to_dict(self) -> dict[str, Any]:
        """Return the words ready for JSON."""
        plain = {n: v.to_dict() if isinstance(v, Words | SAEMetadata) else v for n, v in vars(self).items()}
        return {n: v if isinstance(v, int | float | list | tuple | dict | None) else str(v) for n, v in plain.items()}


class SAEConfig(Translated):
    """Configuration of an SAE; what `metadata` holds can also be read from it, under older words as well."""

    words: ClassVar[dict[str, Any]] = {**TABLE["sae"], "metadata": SAEMetadata()}
    architecture: ClassVar[Architecture] = Architecture("standard")
    metadata: SAEMetadata

    def __getattr__(self, word: str) -> Any:
        facts, word = vars(self).get("metadata", {}), RENAMED.get(word, word)
        if word == "hook_layer" and facts.get("hook_name"):
            return extract_layer_from_tlens_hook_name(facts["hook_name"])
        if word not in facts:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {word!r}")
        return facts[word]

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "architecture": self.architecture()}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Any:
        """Return the configuration that a `cfg.json` of any version describes.

        Raises:
            Refused: an architecture that this class does not have.
        """
        config = dict(config_dict) if "metadata" in config_dict else modern(config_dict)
        facts = config.pop("metadata", {})
        kind = config.pop("architecture", "standard")
        made = (TRAINING if issubclass(cls, TrainingSAEConfig) else FROZEN).get(kind, object)
        if not issubclass(made, cls):
            raise Refused(
                f"architecture {kind!r}", f"{cls.__name__} does not have it", f"use one of {', '.join(FROZEN)}"
            )
        own = {n: config.pop(n) for n in made.words if n in config}
        return made(**own, metadata=SAEMetadata(**facts | config))


class TrainingSAEConfig(SAEConfig):
    """Configuration of an SAE that is to be trained."""


def _made(base: type[SAEConfig], kind: str, name: str, words: dict[str, Any]) -> type[SAEConfig]:
    """Return the class of configurations of an architecture."""
    words = {**base.words, **words, **({"apply_b_dec_to_input": False} if "d_out" in words else {})}
    doc = f"Configuration of architecture {kind!r}."
    return type(
        name, (base,), {"__doc__": doc, "__module__": __name__, "words": words, "architecture": Architecture(kind)}
    )


FROZEN = {k: _made(SAEConfig, k, f"{row['class']}Config", row["words"]) for k, row in TABLE["frozen"].items()}
TRAINING = {
    k: _made(TrainingSAEConfig, k, f"{row['class']}Config", row["words"]) for k, row in TABLE["training"].items()
}


class LoggingConfig(Translated):
    """Configuration of logs; Weights & Biases is used where it is installed."""

    words = TABLE["log"]


class LanguageModelSAERunnerConfig(Translated):
    """Configuration of a training run: nested (`sae=`, `logger=`) as in version 6, or flat as before it."""

    words = TABLE["run"]

    def __init__(self, **given: Any):
        given = {RENAMED.get(n, n): v for n, v in given.items()}
        logs, flat = ({n: given.pop(n) for n in names if n in given} for names in (LoggingConfig.words, TABLE["flat"]))
        gone = {n: given.pop(n) for n in OLD.keys() - TABLE["flat"] if n in given}
        if flat and "sae" in given:
            word, sae = next(iter(flat)), type(given["sae"]).__name__
            why = f"it is a word of versions {OLD[word]}, and sae= one of version 6"
            raise Refused(f"word {word!r} beside sae=", why, f"give it to {sae}")
        given = {"sae": _nested(flat), "logger": LoggingConfig(**logs)} | given
        super().__init__(**given)
        idle = [f"{n} (versions {OLD[n]})" for n, v in gone.items() if v and n != "hook_layer"]
        if idle:
            warnings.warn(f"words without effect here: {', '.join(idle)}; docs/compat.md says why", stacklevel=2)

    def __getattr__(self, word: str) -> Any:
        word, own = RENAMED.get(word, word), vars(self)
        for held in (own, *(vars(own[part]) for part in ("sae", "logger") if part in own)):
            if word in held:
                return held[word]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {word!r}")


def _nested(flat: dict[str, Any]) -> Any:
    """Return the configuration of the SAE that flat words describe."""
    topk = (flat.pop("activation_fn_kwargs", None) or {}) if flat.pop("activation_fn", "") == "topk" else {}
    made = TRAINING[flat.pop("architecture", "topk" if topk else "standard")]
    size = flat.setdefault("d_in", 512) * (flat.pop("expansion_factor", None) or 4)
    flat = {"l1_coefficient": 1e-3, **flat, **topk, "d_sae": flat.get("d_sae") or size}
    return made(**{n: v for n, v in flat.items() if n in made.words})
