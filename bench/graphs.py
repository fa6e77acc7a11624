"""What attribution graphs cost, in CPU seconds and memory, and how that grows with tokens.

GPT-2 small's shape (12 layers, d 768, 50257 tokens), random weights, random transcoders of 4096 latents of each MLP of
which 50 are active on a token, one thread. The prompt is a beginning of text and random tokens; all active features are
nodes, and the targets are the ten likeliest tokens. cutaway's call is `graphs.trace` as users call it: with its null of
20 random targets, closure of every row, influence, scores and record. circuit-tracer's is `attribute`, which returns
the edges alone, over its TransformerLens backend, in batches of 64, with which it is faster here and smaller than with
its default of 512. Both must find as many features, and graphs of the same scores.

Memory is what the resident set of a fresh process grows by at its peak in the first call, large blocks handed back at
once (`MALLOC_MMAP_THRESHOLD_`). Every weight of the model and the transcoders has been read before: both map files
rather than read them (cutaway all, circuit-tracer its transcoders), and pages that a call is the first to touch would
count as its growth. The rows grow with the tokens, and so do the positions that each reads, so that both
tools' time grows with the square of the tokens.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import sweeps
from bench.frame import ROOT, Row, Subject, finish, options, pythons, quiet, rename_tokenizer, serve, spent
from bench.growth import AT_ONCE, grown

LAYERS, WIDTH, LATENTS, ACTIVE = 12, 768, 4096, 50
TOKENS, GROWTH = 12, (6, 12, 18, 24)
BATCH = 64
CLOSE = 1e-4  # between scores
LEAST = 7.0

Traced = tuple[int, tuple[float, float]]  # active features, and the scores as circuit-tracer counts


def main() -> int:
    """Measure both in rounds that take turns, then memory, and write the rows."""
    chosen = options(__doc__, rounds=3).parse_args()
    interpreters = pythons(chosen, {"circuit_tracer": "d"})
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        rows = [*compare(folder, interpreters, chosen.rounds), memory(folder, interpreters)]
        return finish("graphs", rows, write=not chosen.no_write, label=chosen.label)


def save(folder: Path) -> None:
    """Seeded random weights, a prompt, and transcoders whose biases leave so many latents active on its tokens."""
    import torch

    import cutaway as ca
    from cutaway.dictionaries.formats.circuit_tracer import write
    from cutaway.dictionaries.gates import Relu
    from cutaway.dictionaries.transforms import one_block, together

    sweeps.save(str(folder))
    rename_tokenizer(folder)
    g = torch.Generator().manual_seed(1)
    model = ca.load(folder, check=False)
    words = model.shape.d_vocab - 1
    ids = [words, *torch.randint(words, (max(GROWTH) - 1,), generator=g).tolist()]
    (folder / "prompt.json").write_text(json.dumps(ids), "utf-8")
    acts = model.capture(ca.tasks.as_prompts(torch.tensor([ids])).bind(model), ["mlp_in", "mlp_out"])

    def transcoder(i: int) -> Any:
        read, written = f"mlp_in.{i}", f"mlp_out.{i}"
        rows, back = (torch.randn(LATENTS, WIDTH, generator=g) / WIDTH**0.5 for _ in range(2))
        seen = (acts[read][0, 1:] @ rows.T).flatten().sort(descending=True).values
        last = ACTIVE * (len(ids) - 1)
        threshold = seen[last - 1 : last + 1].mean()  # between two values, for both must see the same latents active
        size = acts[written][0, 1:].norm(dim=1).mean() / ACTIVE**0.5
        bias, mean = -threshold.expand(LATENTS), acts[written][0].mean(0)
        return one_block({read: rows}, {written: back * size}, bias, {written: mean}, Relu())

    write(together([transcoder(i) for i in range(LAYERS)]), folder / "transcoders")


def cutaway(folder: Path) -> tuple[str, Callable[[int], Callable[[], Traced]]]:
    """`graphs.trace` with its defaults, all active features as nodes."""
    import torch

    import cutaway as ca

    torch.set_num_threads(1)
    model, d = ca.load(folder, check=False), ca.dictionaries.load(folder / "transcoders")
    read((*model.hf.parameters(), *(t for part in (*d.encoder, *d.decoder) for t in part.values())))
    ids = json.loads((folder / "prompt.json").read_text("utf-8"))

    def job(tokens: int) -> Callable[[], Traced]:
        prompts = ca.tasks.as_prompts(torch.tensor([ids[:tokens]]))

        def run() -> Traced:
            graph = ca.graphs.trace(model, prompts, d, nodes=LAYERS * tokens * LATENTS)
            return int(graph.kinds["unit"].sum()), graph.scores("circuit-tracer")

        return run

    return ca.__version__, job


def circuit_tracer(folder: Path) -> tuple[str, Callable[[int], Callable[[], Traced]]]:
    """`attribute`, all active features as nodes."""
    import torch
    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_graph_scores

    from bench.tracers import replacement_model

    torch.set_num_threads(1)
    model = replacement_model(folder, folder / "transcoders")
    read(model.parameters())
    ids = json.loads((folder / "prompt.json").read_text("utf-8"))
    found = dict[str, Any]()

    def job(tokens: int) -> Callable[[], Traced]:
        def run() -> Traced:
            found["graph"] = attribute(torch.tensor(ids[:tokens]), model, batch_size=BATCH)
            return len(found["graph"].selected_features), compute_graph_scores(found["graph"])

        return run

    return version("circuit-tracer"), job


def read(weights: Iterable[Any]) -> None:
    """Read every number, so that the pages of mapped files are in memory."""
    for t in weights:
        t.sum()


SUBJECTS = {"cutaway": cutaway, "circuit_tracer": circuit_tracer}


# --- time


def compare(folder: str, interpreters: dict[str, str], rounds: int) -> list[Row]:
    """Rows of CPU time by tokens, the peer's up to the prompt's own."""
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    features = dict[int, int]()
    with contextlib.ExitStack() as stack:
        running = {}
        for name, python in interpreters.items():
            running[name] = Subject(python, "bench.graphs", "--subject", name, folder)
            stack.callback(running[name].close)
        for n in range(rounds):
            for tokens in GROWTH:
                found = list[dict[str, Any]]()
                for name, subject in running.items():
                    if name == "cutaway" or tokens <= TOKENS:
                        found.append(subject.ask(tokens=tokens))
                        times.setdefault((name, tokens), []).append((found[-1]["cpu"], found[-1]["wall"]))
                        says = f"round {n + 1}: {tokens} tokens, {name}: {found[-1]['cpu']:.1f} s"
                        print(says, file=sys.stderr, flush=True)
                features[tokens] = check(found)
        release = running["circuit_tracer"].about["version"] if "circuit_tracer" in running else ""
    return [row(times, tokens, features[tokens], release) for tokens in GROWTH]


def check(found: list[dict[str, Any]]) -> int:
    """Return the number of features, or stop where subjects trace other graphs."""
    for other in found[1:]:
        far = max(abs(a - b) for a, b in zip(found[0]["scores"], other["scores"], strict=True))
        if other["features"] != found[0]["features"] or far > CLOSE:
            raise SystemExit(f"subjects trace other graphs: {found}")
    return found[0]["features"]


def row(times: dict[tuple[str, int], list[tuple[float, float]]], tokens: int, features: int, release: str) -> Row:
    """The row of one number of tokens."""
    ours = times["cutaway", tokens]
    low, middle, high = (round(q, 3) for q in statistics.quantiles([c for c, _ in ours], n=4))
    wall = round(statistics.median(w for _, w in ours), 3)
    made = Row(f"{tokens} tokens, {features} features: CPU time", middle, "s", quartiles=(low, high), wall=wall)
    if ("circuit_tracer", tokens) not in times:
        return made
    theirs = round(statistics.median(c for c, _ in times["circuit_tracer", tokens]), 2)
    return made.against(f"circuit-tracer {release}", theirs, LEAST if tokens == TOKENS else None)


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    with contextlib.redirect_stdout(sys.stderr):
        release, job = SUBJECTS[name](Path(folder))

    def answer(tokens: int) -> dict[str, Any]:
        found, run = list[Traced](), job(tokens)
        with contextlib.redirect_stdout(sys.stderr):
            cpu, wall = spent(lambda: found.append(run()))
        features, scores = found[0]
        return {"cpu": cpu, "wall": wall, "features": features, "scores": scores}

    serve({"version": release}, answer)


# --- memory


def memory(folder: str, interpreters: dict[str, str]) -> Row:
    """The row of peak memory, each subject in a process of its own."""
    found = dict[str, float]()
    for name, python in interpreters.items():
        command = [python, "-m", "bench.graphs", "--peak", name, folder]
        done = subprocess.run(command, cwd=ROOT, env={**quiet(), **AT_ONCE}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found[name] = round(json.loads(done.stdout.splitlines()[-1]) / 2**20)
        print(f"{name}: {found[name]:.0f} MiB", file=sys.stderr, flush=True)
    made = Row(f"{TOKENS} tokens: memory", found["cutaway"], "MiB")
    if "circuit_tracer" not in found:
        return made
    return made.against("circuit-tracer", found["circuit_tracer"], 1.0)


def peak(name: str, folder: str) -> int:
    """Bytes by which this process grows at most while it traces the prompt."""
    with contextlib.redirect_stdout(sys.stderr):
        _, job = SUBJECTS[name](Path(folder))
        return grown(job(TOKENS))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    elif sys.argv[1:2] == ["--peak"]:
        print(json.dumps(peak(*sys.argv[2:4])))
    else:
        sys.exit(main())
