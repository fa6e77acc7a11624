"""A studio in this process: its worker answers here, so that a test needs no other process and starts at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import httpx

from cutaway.core.progress import listening
from cutaway.studio.actions.about import hello
from cutaway.studio.folder import Folder
from cutaway.studio.guard import Guard
from cutaway.studio.server import Studio, create
from cutaway.studio.session import Session
from cutaway.studio.worker import answering
from cutaway.studio.workers import LoadedModel, WorkerRefused

HOST = "127.0.0.1:1"


class Here:
    """A worker that is no process of its own."""

    def __init__(self, session: Session):
        self.session = session
        self.ended = 0

    async def start(self) -> dict[str, Any]:
        return hello(self.session)

    async def ask(self, action: str, arguments: Any, listener: Any = None, job: str | None = None) -> Any:
        def work() -> dict[str, Any]:
            with listening(listener or (lambda done, total: None)):
                return answering(partial(self.session.do, action, arguments, job))

        said = await asyncio.to_thread(work)
        if "done" in said:
            return said["done"]
        raise WorkerRefused(said["refused"], bool(said.get("memory")), bool(said.get("defect")))

    async def end(self) -> None:
        self.ended += 1


def studio_here(folder: Folder, model: Any = None, name: str = "miniworld") -> Studio:
    """Return a studio whose only model is loaded here."""
    session = Session(folder, name, name, {name: name})
    if model is not None:
        session.__dict__["model"] = model
    studio = Studio(folder, {name: name})
    studio.models = {name: LoadedModel(name, name, Here(session), Here(session))}  # type: ignore[arg-type]
    return studio


def guarded(studio: Studio) -> Guard:
    """Return the application of a studio behind its guard."""
    return Guard(create(studio), [HOST])


def client(guard: Guard) -> httpx.AsyncClient:
    """Return a client that has not entered yet."""
    transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=f"http://{HOST}")


@asynccontextmanager
async def entered(guard: Guard) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the cookie."""
    async with client(guard) as c:
        assert (await c.get(f"/{guard.link()}")).status_code == 303
        yield c
