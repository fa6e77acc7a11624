"""The first seconds: what `import cutaway` adds to torch, and loading a tiny model for the first and the second time.

Every number is the median over fresh processes; the first load checks the model (interventions against identities),
later ones remember the outcome.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile

from bench.capture import save
from bench.frame import ROOT, Row, finish, options, quiet

GPT2 = "transformers.models.gpt2.modeling_gpt2"
IMPORT = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import {names}
print(json.dumps([time.process_time() - start, len(set(sys.modules) - before)]))
"""
LOAD = """
import json, sys, time
import torch, transformers.models.gpt2.modeling_gpt2
import cutaway as ca
start = time.process_time()
model = ca.load(sys.argv[1])
print(json.dumps([time.process_time() - start, len(model.disabled)]))
"""


def main() -> int:
    """Measure in fresh processes, the subjects taking turns."""
    chosen = options(__doc__, rounds=7).parse_args()
    packages = {"cutaway": (sys.executable, "cutaway", f"cutaway.models.loading.load, {GPT2}")}
    if (peers := chosen.python_a) is not None:
        bridge = f"transformer_lens.model_bridge, {GPT2}"
        packages |= {
            "transformer-lens": (peers, "transformer_lens", bridge),
            "nnsight": (peers, "nnsight", f"nnsight, {GPT2}"),
        }
    imports: dict[str, list[list[float]]] = {name: [] for name in packages}
    ready: dict[str, list[list[float]]] = {name: [] for name in packages}
    loads: dict[str, list[list[float]]] = {"first": [], "second": []}
    with tempfile.TemporaryDirectory() as model:
        save("tiny", model)
        for _ in range(chosen.rounds):
            for name, (python, package, all_of_it) in packages.items():
                imports[name].append(fresh(python, IMPORT.format(names=package)))
                ready[name].append(fresh(python, IMPORT.format(names=all_of_it)))
            with tempfile.TemporaryDirectory() as home:
                for which in loads:
                    loads[which].append(fresh(sys.executable, LOAD, model, home=home))
    rows = [
        *rows_against("import: modules beyond torch", imports, 1, "modules", 60),
        *rows_against("import: CPU time beyond torch", imports, 0, "s", 0.3),
        *rows_against("import with all that loading a GPT-2 takes: CPU time beyond torch", ready, 0, "s"),
        *rows_against("load a tiny folder for the first time, checked", {"cutaway": loads["first"]}, 0, "s"),
        *rows_against("load it again", {"cutaway": loads["second"]}, 0, "s"),
    ]
    return finish("first", rows, write=not chosen.no_write, label=chosen.label)


def fresh(python: str, code: str, *arguments: str, home: str | None = None) -> list[float]:
    """What a new process prints."""
    env = quiet() | ({"HOME": home} if home else {})
    done = subprocess.run([python, "-c", code, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def rows_against(
    work: str, samples: dict[str, list[list[float]]], which: int, unit: str, bar: float | None = None
) -> list[Row]:
    """One row for each peer, or one alone, of the first or second number that the processes printed."""
    found = {name: [sample[which] for sample in printed] for name, printed in samples.items()}
    low, middle, high = (round(q, 4) for q in statistics.quantiles(found["cutaway"], n=4))
    row = Row(work, middle, unit, bar, quartiles=(low, high))
    peers = {name: round(statistics.median(values), 4) for name, values in found.items() if name != "cutaway"}
    return [row.against(name, value) for name, value in peers.items()] or [row]


if __name__ == "__main__":
    sys.exit(main())
