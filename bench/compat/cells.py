"""One side of the differential harness: the cells of a notebook run in this environment, and what each one leaves.

Runs in the environment of the original packages or, with `--cutaway`, in cutaway's, under `cutaway.compat.imports()`.
Only torch and safetensors are needed beside what the cells import. Seeds are set before each cell.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from bench.compat import stubs
from bench.compat.values import LONGEST, leaves, packed, signature

WORDS = """the of and to in a is that for it was on are as with his they at be this from have or by one had not but
what all were when we there can an your which their said if do will each about how up out them then she""".split()  # noqa: SIM905


class TooSlow(BaseException):
    """A cell that ran past its limit."""


def main() -> None:
    """Run the cells of a file of sources (JSON: a list of texts), and write a table of what they left."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", type=Path)
    parser.add_argument("folder", type=Path, help="of the record")
    parser.add_argument("--cutaway", action="store_true", help="run them under cutaway's façades")
    parser.add_argument("--models", default="{}", help="names and folders of models that imports() is given")
    parser.add_argument("--dictionaries", default="{}", help="the same of dictionaries")
    parser.add_argument("--limit", type=int, default=300, help="seconds that a cell may run")
    parser.add_argument("--extra", help="folder of packages that cells import and an environment may lack")
    parser.add_argument("--file", default="notebook.py", help="the notebook's own path")
    chosen = parser.parse_args()
    chosen.folder = chosen.folder.resolve()
    import torch

    torch.set_num_threads(1)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    if chosen.extra:
        sys.path.append(chosen.extra)
    with contextlib.ExitStack() as stack:
        if chosen.cutaway:
            from cutaway import compat

            stack.enter_context(compat.imports(json.loads(chosen.models) | json.loads(chosen.dictionaries)))
        stubs.install()
        offline_hub()
        record = list(run(json.loads(chosen.sources.read_text("utf-8")), chosen))
    (chosen.folder / "record.json").write_text(json.dumps(record, indent=1), "utf-8")


def offline_hub() -> None:
    """List the files of a repository from the local cache, and give every data set the same texts."""
    import huggingface_hub as hub

    def list_repo_files(_: Any, repo_id: str, **__: Any) -> list[str]:
        root = Path(hub.constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots")
        files = [p.relative_to(root).parts[1:] for p in root.rglob("*") if p.is_file()]
        return sorted("/".join(parts) for parts in files)

    hub.HfApi.list_repo_files = list_repo_files  # type: ignore[method-assign]
    hub.list_repo_files = lambda repo_id, **named: list_repo_files(None, repo_id, **named)
    import tqdm
    import transformers

    if not find_spec(moved := "transformers.models.gpt2.tokenization_gpt2_fast"):  # where version 4 had a tokenizer
        sys.modules[moved] = transformers
    sys.modules["tqdm.notebook"] = tqdm  # no widgets
    with contextlib.suppress(ImportError):
        import datasets

        datasets.load_dataset = local_texts


def local_texts(*_: Any, **named: Any) -> Any:
    """Return seeded random words as a data set, in place of any."""
    from datasets import Dataset

    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=drawn.randint(20, 400))) for _ in range(300)]
    made = Dataset.from_dict({"text": texts, "meta": [""] * len(texts)})
    return made.to_iterable_dataset() if named.get("streaming") else made


def run(sources: list[str], chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the cells in one namespace, and yield the record of each; one that fails stops no other."""
    from safetensors.torch import save_file

    stubs.SHOWN.clear()
    sys.modules["__main__"] = ModuleType("__main__")
    space = vars(sys.modules["__main__"])
    space.update({name: stubs.Anything(name) for name in ("get_ipython", "display")}, __file__=chosen.file)
    sys.path.insert(0, str(Path(chosen.file).parent))
    os.chdir(chosen.folder)
    for number, source in enumerate(sources):
        before = {name: signature(value) for name, value in space.items()}
        start, stdout = time.perf_counter(), io.StringIO()
        error, last = one_cell(source, number, space, stdout, chosen.limit)
        left = {name: value for name, value in space.items() if plain(name, value)}
        changed = {name: value for name, value in left.items() if before.get(name, left) != signature(value)}
        found = dict(table(changed, last))
        texts, tensors = packed(found)
        stubs.SHOWN.clear()
        save_file(tensors, chosen.folder / f"cell{number}.safetensors")
        seconds = round(time.perf_counter() - start, 2)
        print(f"cell {number}: {seconds} s {error or ''}"[:200], file=sys.stderr, flush=True)
        yield {"error": error, "stdout": stdout.getvalue(), "seconds": seconds, "values": texts}


def plain(name: str, value: Any) -> bool:
    """Return True if a name of the namespace is of the notebook and may hold a value."""
    return not name.startswith("_") and not isinstance(value, ModuleType | FunctionType | type | stubs.Anything)


def table(changed: dict[str, Any], last: Any) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of the changed variables, of the cell's last expression, and of what it drew."""
    for root, value in [*changed.items(), ("<last>", last), *((f"<drawn {i}>", v) for i, v in enumerate(stubs.SHOWN))]:
        for count, (path, leaf) in enumerate(leaves(value)):
            if count < LONGEST and not (root == "<last>" and leaf is None):
                yield f"{root}{path}", leaf


def one_cell(
    source: str, number: int, space: dict[str, Any], stdout: io.StringIO, limit: int
) -> tuple[str | None, Any]:
    """Run a cell, and return its error and the value of its last expression."""
    seed()
    last = None
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        with contextlib.redirect_stdout(stdout):
            tree = ast.parse(source)
            end = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, f"<cell {number}>", "exec"), space)
            if isinstance(end, ast.Expr):
                last = eval(compile(ast.Expression(end.value), f"<cell {number}>", "eval"), space)
    except TooSlow:
        return "TooSlow: it ran past its limit", None
    except (Exception, SystemExit) as error:
        *_, frame = traceback.extract_tb(error.__traceback__)
        return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})", None
    finally:
        signal.alarm(0)
    return None, last


def seed() -> None:
    """Set the seeds of all that draws."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def stop(*_: Any) -> None:
    raise TooSlow


if __name__ == "__main__":
    main()
