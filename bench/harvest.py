"""What harvesting costs: activations of one site to disk, shuffled, in tokens a CPU second.

GPT-2 small's shape with random weights, the stream that enters block 6, 96 contexts of 128 given token ids, eight at a
time, one thread, files included, the loading of the model not. cutaway writes them in one random order over all tokens,
with checksums and moments. SAELens' `CacheActivationsRunner` writes them in the order of the contexts and shuffles
their numbers; it reads through HookedTransformer, its default, or through its wrapper of transformers' own model. It
cannot store bfloat16, so there it computes in bfloat16 and stores float16. It always fills a whole buffer, so its
buffer is made as large as the data. Every subject must end with the same activations.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import sweeps
from bench.frame import Row, Subject, finish, options, pythons, serve, spent

UNIT = "tokens/CPU s"
CONTEXTS, LENGTH, ROWS, WIDTH, LAYER = 96, 128, 8, 768, 6
WORDS = {"float32": "one site of 12 layers, float32", "bfloat16": "one site of 12 layers, bfloat16"}
CLOSE = {"float32": 1e-5, "bfloat16": 1e-2}  # relative difference of the mean norm, weighted by token id
LEAST = 2.0  # times the tokens a second of the runner as it comes
PEERS = {"saelens": "sae-lens {}, HookedTransformer", "saelens_hf": "sae-lens {}, wrapped transformers model"}
Job = Callable[[str], Any]  # harvests into a folder


@dataclass(frozen=True)
class Harvester:
    """One tool with a loaded model: harvest into a folder, and the weighted mean norm of what lies there."""

    version: str
    run: Job
    read: Callable[[Any], float]


def main() -> int:
    """Measure every subject in rounds that take turns, and write the rows."""
    chosen = options(__doc__, rounds=4).parse_args()
    interpreters = pythons(chosen, dict.fromkeys(PEERS, "b"))
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return finish(
            "harvest", compare(folder, interpreters, chosen.rounds), write=not chosen.no_write, label=chosen.label
        )


def save(folder: str) -> None:
    """Seeded random weights, a tokenizer, and the contexts, for every subject alike."""
    import torch
    from safetensors.torch import save_file

    sweeps.save(folder)
    ids = torch.randint(50000, (CONTEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, Path(folder, "contexts.safetensors"))


def compare(folder: str, interpreters: dict[str, str], rounds: int) -> list[Row]:
    """One row a dtype and peer."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with contextlib.ExitStack() as stack:
        running = {}
        for name, python in interpreters.items():
            running[name] = Subject(python, "bench.harvest", "--subject", name, folder)
            stack.callback(running[name].close)
        for n in range(rounds):
            for dtype in WORDS:
                norm = math.nan
                for name, subject in running.items():
                    done = subject.ask(dtype=dtype)
                    norm = done["norm"] if math.isnan(norm) else norm
                    if abs(done["norm"] / norm - 1) > CLOSE[dtype]:
                        raise SystemExit(f"{name} harvests other activations: mean norm {done['norm']} against {norm}")
                    found.setdefault((dtype, name), []).append((done["cpu"], done["wall"]))
                    print(f"round {n + 1}: {dtype} by {name}: {done['cpu']:.0f}", file=sys.stderr, flush=True)
        versions = {name: subject.about["version"] for name, subject in running.items()}
    return [row for dtype in WORDS for row in rows(dtype, found, versions)]


def rows(dtype: str, found: dict[tuple[str, str], list[tuple[float, float]]], versions: dict[str, str]) -> list[Row]:
    """The rows of one dtype: one a peer, or one alone."""
    ours = found[dtype, "cutaway"]
    low, middle, high = statistics.quantiles([c for c, _ in ours], n=4)
    row = Row(WORDS[dtype], round(middle), UNIT, sense="min", quartiles=(round(low), round(high)),
              wall=round(statistics.median(w for _, w in ours)))  # fmt: skip
    compared = []
    for name, says in PEERS.items():
        if (dtype, name) in found:
            theirs = round(statistics.median(c for c, _ in found[dtype, name]))
            least = LEAST if name == "saelens" else None
            compared.append(row.against(says.format(versions[name]), theirs, least))
    return compared or [row]


