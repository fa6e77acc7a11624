"""A dictionary of a real model, on text that any Debian machine with Python has: `python -m tools.real_dictionary`.

It reads a middle layer of SmolLM2-135M-Instruct with `cutaway harvest`, trains a TopK dictionary with `cutaway dict
train` and judges it with `cutaway dict eval` on files that it has not seen, beside PCA, random directions and the
model's own neurons; does the same with the model whose weights are shuffled, as a control; and publishes scores and
ten latents in docs/real.md. The ten are a seeded draw among the latents of ordinary frequency: nobody chose them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cutaway as ca
from bench.frame import machine, quiet
from tools import real, real_studies

ROOT = Path(__file__).parents[1]
MODEL, SITE = "smollm2", "resid_post.15"
LATENTS, K, TOKENS, PASSES, CONTEXT, HELD = 4096, 32, 150_000, 8, 96, 16_384
CHARACTERS = {"train": 2_400_000, "test": 300_000}
#: share of held-out tokens on which a latent fires, to be drawn; how many are drawn; of how many contexts each
ORDINARY, DRAWN, CONTEXTS = (0.001, 0.02), 10, 4
DOCUMENTS = (Path("/usr/share/common-licenses"), Path("/usr/share/doc"))
SUFFIXES = ("", ".txt", ".md", ".rst")
LONG = 20_000  # characters that one file gives at most


def main() -> None:
    """Train, judge, keep the numbers, and write the page."""
    chosen = real.options(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), chosen.folder / MODEL)
    real.publish(found, real_studies.DICTIONARY, write=not chosen.no_write)


def measured(folder: Path, model: Path) -> dict[str, Any]:
    """Train and judge, in a folder that nothing is kept of, on the model and on its shuffled twin."""
    about = {part: written(folder / f"{part}.jsonl", part) for part in CHARACTERS}
    twin = shuffled_weights(model, folder / "shuffled")
    seconds, found = {}, {}
    for name, path, more in (
        ("model", model, ("--features", LATENTS, "--by", "frequency")),
        ("shuffled", twin, ("--sequences", 0)),
    ):
        own, start = folder / f"of {name}", time.perf_counter()
        tell("harvest", "--model", path, "--sites", SITE, "--out", own / "acts", "--text", folder / "train.jsonl",
             "--tokens", TOKENS, "--context", CONTEXT)  # fmt: skip
        tell("dict", "train", "--acts", own / "acts", "--site", SITE, "--out", own / "run", "--gate", "topk",
             "--latents", LATENTS, "--k", K, "--tokens", TOKENS * PASSES, "--batch", 1024, "--rate", "1e-3",
             "--threads", 1)  # fmt: skip
        found[name] = tell("dict", "eval", own / "run" / "dictionary.safetensors", "--model", path, "--text",
                           folder / "test.jsonl", "--tokens", HELD, "--context", CONTEXT, *more)  # fmt: skip
        seconds[name] = round(time.perf_counter() - start)
    judged = found["model"]
    ordinary = [f for f in judged["features"] if ORDINARY[0] <= f["frequency"] <= ORDINARY[1]]
    drawn = random.Random(0).sample(sorted(ordinary, key=lambda f: f["latent"]), DRAWN)
    return {
        "model": real.MODELS[MODEL], "site": SITE, "latents": LATENTS, "k": K, "tokens": TOKENS, "passes": PASSES,
        "held out": HELD, "text": about, "seconds": seconds, "scores": scores(judged["scores"]),
        "shuffled": scores(found["shuffled"]["scores"]),
        "density": {k: judged["density"][k] for k in ("decades", "latents")},
        "ordinary": {"bounds": ORDINARY, "latents": len(ordinary), "firing": len(judged["features"])},
        "features": sorted((shown(f) for f in drawn), key=lambda f: f["latent"]), "machine": machine(),
    }  # fmt: skip


def shuffled_weights(model: Path, folder: Path) -> Path:
    """Write the model with the entries of every weight matrix in random order, and answer the folder."""
    copy = ca.models.shuffled(ca.load(str(model)))
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    copy.hf.save_pretrained(folder)
    return folder


def shown(feature: dict[str, Any]) -> dict[str, Any]:
    """A latent with its first contexts, as far as the page shows it."""
    kept = [{k: _unnamed(c[k]) for k in ("value", "before", "token", "after")} for c in feature["contexts"][:CONTEXTS]]
    return {k: feature[k] for k in ("latent", "focus", "frequency", "mean active")} | {"contexts": kept}


def _unnamed(text: Any) -> Any:
    """Text without the mail addresses that documents have; numbers as they are."""
    return re.sub(r"[\w.+-]+@[\w.-]+", "name@host", text) if isinstance(text, str) else text


def scores(judged: dict[str, Any]) -> dict[str, Any]:
    """The scores by name: value, interval, what random directions got, and what each control got."""
    names, controls = judged["labels"]["score"], judged["labels"]["control"]
    value, interval, null, beside = (judged["fields"][f]["values"] for f in ("score", "interval", "null", "control"))
    return {
        name: {"value": value[i], "interval": interval[i], "random directions": null[i]}
        | dict(zip(controls, beside[i], strict=True))
        for i, name in enumerate(names)
    }


def tell(command: str, *words: Any) -> Any:
    """What a command of `cutaway` answers; its progress goes to the terminal."""
    line = [sys.executable, "-m", "cutaway", command, *map(str, words), "--json"]
    done = subprocess.run(line, cwd=ROOT, env=quiet(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"cutaway {command} ended with {done.returncode}")
    return json.loads(done.stdout)


# --- text


def written(path: Path, part: str) -> dict[str, Any]:
    """Write the text of one part as JSON lines, and say how much it is."""
    characters = files = 0
    digest = hashlib.sha256()
    with path.open("w", encoding="utf-8") as out:
        for text in texts(part):
            out.write(json.dumps({"text": text}) + "\n")
            digest.update(text.encode())
            characters, files = characters + len(text), files + 1
            if characters >= CHARACTERS[part]:
                break
    return {"files": files, "characters": characters, "sha256": digest.hexdigest()[:16]}


def texts(part: str) -> Iterator[str]:
    """The texts of one part, in an order that the names of the files give; every tenth file is held out.

    A paragraph that an earlier file had, of either part, is left out: licences say the same in a thousand places.
    """
    seen: set[bytes] = set()
    for number, path in sorted((_number(p), p) for p in files()):
        held = "test" if number % 10 == 0 else "train"
        kept, size = [], 0
        for paragraph in paragraphs(path):
            key = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
            if key not in seen and size < LONG:
                seen.add(key)
                kept.append(paragraph)
                size += len(paragraph)
        if kept and held == part:
            yield "\n\n".join(kept)


def files() -> Iterator[Path]:
    """Licences and plain documents of the system, and the sources of the standard library."""
    for root in DOCUMENTS:
        yield from (p for p in root.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not p.is_symlink())
    library = Path(sysconfig.get_paths()["stdlib"])
    left = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    yield from (p for p in library.rglob("*.py") if not left & set(p.relative_to(library).parts))


def paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a file of 80 characters or more; of a source, those of its docstrings."""
    try:
        text = path.read_text("utf-8")
        parts = docstrings(text) if path.suffix == ".py" else [text]
    except (OSError, UnicodeDecodeError, SyntaxError):
        return
    for part in parts:
        yield from (p for p in part.split("\n\n") if len(p) >= 80)


def docstrings(source: str) -> list[str]:
    """Every docstring of a source file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
    return found


def _number(path: Path) -> int:
    """A number that only a file's name and its folder's give, so that the order is the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(path.parts[-2:]).encode()).digest()[:4], "big")


if __name__ == "__main__":
    main()
