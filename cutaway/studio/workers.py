"""Workers from the side of the server: processes that are started, asked, watched and ended."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from cutaway.core.refuse import Refused
from cutaway.studio.folder import Folder

_MOST_ANSWER = 1 << 26  # bytes of one line from a worker
Listener = Callable[[float, float], None]


class WorkerRefused(Refused):
    """A refusal of a worker; `memory` is True where memory ran out, `defect` where it met an error of its own."""

    def __init__(self, refusal: Mapping[str, str], memory: bool = False, defect: bool = False):
        super().__init__(refusal["what"], refusal["why"], refusal["instead"])
        self.memory, self.defect = memory, defect


class TookTooLong(Refused):
    """A refusal of what was given up after the time that its action has."""

    def __init__(self, action: str, patience: float):
        super().__init__(action, f"it takes longer than {patience:.0f} s", "run it as a job")


class Cancelled(Exception):
    """The worker was ended while it worked."""


@runtime_checkable
class Answering(Protocol):
    """The protocol of what answers for a model: a worker, or its stand-in in tests."""

    async def start(self) -> dict[str, Any]: ...
    async def ask(
        self, action: str, arguments: Any, listener: Listener | None = None, job: str | None = None
    ) -> Any: ...
    async def end(self) -> None: ...


@dataclass
class Worker:
    """A process that holds a model.

    Attributes:
        setting: what the process is started with.
        hello: what it said when it was ready.
    """

    setting: dict[str, Any]
    hello: dict[str, Any] | None = None
    _process: asyncio.subprocess.Process | None = None
    _waiting: dict[int, tuple[asyncio.Future[Any], Listener | None]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start(self) -> dict[str, Any]:
        """Start the process if none runs, and return what it says when it is ready.

        Raises:
            WorkerRefused: the model cannot be loaded.
        """
        async with self._starting:
            if self._process is not None and self._process.returncode is None and self.hello is not None:
                return self.hello
            command = (sys.executable, "-m", "cutaway.studio.worker", json.dumps(self.setting))
            pipe = asyncio.subprocess.PIPE
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, limit=_MOST_ANSWER, start_new_session=True
            )
            ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._waiting = {0: (ready, None)}
            self._reader = asyncio.create_task(self._read(self._process))
            said: dict[str, Any] = await ready
            self.hello = said
            return said

    async def ask(self, action: str, arguments: Any, listener: Listener | None = None, job: str | None = None) -> Any:
        """Ask for an action and wait for its answer.

        Raises:
            WorkerRefused: the worker refuses.
            Cancelled: the process was ended meanwhile.
        """
        await self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        number, answer = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = answer, listener
        line = json.dumps({"id": number, "action": action, "arguments": arguments, "job": job})
        try:
            self._process.stdin.write(line.encode() + b"\n")
            await self._process.stdin.drain()
        except ConnectionError:
            self._waiting.pop(number, None)
            raise Cancelled from None
        return await answer

    async def end(self) -> None:
        """End the process; what it was asked is cancelled."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while line := await process.stdout.readline():
                self._hear(json.loads(line))
        except ValueError:  # a line beyond the limit
            process.kill()
        code = await process.wait()
        waiting, self._waiting = self._waiting, {}
        for answer, _ in waiting.values():
            if not answer.done():
                answer.set_exception(_gone(code))

    def _hear(self, said: dict[str, Any]) -> None:
        answer, listener = self._waiting.get(said["id"], (None, None))
        if answer is None or answer.done():
            return
        if "progress" in said:
            if listener is not None:
                listener(*said["progress"])
            return
        self._waiting.pop(said["id"])
        if "done" in said:
            answer.set_result(said["done"])
        else:
            answer.set_exception(WorkerRefused(said["refused"], bool(said.get("memory")), bool(said.get("defect"))))


def _gone(code: int) -> Exception:
    """Return the error of a process that ended while it was asked: by us, or by a system short of memory."""
    if code >= 0:
        why = "the worker ended; its last words stand in the terminal"
        return WorkerRefused({"what": "the model", "why": why, "instead": "look there"}, defect=True)
    return Cancelled()


@dataclass
class LoadedModel:
    """A model of the studio, with a worker for the page and one for jobs, which is started with the first job.

    Attributes:
        name: its name on the page.
        source: what `ca.load` is given for it.
        state: how far it is.
        why: the reason, if it could not be loaded.
        card: what its worker says of it.
        turn: held by the question that the page's worker answers.
        job_turn: held by the job that runs, or by the question that the jobs' worker answers between two.
    """

    name: str
    source: str
    page: Answering
    jobs: Answering
    state: Literal["absent", "loading", "ready", "failed"] = "absent"
    why: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    job_turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def free(self, aside: bool) -> tuple[Answering, asyncio.Lock]:
        """Return the worker of a question with its lock: that of jobs if the question may go aside and none runs."""
        return (self.jobs, self.job_turn) if aside and not self.job_turn.locked() else (self.page, self.turn)

    async def load(self) -> dict[str, Any]:
        """Start the page's worker and return what it says.

        Raises:
            WorkerRefused: the model cannot be loaded.
        """
        self.state = "ready" if self.state == "ready" else "loading"
        try:
            said = await self.page.start()
        except (WorkerRefused, Cancelled) as refusal:
            self.state, self.why = "failed", str(refusal) or "its worker was ended"
            raise
        self.state, self.card = "ready", said["model"]
        return said

    async def end(self) -> None:
        """End both workers."""
        await self.page.end()
        await self.jobs.end()


def loaded_model(folder: Folder, name: str, sources: Mapping[str, str]) -> LoadedModel:
    """Return a model of the studio; its workers are not started yet."""
    setting = {
        "folder": str(folder.path),
        "files": {n: str(p) for n, p in folder.files.items()},
        "name": name,
        "source": sources[name],
        "others": dict(sources),
    }
    return LoadedModel(name, sources[name], Worker(setting), Worker(setting))