def cutaway(folder: str, ids: Any) -> dict[str, Harvester]:
    """`streams.harvest`, with its defaults but that no token is masked, as in the peer."""
    import torch

    import cutaway as ca
    from cutaway.streams import Masking, Packing, Shards, from_ids, harvest

    def read(shards: Shards) -> float:
        return weighted((b.ids, next(iter(b.acts.values()))) for b in shards.stream())

    def harvester(dtype: str) -> Harvester:
        model = ca.load(folder, dtype=dtype, check=False)
        masking, packing = Masking(special=False, sinks=None), Packing(LENGTH, rows=ROWS)

        def run(out: str) -> Shards:
            return harvest(model, from_ids(ids), f"resid_pre.{LAYER}", out, packing=packing, masking=masking)

        return Harvester(ca.__version__, run, read)

    torch.set_num_threads(1)
    return {dtype: harvester(dtype) for dtype in WORDS}


def saelens(folder: str, ids: Any) -> dict[str, Harvester]:
    """SAELens' runner with the class of models that it takes by default."""
    import torch
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoTokenizer, GPT2LMHeadModel

    def load(dtype: str) -> Any:
        hf = GPT2LMHeadModel.from_pretrained(folder)
        config = loading.get_pretrained_model_config(folder, fold_ln=False, device="cpu", dtype=getattr(torch, dtype))
        model: Any = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(folder))
        model.load_and_process_state_dict(
            loading.get_pretrained_state_dict(folder, config, hf), fold_ln=False, center_writing_weights=False,
            center_unembed=False, fold_value_biases=False,
        )  # fmt: skip
        return model

    return _runners(folder, ids, load, "HookedTransformer", f"blocks.{LAYER}.hook_resid_pre")


def saelens_hf(folder: str, ids: Any) -> dict[str, Harvester]:
    """SAELens' runner with its wrapper of transformers' own model, which stops after the block it reads."""
    import torch
    from sae_lens.load_model import load_model

    def load(dtype: str) -> Any:
        return load_model("AutoModelForCausalLM", folder, "cpu", {"dtype": getattr(torch, dtype)})

    return _runners(folder, ids, load, "AutoModelForCausalLM", f"transformer.h.{LAYER - 1}")


def _runners(folder: str, ids: Any, load: Callable[[str], Any], kind: str, hook: str) -> dict[str, Harvester]:
    import torch
    from datasets import Dataset
    from sae_lens import cache_activations_runner as runner
    from sae_lens.config import CacheActivationsRunnerConfig

    torch.set_num_threads(1)
    data = Dataset.from_dict({"input_ids": ids.tolist()})

    def harvester(dtype: str) -> Harvester:
        model, kept = load(dtype), {"float32": "float32", "bfloat16": "float16"}[dtype]
        runner.load_model = lambda **_: model  # a folder is no name that HookedTransformer knows
        size = ids.numel() * WIDTH * {"float32": 4, "float16": 2}[kept]

        def run(out: str) -> Any:
            config = CacheActivationsRunnerConfig(
                dataset_path="given", model_name=folder, model_class_name=kind, model_batch_size=ROWS, hook_name=hook,
                d_in=WIDTH, training_tokens=ids.numel(), context_size=LENGTH, new_cached_activations_path=out,
                dtype=kept, device="cpu", prepend_bos=False, buffer_size_gb=(size + 0.5) / 1e9,
            )  # fmt: skip
            runner.load_model = lambda **_: model
            return runner.CacheActivationsRunner(config, override_dataset=data).run()

        def read(found: Any) -> float:
            rows = found.with_format("torch")
            return weighted((r["token_ids"], r[hook]) for r in rows)

        return Harvester(version("sae-lens"), run, read)

    return {dtype: harvester(dtype) for dtype in WORDS}


def weighted(parts: Any) -> float:
    """Mean norm of the activations, weighted by token id, so that it says which token has which activation."""
    above, below = 0.0, 0.0
    for ids, acts in parts:
        above += float((ids.double() * acts.double().norm(dim=-1)).sum())
        below += float(ids.double().sum())
    return above / below


SUBJECTS = {"cutaway": cutaway, "saelens": saelens, "saelens_hf": saelens_hf}


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's measurements."""
    from safetensors.torch import load_file

    ids = load_file(Path(folder, "contexts.safetensors"))["ids"]
    harvesters = SUBJECTS[name](folder, ids)

    def answer(dtype: str) -> dict[str, float]:
        h, found = harvesters[dtype], []
        with tempfile.TemporaryDirectory() as out:
            cpu, wall = spent(lambda: found.append(h.run(str(Path(out, "acts")))))
            norm = h.read(found[0])
        return {"cpu": ids.numel() / cpu, "wall": ids.numel() / wall, "norm": norm}

    serve({"version": next(iter(harvesters.values())).version}, answer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    else:
        sys.exit(main())
