"""The training loop with a small logistic probe: exact resume, interrupts, the guard, reports, refusals."""

import json
import os
import signal

import pytest
import torch

from cutaway.core.cursor import Rounds
from cutaway.core.refuse import Refused
from cutaway.training import Checkpoints, Guard, Loop, Plan, Update
from cutaway.training.wandb_log import numbers

N, D, BATCH = 256, 8, 16


class Labelled(Rounds):
    """Points with labels."""

    def __init__(self):
        super().__init__(N, BATCH, seed=1)
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, D, generator=g)
        self.y = (self.x @ torch.randn(D, generator=g) > 0).float()

    def __next__(self):
        i = self.indices()
        return self.x[i], self.y[i]


class Probe(Update):
    """A logistic probe with momentum."""

    kind = "probe training"

    def __init__(self):
        self.weights, self.velocity = torch.zeros(D), torch.zeros(D)
        self.guard, self.total, self.steps = Guard(), 0.0, 0

    def step(self, batch, loop):
        x, y = batch
        w = self.weights.requires_grad_()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)
        if self.guard.passes(bool(loss.isfinite()), loop):
            (slope,) = torch.autograd.grad(loss, w)
            self.velocity = 0.9 * self.velocity + slope
            self.weights = w.detach() - 0.3 * loop.plan.factor(loop.step, loop.plan.steps(BATCH)) * self.velocity
            self.total, self.steps = self.total + float(loss.detach()), self.steps + 1
        self.guard.check("training the probe", "look for infinite activations")
        return len(x)

    def report(self, loop):
        line = {"loss": self.total / self.steps if self.steps else float("nan")}
        self.total, self.steps = 0.0, 0
        return [line]

    def state(self):
        own = {"lost": self.guard.lost, "total": self.total, "summed": self.steps}
        return {"weights": self.weights.detach(), "velocity": self.velocity}, own

    def restore(self, tensors, record, loop):
        self.weights, self.velocity = tensors["weights"], tensors["velocity"]
        self.guard, self.total, self.steps = Guard(record["lost"]), record["total"], record["summed"]


PLAN = Plan(BATCH * 30, log_every=4, checkpoint_every=8)


def trained(out=None, source=None, plan=PLAN, stop_after=None, **more):
    loop = Loop(Probe(), source or Labelled(), plan, out, **more)
    loop.start()
    loop.run(stop_after)
    return loop


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_reports_and_goes_on_with_the_same_bits(tmp_path):
    lines = []
    whole = trained(tmp_path / "whole", on_log=lines.append)
    assert (whole.step, whole.tokens, whole.done) == (30, 480, 1.0)
    assert [x["step"] for x in lines] == [4, 8, 12, 16, 20, 24, 28, 30]
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["seconds_left"] == 0
    trained(tmp_path / "part", stop_after=13)
    again = trained(tmp_path / "part")
    assert torch.equal(whole.update.weights, again.update.weights)
    assert torch.equal(whole.update.velocity, again.update.velocity)
    losses = [[(x["step"], x["loss"]) for x in logged(tmp_path / n)] for n in ("whole", "part")]
    assert losses[0] == losses[1]


def test_an_interrupt_waits_for_the_step_and_is_saved(tmp_path):
    class Rung(Probe):
        def step(self, batch, loop):
            if loop.step == 10:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step(batch, loop)

    loop = Loop(Rung(), Labelled(), PLAN, tmp_path)
    loop.start()
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert Checkpoints(tmp_path, "probe training").read()[1]["step"] == 11
    assert torch.equal(trained(tmp_path).update.weights, trained().update.weights)


def test_lines_after_the_checkpoint_are_cut_on_resume(tmp_path):
    def die(line):
        if line["step"] == 12:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        trained(tmp_path, on_log=die)
    assert [x["step"] for x in logged(tmp_path)] == [4, 8, 12]
    trained(tmp_path, stop_after=9)
    assert [x["step"] for x in logged(tmp_path)] == [4, 8]


def test_a_loss_that_is_not_finite_is_skipped_and_three_in_a_row_end_the_run():
    class Broken(Labelled):
        def __init__(self, bad):
            super().__init__()
            self.bad = bad

        def __next__(self):
            x, y = super().__next__()
            return (x * float("nan") if self.number in self.bad else x), y

    loop = trained(source=Broken({3, 4, 7}))
    assert [e["step"] for e in loop.events] == [2, 3, 6]
    assert bool(loop.update.weights.isfinite().all())
    with pytest.raises(Refused, match="no number 3 times"):
        trained(source=Broken({3, 4, 5}))


def test_batches_read_ahead_are_trained_on_and_a_source_may_end(tmp_path):
    class Short(Labelled):
        def __next__(self):
            if self.number == 9:
                raise StopIteration
            return super().__next__()

    class Peeking(Probe):
        def begin(self, loop):
            seen = [len(x) for (x, _), _ in zip(loop.peek(), range(3), strict=False)]
            loop.note("read ahead", batches=len(seen))

    loop = Loop(Peeking(), Short(), PLAN, tmp_path)
    loop.start()
    loop.run(stop_after=2)
    assert len(loop.waiting) == 2
    loop = Loop(Peeking(), Short(), PLAN, tmp_path)
    loop.start()
    loop.run()
    assert loop.step == 9
    assert [x.get("event") for x in logged(tmp_path)] == ["read ahead", None, None, "the source ended", None]
    assert torch.equal(loop.update.weights, trained(source=Short()).update.weights)


def test_a_plan_may_follow_the_clock():
    class Clocked(Plan):
        def done(self, tokens, seconds):
            return max(super().done(tokens, seconds), seconds / 0.02)

    loop = trained(plan=Clocked(BATCH * 10**6, log_every=10**6))
    assert loop.done >= 1
    assert loop.logged_tokens == loop.tokens < BATCH * 10**6


def test_other_runs_and_settings_are_refused(tmp_path):
    trained(tmp_path, stop_after=3)
    with pytest.raises(Refused, match="other plan"):
        trained(tmp_path, plan=Plan(BATCH * 31))
    with pytest.raises(Refused, match="no checkpoint of other training"):
        Checkpoints(tmp_path, "other training").read()
    with pytest.raises(Refused, match="cursor"):
        trained(source=[1, 2])
    source = Labelled()
    with pytest.raises(Refused, match="seed 2, here 1"):
        source.restore(source.state() | {"seed": 2})

    class Taken(Probe):
        def state(self):
            return {}, {"step": 3}

    with pytest.raises(Refused, match="the loop keeps"):
        Loop(Taken(), Labelled(), PLAN, tmp_path).save()


def test_numbers_of_a_line():
    line = {"step": 3, "loss": 1.0, "terms": {"l1": 0.5}, "name": "x"}
    assert numbers(line) == {"loss": 1.0, "terms/l1": 0.5}
    assert numbers({"event": "probe", "step": 3}) == {"event/probe": 1.0}
