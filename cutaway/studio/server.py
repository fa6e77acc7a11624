"""The server: routes from the table of actions, jobs with their events, files of results, and the page itself."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import ValidationError
from starlette.exceptions import HTTPException

import cutaway
from cutaway.core.refuse import Refused
from cutaway.studio import messages as m
from cutaway.studio.actions import ACTIONS, Action
from cutaway.studio.folder import Folder
from cutaway.studio.jobs import Jobs
from cutaway.studio.workers import Cancelled, LoadedModel, TookTooLong, WorkerRefused, loaded_model
from cutaway.views.style import style

STATIC = Path(__file__).parent / "static"
API = "/api/v1"
_MOST_KEPT = 256  # answers
_REFUSALS: dict[int | str, dict[str, Any]] = {
    422: {"model": m.Refusal, "description": "Refused: what, why, and what instead."},
    504: {"model": m.Refusal, "description": "It takes longer than a page waits: run it as a job."},
    503: {"model": m.Refusal, "description": "The memory is not enough, or the model is not ready."},
}


class Studio:
    """The state of the server.

    Attributes:
        folder: where results and jobs lie.
        models: the models by their names; the first one is meant where none is named.
        jobs: the table of jobs.
    """

    def __init__(self, folder: Folder, sources: Mapping[str, str]):
        self.folder, self.jobs = folder, Jobs(folder.database)
        self.models = {name: loaded_model(folder, name, sources) for name in sources}
        self.methods: list[m.MethodCard] = []
        self.kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._changed = asyncio.Event()
        self._wake = {name: asyncio.Event() for name in sources}
        self._running: dict[str, str] = {}  # model → job
        self._tasks: list[asyncio.Task[Any]] = []

    # --- models

    def model(self, name: str) -> LoadedModel:
        """Return a model by name; the first one if the name is empty.

        Raises:
            Refused: there is none of that name.
        """
        name = name or next(iter(self.models))
        if name not in self.models:
            raise Refused(
                f"model {name!r}", "the studio was not started with it", f"use one of {', '.join(self.models)}"
            )
        return self.models[name]

    async def load(self, model: LoadedModel) -> None:
        """Load a model and tell the page."""
        self._tell()
        with suppress(WorkerRefused, Cancelled):
            said = await model.load()
            self.methods = self.methods or [m.MethodCard(**c) for c in said["methods"]]
        self._tell()

    async def ask(self, row: Action, request: m.Request, gone: Callable[[], Awaitable[bool]] | None = None) -> bytes:
        """Do an action with a worker, in its turn, and return its answer as JSON.

        Args:
            gone: tells if no one waits for the answer any more; then it is not begun.

        Raises:
            Refused: the worker refuses, or the work takes longer than the action has.
        """
        model, body = self.model(request.model), request.model_dump_json()
        key = (row.name, f"{model.name} {body}")
        if row.kept and key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        if model.state != "ready":
            await self.load(model)
        worker, turn = model.free(row.aside)
        try:
            async with turn:
                if gone is not None and await gone():
                    raise Refused(row.name, "the page no longer waits for it", "ask again")
                await worker.start()
                try:
                    async with asyncio.timeout(row.patience):
                        answer = await worker.ask(row.name, json.loads(body))
                except TimeoutError:
                    await worker.end()  # what it does is of no use any more
                    raise TookTooLong(row.name, row.patience) from None
        except Cancelled:
            why = "its worker was ended, perhaps by a system short of memory"
            instead = "ask again; for less, or for a smaller model"
            raise WorkerRefused({"what": row.name, "why": why, "instead": instead}, memory=True) from None
        data = row.response(**answer).model_dump_json().encode()
        if row.kept:
            self.kept[key] = data
            while len(self.kept) > _MOST_KEPT:
                self.kept.popitem(last=False)
        return data

    # --- jobs

    async def submit(self, call: m.Values) -> m.Job:
        """Add a job.

        Raises:
            Refused: no such model or method, or too many jobs wait.
        """
        model = self.model(call.model)
        if (row := ACTIONS.get(call.method)) is not None and row.job:
            _request(row, model.name, call.values)
        elif self.methods and call.method not in {c.name for c in self.methods}:
            raise Refused(f"method {call.method!r}", "there is no such method", "choose one of the list of methods")
        job = self.jobs.add(model.name, call.method, call.values)
        self._wake[model.name].set()
        self._tell()
        return job

    async def cancel(self, name: str) -> m.Job:
        """Cancel a job: one that runs loses its worker, which is started again for the next."""
        job = self.jobs.get(name)
        self.jobs.end(name, "cancelled")
        if self._running.get(job.model) == name:
            await self.models[job.model].jobs.end()
        self._tell()
        return self.jobs.get(name)

    async def work(self, model: LoadedModel) -> None:
        """Run the jobs of a model, one after another, for as long as the server runs."""
        wake = self._wake[model.name]
        while True:
            job = self.jobs.next(model.name)
            if job is None:
                wake.clear()
                await wake.wait()
                continue
            self._running[model.name] = job.id
            self._tell()
            await self._run(model, job)
            self._running.pop(model.name, None)
            self._tell()

    async def _run(self, model: LoadedModel, job: m.Job) -> None:
        def listen(done: float, total: float) -> None:
            self.jobs.progress(job.id, done, total)
            self._tell()

        row = ACTIONS.get(job.method, ACTIONS["run"])
        call = {"method": job.method, "values": job.values} if row.name == "run" else job.values
        try:
            request = _request(row, model.name, call).model_dump()
            async with model.job_turn:
                shown = await model.jobs.ask(row.name, request, listen, job.id)
            self.jobs.end(job.id, "done", result=shown["id"])
        except Refused as refusal:
            self.jobs.end(job.id, "refused", refusal=refusal.as_dict())
        except Cancelled:
            why = "its worker was ended, perhaps by a system short of memory"
            lost = {"what": job.method, "why": why, "instead": "run it again: its sweeps go on where they were"}
            self.jobs.end(job.id, "lost", refusal=lost)  # nothing, if it was cancelled

    # --- events

    def _tell(self) -> None:
        """Wake those who wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self, state: Callable[[], Any]) -> AsyncIterator[str]:
        """Yield a state as an event now and whenever it has changed."""
        last = None
        while True:
            if (now := state()) != last:
                last = now
                yield f"data: {now}\n\n"
            try:
                await asyncio.wait_for(self._changed.wait(), 15.0)
            except TimeoutError:
                last = None  # say it again, so that a connection that is gone is noticed

    # --- life

    def about(self) -> m.About:
        """Return what there is."""
        names = ("name", "source", "state", "why")
        cards = [m.ModelCard.model_validate(x.card | {n: getattr(x, n) for n in names}) for x in self.models.values()]
        files = [m.FileCard(id=i, name=p.name) for i, p in self.folder.files.items()]
        return m.About(version=cutaway.__version__, models=cards, files=files, methods=self.methods)

    async def start(self) -> None:
        """Begin to load the first model and to run jobs."""
        first = next(iter(self.models.values()))
        self._tasks = [asyncio.create_task(self.load(first))]
        self._tasks += [asyncio.create_task(self.work(x)) for x in self.models.values()]

    async def stop(self) -> None:
        """End all workers; a job that runs waits again at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(x.end() for x in self.models.values()))


def _request(row: Action, model: str, values: Mapping[str, Any]) -> m.Request:
    """Return the request of a job.

    Raises:
        Refused: values that it does not take.
    """
    try:
        return row.request(**{**values, "model": model})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or row.name
        raise Refused(where, str(first["msg"]), "leave it out, or see its form") from None


def create(studio: Studio) -> FastAPI:
    """Return the application of a studio, without its guard."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await studio.start()
        yield
        await studio.stop()

    app = FastAPI(
        title="cutaway studio",
        version=cutaway.__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.include_router(_routes(studio), prefix=API)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _absent)
    app.add_api_route("/views.css", _views, include_in_schema=False)
    app.mount("/", StaticFiles(directory=STATIC, html=True))
    return app


