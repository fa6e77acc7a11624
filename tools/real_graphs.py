"""Attribution graphs of a real model, over transcoders trained here: `python -m tools.real_graphs`.

It trains transcoders of all MLPs of SmolLM2-135M-Instruct with one `cutaway dict train` on the text of
`tools.real_dictionary`, in `runs/real/transcoders`, where a stopped run goes on; judges them with `cutaway dict eval`
on files that they have not seen; traces and validates the graph of a capital and of an IOI sentence over them, and over
the model's own neurons; and publishes it all in docs/real.md. Prompts are the first of their sets.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch

import cutaway as ca
from bench.frame import machine
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.validate import GraphValidation
from tests.real import sets
from tools import real, real_dictionary, real_studies
from tools.real_lenses import rounded

MODEL, PROMPTS = "smollm2", {"capital": "fact_capital", "IOI": "ioi"}
LATENTS, K, TOKENS, BATCH, CONTEXT, HELD, RATE = 1024, 32, 150_000, 256, 96, 8192, "2e-3"
SHOWN, REMOVED, LEADING = 8, 20, 1  # the first token is a sink, though no beginning-of-text token stands there


def main() -> None:
    """Train, judge, trace, keep the numbers, and write the page."""
    parser = real.options(__doc__)
    parser.add_argument("--out", type=Path, default=real.RUNS / "transcoders", help="where transcoders are kept")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="that the transcoders are trained on")
    chosen = parser.parse_args()
    found = measured(chosen.folder / MODEL, chosen.out, chosen.tokens)
    real.publish(found, real_studies.GRAPHS, write=not chosen.no_write)


def measured(folder: Path, out: Path, tokens: int) -> dict[str, Any]:
    """Train transcoders, or go on with them, and trace over them and over neurons."""
    out.mkdir(parents=True, exist_ok=True)
    about = {part: real_dictionary.written(out / f"{part}.jsonl", part) for part in real_dictionary.CHARACTERS}
    minutes, judged = trained(folder, out, tokens)
    model = ca.load(folder)
    over = {"transcoders": ca.dictionaries.load(out / "run" / "dictionary.safetensors"), "neurons": "neurons"}
    found = {f"{name}, {units}": traced(model, task, given) for name, of in PROMPTS.items()
             for task in [sets.task(model, of, 1)] for units, given in over.items()}  # fmt: skip
    return {
        "model": real.MODELS[MODEL], "latents": LATENTS, "k": K, "tokens": tokens, "CPU minutes": minutes,
        "held out": HELD, "text": about, "FVU": judged, "graphs": found, "machine": machine(),
    }  # fmt: skip


def trained(folder: Path, out: Path, tokens: int) -> tuple[float, dict[str, Any]]:
    """Train the transcoders of all MLPs at once, and say how long the processor took and what they miss."""
    kept, before = out / "minutes.json", _seconds()
    if not kept.is_file():
        real_dictionary.tell(
            "dict", "train", "--model", folder, "--text", out / "train.jsonl", "--kind", "transcoder", "--skip",
            "--site", "mlp_in.*", "--write", "mlp_out.*", "--gate", "topk", "--latents", LATENTS, "--k", K, "--tokens",
            tokens, "--batch", BATCH, "--context", CONTEXT, "--rate", RATE, "--threads", 1, "--out", out / "run",
        )  # fmt: skip
        kept.write_text(json.dumps(round((_seconds() - before) / 60, 1)), "utf-8")
    judged = real_dictionary.tell(
        "dict", "eval", out / "run" / "dictionary.safetensors", "--model", folder, "--text", out / "test.jsonl",
        "--tokens", HELD, "--context", CONTEXT, "--sequences", 8,
    )  # fmt: skip
    return json.loads(kept.read_text("utf-8")), real_dictionary.scores(judged["scores"])


def _seconds() -> float:
    """CPU seconds of processes that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def traced(model: ca.Model, task: ca.Task, units: Any) -> dict[str, Any]:
    """What the graph of a prompt says, and what removing its largest units changes."""
    graph = ca.graphs.trace(model, task, units, leading=LEADING)
    tested = ca.graphs.validate(model, task, units, top=REMOVED, leading=LEADING)
    return {"prompt": task.pairs[0].clean, "answer": task.pairs[0].answer, "foil": task.pairs[0].foil} | told(
        graph, tested
    )


def told(graph: AttributionGraph, tested: GraphValidation) -> dict[str, Any]:
    """The scores of a graph and of its validation, and its largest nodes among those beyond all random targets."""
    assert graph.influence_null is not None
    beside = graph.influence_null.max(1).values
    first = torch.where(graph.influence > beside, graph.influence, 0.0).argsort(descending=True)[:SHOWN].tolist()
    nodes = [{"node": graph.labels["node"][i], "influence": rounded(graph.influence[i]),
              "random targets": rounded(beside[i])} for i in first]  # fmt: skip
    beyond = (tested.effect.abs() > tested.effect_null.abs().amax(1)).float().mean()
    return {
        "active units": graph.record["active units"], "nodes": len(graph.influence),
        "closure": rounded(graph.residual.abs().max()), "size of values": rounded(graph.value.square().mean().sqrt()),
        "replacement": rounded(graph.replacement), "completeness": rounded(graph.completeness),
        "replacement, rotated": rounded(tested.replacement_null),
        "completeness, rotated": rounded(tested.completeness_null), "errors": rounded(graph.error_share),
        "left out": rounded(graph.others_share), "agreement": rounded(tested.agreement),
        "agreement interval": rounded(tested.agreement_interval), "direct agreement": rounded(tested.direct_agreement),
        "direct agreement interval": rounded(tested.direct_agreement_interval), "removed": len(tested.effect),
        "beyond random vectors": rounded(beyond), "largest": nodes,
    }  # fmt: skip


if __name__ == "__main__":
    main()
