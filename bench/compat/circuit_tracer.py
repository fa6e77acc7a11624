"""Values of circuit-tracer on seeded random models, for the tests of its façade: interventions and a graph.

Models, transcoders and prompt are those of `bench.graph_parity`. `python -m bench.compat.circuit_tracer --python-d
PYTHON` writes them into `tests/compat/reference/circuit_tracer.safetensors`: logits after the last token, and features
there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "tests" / "compat" / "reference" / "circuit_tracer.safetensors"
CASES = ("GPT-2, cross-layer", "Llama, skips and thresholds")
#: layer, position, feature, value; the last is of one that no token activates
ROWS = ((0, 3, 5, 3.0), (1, 2, 40, 0.0), (1, 11, 7, -1.5), (2, 11, 90, 2.0))
OPEN = ((0, slice(1, None), 5, 2.0), (1, 0, 40, 4.0), (1, slice(2, 5), 7, 0.0))
#: the interventions by name, with their options
ASKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "free": (ROWS, {"freeze_attention": False}),
    "frozen": (ROWS, {}),
    "open": (OPEN, {"apply_activation_function": False}),
    "two layers held": (ROWS, {"constrained_layers": range(2)}),
    "all layers held": (ROWS, {"constrained_layers": range(3)}),
}
GENERATED = ("open", "two layers held")
STEPS = 3


def values(model: Any, ids: Any) -> dict[str, Any]:
    """Return what a replacement model, there or here, says of each intervention."""
    found: dict[str, Any] = {}
    for name, (rows, options) in ASKED.items():
        logits, acts = model.feature_intervention(ids, rows, **options)
        found |= {f"{name} logits": logits[0, -1], f"{name} features": acts[:, -1]}
        if name in GENERATED:
            given = {"do_sample": False, "stop_at_eos": False, "verbose": False, "max_new_tokens": STEPS}
            _, logits, acts = model.feature_intervention_generate(ids, rows, **given, **options)
            found |= {f"{name} steps": logits, f"{name} steps' features": acts[:, -1]}
    return found


def peer(folder: Path) -> None:
    """Write what circuit-tracer says."""
    import torch
    from safetensors.torch import save_file

    from bench import graph_parity
    from bench.tracers import replacement_model

    torch.set_num_threads(1)
    found, ids = {}, torch.tensor(graph_parity.prompt())
    for name in CASES:
        case = graph_parity.CASES[name]
        model = replacement_model(folder / case.shape, folder / "transcoders" / name)
        tokens = model.generate  # generates from ids with an axis of prompts
        model.generate = lambda ids, tokens=tokens, **options: tokens(ids[None], return_type="tokens", **options)
        found |= {f"{name}: {key}": value.detach().clone() for key, value in values(model, ids).items()}
    save_file(found, FILE)


def main() -> None:
    """Save the models, and ask circuit-tracer in its own environment."""
    from bench.graph_parity import save

    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        subprocess.run([sys.argv[2], "-m", "bench.compat.circuit_tracer", folder], check=True)


if __name__ == "__main__":
    main() if sys.argv[1] == "--python-d" else peer(Path(sys.argv[1]))
