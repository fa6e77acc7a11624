"""A copy of a model that has learned nothing: the control of comparisons between checkpoints."""

from __future__ import annotations

from copy import deepcopy

import torch

from cutaway.core import repeat as again
from cutaway.core.repeat import Made
from cutaway.core.stats import generator
from cutaway.models.loading.provenance import look
from cutaway.models.model import Model

SHUFFLED = "shuffled"


def shuffled(model: Model, seed: int = 0) -> Model:
    """Return a copy whose weight matrices have their entries in random order; the same copy for the same seed.

    Norms and biases (one axis) stay, and so does the statistic of every matrix.
    """
    hf, g = deepcopy(model.hf), generator(seed)
    with torch.no_grad():
        for p in hf.parameters():
            if p.ndim > 1:
                p.copy_(p.flatten()[torch.randperm(p.numel(), generator=g).to(p.device)].reshape(p.shape))
    copy = Model(hf, model.tokenizer, f"{model.name} (shuffled)", model.world, disabled=model.disabled)
    how = again.made("model", model)
    call = "ca.models.shuffled(model)" if seed == 0 else f"ca.models.shuffled(model, {seed})"
    no_flags = "" if seed == 0 else f"no flag says a shuffled copy with seed={seed}"
    made = Made(call, {"": SHUFFLED}, how.no_flags or no_flags, how.no_python, {"model": how.python})
    copy.made = made.of(copy, look)
    return copy
