"""Edits of knowledge on the bundled model: ROME one by one and MEMIT together, on requests that chose no setting.

The defaults of `editing.rome`, at the layer chosen on the requests of seed 1 (of which 32 chose rate, steps and clamp
too), on 100 requests of seed 2, with a wrong layer beside it; MEMIT on 50 of them. `python -m bench.editing` writes
bench/results/editing.json.
"""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import cutaway as ca
from cutaway.editing import KnowledgeEdit
from cutaway.tasks.prompts import Prompts
from cutaway.zoo.miniworld.documents import WorldDocuments

RESULT = Path(__file__).with_name("results") / "editing.json"
DOCUMENTS, HELD_OUT, TOGETHER, WRONG = 1000, 100, 50, 20
LAYER, WRONG_LAYER = 0, 4
MEMIT: dict[str, Any] = {"layers": (0, 1), "weight": 100.0}


def row(found: KnowledgeEdit, n: int, seconds: float) -> dict[str, Any]:
    """Return the shares of a result with their intervals and nulls, ready for JSON."""
    names = found.labels["measure"]
    shares = zip(names, found.share.tolist(), found.interval.tolist(), found.null.mean(-1).tolist(), strict=True)
    return {
        "options": found.record["options"],
        "requests": n,
        "shares": {m: {"share": s, "interval": i, "random rewrites": r} for m, s, i, r in shares},
        "kl per token": {"mean": float(found.kl), "interval": found.kl_interval.tolist()},
        "size": float(found.size.mean()),
        "CPU-seconds per request": seconds / n,
    }


def run() -> dict[str, Any]:
    """Run every edit."""
    model = ca.load("miniworld")
    texts = Prompts(tuple(islice(WorldDocuments(model.world).read(0), DOCUMENTS)), "documents")
    held_out = ca.editing.from_world(model, HELD_OUT, seed=2)
    calls = {
        "rome": lambda: ca.editing.rome(model, held_out, texts, layer=LAYER, samples=1),
        "rome at a wrong layer": lambda: ca.editing.rome(
            model, held_out.take(WRONG), texts, layer=WRONG_LAYER, samples=1
        ),
        "memit": lambda: ca.editing.memit(model, held_out.take(TOGETHER), texts, samples=2, **MEMIT),
    }
    numbers = {"rome": HELD_OUT, "rome at a wrong layer": WRONG, "memit": TOGETHER}
    out = {}
    for name, call in calls.items():
        start = time.process_time()
        found, _ = call()
        out[name] = row(found, numbers[name], time.process_time() - start)
    return out


if __name__ == "__main__":
    RESULT.write_text(json.dumps(run(), indent=1) + "\n", "utf-8")
