"""Any Hugging Face model, live: families, sites, capture, edits, weights, residual decomposition, tokens."""

from cutaway.models.access.capture import Activations
from cutaway.models.anatomy.residual import decompose, logit_contributions
from cutaway.models.edits.apply import Apply
from cutaway.models.edits.edit import Edit
from cutaway.models.edits.library import Ablate, Add, Freeze, Knockout, Project, Replace, Scale
from cutaway.models.edits.rewrite_export import export_adapter, export_model
from cutaway.models.edits.rewrite_set import Rewrites, RewriteStack, changes, difference
from cutaway.models.edits.rewrites import Rewrite, open_rewrites, rewritten, save_rewrites
from cutaway.models.loading.load import load
from cutaway.models.loading.shuffle import shuffled
from cutaway.models.loading.untied import untied
from cutaway.models.model import Model
from cutaway.models.self_check import self_check
from cutaway.models.tokens import Tokens, batch

__all__ = [
    "Ablate",
    "Activations",
    "Add",
    "Apply",
    "Edit",
    "Freeze",
    "Knockout",
    "Model",
    "Project",
    "Replace",
    "Rewrite",
    "RewriteStack",
    "Rewrites",
    "Scale",
    "Tokens",
    "batch",
    "changes",
    "decompose",
    "difference",
    "export_adapter",
    "export_model",
    "load",
    "logit_contributions",
    "open_rewrites",
    "rewritten",
    "save_rewrites",
    "self_check",
    "shuffled",
    "untied",
]