def _routes(studio: Studio) -> APIRouter:
    api = APIRouter(responses=_REFUSALS)

    @api.get("/about")
    async def about() -> m.About:
        """Tell what there is: models, files and methods."""
        return studio.about()

    @api.get("/events", response_class=StreamingResponse)
    async def events() -> StreamingResponse:
        """Tell the states of models and jobs, now and whenever they change."""

        def state() -> str:
            return json.dumps(
                {
                    "models": {x.name: x.state for x in studio.models.values()},
                    "jobs": [j.model_dump() for j in studio.jobs.all(50)],
                }
            )

        return StreamingResponse(studio.changes(state), media_type="text/event-stream")

    @api.post("/models/{name}")
    async def load(name: str) -> m.About:
        """Load a model."""
        await studio.load(studio.model(name))
        return studio.about()

    @api.get("/jobs")
    async def jobs() -> list[m.Job]:
        """List the newest jobs."""
        return studio.jobs.all()

    @api.post("/jobs")
    async def submit(call: m.Values) -> m.Job:
        """Run a method in the background."""
        return await studio.submit(call)

    @api.get("/jobs/{job}")
    async def job(job: str) -> m.Job:
        """Tell how far a job is."""
        return studio.jobs.get(job)

    @api.delete("/jobs/{job}")
    async def cancel(job: str) -> m.Job:
        """Cancel a job."""
        return await studio.cancel(job)

    @api.get("/results/{result}/file", response_class=FileResponse)
    async def file(result: str) -> FileResponse:
        """Download a result as safetensors."""
        path = studio.folder.result(result)
        return FileResponse(path, filename=path.name, media_type="application/octet-stream")

    for row in (x for x in ACTIONS.values() if not x.job):
        api.add_api_route(
            f"/{row.name}", _route(studio, row), methods=["POST"], response_model=row.response, summary=row.says
        )
    return api


def _route(studio: Studio, row: Action) -> Callable[..., Any]:
    async def route(request: Any, http: Any) -> Response:
        answer = await studio.ask(row, request, http.is_disconnected)
        return Response(answer, media_type="application/json")

    route.__annotations__ = {"request": row.request, "http": HttpRequest, "return": Response}
    route.__name__ = row.name
    return route


async def _views() -> Response:
    """Return the style sheet that pictures have everywhere."""
    return Response(style(), media_type="text/css")


async def _refused(_: Any, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, Refused)
    status = 504 if isinstance(refusal, TookTooLong) else 422
    if isinstance(refusal, WorkerRefused):
        status = 503 if refusal.memory else 500 if refusal.defect else 422
    return JSONResponse(refusal.as_dict(), status)


async def _malformed(_: Any, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(x) for x in first["loc"][1:]) or "the request"
    return JSONResponse({"what": where, "why": str(first["msg"]), "instead": "see openapi.json"}, 422)


async def _absent(_: Any, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    said = {"what": "the address", "why": str(error.detail), "instead": "begin at the first page"}
    return JSONResponse(said, error.status_code)
