"""A store of features of a real model, and how far short rules explain them: `python -m tools.real_features`.

It trains a small TopK dictionary on a middle layer of SmolLM2-135M-Instruct with the text of `tools.real_dictionary`,
harvests a store on its held-out files with `cutaway features harvest`, finds a rule for each of the first thousand
latents on one half of the documents, scores it on the other, beside random features of the same densities, and
publishes what came out in docs/real.md. The labels that are shown are a seeded draw among all latents that were scored.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from bench.frame import machine
from cutaway.core.stats import mean_interval
from cutaway.features import Explanations, FeatureStore, explain
from cutaway.features.explain import NONE
from tools import real, real_studies
from tools.real_dictionary import CONTEXT, MODEL, SITE, tell, written

LATENTS, K, TRAINED, HARVESTED, RULED = 1024, 32, 120_000, 60_000, 1000
SCORED = 20  # tokens of the score half on which a latent is active, from which on its F1 counts
DRAWN = 12


def main() -> None:
    """Train, harvest, find rules, keep the numbers, and write the page."""
    chosen = real.options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), chosen.folder / MODEL)
    real.publish(found, real_studies.FEATURES, write=not chosen.no_write)


def measured(folder: Path, model: Path) -> dict[str, Any]:
    """Make the store in a folder that nothing is kept of, and score the rules."""
    about, start = {part: written(folder / f"{part}.jsonl", part) for part in ("train", "test")}, time.perf_counter()
    dictionary, made = trained(folder, model), time.perf_counter()
    tell("features", "harvest", "--model", model, "--context", CONTEXT, "--dictionary", dictionary, "--text",
         folder / "test.jsonl", "--tokens", HARVESTED, "--out", folder / "store")  # fmt: skip
    store, harvested = FeatureStore(folder / "store"), time.perf_counter()
    found = explain(store, range(RULED))
    parts = {"training": made - start, "harvest": harvested - made, "rules": time.perf_counter() - harvested}
    known = store.latents()
    return {
        "model": real.MODELS[MODEL], "site": SITE, "latents": LATENTS, "k": K, "trained": TRAINED, "text": about,
        "counts": store.manifest["counts"], "firing": int((known.count > 0).sum()),
        "bytes": sum(row["bytes"] for row in store.files()), "seconds": {n: round(s) for n, s in parts.items()},
        **scores(found), "machine": machine(),
    }  # fmt: skip


def trained(folder: Path, model: Path) -> Path:
    """Train the dictionary on the files of a folder, which are written if they are not there."""
    given = folder / "train.jsonl"
    if not given.is_file():
        written(given, "train")
    tell("dict", "train", "--model", model, "--context", CONTEXT, "--site", SITE, "--text", given, "--out",
         folder / "run", "--gate", "topk", "--latents", LATENTS, "--k", K, "--tokens", TRAINED, "--batch", 1024,
         "--rate", "1e-3", "--threads", 1)  # fmt: skip
    return folder / "run" / "dictionary.safetensors"


def scores(found: Explanations) -> dict[str, Any]:
    """Held-out F1 of the rules, beside random features, and some of the labels."""
    at = found.labels["measure"].index("F1")
    texts = [x.partition(": ")[2] for x in found.labels["latent"]]
    counted = (found.held_out >= SCORED).nonzero()[:, 0]
    f1, null = found.score[counted, at], found.null[counted, at]
    ruled = [i for i in range(len(texts)) if not texts[i].startswith(NONE)]
    drawn = sorted(random.Random(0).sample(counted.tolist(), DRAWN))
    return {
        "ruled": {"latents": len(texts), "with a rule": len(ruled), "scored": len(counted), "from": SCORED},
        "F1": {"mean": float(f1.mean()), "interval": mean_interval(f1, within=(0, 1)).tolist(),
               "quantiles": f1.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])).tolist()},
        "random features": {"mean": float(null.mean()), "interval": mean_interval(null.mean(1), within=(0, 1)).tolist(),
                            "largest": float(null.max()), "with a rule": int((null > 0).sum()), "drawn": null.numel()},
        "by chance": {"mean": float(found.chance[counted].mean()),
                      "interval": mean_interval(found.chance[counted], within=(0, 1)).tolist()},
        "first words": dict(Counter(" ".join(texts[i].split()[:2]) for i in ruled).most_common(8)),
        "drawn": [
            {"latent": found.labels["latent"][i].partition(":")[0], "says": texts[i], "F1": float(found.score[i, at]),
             "interval": found.interval[i, at].tolist(), "random": found.null[i, at].tolist(),
             "tokens": int(found.held_out[i])}
            for i in drawn
        ],
    }  # fmt: skip


if __name__ == "__main__":
    main()
