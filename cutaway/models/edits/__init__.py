"""Edits: changes of activations and of weights, as data.

    model.run("The cat sat on the", edits=[ca.edits.Ablate("z.3.0"), ca.edits.Scale("mlp_out.2", 0.5)])

An edit is frozen: it can be stored, compared and recorded, and it changes the model only within one call or block.
"""

from cutaway.models.edits.apply import Apply
from cutaway.models.edits.conditional import Conditional
from cutaway.models.edits.library import Ablate, Add, Cap, Edit, Freeze, Knockout, Project, Replace, Scale

__all__ = [
    "Ablate",
    "Add",
    "Apply",
    "Cap",
    "Conditional",
    "Edit",
    "Freeze",
    "Knockout",
    "Project",
    "Replace",
    "Scale",
]
