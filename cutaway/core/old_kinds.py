"""Result files of earlier versions: the class and grid of each kind, and the fields that were words of the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_EFFECTS = "cutaway.interventions.effects:Effects"
_GRIDS = {
    "position": ("layer", "position"),
    "head": ("layer", "head"),
    "neuron": ("layer", "neuron"),
    "head_position": ("layer", "head", "position"),
    "neuron_position": ("layer", "neuron", "position"),
    "node": ("node",),
}


@dataclass(frozen=True)
class OldKind:
    """The class that reads a file of an old kind, its grid, and fields and axes that have another name today."""

    path: str
    grid: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)


#: kind in the file → how to read it; kinds of today stand here for files that do not name their class
OLD_KINDS: dict[str, OldKind] = {
    **{f"{name}_effects": OldKind(_EFFECTS, grid) for name, grid in _GRIDS.items()},
    **{f"{name}_scores": OldKind(_EFFECTS, grid) for name, grid in _GRIDS.items()},
    "layer_ablation": OldKind(_EFFECTS, ("layer",)),
    **{f"{name}_ablation": OldKind(_EFFECTS, _GRIDS[name]) for name in ("position", "head", "neuron", "head_position")},
    "path_effects": OldKind(_EFFECTS, ("layer", "head")),
    "mlp_path_effects": OldKind(_EFFECTS, ("layer",)),
    "latent_effects": OldKind(_EFFECTS, ("latent",)),
    "latent_position_effects": OldKind(_EFFECTS, ("latent", "position")),
    "cross_model_heads": OldKind(_EFFECTS, ("layer", "head"), {"own": "clean"}),
    "cross_model_positions": OldKind(_EFFECTS, ("layer", "position"), {"own": "clean"}),
    "direct_attribution": OldKind("cutaway.lenses.direct_attribution:DirectAttribution"),
    "head_type_effects": OldKind("cutaway.heads.confirm:TypeEffects", axes={"token": "span"}),
    "lens_curve": OldKind("cutaway.lenses.logit_lens:LensCurve"),
    "lens_grid": OldKind("cutaway.lenses.lens_grid:LensGrid"),
    "trace": OldKind("cutaway.patching.causal_trace:Trace"),
    "group_effect": OldKind("cutaway.patching.group:GroupEffect"),
    "interactions": OldKind("cutaway.patching.interactions:Interactions"),
    "knockouts": OldKind("cutaway.patching.knockout:Knockouts"),
    "knockout_curve": OldKind("cutaway.patching.knockout_curve:KnockoutCurve"),
    "self_repair": OldKind("cutaway.patching.self_repair:SelfRepair"),
    "streamed_attention": OldKind("cutaway.heads.stream:StreamedAttention", axes={"kind": "type"}),
    "decomposition": OldKind("cutaway.models.anatomy.residual:Decomposition"),
    "predictions": OldKind("cutaway.suites.explanation:Predictions"),
    "dictionary_comparison": OldKind("cutaway.dictionaries.evaluation.compare:Comparison"),
    "dictionary_features": OldKind("cutaway.dictionaries.evaluation.features:Features"),
    "dictionary_firing": OldKind("cutaway.dictionaries.evaluation.firing:Firing"),
    "dictionary_geometry": OldKind("cutaway.dictionaries.evaluation.geometry:Geometry"),
    "dictionary_probing": OldKind("cutaway.dictionaries.evaluation.probing:Probing"),
    "dictionary_scores": OldKind("cutaway.dictionaries.evaluation.scores:Scores"),
    "dictionary_splitting": OldKind("cutaway.dictionaries.evaluation.splitting:Splitting"),
    "dictionary_stability": OldKind("cutaway.dictionaries.evaluation.stability:Stability"),
}

#: word of an old record → the field that holds it today
_OLD_WORDS = {
    "clean − corrupt": "gap",
    "clean − corrupted": "gap",
    "other − own": "gap",
    "clean − corrupted, probability": "gap_probability",
    "clean − corrupted of the other": "gap_other",
    "changed positions": "changed",
    "answer": "answer",
    "foil": "foil",
    "rank of the answer": "rank",
}


def fields_of_record(meta: dict[str, Any], main: str, known: set[str]) -> dict[str, Any]:
    """Move what an old record says in words of its own to `units`, `reasons` and the facts, which are returned.

    Args:
        meta: the units, the reasons and the record of a file without reasons; changed in place.
        main: the field that the result is about, whose interval or null is meant where no field is named.
        known: the fields of the result's class.
    """
    record: dict[str, Any] = meta["record"]
    for word in ("no_interval", "without interval or null"):
        if word in record:
            found = record.pop(word)
            meta["reasons"] |= found if isinstance(found, Mapping) else {main: found}
    if isinstance(record.get("units"), Mapping):
        meta["units"] |= record.pop("units")
    moved = {word: name for word, name in _OLD_WORDS.items() if word in record and name in known}
    return {name: record.pop(word) for word, name in moved.items()}
