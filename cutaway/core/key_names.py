"""Names under which the keys of ledgers know classes and functions of the package, wherever they stand today.

A key that held the path of a class would end with the next move, and every ledger under it. Whatever moves or is
renamed therefore keeps the name that ledgers were first written with: one row here.
"""

from __future__ import annotations

_EDITS = ("Ablate", "Add", "Freeze", "Knockout", "Project", "Replace", "Scale")
_METRICS = ("logit_diff", "logit", "log_prob", "prob", "prob_diff", "kl", "rank", "accuracy")

#: path of today → name in keys
KEY_NAMES: dict[str, str] = {
    **{f"cutaway.models.edits.library.{name}": f"cutaway.models.edits.{name}" for name in _EDITS},
    **{f"cutaway.tasks.readouts.{name}": f"cutaway.tasks.metrics.{name}" for name in _METRICS},
    "cutaway.tasks.readouts.Readout": "cutaway.tasks.metrics.Metric",
    "cutaway.interventions.ablation_values.RandomStep": "cutaway.patching.baseline.RandomStep",
    "cutaway.tasks.bound.Bound._measured": "cutaway.tasks.bound.Bound.metric_at",
    "cutaway.models.access.reading.jointly.<locals>.function": "cutaway.patching.activation._run.<locals>.measure",
    "cutaway.models.edits.keep.Read": "cutaway.dictionaries.splice.SpliceRead",
    "cutaway.models.access.capture.Activations": "cutaway.models.capture.Activations",
}
#: name of a class in keys → field that was renamed → its name in keys
KEY_FIELDS: dict[str, dict[str, str]] = {"cutaway.tasks.bound.Bound": {"readout": "row"}}
#: name of a class in keys → fields that say how a thing is computed, not what it is: keys never hold them
UNKEYED_FIELDS: dict[str, tuple[str, ...]] = {"cutaway.tasks.metrics.Metric": ("of_choices",)}
#: name of a class in keys → fields that it was given later: keys hold them only where they are not their default
LATER_FIELDS: dict[str, tuple[str, ...]] = {
    "cutaway.core.address.Address": ("model",),
    "cutaway.tasks.bound.Bound": ("steps",),
    "cutaway.models.access.reading.Reads": ("continuations",),
    "cutaway.models.tokens.Tokens": ("tails",),
    "cutaway.tasks.metrics.Metric": ("reads", "whole_answer", "continuations"),
}
