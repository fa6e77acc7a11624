"""Kinds of result as files of earlier versions name them, and the class and grid that each has today."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """The class that reads a file of an old kind, its grid, and fields that have another name today."""

    path: str
    grid: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)


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
    "lens_curve": OldKind("cutaway.lenses.logit_lens:LensCurve"),
    "lens_grid": OldKind("cutaway.lenses.lens_grid:LensGrid"),
    "trace": OldKind("cutaway.patching.causal_trace:Trace"),
    "group_effect": OldKind("cutaway.patching.group:GroupEffect"),
    "interactions": OldKind("cutaway.patching.interactions:Interactions"),
    "knockouts": OldKind("cutaway.patching.knockout:Knockouts"),
    "knockout_curve": OldKind("cutaway.patching.knockout_curve:KnockoutCurve"),
    "self_repair": OldKind("cutaway.patching.self_repair:SelfRepair"),
    "decomposition": OldKind("cutaway.models.anatomy.residual:Decomposition"),
    "predictions": OldKind("cutaway.suites.explain:Predictions"),
    "dictionary_comparison": OldKind("cutaway.dictionaries.evaluation.stability:Comparison"),
    "dictionary_features": OldKind("cutaway.dictionaries.evaluation.features:Features"),
    "dictionary_firing": OldKind("cutaway.dictionaries.evaluation.firing:Firing"),
    "dictionary_geometry": OldKind("cutaway.dictionaries.evaluation.geometry:Geometry"),
    "dictionary_probing": OldKind("cutaway.dictionaries.evaluation.probing:Probing"),
    "dictionary_scores": OldKind("cutaway.dictionaries.evaluation.scores:Scores"),
    "dictionary_splitting": OldKind("cutaway.dictionaries.evaluation.stability:Splitting"),
    "dictionary_stability": OldKind("cutaway.dictionaries.evaluation.stability:Stability"),
}
