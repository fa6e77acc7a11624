"""How long the studio takes to answer on loopback, on the bundled model; and what twenty clients at once do to it.

    python -m bench.studio [--real /path/to/smollm2]

Server, workers and clients share the machine. Wall clock, 95th percentile of `--repeats` requests, each of a prompt
that was not asked before (unless the row says so). The first paint is read by a real browser. Memory is that of server
and worker, before and after the minute.
"""

from __future__ import annotations

import gzip
import itertools
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.frame import Row, finish, options, quiet

NAMES = ("Kate", "Max", "Mary", "John", "Anna", "Tom", "Lily", "George", "Diana", "James")
PLACES = ("market", "store", "park", "school", "station", "garden", "library", "beach")


class Served:
    """A running studio, and a client with its cookie."""

    def __init__(self, folder: str, *models: str):
        import httpx

        command = [sys.executable, "-m", "cutaway", "studio", "--no-browser", "--folder", folder]
        command += [word for m in models for word in ("--model", m)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=quiet())
        assert self.process.stderr is not None
        found = re.search(r"http\S+", self.process.stderr.readline())
        assert found is not None
        self.address = found[0]
        self.base = self.address.split("/?")[0]
        self.client = httpx.Client(base_url=self.base, timeout=300.0)

    def enter(self) -> None:
        """Take the cookie, and wait until the model is ready."""
        self.client.get(self.address)
        while self.client.get("/api/v1/about").json()["models"][0]["state"] != "ready":
            time.sleep(0.1)

    def ask(self, action: str, **body: Any) -> None:
        """Ask for an action; a refusal is an error."""
        self.client.post(f"/api/v1/{action}", json=body).raise_for_status()

    def memory(self) -> float:
        """Return the resident memory of the server and its workers, in MiB."""
        import psutil

        whole = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in (whole, *whole.children(recursive=True))) / 2**20


