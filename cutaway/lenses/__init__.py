"""Lenses: what the residual stream already says at each depth, and which components write it."""

from cutaway.lenses.accumulated_residual import accumulated_residual
from cutaway.lenses.debug import debug
from cutaway.lenses.direct_attribution import direct_attribution
from cutaway.lenses.directions import TokenDirections, token_directions
from cutaway.lenses.jacobian import JacobianLens, open_jacobian_lens
from cutaway.lenses.jacobian_estimation import estimate_jacobian_lens, jacobian_directions
from cutaway.lenses.jacobian_lens import jacobian_lens
from cutaway.lenses.lens_grid import lens_grid
from cutaway.lenses.logit_lens import logit_lens
from cutaway.lenses.patchscope import patchscope
from cutaway.lenses.source_attribution import source_attribution
from cutaway.lenses.swap import swap, swap_along
from cutaway.lenses.token_relevance import token_relevance
from cutaway.lenses.tuned import TunedLens, identity_lens, open_lens
from cutaway.lenses.tuned_lens import tuned_lens
from cutaway.lenses.tuned_training import lens_sites, train_tuned_lens

__all__ = [
    "JacobianLens",
    "TokenDirections",
    "TunedLens",
    "accumulated_residual",
    "debug",
    "direct_attribution",
    "estimate_jacobian_lens",
    "identity_lens",
    "jacobian_directions",
    "jacobian_lens",
    "lens_grid",
    "lens_sites",
    "logit_lens",
    "open_jacobian_lens",
    "open_lens",
    "patchscope",
    "source_attribution",
    "swap",
    "swap_along",
    "token_directions",
    "token_relevance",
    "train_tuned_lens",
    "tuned_lens",
]
