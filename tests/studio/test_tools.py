"""Tools for agents: a scripted client audits a model from end to end, and claims only what the numbers support."""

import asyncio

from mcp.client.client import Client

import cutaway as ca
from cutaway.core.rung import exceeding
from cutaway.studio.folder import Folder
from cutaway.studio.tools import Tools
from tests.studio.here import studio_here


def _audit(studio, script):
    """Run a script of tool calls against the tools of a studio."""

    async def run():
        worker = asyncio.create_task(studio.work(next(iter(studio.models.values()))))
        async with Client(Tools(studio).server()) as client:
            out = await script(client)
        worker.cancel()
        return out

    return asyncio.run(run())


def test_an_audit_from_end_to_end(tmp_path, miniworld):
    studio = studio_here(Folder.of(tmp_path), miniworld)

    async def script(client):
        tools = {t.name for t in (await client.list_tools()).tools}
        guess = await client.call_tool("predict", {"prompt": "The capital of Norway is"})
        found = await client.call_tool("lenses__direct_attribution", {"task": "ioi", "task_n": 6})
        cut = await client.call_tool(
            "patching__ablate", {"task": "ioi", "task_n": 6, "samples": 2, "budget_seconds": 600}
        )
        for _ in range(600):
            if "result" in cut.structured_content and cut.structured_content.get("text"):
                break
            await asyncio.sleep(0.1)
            cut = await client.call_tool("job", {"id": cut.structured_content["id"]})
        said = {"result": found.structured_content["result"], "sentence": "Head 4.0 causes the answer."}
        weak = await client.call_tool("judge_sentence", said)
        said = {"result": cut.structured_content["result"], "sentence": "Ablating the head changes the answer."}
        strong = await client.call_tool("judge_sentence", said)
        return tools, guess, found, cut, weak, strong

    tools, guess, found, cut, weak, strong = _audit(studio, script)
    assert {n.replace(".", "__") for n in ca.methods()} <= tools
    assert "oslo" in guess.content[0].text
    for answer in (found, cut):
        text = answer.content[0].text
        assert len(text.encode()) <= 2000
        assert "interval" in text
        assert "control" in text
        assert "verdict: " in text
        assert not exceeding(text.replace("Which components write the answer?", ""), "interventional")
    own = ca.lenses.direct_attribution(miniworld, ca.tasks.load("ioi", miniworld, 6))
    best = own.top(1)[0]
    assert f"{best['component']}; effect {best['effect']:.3g} logits" in found.content[0].text
    assert not weak.structured_content["allowed"]
    assert "causes" in weak.structured_content["beyond"]
    assert strong.structured_content["allowed"]


def test_budgets_and_wrong_calls_are_refused(tmp_path, miniworld):
    studio = studio_here(Folder.of(tmp_path), miniworld)
    calls = (
        ("patching__activation", {"task": "ioi", "task_n": 4, "budget_seconds": 1e-6}, "the budget is 1e-06 s"),
        ("lenses__logit_lens", {"task": "facts", "sample": 1}, "near: samples"),
        ("lenses__nothing", {}, "there is no such tool"),
        ("predict", {}, "it is missing"),
        ("predict", {"prompt": 3}, "it is of another type"),
        ("job", {"id": "none"}, "there is no such job"),
        ("read_result", {"result": "../x"}, "there is no such result"),
        ("lenses__logit_lens", {"prompts": "/etc/passwd.txt"}, "by their id only"),
    )

    async def script(client):
        return [(await client.call_tool(n, a), why) for n, a, why in calls]

    for answer, why in _audit(studio, script):
        assert answer.is_error
        assert why in answer.content[0].text
        assert set(answer.structured_content["refused"]) == {"what", "why", "instead"}
