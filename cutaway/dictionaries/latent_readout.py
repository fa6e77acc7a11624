"""A latent as a readout: what methods measure where a task's metric is a feature rather than an answer."""

from __future__ import annotations

from torch import Tensor

from cutaway.core.node import Latent
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary, place_of
from cutaway.models.access.capture import Activations
from cutaway.tasks.readouts import Readout, mean_over_tokens


def latent(dictionary: Dictionary, index: int, position: int | None = None) -> Readout:
    """Return the readout of a latent's value in the activations of a run.

        ca.Task("subject", pairs, metric=ca.dictionaries.latent(d, 17, position=-1))

    Args:
        dictionary: the dictionary, of sites of the model that is measured.
        index: number of the latent, over all blocks.
        position: position of the prompt; without it the mean over each prompt's tokens.

    Raises:
        Refused: no such latent, or a gate under which a token's code depends on other tokens of the batch.
    """
    block, local = place_of(dictionary, index)
    gate, sites = dictionary.gates[block], dictionary.blocks[block].reads
    name = str(Latent(block, local, position))
    if gate.whole_batch:
        why = f"{type(gate).__name__} chooses among all tokens of a batch, so that runs side by side would change it"
        raise Refused(f"readout of {name}", why, "use a dictionary with thresholds")

    def measure(acts: Activations, answers: Tensor, foils: Tensor, reference: Tensor | None) -> Tensor:
        if position is not None:
            return dictionary.encode({s: acts[f"{s}@{position}"] for s in sites}, block).columns([local])[:, 0]
        values = dictionary.encode({s: acts[s].flatten(0, 1) for s in sites}, block).columns([local])[:, 0]
        return mean_over_tokens(values.view(acts.tokens.ids.shape), acts)

    says = "the value of a dictionary's latent"
    named = f"{name} of {dictionary.fingerprint()[:8]}"
    return Readout(named, measure, "latent's value", not gate.greedy, says, reads=sites)
