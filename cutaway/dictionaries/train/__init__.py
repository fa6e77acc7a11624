"""Training of dictionaries: recipes (what), plans (how long), and the run that follows them.

from cutaway.dictionaries import train
recipe = train.autoencoder("resid_post.3", 1024, train.TopK(16))
trained = train.train(stream, recipe, train.Plan(tokens=2_000_000), out="runs/my_dictionary")
"""

from cutaway.dictionaries.train.adam import AdamSettings
from cutaway.dictionaries.train.cards import card
from cutaway.dictionaries.train.endtoend import Divergence, Whole
from cutaway.dictionaries.train.feed import Held, Source
from cutaway.dictionaries.train.gating import (
    AbsTopK,
    BatchTopK,
    Gated,
    Gating,
    GroupMax,
    JumpRelu,
    MatchingPursuit,
    Relu,
    TopK,
)
from cutaway.dictionaries.train.learner import Learner, Moments
from cutaway.dictionaries.train.loop import Progress, Trained, train
from cutaway.dictionaries.train.plan import Plan
from cutaway.dictionaries.train.recipe import (
    Recipe,
    autoencoder,
    autoencoders,
    cross_layer,
    crosscoder,
    customary,
    recipe_of,
    transcoder,
    transcoders,
)
from cutaway.dictionaries.train.shards import mesh
from cutaway.dictionaries.train.wandb_log import wandb_log

__all__ = [
    "AbsTopK", "AdamSettings", "BatchTopK", "Divergence", "Gated", "Gating", "GroupMax", "Held", "JumpRelu", "Learner",
    "MatchingPursuit", "Moments", "Plan", "Progress", "Recipe", "Relu", "Source", "TopK", "Trained", "Whole",
    "autoencoder", "autoencoders", "card", "cross_layer", "crosscoder", "customary", "mesh", "recipe_of", "train",
    "transcoder", "transcoders", "wandb_log",
]  # fmt: skip
