"""The subject `requests`: a file, or false facts about the world of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutaway.core.refuse import Refused
from cutaway.core.subject import REQUIRED, Flag, Subject, register
from cutaway.editing.layouts import from_jsonl
from cutaway.editing.request import Probe, Request, Requests
from cutaway.editing.world import from_world
from cutaway.models.model import Model

WORLD = "facts"


def open_requests(model: Model, source: str | Path, n: int | None = None, seed: int = 0) -> Requests:
    """Return the requests that a text means: a .jsonl file, or `facts` for those about the model's own world.

    Raises:
        Refused: neither, or a file or world without requests.
    """
    if str(source) == WORLD:
        return from_world(model, **({} if n is None else {"n": n}), seed=seed)
    if Path(source).suffix != ".jsonl":
        why = "it is neither a .jsonl file nor a world's facts"
        raise Refused(f"requests {str(source)!r}", why, f"give a .jsonl file, or {WORLD}")
    return from_jsonl(source, n)


def _open(flags: Mapping[str, Any], opened: Mapping[str, Any]) -> Requests:
    return open_requests(opened["model"], flags["requests"], flags["requests_n"], flags["requests_seed"])


def _example(opened: Mapping[str, Any]) -> Requests:
    """Return requests about the model's world, or about two countries."""
    model: Model = opened["model"]
    if getattr(model.world, "people", None):
        return from_world(model, 2)
    places = (("Norway", "Oslo", "Bergen"), ("Japan", "Tokyo", "Osaka"))
    made = []
    for (name, old, new), (other, its, _) in zip(places, reversed(places), strict=True):
        probes = (
            Probe("paraphrase", f"The government of {name} sits in", new),
            Probe("neighbourhood", f"The capital of {other} is", its),
        )
        made.append(Request(name, f"The capital of {name} is", new, old, probes))
    return Requests(tuple(made), "capitals")


register(
    Subject(
        "requests",
        Requests,
        (
            Flag("requests", str, REQUIRED, "a .jsonl file (CounterFact, zsRE, MQuAKE), or facts of the model's world"),
            Flag("requests_n", int | None, None, "number of requests [default: of a file all, of a world 8]"),
            Flag("requests_seed", int, 0, "seed of the requests about a world"),
        ),
        _open,
        _example,
        needs=("model",),
        advice="ca.editing.from_jsonl(path) or ca.editing.from_world(model)",
    )
)
