"""Training of dictionaries: recipes (what), plans (how long), and the run that follows them.

from cutaway.dictionaries import training
recipe = training.autoencoder("resid_post.3", 1024, training.TrainTopK(16))
trained = training.train(stream, recipe, training.Plan(tokens=2_000_000), out="runs/my_dictionary")
"""

from cutaway.core.cursor import Source
from cutaway.dictionaries.gates import (
    TrainAbsTopK,
    TrainBatchTopK,
    TrainGate,
    TrainGated,
    TrainGroupMax,
    TrainJumpRelu,
    TrainMatchingPursuit,
    TrainRelu,
    TrainTopK,
)
from cutaway.dictionaries.training.adam import AdamSettings
from cutaway.dictionaries.training.endtoend import Divergence, Whole
from cutaway.dictionaries.training.feed import Held
from cutaway.dictionaries.training.learner import Learner, SiteMoments
from cutaway.dictionaries.training.mesh import mesh
from cutaway.dictionaries.training.plan import Plan
from cutaway.dictionaries.training.recipe import (
    Recipe,
    autoencoder,
    autoencoders,
    cross_layer,
    crosscoder,
    recipe_of,
    transcoder,
    transcoders,
)
from cutaway.dictionaries.training.run import Progress, train, wandb_log
from cutaway.dictionaries.training.update import Trained

__all__ = [
    "AdamSettings",
    "Divergence",
    "Held",
    "Learner",
    "Plan",
    "Progress",
    "Recipe",
    "SiteMoments",
    "Source",
    "TrainAbsTopK",
    "TrainBatchTopK",
    "TrainGate",
    "TrainGated",
    "TrainGroupMax",
    "TrainJumpRelu",
    "TrainMatchingPursuit",
    "TrainRelu",
    "TrainTopK",
    "Trained",
    "Whole",
    "autoencoder",
    "autoencoders",
    "cross_layer",
    "crosscoder",
    "mesh",
    "recipe_of",
    "train",
    "transcoder",
    "transcoders",
    "wandb_log",
]  # fmt: skip
