"""The server: answers equal the library's own calls, jobs end as they should and survive a stop, nothing is a 500."""

import asyncio
import dataclasses
import json
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cutaway as ca
from cutaway.studio.actions import ACTIONS
from cutaway.studio.folder import Folder
from cutaway.studio.jobs import Jobs
from cutaway.studio.messages import Values
from cutaway.studio.workers import TookTooLong
from tests.studio.here import entered, studio_here

LENS = {"method": "lenses.logit_lens", "values": {"task": "facts", "task_n": 4, "samples": 2}}


def talk(guard, *requests):
    """Return the answers to some requests, in order: `(method, path, body)`."""

    async def ask():
        async with entered(guard) as c:
            typed = {"headers": {"content-type": "application/json"}}
            return [
                await c.request(m, f"/api/v1/{p}", **({"content": json.dumps(b), **typed} if b else {}))
                for m, p, b in requests
            ]

    return asyncio.run(ask())


def test_a_result_is_the_librarys_own(guard, miniworld):
    run, again = talk(guard, ("POST", "run", LENS), ("POST", "run", LENS))
    shown = run.json()
    assert again.json() == shown
    own = ca.lenses.logit_lens(miniworld, ca.tasks.load("facts", miniworld, 4), samples=2)
    data, page, file = talk(
        guard,
        ("POST", "data", {"result": shown["id"]}),
        ("POST", "report", {"result": shown["id"]}),
        ("GET", f"results/{shown['id']}/file", None),
    )
    fields = data.json()["fields"]
    for name, t in own.tensors().items():
        assert fields[name]["axes"] == list(own.axes()[name])
        torch.testing.assert_close(torch.tensor(fields[name]["values"]), t.float(), atol=1e-5, rtol=1e-5)
    assert shown["control"] == "rotated_basis"
    assert shown["command"].startswith("cutaway lenses logit_lens")
    assert "<!doctype html>" in page.json()["html"]
    assert file.headers["content-type"] == "application/octet-stream"


def test_a_prompt_is_predicted_as_the_model_does(guard, miniworld):
    (answer,) = talk(guard, ("POST", "predict", {"prompt": "The capital of Norway is", "top": 3}))
    own = miniworld.text.predict("The capital of Norway is", 3)
    assert [g["text"] for g in answer.json()["next"]] == [p.text for p in own]
    assert [g["probability"] for g in answer.json()["next"]] == pytest.approx([p.probability for p in own], rel=1e-5)


def _ended(studio, *jobs):
    """Run the jobs of a studio until these have ended, and return them."""

    async def run():
        worker = asyncio.create_task(studio.work(next(iter(studio.models.values()))))
        async with asyncio.timeout(60):
            while any(studio.jobs.get(j.id).state in ("waiting", "running") for j in jobs):
                await asyncio.sleep(0.02)
        worker.cancel()
        return [studio.jobs.get(j.id) for j in jobs]

    return asyncio.run(run())


@pytest.fixture
def alone(tmp_path, miniworld):
    """A studio with a folder and jobs of its own."""
    return studio_here(Folder.of(tmp_path), miniworld)


def _submitted(studio, **values: Any):
    return asyncio.run(studio.submit(Values(**LENS | values)))


def test_jobs_end_as_done_or_refused(alone):
    done, refused = _ended(alone, _submitted(alone), _submitted(alone, values={"task": "nothing"}))
    assert (done.state, refused.state) == ("done", "refused")
    assert alone.folder.result(done.result).is_file()
    assert (refused.result, "nothing" in refused.refusal.what) == (None, True)


def test_a_job_is_cancelled_before_and_while_it_runs(alone, monkeypatch):
    studio = alone
    model, begun, free = next(iter(studio.models.values())), threading.Event(), threading.Event()

    async def ask(*_: Any):
        begun.set()
        await asyncio.to_thread(free.wait)
        return {"id": "never"}

    monkeypatch.setattr(model.jobs, "ask", ask)
    first, second = _submitted(studio), _submitted(studio)

    async def run():
        worker = asyncio.create_task(studio.work(model))
        await asyncio.to_thread(begun.wait)
        cancelled = [await studio.cancel(second.id), await studio.cancel(first.id)]
        free.set()
        await asyncio.sleep(0.1)
        worker.cancel()
        return cancelled

    assert [j.state for j in asyncio.run(run())] == ["cancelled", "cancelled"]
    assert studio.jobs.get(first.id).state == "cancelled"  # what came later does not count
    assert model.jobs.ended == 1


