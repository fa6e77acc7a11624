"""Who is measured by `bench.sweeps`: each tool's own way of doing the same sweeps."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.works import ANSWER, CELLS, DRAWS, FOIL, HEADS, LAYERS, POSITIONS, WINDOW, WORKS


@dataclass(frozen=True)
class Job:
    """What returns the numbers of some cells: `cells` is their range (all, if none is given), named by `says`."""

    run: Callable[[], Any]
    cells: tuple[int, int, int]
    says: str = ""


def prepare(name: str, folder: str) -> tuple[str, Callable[[], Any], dict[str, Job]]:
    """Version, plain forward and sweeps of a subject."""
    import torch
    from safetensors.torch import load_file
    from transformers import GPT2LMHeadModel

    torch.set_num_threads(1)
    given = load_file(Path(folder, "ids.safetensors"))
    bare = GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)

    @torch.no_grad()
    def plain() -> Any:
        return bare(given["ids"][:1], use_cache=False).logits

    # cutaway looks at the very model that is run bare; peers rebuild or hook theirs, so each gets its own copy.
    own = bare if name == "cutaway" else GPT2LMHeadModel.from_pretrained(folder).eval().requires_grad_(False)
    release, jobs = SUBJECTS[name](own, given["ids"], given["noise"])
    return release, plain, jobs


def whole(**runs: Callable[[], Any]) -> dict[str, Job]:
    """Jobs that do every cell."""
    return {work: Job(run, (0, WORKS[work].cells, 1)) for work, run in runs.items()}


def difference(logits: Any) -> Any:
    """The metric, of [… position token] logits of one prompt."""
    return logits[0, -1, ANSWER] - logits[0, -1, FOIL]


def window(layer: int) -> range:
    """The layers restored together."""
    return range(max(0, layer - WINDOW // 2), min(LAYERS, layer - WINDOW // 2 + WINDOW))


def cutaway(hf: Any, ids: Any, noise: Any) -> tuple[str, dict[str, Job]]:
    """The executor and the slopes as the patching methods call them."""
    import torch
    import transformers

    import cutaway as ca
    from cutaway.core.address import Address
    from cutaway.interventions.first_order import cellwise, nodes, slopes, tangent
    from cutaway.models.edits.library import Add, Replace
    from cutaway.models.sweep.executor import sweep
    from cutaway.tasks.pair import Pair
    from cutaway.tasks.task import Task

    model = ca.load(
        hf, tokenizer=transformers.PreTrainedTokenizerFast.from_pretrained(hf.config.name_or_path), check=False
    )
    clean, corrupt = model.tokens(ids[:1]), model.tokens(ids[1:])
    texts = [" ".join(f"t{i}" for i in row) for row in ids.tolist()]
    task = Task("two prompts", (Pair(texts[0], texts[1], f"t{ANSWER}", f"t{FOIL}"),))

    def metric(logits: Any, prompt: Any) -> Any:
        return logits[:, ANSWER] - logits[:, FOIL]

    def patch(site: str, places: list[Address]) -> Any:
        acts = model.capture(clean, site, logits=False)
        return sweep(model, corrupt, [[Replace(a, acts[str(a)])] for a in places], metric)[:, 0]

    def attribution() -> Any:
        bound = task.bind(model)
        asked = nodes(model, bound, ["z", "mlp_out"])
        x, found = slopes(model, bound, ["z", "mlp_out"], "denoise")
        steps = [tangent(model, x, n, x.donor)(found[0]) for n in asked]
        return torch.cat([cellwise(n, s, x.target).flatten() for n, s in zip(asked, steps, strict=True)])

    def called() -> Any:
        return ca.patching.attribution(model, task, site=["z", "mlp_out"], audit=0).effect

    def trace() -> Any:
        many = clean.rows([0] * DRAWS)
        acts = model.capture(many, "mlp_out", logits=False)
        cells = [[Address("mlp_out", j, None, p) for j in window(i)] for i, p in resid]
        restored = [[Replace(a, acts[str(a)]) for a in places] for places in cells]
        return sweep(model, many, restored, metric, base=[Add("embed", noise[:, 0])]).T.flatten()

    resid = [(i, p) for i in range(LAYERS) for p in range(POSITIONS)]
    heads = [(i, h) for i in range(LAYERS) for h in range(HEADS)]
    return ca.__version__, whole(
        resid=lambda: patch("resid_pre", [Address("resid_pre", i, None, p) for i, p in resid]),
        heads=lambda: patch("z", [Address("z", i, h) for i, h in heads]),
        by_position=lambda: patch("z", [Address("z", i, h, p) for i, h in heads for p in range(POSITIONS)]),
        attribution=attribution,
        attribution_called=called,
        trace=trace,
    )


def transformer_lens(hf: Any, ids: Any, noise: Any) -> tuple[str, dict[str, Job]]:
    """TransformerLens 4's own helpers over its bridge."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    bridge: Any = TransformerBridge.boot_transformers(hf.config.name_or_path, hf_model=hf.requires_grad_(True))

    def attribution() -> Any:
        found = attribution_patch(bridge, ids[:1], ids[1:], difference).node_scores
        z, mlp = torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS, POSITIONS)
        for node, score in found.items():
            if node.kind == "attn_head_out":
                z[node.layer, node.head] += score
            elif node.kind == "mlp_out":
                mlp[node.layer, node.position] += score
        return torch.cat([z.flatten(), mlp.flatten()])

    jobs = _helpers(bridge, ids, resid=1, heads=1, by_position=16)
    return version("transformer-lens"), jobs | whole(attribution=attribution)


