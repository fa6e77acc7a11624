"""The training run: one or several dictionaries on one stream of activations, with checkpoints and a log.

Every batch is read once and given to all of them. A recipe without a learning rate starts as three dictionaries whose
rates differ by factors of three; after the probe the one with the lowest loss goes on as it is, and the curves of all
three stay in the log. A run is a folder: `checkpoint.safetensors` holds weights, optimisers, and in its header the
cursor of the stream and everything else the next step depends on, so that a run that was killed goes on with the same
bits (on the same machine and number of threads); `log.jsonl` has one line a dictionary and time. Starting directions
come from the recipe's seed and the order of tokens from the stream; the steps themselves draw no random numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.json_lines import written
from cutaway.core.progress import advance
from cutaway.core.refuse import Refused
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.kernels import precision
from cutaway.dictionaries.kernels.precision import Choice
from cutaway.dictionaries.kernels.topk import Encoder, top_k
from cutaway.dictionaries.training import checkpoints
from cutaway.dictionaries.training.entries import Entry, finite, late
from cutaway.dictionaries.training.feed import Source, acts_of
from cutaway.dictionaries.training.interrupts import Interrupts, put_off
from cutaway.dictionaries.training.learner import Learner, Moments
from cutaway.dictionaries.training.mesh import Shards
from cutaway.dictionaries.training.plan import TRIED, Plan
from cutaway.dictionaries.training.recipe import Recipe
from cutaway.models.sweep.processes import processes

MOMENT_TOKENS = 8192  # of which means and norms are taken, where the source does not have them
PATIENCE = 3  # batches in a row whose loss is not a number
RECHECK = 1000  # steps between comparisons of bfloat16 selection with float32


@dataclass(frozen=True)
class Progress:
    """What the callback of a run is told."""

    tokens: int
    of: int
    loss: float
    fvu: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Trained:
    """One finished dictionary, the learning rate it was trained with, and the curves of all that were tried."""

    dictionary: Dictionary
    rate: float
    curves: dict[str, list[dict[str, Any]]]  # by learning rate
    tokens: int
    seconds: float
    choice: Choice


class Run:
    """The state of a training run; `train/sharded.py` has that of several processes."""

    shards: Shards | None = None
    speaks = True  # whether this process writes log and record

    def __init__(
        self, source: Source, recipes: Sequence[Recipe], plan: Plan, out: Path | None, device: torch.device | str
    ):
        if not recipes:
            raise Refused("a training run", "no recipe was given", "give at least one")
        self.source, self.recipes, self.plan, self.out, self.device = source, list(recipes), plan, out, device
        self.sites = tuple(dict.fromkeys(s for r in recipes for s in (*r.reads, *r.writes)))
        self.step = self.tokens = self.logged_tokens = 0
        self.seconds = 0.0
        self.entries: list[Entry] = []
        self.ended: dict[int, dict[str, list[dict[str, Any]]]] = {}
        self.choice = Choice()
        self.waiting: list[tuple[Any, dict[str, Any]]] = []  # batches read ahead, each with the cursor behind it
        self.cursor: dict[str, Any] | None = None  # of the last batch, if others wait
        self.events: list[dict[str, Any]] = []
        self.told: Callable[[dict[str, Any]], None] | None = None  # of every line of the log
        self.interrupts = Interrupts()
        self.whole = True  # whether no step is half done
        self._began = self._saved = time.perf_counter()
        self._lines = 0

    # --- beginning

    def begin(self) -> None:
        """Measure the first batches, which wait to be trained on, and start every dictionary.

        Means and norms are those of the source, if it has counted them over more tokens.
        """
        counted = self._counted()
        first, size = self._first(1 if counted else MOMENT_TOKENS)
        if size > self.plan.tokens:
            what, why = f"a plan of {self.plan.tokens:,} tokens", f"one batch of the source has {size:,}"
            raise Refused(what, why, "plan more tokens, or make smaller batches")
        moments = Moments.known(counted) if counted else Moments.of(first)
        self.steps, self.probing = self.plan.steps(size), self.plan.probing(self.plan.steps(size))
        for i, recipe in enumerate(self.recipes):
            base = recipe.rate if recipe.rate is not None else recipe.customary_rate(self.steps)
            tried = (1.0,) if recipe.rate is not None or not self.probing else TRIED
            for factor in tried:
                learner = self._learner(recipe, moments, self.plan.silent_after())
                self.entries.append(Entry(i, base * factor, learner))
        self._choose(first)

    def _learner(self, recipe: Recipe, moments: Moments, silent_after: int) -> Learner:
        return Learner(recipe, moments, self.device, silent_after)

    def _counted(self) -> dict[str, Any]:
        """The moments of all sites, if the source has them."""
        given = getattr(self.source, "moments", None)
        found: Any = given() if callable(given) else {}
        return {s: found[s] for s in self.sites} if all(s in found for s in self.sites) else {}

    def _first(self, tokens: int) -> tuple[dict[str, Tensor], int]:
        parts, held, size = [], 0, 0
        for batch in self.source:
            self.waiting.append((batch, self.source.state()))
            parts.append(acts_of(batch, self.sites, self.device))
            size = size or len(next(iter(parts[0].values())))
            held += len(next(iter(parts[-1].values())))
            if held >= min(tokens, self.plan.tokens):
                break
        if not held:
            raise Refused("training", "the source gave no tokens", "give a source with tokens")
        return {s: torch.cat([p[s] for p in parts]) for s in self.sites}, size

    def _choose(self, first: dict[str, Tensor]) -> None:
        """Decide on precision: as the plan says, or by measurement."""
        plan, learner = self.plan, self.entries[0].learner
        k = int(getattr(learner.recipe.gating, "k", 0))
        if "auto" in (plan.select, plan.products):
            weights, bias, _ = learner.encoder(0)
            asked = k if plan.select == "auto" and k and learner.recipe.gating.encodes else None
            self.choice = self._measured(learner.inputs(0, first), weights, bias, asked)
        if plan.select != "auto":
            self.choice = replace(self.choice, select=plan.select)
        if plan.products != "auto":
            self.choice = replace(self.choice, onednn=plan.products == "onednn")
        for e in self.entries:
            e.learner.shadowed(self.choice.select == "bfloat16")
        self.note("precision", **self.choice.as_dict())

    def _measured(self, x: Tensor, weights: Tensor, bias: Tensor, k: int | None) -> Choice:
        return precision.measure(x, weights, bias, k)

    # --- going on

    def next(self, stream: Iterator[Any]) -> Any:
        """The next batch, None at the end."""
        if self.waiting:
            batch, self.cursor = self.waiting.pop(0)
            return batch
        self.cursor = self.source.state()  # where the last step ended, should the source be interrupted
        with self.interrupts.open():
            batch = next(stream, None)
        self.cursor = None
        return batch

    def advance(self, batch: Any) -> None:
        """One step of every dictionary on a batch."""
        self.whole = False
        acts = acts_of(batch, self.sites, self.device)
        done, factor = min(1.0, self.tokens / self.plan.tokens), self.plan.factor(self.step, self.steps)
        for e in self.entries:
            report = e.learner.step(acts, e.rate * factor, done, batch)
            if report is not None:
                e.lost = 0
                e.add(report)
                continue
            e.lost += 1
            self.note("loss is not a number", rate=e.rate, recipe=e.recipe)
        self._give_up()
        self.step += 1
        self.tokens += len(next(iter(acts.values())))
        if self.step % RECHECK == 0:
            self._recheck(acts)
        if self.step % self.plan.log_every == 0 or self.tokens >= self.plan.tokens:
            self.log()
        if self.step == self.probing:
            self._prune()
        self.whole = True

    def _give_up(self) -> None:
        """Drop dictionaries that are lost; if a recipe has no other, refuse."""
        for e in [e for e in self.entries if e.lost >= PATIENCE]:
            if sum(o.recipe == e.recipe for o in self.entries) == 1:
                what, why = f"training at rate {e.rate:.3g}", f"the loss was no number {PATIENCE} times in a row"
                raise Refused(what, why, "use a lower rate, or look for infinite activations in the stream")
            self._end(e)

    def _prune(self) -> None:
        """End of the probe: of each recipe the dictionary with the lowest loss goes on."""
        if len(self.entries) > len(self.recipes) and any(e.steps for e in self.entries):
            self.log()
        for i in range(len(self.recipes)):
            tried = [e for e in self.entries if e.recipe == i]
            best = min(tried, key=lambda e: late(e.curve))
            for e in tried:
                if e is not best:
                    self._end(e)
            if len(tried) > 1:
                self.note("probe", recipe=i, rate=best.rate, losses={f"{e.rate:.3g}": late(e.curve) for e in tried})

    def _end(self, e: Entry) -> None:
        self.ended.setdefault(e.recipe, {})[f"{e.rate:.3g}"] = e.curve
        self.entries.remove(e)

    def _recheck(self, acts: dict[str, Tensor]) -> None:
        for e in self.entries:
            for b, shadow in list(e.learner.shadows.items()):
                x = e.learner.inputs(b, acts)[:128]
                w, bias, scale = e.learner.encoder(b)
                k = int(getattr(e.learner.recipe.gating, "k", 1))
                exact, quick = Encoder(w, bias, scale), Encoder(w, bias, scale, shadow)
                same = self._agreed(precision.agreement(top_k(x, exact, k), top_k(x, quick, k)))
                if same < precision.SAME:
                    self.note("bfloat16 selection is given up", same=same, block=b)
                    del e.learner.shadows[b]

    def _agreed(self, same: float) -> float:
        return same

    # --- log

    def log(self) -> None:
        """A line of every dictionary."""
        speed, left = self.speed()
        for e in self.entries:
            line = {"step": self.step, "tokens": self.tokens, "recipe": e.recipe, "rate": e.rate}
            line |= {"factor": self.plan.factor(self.step - 1, self.steps)} | e.line(self.tokens - self.logged_tokens)
            e.curve.append({n: line[n] for n in ("tokens", "loss", "fvu", "l0", "silent")})
            self._write(line | {"tokens_per_second": round(speed, 1), "seconds_left": round(left, 1)})
        self.logged_tokens = self.tokens

    def note(self, event: str, **more: Any) -> None:
        """Something that happened."""
        self.events.append({"event": event, "step": self.step, **more})
        self._write(self.events[-1])

    def _write(self, line: dict[str, Any]) -> None:
        self._lines += 1
        if self.out is not None and self.speaks:
            with (self.out / "log.jsonl").open("a", encoding="utf-8") as f:
                f.write(written(finite(line)) + "\n")
        if self.told is not None and self.speaks:
            self.told(line)

    def speed(self) -> tuple[float, float]:
        """Tokens a second so far, and the seconds that are left at that speed."""
        seconds = self.seconds + time.perf_counter() - self._began
        speed = self.tokens / seconds if seconds > 0 else 0.0
        return speed, (self.plan.tokens - self.tokens) / speed if speed else float("inf")

    def progress(self) -> Progress:
        """What is told to the caller."""
        speed, left = self.speed()
        best = min((e.curve[-1] for e in self.entries if e.curve), key=lambda c: c["loss"], default=None)
        loss, fvu = (best["loss"], best["fvu"]) if best else (float("nan"), float("nan"))
        return Progress(self.tokens, max(self.tokens, self.plan.tokens), loss, fvu, speed, max(0.0, left))

    # --- checkpoints

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        late = time.perf_counter() - self._saved >= self.plan.checkpoint_seconds
        return late or self.step % self.plan.checkpoint_every == 0

    def save(self) -> None:
        """Write the checkpoint; a crash in between leaves the earlier one."""
        if self.out is None:
            return
        tensors, entries = {}, []
        for i, e in enumerate(self.entries):
            own, numbers = e.learner.state()
            tensors |= {f"{i}/{n}": t for n, t in own.items()} | {f"{i}/sum/{n}": t for n, t in e.sums.items()}
            entries.append({"recipe": e.recipe, "rate": e.rate, "lost": e.lost, "curve": e.curve, "steps": e.steps,
                            "learner": numbers})  # fmt: skip
        seconds = self.seconds + time.perf_counter() - self._began
        cursor = self.source.state() if self.cursor is None else self.cursor
        record = {
            "step": self.step, "tokens": self.tokens, "logged_tokens": self.logged_tokens, "steps": self.steps,
            "probing": self.probing, "seconds": seconds, "lines": self._lines, "entries": entries,
            "ended": {str(i): curves for i, curves in self.ended.items()}, "events": self.events,
            "source": cursor, "choice": self.choice.as_dict(), "plan": self.plan.as_dict(),
            "recipes": [r.as_dict() for r in self.recipes], "threads": torch.get_num_threads(),
        }  # fmt: skip
        checkpoints.write(self.out, tensors, record, self.shards)
        self._saved = time.perf_counter()

    def load(self) -> None:
        """Take up the checkpoint of the folder.

        Raises:
            Refused: it is of other recipes or another plan.
        """
        assert self.out is not None
        tensors, record = checkpoints.read(self.out, self.shards)
        same = {"recipes": [r.as_dict() for r in self.recipes], "plan": self.plan.as_dict()}
        for n, value in same.items():
            if json.dumps(record[n], sort_keys=True) != json.dumps(value, sort_keys=True):
                why = f"its checkpoint was written with other {n}"
                raise Refused(f"resuming in {self.out}", why, "use the same, another folder, or resume=False")
        for n in ("step", "tokens", "logged_tokens", "steps", "probing", "seconds", "events"):
            setattr(self, n, record[n])
        self.choice = Choice(**record["choice"])
        self.ended = {int(i): curves for i, curves in record["ended"].items()}
        self._began = self._saved = time.perf_counter()
        for i, saved in enumerate(record["entries"]):
            own = {n.removeprefix(f"{i}/"): t for n, t in tensors.items() if n.startswith(f"{i}/")}
            self.entries.append(self._entry(saved, own))
        self.source.restore(record["source"])
        self._cut_log(record["lines"])

    def _entry(self, saved: dict[str, Any], own: dict[str, Tensor]) -> Entry:
        means = {n.removeprefix("mean/"): t for n, t in own.items() if n.startswith("mean/")}
        moments = Moments(means, dict.fromkeys(means, 1.0), dict.fromkeys(means, 1.0))  # `restore` brings the true ones
        learner = self._learner(self.recipes[saved["recipe"]], moments, self.plan.silent_after())
        learner.restore(own, saved["learner"])
        sums = {n.removeprefix("sum/"): t.to(self.device) for n, t in own.items() if n.startswith("sum/")}
        return Entry(saved["recipe"], saved["rate"], learner, saved["lost"], saved["curve"], sums, saved["steps"])

    def _cut_log(self, lines: int) -> None:
        """Forget what was logged after the checkpoint."""
        assert self.out is not None
        path = self.out / "log.jsonl"
        if path.is_file() and self.speaks:
            kept = path.read_text("utf-8").splitlines(keepends=True)[:lines]
            path.write_text("".join(kept), encoding="utf-8")
        self._lines = lines

    def results(self) -> list[Trained]:
        """The dictionaries as they stand."""
        seconds = self.seconds + time.perf_counter() - self._began
        found = []
        for i in range(len(self.recipes)):
            e = min((e for e in self.entries if e.recipe == i), key=lambda e: late(e.curve))
            curves = self.ended.get(i, {}) | {f"{e.rate:.3g}": e.curve}
            about = {"rate": e.rate, "tokens": self.tokens, "plan": self.plan.as_dict()}
            identity = getattr(self.source, "identity", None)
            about |= {"stream": identity()} if callable(identity) else {}
            found.append(Trained(e.learner.dictionary(**about), e.rate, curves, self.tokens, seconds, self.choice))
        return found


def train(
    source: Source | Any,
    recipes: Recipe | Sequence[Recipe],
    plan: Plan,
    *,
    out: str | Path | None = None,
    resume: bool = True,
    device: torch.device | str | Any = "cpu",
    progress: Callable[[Progress], None] | None = None,
    told: Callable[[dict[str, Any]], None] | None = None,
    stop_after: int | None = None,
) -> list[Trained]:
    """Train one or several dictionaries on one stream of activations.

    Args:
        source: batches of activations with an exact cursor: a stream, a truth's stream, or `Held`.
        recipes: what to train; all see the same batches.
        plan: how long and how exactly.
        out: folder of the run, for checkpoints and the log; None keeps nothing.
        resume: go on from the checkpoint in `out`, if there is one.
        device: where the weights are; in a process group, as torchrun starts it, `train.mesh(replicas)` (or all
            latents are sharded, on the devices of the group).
        progress: called whenever the log gets lines, in the first process.
        told: given every line of the log, in the first process; `wandb_log` has one.
        stop_after: end at this step with a checkpoint, as an interruption would.

    Raises:
        Refused: a source without a cursor or tokens, a checkpoint of another run, a folder or device that cannot be
            used, or a loss that is no number.
        KeyboardInterrupt: as it came; with `out`, the last whole step is in the checkpoint, and the same call goes on.
    """
    if not isinstance(source, Source):
        why = "training needs batches and an exact cursor (state and restore)"
        raise Refused(f"a source of type {type(source).__name__}", why, "use a stream, or train.Held for tensors")
    if isinstance(device, torch.device | str):
        _check_device(device)
    folder = _folder(out)
    run = _kind()(source, [recipes] if isinstance(recipes, Recipe) else recipes, plan, folder, device)
    run.told = told
    if resume and folder is not None and checkpoints.exists(folder, run.shards):
        run.load()
    else:
        if folder is not None and run.speaks:
            (folder / "log.jsonl").write_text("", encoding="utf-8")
        run.begin()
    with precision.products(run.choice), put_off(run.shards is None) as run.interrupts:
        try:
            _go_on(run, stop_after, progress)
        except KeyboardInterrupt:
            if run.whole and run.shards is None:  # several processes would each stop at another step
                run.save()
            raise
    return run.results()


def _go_on(run: Run, stop_after: int | None, progress: Callable[[Progress], None] | None) -> None:
    """Train to the end, with reports and checkpoints."""
    for _ in _batches(run, stop_after):
        advance(run.tokens, run.plan.tokens)
        logged = run.step % run.plan.log_every == 0 or run.tokens >= run.plan.tokens
        if logged and progress is not None and run.speaks:
            progress(run.progress())
        if run.due():
            run.save()
        run.interrupts.check()
    run.save()


def _folder(out: str | Path | None) -> Path | None:
    if out is None:
        return None
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"folder {str(out)!r}", f"it cannot be made: {error.strerror}", "choose another place") from error
    return Path(out)


def _check_device(device: torch.device | str) -> None:
    """Refuse a device that this machine does not have."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = f"it cannot be used: {str(error).splitlines()[0]}"
        raise Refused(f"device {str(device)!r}", why, "use cpu, or another device") from error


def _kind() -> type[Run]:
    if processes() == 1:
        return Run
    from cutaway.dictionaries.training.sharded import ShardedRun

    return ShardedRun


def _batches(run: Run, stop_after: int | None) -> Iterator[None]:
    """Advance the run batch by batch until its budget is used."""
    stream = iter(run.source)
    while run.tokens < run.plan.tokens and run.step != stop_after:
        batch = run.next(stream)
        if batch is None:
            run.note("the source ended", tokens=run.tokens)
            if run.step % run.plan.log_every:
                run.log()
            return
        run.advance(batch)
        yield
