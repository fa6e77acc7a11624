"""Lenses: what the residual stream already says at each depth, and which components write it."""

from cutaway.lenses.direct_attribution import direct_attribution
from cutaway.lenses.lens_grid import lens_grid
from cutaway.lenses.logit_lens import logit_lens

__all__ = ["direct_attribution", "lens_grid", "logit_lens"]