def test_a_stop_loses_no_result_and_a_job_that_ran_goes_on(alone, miniworld):
    (kept,) = _ended(alone, _submitted(alone, values={"task": "facts", "task_n": 3, "samples": 2}))
    running = _submitted(alone, values={"task": "ioi", "task_n": 3, "samples": 2})
    assert alone.jobs.next("miniworld").id == running.id  # and here the server is killed
    after = studio_here(alone.folder, miniworld)
    assert after.jobs.get(kept.id).result == kept.result
    assert after.jobs.get(running.id).state == "waiting"
    assert _ended(after, running)[0].result


def test_too_many_jobs_are_refused(folder, monkeypatch):
    monkeypatch.setattr("cutaway.studio.jobs.MOST_WAITING", 2)
    jobs = Jobs(folder.path / "few.sqlite")
    for _ in range(2):
        jobs.add("m", "a.b", {})
    with pytest.raises(ca.Refused, match="2 wait already"):
        jobs.add("m", "a.b", {})


def test_a_question_that_no_one_waits_for_is_not_begun(alone):
    async def gone():
        return True

    asked = ACTIONS["predict"].request(prompt="The capital of Norway is")
    with pytest.raises(ca.Refused, match="no longer waits"):
        asyncio.run(alone.ask(ACTIONS["predict"], asked, gone))
    assert b"oslo" in asyncio.run(alone.ask(ACTIONS["predict"], asked))


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "a job runs"])
def test_planning_leaves_the_pages_worker_free_while_no_job_runs_and_is_given_up(alone, monkeypatch, busy):
    model = next(iter(alone.models.values()))
    planner, other = (model.page, model.jobs) if busy else (model.jobs, model.page)
    asked = ACTIONS["cost"].request(**LENS)
    row = dataclasses.replace(ACTIONS["cost"], patience=0.05)

    async def never(*_: Any):
        await asyncio.sleep(60)

    async def run():
        if busy:
            await model.job_turn.acquire()
        planned = json.loads(await alone.ask(ACTIONS["cost"], asked))
        assert planned["forwards"] > 0
        monkeypatch.setattr(planner, "ask", never)
        with pytest.raises(TookTooLong, match="longer than"):
            await alone.ask(row, asked)
        return await alone.ask(ACTIONS["predict"], ACTIONS["predict"].request(prompt="The")) if not busy else b"{"

    assert asyncio.run(run()).startswith(b"{")
    assert (planner.ended, other.ended) == (1, 0)


def test_a_lack_of_memory_is_503_with_a_hint(guard, studio, monkeypatch):
    def run(session, request):
        raise MemoryError

    monkeypatch.setattr("cutaway.studio.actions.prompts.predict", run)
    (answer,) = talk(guard, ("POST", "predict", {"prompt": "not asked before"}))
    assert answer.status_code == 503
    assert "smaller" in answer.json()["instead"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.floats() | st.text(max_size=8)
    | st.sampled_from(["facts", "ioi", "resid_post.3", "z.4.0", "file:my-notes-txt", "../x", "lenses.debug"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def _bodies(action):
    names = st.sampled_from([*action.request.model_fields, "other"])
    return st.dictionaries(names, VALUES, max_size=4)


@pytest.mark.parametrize("name", [n for n, a in ACTIONS.items() if not a.job])
def test_no_request_is_a_500(name, guard):
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(_bodies(ACTIONS[name]))
    def asked(body):
        text = json.dumps(body)

        async def ask():
            async with entered(guard) as c:
                return await c.post(f"/api/v1/{name}", content=text, headers={"content-type": "application/json"})

        answer = asyncio.run(ask())
        assert answer.status_code in (200, 400, 422, 503), answer.text

    asked()


@pytest.mark.wide
def test_forms_are_fuzzed_too(guard):
    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(["task", "prompts", "samples", "answer", "seed", "model", "model_dtype"]), VALUES)
    def asked(name, value):
        body = {
            "method": "lenses.logit_lens",
            "values": {"prompts": "The capital of Norway is", "samples": 1, name: value},
        }
        (answer,) = talk(guard, ("POST", "cost", json.loads(json.dumps(body))))
        assert answer.status_code in (200, 422, 503, 504), answer.text

    asked()


def test_the_events_tell_states(studio):
    async def first():
        stream = studio.changes(lambda: json.dumps({"n": 1}))
        return await anext(stream)

    assert asyncio.run(first()) == 'data: {"n": 1}\n\n'
