"""The training loop of everything that is fitted: checkpoints, exact resume, interrupts, a log, a forecast, a guard.

from cutaway.training import Loop, Plan, Update
class Probe(Update): ...  # step, report, state, restore
loop = Loop(Probe(), source, Plan(tokens=100_000), "runs/probe")
loop.start()
loop.run()
"""

from cutaway.training.checkpoints import Checkpoints
from cutaway.training.guard import Guard
from cutaway.training.loop import Forecast, Loop, Update
from cutaway.training.plan import Plan
from cutaway.training.ranks import Ranks
from cutaway.training.wandb_log import wandb_log

__all__ = ["Checkpoints", "Forecast", "Guard", "Loop", "Plan", "Ranks", "Update", "wandb_log"]
