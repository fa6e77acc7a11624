"""The training loop: an update, a source of batches, and a plan.

A run is a folder: `checkpoint.safetensors` holds the state of the update, and in its header the cursor of the source
and everything else the next step depends on, so that a run that was killed goes on with the same bits (on the same
machine and number of threads); `log.jsonl` has the reports and events. An interrupt waits until a step is whole. The
loop itself draws no random numbers.

    loop = Loop(update, source, Plan(tokens=100_000), "runs/probe")
    loop.start()
    loop.run()
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cutaway.core.cursor import Source
from cutaway.core.files import make_folder
from cutaway.core.progress import advance
from cutaway.core.refuse import Keyword, Refused
from cutaway.training.checkpoints import Checkpoints, shared_storage
from cutaway.training.interrupts import Interrupts, held_back
from cutaway.training.log import Log, OnLog
from cutaway.training.plan import Plan
from cutaway.training.ranks import Ranks

_COUNTED = ("step", "tokens", "logged_tokens", "seconds", "events")  # attributes that are in the record as they are


@runtime_checkable
class Update(Protocol):
    """Protocol of what is trained: weights, their optimizer, and sums for the log.

    Write `step`, `report`, `state` and `restore`; the other methods have a default for classes that inherit from this
    one. Each method gets the loop, which has the plan, `step`, `tokens` and `seconds` so far, `note` and `log`.

    Attributes:
        kind: what is trained, written into checkpoints.
        ranks: the processes over which the update is spread; None for one process.
    """

    kind: str = "training"
    ranks: Ranks | None = None

    def begin(self, loop: Loop) -> None:
        """Start a fresh run; `loop.peek()` reads batches ahead that are trained on later. Not called on resume."""
        return

    def step(self, batch: Any, loop: Loop) -> int:
        """Learn from a batch and return its tokens; `loop.step` and `loop.tokens` count those before it."""
        ...

    def after_step(self, loop: Loop) -> None:
        """Do what follows a step once it is counted and logged."""
        return

    def report(self, loop: Loop) -> list[dict[str, Any]]:
        """Return the lines for the log about the steps since the last report; the loop adds step, tokens, speed and
        forecast.
        """
        ...

    def settings(self, loop: Loop) -> dict[str, Any]:
        """Return the settings that must be equal on resume, JSON-ready; they are part of a checkpoint's record."""
        return {"plan": loop.plan.as_dict()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that the next step depends on: tensors by name, and JSON-ready data by name."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], loop: Loop) -> None:
        """Take up an earlier `state`; the record has the settings as well."""
        ...


@dataclass(frozen=True)
class Forecast:
    """Speed of a run so far, and the time that is left at that speed."""

    tokens_per_second: float
    seconds_left: float


class Loop:
    """A training run. Call `start`, which begins or resumes it, and then `run`.

    Attributes:
        update: what is trained.
        source: batches with an exact cursor.
        plan: how long, and when to log and save.
        out: folder of the run; None keeps nothing.
        step: steps done.
        tokens: tokens trained on.
        logged_tokens: tokens at the last report.
        events: what was noted, as in the log.
        waiting: batches read ahead, each with the cursor behind it.
        done: share of the plan that is done; the run ends at 1.
        whole: False while a step is half done.
    """

    def __init__(
        self,
        update: Update,
        source: Source | Any,
        plan: Plan,
        out: str | Path | None = None,
        *,
        on_log: OnLog | None = None,
    ):
        if not isinstance(source, Source):
            why = "training needs batches and an exact cursor (state and restore)"
            raise Refused(f"a source of type {type(source).__name__}", why, "use a stream, or train.Held for tensors")
        self.update, self.source, self.plan, self.out = update, source, plan, None if out is None else make_folder(out)
        self.is_main_process = update.ranks is None or update.ranks.rank == 0
        self.log_file = Log(self.out, on_log, self.is_main_process)
        self.checkpoints = None if self.out is None else Checkpoints(self.out, update.kind, update.ranks)
        if self.checkpoints is not None and update.ranks is not None:
            shared_storage()  # refused now rather than at the first checkpoint
        self.step = self.tokens = self.logged_tokens = 0
        self.done = 0.0
        self.events: list[dict[str, Any]] = []
        self.whole = True
        self._seconds = 0.0  # before this process took the run up
        self._began = self._saved = time.perf_counter()
        self.waiting: list[tuple[Any, dict[str, Any]]] = []
        self._cursor: dict[str, Any] | None = None  # behind the last batch, where the source itself is further on
        self._interrupts = Interrupts()

    @property
    def seconds(self) -> float:
        """Time of the run so far, over all processes that took it up."""
        return self._seconds + time.perf_counter() - self._began

    def start(self, resume: bool = True) -> None:
        """Take up the checkpoint in the folder if there is one and `resume` is True; begin a fresh run otherwise."""
        if resume and self.checkpoints is not None and self.checkpoints.exist():
            self.load()
        else:
            self.log_file.cut(0)
            self.update.begin(self)

    def run(self, stop_after: int | None = None, on_report: Callable[[Loop], None] | None = None) -> None:
        """Train to the end of the plan or of the source, with reports and checkpoints.

        Args:
            stop_after: end at this step with a checkpoint, as an interruption would.
            on_report: called after each report, in the main process.

        Raises:
            KeyboardInterrupt: as it came; the last whole step is in the checkpoint, if there is one process.
        """
        with held_back(self.update.ranks is None) as self._interrupts:
            try:
                stream = iter(self.source)
                while self.done < 1 and self.step != stop_after:
                    if (batch := self._next(stream)) is None:
                        self.note("the source ended", tokens=self.tokens)
                        if self.step % self.plan.log_every:
                            self.log()
                        break
                    reported = self.advance(batch)
                    advance(self.tokens, self.plan.tokens)
                    if reported and on_report is not None and self.is_main_process:
                        on_report(self)
                    if self._due(reported):
                        self.save()
                    self._interrupts.check()
                self.save()
            except KeyboardInterrupt:
                if self.whole and self.update.ranks is None:  # several processes would each stop at another step
                    self.save()
                raise

    def advance(self, batch: Any) -> bool:
        """Do one step; True if it was reported in the log."""
        self.whole = False
        tokens = self.update.step(batch, self)
        self.step += 1
        self.tokens += tokens
        self.done = self.plan.done(self.tokens, self.seconds)
        reported = self.step % self.plan.log_every == 0 or self.done >= 1
        if reported:
            self.log()
        self.update.after_step(self)
        self.whole = True
        return reported

    def peek(self) -> Iterator[Any]:
        """Read batches ahead; they wait to be trained on."""
        for batch in self.source:
            self.waiting.append((batch, self.source.state()))
            yield batch

    # --- log

    def log(self) -> None:
        """Write the update's report, each line with the speed and the time left."""
        forecast = self.forecast()
        speed = {"tokens_per_second": round(forecast.tokens_per_second, 1)}
        speed["seconds_left"] = round(forecast.seconds_left, 1)
        for line in self.update.report(self):
            self.log_file.write({"step": self.step, "tokens": self.tokens} | line | speed)
        self.logged_tokens = self.tokens

    def note(self, event: str, **more: Any) -> None:
        """Log an event."""
        self.events.append({"event": event, "step": self.step, **more})
        self.log_file.write(self.events[-1])

    def forecast(self) -> Forecast:
        """Return the tokens per second so far, and the seconds that are left at that speed."""
        seconds = self.seconds
        done = self.plan.done(self.tokens, seconds)
        left = seconds / done * max(0.0, 1 - done) if done else float("inf")
        return Forecast(self.tokens / seconds if seconds > 0 else 0.0, left)

    # --- checkpoints

    def save(self) -> None:
        """Write the checkpoint; a crash in between leaves the earlier one."""
        if self.checkpoints is None:
            return
        tensors, own = self.update.state()
        cursor = self.source.state() if self._cursor is None else self._cursor
        record = {n: getattr(self, n) for n in _COUNTED} | {
            "lines": self.log_file.lines,
            "source": cursor,
            "threads": torch.get_num_threads(),
        }
        record |= self.update.settings(self)
        if clash := own.keys() & record.keys():
            what = f"a state of {self.update.kind} with {', '.join(sorted(clash))}"
            raise Refused(what, "the loop keeps these itself", "give them other names")
        self.checkpoints.write(tensors, own | record)
        self._saved = time.perf_counter()

    def load(self) -> None:
        """Take up the checkpoint of the folder.

        Raises:
            Refused: it is of another kind of run, or of other settings.
        """
        assert self.checkpoints is not None
        tensors, record = self.checkpoints.read()
        for name, value in self.update.settings(self).items():
            if json.dumps(record[name], sort_keys=True) != json.dumps(value, sort_keys=True):
                why = f"its checkpoint was written with other {name}"
                instead = ("use the same, another folder, or ", Keyword("resume", False))
                raise Refused(f"resuming in {self.out}", why, instead)
        self.step, self.tokens, self.logged_tokens = (record[n] for n in _COUNTED[:3])
        self._seconds, self.events = record["seconds"], record["events"]
        self._began = self._saved = time.perf_counter()
        self.done = self.plan.done(self.tokens, self.seconds)
        self.update.restore(tensors, record, self)
        self.source.restore(record["source"])
        self.log_file.cut(record["lines"])

    def _due(self, reported: bool) -> bool:
        """True if it is time for a checkpoint; of several processes the first decides, where they report anyway."""
        late = time.perf_counter() - self._saved >= self.plan.checkpoint_seconds
        by_step = self.step % self.plan.checkpoint_every == 0
        if self.update.ranks is None:
            return late or by_step
        return self.update.ranks.broadcast(late or by_step) if reported else by_step

    def _next(self, stream: Iterator[Any]) -> Any:
        """Return the next batch, None at the end."""
        if self.waiting:
            batch, self._cursor = self.waiting.pop(0)
            return batch
        self._cursor = self.source.state()  # where the last step ended, should the source be interrupted
        with self._interrupts.open():
            batch = next(stream, None)
        self._cursor = None
        return batch