@contextmanager
def served(*models: str) -> Iterator[Served]:
    """A studio in a folder of its own, ended afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        found = Served(folder, *models)
        try:
            yield found
        finally:
            found.process.terminate()
            found.process.wait(20)


def prompts(seed: int = 0) -> Iterator[str]:
    """Yield prompts, no two alike."""
    draw, seen = random.Random(seed), set[str]()
    while True:
        a, b = draw.sample(NAMES, 2)
        text = f"While {a} and {b} were at the {draw.choice(PLACES)}, {draw.choice((a, b))} passed the book to"
        text += f" {draw.choice(NAMES)} and" * (text in seen)
        if text not in seen:
            seen.add(text)
            yield text


def late(job: Callable[[], Any], repeats: int) -> tuple[float, tuple[float, float]]:
    """Return the 95th percentile of the milliseconds that a job takes, and their quartiles."""
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        took.append(1e3 * (time.perf_counter() - start))
    low, _, high = statistics.quantiles(took, n=4)
    return statistics.quantiles(took, n=20)[-1], (round(low, 1), round(high, 1))


def row(work: str, job: Callable[[], Any], repeats: int, bar: float) -> Row:
    """Return the row of a request."""
    job()
    p95, quartiles = late(job, repeats)
    return Row(work, round(p95, 1), "ms, 95th percentile", bar, quartiles=quartiles)


def answers(studio: Served, repeats: int) -> list[Row]:
    """Measure the requests that screens make."""
    new = prompts()
    task = {"task": "sentence", "task_target": " Kate", "task_foil": " Max"}

    def lens() -> None:
        studio.ask("run", method="lenses.lens_grid", values={"prompts": next(new)})

    def attribution() -> None:
        studio.ask("run", method="lenses.direct_attribution", values={"prompts": next(new)})

    def patched() -> None:
        values = {**task, "task_sentence": next(new), "site": ["resid_pre"]}
        studio.ask("run", method="patching.activation", values=values)

    def intervened() -> None:
        edits = [{"kind": "zero", "address": head} for head in ("z.4.0", "z.3.1")]
        studio.ask("intervene", prompt=next(new), edits=edits, words=12)

    kept = {"method": "lenses.lens_grid", "values": {"prompts": "The capital of Norway is"}}
    return [
        row("a page asked for before", lambda: studio.ask("run", **kept), repeats, 50),
        row("the next token of a new prompt", lambda: studio.ask("predict", prompt=next(new)), repeats, 300),
        row("lens grid of a new prompt", lens, repeats, 300),
        row("direct attribution of a new prompt", attribution, repeats, 300),
        row("an intervention on a new prompt, with 20 controls", intervened, repeats, 500),
        row("patch map of a new prompt, with its counterfactual found", patched, max(8, repeats // 4), 3000),
    ]


def painted(studio: Served, repeats: int = 5) -> list[Row]:
    """Measure the first paint by a real browser, and what it loads."""
    from playwright.sync_api import sync_playwright

    from cutaway.studio.server import STATIC

    took = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = browser.new_context()
        page = context.new_page()
        page.goto(studio.address)
        for _ in range(repeats):
            page = browser.new_context(storage_state=context.storage_state()).new_page()
            page.goto(studio.base)
            page.wait_for_selector(".top")
            took.append(page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        browser.close()
    sent = [p for p in STATIC.rglob("*") if p.suffix in (".html", ".js", ".css", ".svg")]
    size = sum(len(gzip.compress(p.read_bytes())) for p in sent) / 1024
    return [
        Row("first contentful paint, nothing in the browser's cache", round(statistics.median(took), 1), "ms", 1000),
        Row("the page's own files, compressed", round(size, 1), "KiB", 350),
    ]


def crowd(studio: Served, clients: int, seconds: float) -> list[Row]:
    """Let some clients ask without a pause, and count errors, answers and the growth of memory."""
    import httpx

    stop, errors, took = time.monotonic() + seconds, list[str](), list[float]()
    cookies = dict(studio.client.cookies)

    def one(number: int) -> None:
        with httpx.Client(base_url=studio.base, timeout=120.0, cookies=cookies) as client:
            for n, text in enumerate(prompts(number)):
                if time.monotonic() > stop:
                    return
                body = {"prompt": text} if n % 3 else {"method": "lenses.lens_grid", "values": {"prompts": text}}
                start = time.perf_counter()
                answer = client.post(f"/api/v1/{'predict' if n % 3 else 'run'}", json=body)
                took.append(time.perf_counter() - start)
                if answer.status_code != 200:
                    errors.append(answer.text)

    for _ in itertools.islice(prompts(99), 40):  # what the first answers take stays
        studio.ask("predict", prompt=_)
    before = studio.memory()
    threads = [threading.Thread(target=one, args=(i,)) for i in range(clients)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    after = studio.memory()
    return [
        Row(f"errors of {clients} clients in {seconds:.0f} s, {len(took)} answers", len(errors), "errors", 0),
        Row("an answer among them", round(1e3 * statistics.quantiles(took, n=20)[-1], 1), "ms, 95th percentile"),
        Row("memory after them", round(after / before, 3), "× before", 1.1),
    ]


def real(folder: str) -> list[Row]:
    """Measure the first answers of screens on a real model, from the moment it is ready.

    As the page does, what has controls is asked with few of them first: that answer has the bar, and the whole one has
    none. The very first answer is one; of the others the least of three is taken, which is the least disturbed.
    """
    with served(f"smollm2={folder}") as studio:
        studio.enter()
        new, heads = prompts(5), itertools.count()

        def run(method: str, **values: Any) -> None:
            studio.ask("run", method=method, values=values)

        def intervened(samples: int) -> None:
            edits = [{"kind": "zero", "address": "z.12.0"}]
            studio.ask("intervene", prompt=next(new), edits=edits, samples=samples)

        asked: dict[str, tuple[Callable[[], None], float | None]] = {
            "next token": (lambda: studio.ask("predict", prompt=next(new)), 3),
            "lens grid, first with one control": (lambda: run("lenses.lens_grid", prompts=next(new), samples=1), 3),
            "lens grid, whole": (lambda: run("lenses.lens_grid", prompts=next(new)), None),
            "direct attribution": (lambda: run("lenses.direct_attribution", prompts=next(new)), 3),
            "Heads, attention of a layer": (lambda: studio.ask("attention", prompt=next(new), layer=12, count=128), 3),
            "Heads, circuits of a head": (lambda: run("weights.circuits", heads=[f"12.{next(heads)}"]), 3),
            "Intervene, first with two controls": (lambda: intervened(2), 3),
            "Intervene, whole": (lambda: intervened(20), None),
        }
        found = [Row("SmolLM2: next token, first", round(_seconds(asked["next token"][0]), 2), "s, of one", 3)]
        for name, (job, bar) in asked.items():
            least = min(_seconds(job) for _ in range(3))
            found.append(Row(f"SmolLM2: {name}", round(least, 2), "s, least of three", bar))
        return found


def _seconds(job: Callable[[], None]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def main() -> int:
    """Measure and write."""
    parser = options(__doc__, repeats=60, clients=20, seconds=60)
    parser.add_argument("--real", metavar="FOLDER", help="a real model, such as SmolLM2's folder")
    chosen = parser.parse_args()
    busy = os.getloadavg()[0]
    with served() as studio:
        rows = painted(studio)
    with served() as studio:
        studio.enter()
        rows += answers(studio, chosen.repeats)
        rows += crowd(studio, chosen.clients, float(chosen.seconds))
    if chosen.real and Path(chosen.real).is_dir():
        rows += real(chosen.real)
    rows.append(Row("load of the machine by others, average of the minute before", round(busy, 1), "processes"))
    return finish("studio", rows, write=not chosen.no_write, label=chosen.label)


if __name__ == "__main__":
    sys.exit(main())
