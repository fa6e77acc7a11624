"""Attribution graphs of a real model, over transcoders trained here: `python -m tools.real_graphs`.

It trains transcoders of all MLPs of SmolLM2-135M-Instruct with one `cutaway dict train` on the text of
`tools.real_dictionary`, in `runs/real/transcoders`, where a stopped run goes on; judges them with `cutaway dict eval`
on files that they have not seen; traces and validates the graph of a capital and of an IOI sentence over them, and over
the model's own neurons; splits the largest edges of both by heads, and the score of head 23.4 for the country in
prompts about capitals; and publishes it all in docs/real.md. Prompts are the first of their sets.
"""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import cutaway as ca
from bench.frame import machine
from cutaway.core.stats import mean_interval
from cutaway.graphs.attribution_graph import AttributionGraph
from cutaway.graphs.validate import GraphValidation
from tests.real import sets
from tools import real, real_dictionary, real_studies
from tools.real_lenses import rounded

MODEL, PROMPTS = "smollm2", {"capital": "fact_capital", "IOI": "ioi"}
LATENTS, K, TOKENS, BATCH, CONTEXT, HELD, RATE = 1024, 32, 150_000, 256, 96, 8192, "2e-3"
HEAD, LOOKS, SOURCES, EDGES, HEADS, DRAWN = "23.4", 12, 8, 6, 4, 19
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
    attention = {"edges": {name: carried(model, sets.task(model, of, 1), over["transcoders"])
                           for name, of in PROMPTS.items()},
                 "look": looked(model, sets.task(model, PROMPTS["capital"], LOOKS), over["transcoders"])}  # fmt: skip
    return {
        "model": real.MODELS[MODEL], "latents": LATENTS, "k": K, "tokens": tokens, "CPU minutes": minutes,
        "held out": HELD, "text": about, "FVU": judged, "graphs": found, "attention": attention, "machine": machine(),
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


def carried(model: ca.Model, task: ca.Task, units: ca.dictionaries.Dictionary) -> dict[str, Any]:
    """The edges of the most influence between positions, and the heads that carry most of each."""
    found = ca.graphs.head_loadings(model, task, units, top=EDGES, leading=LEADING, samples=DRAWN)
    beside, heads = found.loading_null.abs().amax(-1), found.loading.shape[-1]
    rows = []
    for e, name in enumerate(found.labels["edge"]):
        most = found.loading[e].flatten().abs().argsort(descending=True)[:HEADS].tolist()
        rows.append({"edge": name, "weight": rounded(found.weight[e]), "heads": [
            {"head": f"{i // heads}.{i % heads}", "loading": rounded(found.loading[e].flatten()[i]),
             "random vectors": rounded(beside[e].flatten()[i])} for i in most]})  # fmt: skip
    beyond = (found.loading.abs() > beside) & (found.loading != 0)
    return {
        "words": task.bind(model).clean.pieces[0], "edges": rows, "closure": rounded(found.residual.abs().max()),
        "beyond": int(beyond.sum()), "heads that carry": int((found.loading != 0).sum()),
    }  # fmt: skip


def looked(model: ca.Model, task: ca.Task, units: ca.dictionaries.Dictionary) -> dict[str, Any]:
    """The pairs of sources that make a head look at the country, over prompts: those that most prompts have."""
    pairs, prompts = dict[tuple[str, str], list[tuple[float, float, bool]]](), []
    for pair in task.pairs:
        one = replace(task, pairs=(pair,), made=None)
        found = ca.graphs.qk(model, one, units, head=HEAD, top=SOURCES, leading=LEADING, samples=DRAWN)
        last = len(found.pattern) - 1
        key = int(found.pattern[1:].argmax()) + 1
        beyond = found.pair.abs() > found.pair_null.abs().amax(-1)
        contrast = float(found.score[key] - found.score.nanmean())
        prompts.append({"looks at": found.labels["k_pos"][key], "p": rounded(found.pattern[key]),
                        "contrast": rounded(torch.tensor(contrast)), "shown": rounded(found.contrast.sum()),
                        "beyond": rounded(beyond.float().mean()),
                        "closure": rounded(found.residual.abs())})  # fmt: skip
        for i, query in enumerate(found.labels["query_node"]):
            for j, source in enumerate(found.labels["key_node"]):
                name = (query.replace(f"@{last}", "@last"), source.replace(f"@{key}", "@country"))
                row = (float(found.contrast[i, j]), float(found.lost[i, j]), bool(beyond[i, j]))
                pairs.setdefault(name, []).append(row)
    every = {name: torch.tensor(rows) for name, rows in pairs.items() if len(rows) == len(task)}
    largest = sorted(every, key=lambda name: -float(every[name][:, 0].mean().abs()))[:SOURCES]
    rows = [{"query": q, "key": k, "contrast": rounded(every[q, k][:, 0].mean()),
             "interval": rounded(mean_interval(every[q, k][:, 0])), "lost": rounded(every[q, k][:, 1].mean()),
             "beyond": int(every[q, k][:, 2].sum())} for q, k in largest]  # fmt: skip
    return {"head": HEAD, "sources": SOURCES, "prompts": prompts, "pairs": rows, "in every prompt": len(every)}


if __name__ == "__main__":
    main()
