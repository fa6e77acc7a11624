"""Tools for agents: the method table over the Model Context Protocol, on standard input and output.

Every method is a tool; its input is the form that page and command have, and `budget_seconds`: a call that is planned
to take longer is refused with its estimate. A call that is not done within `WAIT` seconds goes on as a job, whose id
is the answer. A result comes as at most 2 kB of text, with interval, control, verdict and the words that its rung
allows. Nothing else is offered: no file, no code, no network.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import mcp_types as types
from mcp.server import Server
from mcp.server.stdio import stdio_server

import cutaway
from cutaway.core.refuse import Refused
from cutaway.studio import messages as m
from cutaway.studio.actions import ACTIONS
from cutaway.studio.server import Studio

WAIT = 20.0  # seconds until a call becomes a job
BUDGET = {
    "type": "number",
    "description": "the most seconds that the call may be planned to take; beyond, it is refused with its estimate",
    "default": 60,
    "exclusiveMinimum": 0,
}
_TEXT = {"type": "string"}


class Tools:
    """The tools of a studio.

    Attributes:
        studio: the studio whose first model answers.
    """

    def __init__(self, studio: Studio):
        self.studio = studio
        self._others: dict[str, tuple[str, dict[str, Any], Callable[..., Awaitable[Any]]]] = {
            "cost": ("Tell what a call would cost, without making it.", _CALL, self._cost),
            "job": ("Tell how far a job is; once it is done, its result.", _object("id"), self._job),
            "cancel_job": ("Cancel a job.", _object("id"), self._cancel),
            "read_result": ("Read a result again, or another field of it.", _READ, self._read),
            "judge_sentence": (
                "Tell if a sentence claims more than a result supports, and with which words.",
                _object("result", "sentence"),
                self._judge,
            ),
            "predict": ("Tell what the model goes on with after a prompt.", _object("prompt"), self._predict),
        }

    def server(self) -> Server[Any]:
        """Return the server of these tools."""
        says = (
            "Every tool named ROOM__METHOD measures a language model and returns numbers beside a control. Say only "
            "what the verdict and the rung of a result allow; check sentences with judge_sentence."
        )
        return Server(
            "cutaway",
            version=cutaway.__version__,
            instructions=says,
            on_list_tools=self._list,
            on_call_tool=self._call,
        )

    async def _list(self, _: Any, __: Any) -> types.ListToolsResult:
        await self._ready()
        tools = [
            types.Tool(name=tool_name(c.name), description=_about(c), input_schema=tool_schema(c))
            for c in self.studio.methods
        ]
        tools += [types.Tool(name=n, description=d, input_schema=s) for n, (d, s, _) in self._others.items()]
        return types.ListToolsResult(tools=tools)

    async def _call(self, _: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        await self._ready()
        values = dict(params.arguments or {})
        try:
            if params.name in self._others:
                _, schema, function = self._others[params.name]
                _check(params.name, schema, values)
                return _said(await function(**values))
            card = next((c for c in self.studio.methods if tool_name(c.name) == params.name), None)
            if card is None:
                raise Refused(f"tool {params.name!r}", "there is no such tool", "list the tools")
            return _said(await self._run(card.name, values))
        except Refused as refusal:
            return types.CallToolResult(
                content=[types.TextContent(type="text", text=f"refused: {refusal}")],
                structured_content={"refused": refusal.as_dict()},
                is_error=True,
            )

    async def _ready(self) -> None:
        if not self.studio.methods:
            await self.studio.load(self.studio.model(""))

    async def _run(self, method: str, values: dict[str, Any]) -> tuple[str, Any]:
        budget = values.pop("budget_seconds", BUDGET["default"])
        call = m.Values(method=method, values=values)
        planned = m.Cost(**json.loads(await self.studio.ask(ACTIONS["cost"], call)))
        if planned.seconds is not None and planned.seconds > budget:
            why = f"it is planned to take {planned.seconds:.0f} s, and the budget is {budget:g} s"
            raise Refused(method, why, "ask for less (fewer prompts, samples or sites), or raise budget_seconds")
        return await self._followed((await self.studio.submit(call)).id, WAIT)

    async def _followed(self, name: str, wait: float) -> tuple[str, Any]:
        """Wait for a job, and return its result or how far it is."""
        for _ in range(max(1, round(wait / 0.1))):
            job = self.studio.jobs.get(name)
            if job.state not in ("waiting", "running"):
                break
            await asyncio.sleep(0.1)
        if job.refusal is not None:
            raise Refused(job.refusal.what, job.refusal.why, job.refusal.instead)
        if job.result is None:
            share = f", {100 * job.done / job.total:.0f} % done" if job.total else ""
            return f"job {name} is {job.state}{share}; ask again with the tool job", job.model_dump()
        return await self._read(job.result)

    async def _read(self, result: str, field: str = "") -> tuple[str, Any]:
        request = m.ResultOf(result=result, fields=[field] if field else [])
        text = json.loads(await self.studio.ask(ACTIONS["text"], request))["text"]
        return text, {"result": result, "text": text}

    async def _cost(self, method: str, values: dict[str, Any] | None = None) -> tuple[str, Any]:
        found = json.loads(await self.studio.ask(ACTIONS["cost"], m.Values(method=method, values=values or {})))
        return "\n".join(found["lines"]), found

    async def _job(self, id: str) -> tuple[str, Any]:
        return await self._followed(id, 0.0)

    async def _cancel(self, id: str) -> tuple[str, Any]:
        job = await self.studio.cancel(id)
        return f"job {id} is {job.state}", job.model_dump()

    async def _judge(self, result: str, sentence: str) -> tuple[str, Any]:
        found = json.loads(await self.studio.ask(ACTIONS["judge"], m.Claim(result=result, sentence=sentence)))
        if found["allowed"]:
            return "no word of the sentence is above the result's rung", found
        words = ", ".join(f"“{w}”" for w in found["beyond"])
        return f"not allowed: {words}; the rung is {found['rung']}: say “{found['instead']}”", found

    async def _predict(self, prompt: str) -> tuple[str, Any]:
        found = json.loads(await self.studio.ask(ACTIONS["predict"], m.Prompt(prompt=prompt)))
        lines = [f"{g['text']!r} {100 * g['probability']:.3g} % (logit {g['logit']:.3g})" for g in found["next"]]
        return "\n".join(lines), found


async def serve(studio: Studio) -> None:
    """Serve the tools on standard input and output until the input ends."""
    server = Tools(studio).server()
    await studio.start()
    try:
        async with stdio_server() as (read, write):
            await server.run(read, write, server.create_initialization_options())
    finally:
        await studio.stop()


def tool_name(method: str) -> str:
    """Return the name of a method's tool: `lenses.logit_lens` is `lenses__logit_lens`."""
    return method.replace(".", "__")