def hooked_transformer(hf: Any, ids: Any, noise: Any) -> tuple[str, dict[str, Job]]:
    """TransformerLens 3's own helpers over its HookedTransformer, weights as they are."""
    return version("transformer-lens"), _helpers(hooked(hf), ids, resid=4, heads=5)


def hooked(hf: Any) -> Any:
    """TransformerLens' HookedTransformer of a saved model, weights as they are."""
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    folder = hf.config.name_or_path
    config = loading.get_pretrained_model_config(folder, fold_ln=False, device="cpu")
    model: Any = HookedTransformer(config)
    model.load_and_process_state_dict(
        loading.get_pretrained_state_dict(folder, config, hf), fold_ln=False, center_writing_weights=False,
        center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    return model.eval()


def _helpers(model: Any, ids: Any, **each: int) -> dict[str, Job]:
    """What both versions' `patching` offers: one forward a cell, of which every so-manieth is done.

    The clean run is left out where only some cells are done: it would be counted as often as the rest.
    """
    import torch
    from transformer_lens import patching

    axes = {"resid": ["layer", "pos"], "heads": ["layer", "head"], "by_position": ["layer", "head", "pos"]}
    sizes = {"layer": LAYERS, "head": HEADS, "pos": POSITIONS}
    with torch.no_grad():
        before = model.run_with_cache(ids[:1])[1]

    def job(work: str, n: int) -> Job:
        helper, wanted = {
            "resid": (patching.get_act_patch_resid_pre, ["layer", "pos"]),
            "heads": (patching.get_act_patch_attn_head_out_all_pos, ["layer", "head"]),
            "by_position": (patching.get_act_patch_attn_head_out_by_pos, ["layer", "pos", "head"]),
        }[work]
        every = patching.make_df_from_ranges([sizes[axis] for axis in axes[work]], axes[work])[wanted]
        cells = every.iloc[::n].reset_index(drop=True)

        @torch.no_grad()
        def run() -> Any:
            clean = model.run_with_cache(ids[:1])[1] if n == 1 else before
            chosen = {"index_axis_names": None, "index_df": cells}
            return quietly(helper, model, ids[1:], clean, difference, **chosen)

        return Job(run, (0, WORKS[work].cells, n), "" if n == 1 else f"one cell in {n}")

    return {work: job(work, n) for work, n in each.items()}


def quietly(function: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """Without its progress bar on the terminal."""
    with redirect_stderr(io.StringIO()):
        return function(*args, **kw)


def textbook(hf: Any, ids: Any, noise: Any) -> tuple[str, dict[str, Job]]:
    """Three runs a cell, as the definition of activation patching reads, two of them cached whole."""
    import torch

    model = hooked(hf)
    cells = (0, CELLS, 11)

    def put(x: Any, hook: Any, value: Any, position: int) -> Any:
        x[:, position] = value[:, position]
        return x

    @torch.no_grad()
    def resid() -> Any:
        found = []
        for cell in range(*cells):
            name, position = f"blocks.{cell // POSITIONS}.hook_resid_pre", cell % POSITIONS
            _, clean = model.run_with_cache(ids[:1])
            model.run_with_cache(ids[1:])
            hook = functools.partial(put, value=clean[name], position=position)
            found.append(difference(model.run_with_hooks(ids[1:], fwd_hooks=[(name, hook)])))
        return torch.stack(found)

    return version("transformer-lens"), {"resid": Job(resid, cells, "one cell in 11")}


def nnsight(hf: Any, ids: Any, noise: Any) -> tuple[str, dict[str, Job]]:
    """nnsight's traces, with one invoke a position and one trace a layer."""
    import torch
    from nnsight import TransformersModel, save
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(hf.config.name_or_path)
    model: Any = TransformersModel(hf, task="text-generation", tokenizer=tokenizer)

    def values(site: str) -> Any:
        with model.trace(ids[:1], use_cache=False):
            found = save([])
            for block in model.transformer.h:
                found.append(block.input if site == "resid_pre" else block.mlp.output)
        return found

    @torch.no_grad()
    def resid() -> Any:
        clean, found = values("resid_pre"), []
        for i in range(LAYERS):
            with model.trace(use_cache=False) as tracer:
                some = save([])
                for p in range(POSITIONS):
                    with tracer.invoke(ids[1:]):
                        model.transformer.h[i].input[:, p] = clean[i][:, p]
                        some.append(difference(model.lm_head.output))
            found += some
        return torch.stack(found)

    @torch.no_grad()
    def trace() -> Any:
        clean, found = values("mlp_out"), []
        for i in range(LAYERS):
            with model.trace(use_cache=False) as tracer:
                some = save([])
                for p in range(POSITIONS):
                    with tracer.invoke(ids[:1]):
                        model.transformer.wte.output[:] += noise[0]
                        for j in window(i):
                            model.transformer.h[j].mlp.output[:, p] = clean[j][:, p]
                        some.append(difference(model.lm_head.output))
            found += some
        return torch.stack(found)

    first = Job(trace, (0, CELLS, 1), f"one noise in {DRAWS}")
    return version("nnsight"), whole(resid=resid) | {"trace": first}


def pyvene(hf: Any, ids: Any, noise: Any) -> tuple[str, dict[str, Job]]:
    """pyvene's interchange interventions, one call a cell, as its tutorials loop."""
    import pyvene as pv
    import torch

    cells = (0, CELLS, 4)

    @torch.no_grad()
    def resid() -> Any:
        found = []
        for cell in range(*cells):
            layer, position = divmod(cell, POSITIONS)
            if layer not in models:
                kind = {"layer": layer, "component": "block_input", "intervention_type": pv.VanillaIntervention}
                models[layer] = pv.IntervenableModel(kind, model=hf)
            pair = {"input_ids": ids[1:]}, [{"input_ids": ids[:1]}]
            found.append(difference(models[layer](*pair, {"sources->base": position})[1].logits))
        return torch.stack(found)

    models: dict[int, Any] = {}
    return version("pyvene"), {"resid": Job(resid, cells, "one cell in 4")}


SUBJECTS = {
    "cutaway": cutaway,
    "transformer_lens": transformer_lens,
    "hooked_transformer": hooked_transformer,
    "nnsight": nnsight,
    "pyvene": pyvene,
    "textbook": textbook,
}