def tool_schema(card: m.MethodCard) -> dict[str, Any]:
    """Return the input schema of a method's tool: its form and a budget, without the model, which is the studio's."""
    form = card.json_schema
    properties = {n: s for n, s in form["properties"].items() if n != "model"}
    return {**form, "properties": {**properties, "budget_seconds": BUDGET}}


def _about(card: m.MethodCard) -> str:
    return f"{card.answers} ({card.paper}) Control: {card.control}. Rung: {card.rung}. Cost at most {card.cost}."


def _said(found: tuple[str, Any]) -> types.CallToolResult:
    text, data = found
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], structured_content=data)


def _check(tool: str, schema: dict[str, Any], values: dict[str, Any]) -> None:
    for name in schema["required"]:
        if name not in values:
            raise Refused(f"{tool}: {name}", "it is missing", f"give {', '.join(schema['required'])}")
    for name, value in values.items():
        if name not in schema["properties"]:
            raise Refused(f"{tool}: {name}", "it has no such entry", f"it has {', '.join(schema['properties'])}")
        kind = {"string": str, "object": dict}[schema["properties"][name]["type"]]
        if not isinstance(value, kind):
            raise Refused(f"{tool}: {name}", "it is of another type", f"give a {schema['properties'][name]['type']}")


def _object(*names: str, **more: dict[str, Any]) -> dict[str, Any]:
    properties = dict.fromkeys(names, _TEXT) | more
    return {"type": "object", "properties": properties, "required": list(names), "additionalProperties": False}


_CALL = _object("method", values={"type": "object"})
_READ = _object("result", field=_TEXT)
