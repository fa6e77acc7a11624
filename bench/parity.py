"""Numbers that must equal TransformerLens': lenses, direct attribution, streams, heads, copying, composition, patterns.

Three seeded random models of three layers, with norms and biases that are not the identity: GPT-2's shape, Llama's with
grouped key-value heads, and Pythia's (parallel blocks, a quarter of each head rotary). One prompt of 24 tokens, twelve
random ones said twice. A value is the largest difference to TransformerLens 4's bridge on the same weights, in float32,
where the quantity itself reaches the size named; its bar is 1e-4. Copying, composition and direct attribution are read
from folded weights with centred writers, patterns and streams from the model as it is.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.frame import Row, Subject, finish, options, pythons, rename_tokenizer, serve

BAR = 1e-4
ANSWER, FOIL, WORDS, HALF = 7, 9, 200, 12
LAYERS, WIDTH = 3, 64
SHAPES = ("GPT-2", "Llama, grouped heads", "Pythia")
WORK = {
    "lens": "logit lens: the answer's log-probability after each block",
    "stream": "accumulated residual stream, all positions",
    "along depth": "accumulated residual in logits, answer over foil",
    "heads": "what each head writes, all positions",
    "head shares": "direct attribution of each head",
    "component shares": "direct attribution of embedding, attention and MLPs",
    "copying": "copying score Σλ / Σ|λ| of each head",
    "Q": "Q-composition of all pairs",
    "K": "K-composition of all pairs",
    "V": "V-composition of all pairs",
    "patterns": "attention patterns",
    "previous": "previous-token score of each head",
    "prefix": "prefix-matching score of each head",
}


def main() -> int:
    """Compare both subjects on every shape, and write a row a quantity."""
    import torch
    from safetensors.torch import load_file

    parser = options(__doc__)
    chosen = parser.parse_args()
    interpreters = pythons(chosen, {"transformer_lens": "a"})
    if len(interpreters) < 2:
        parser.error("give the python of the peer's environment: --python-a")
    rows = list[Row]()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        save(folder)
        running = {}
        for name, python in interpreters.items():
            running[name] = Subject(python, "bench.parity", "--subject", name, folder)
            stack.callback(running[name].close)
        peer = f"transformer-lens {running['transformer_lens'].about['version']}"
        for shape in SHAPES:
            ours, theirs = (load_file(running[name].ask(shape=shape)["file"]) for name in interpreters)
            for key, words in WORK.items():
                a, b = ours[key].double(), theirs[key].double()
                same = a.shape == b.shape and bool((a.isfinite() == b.isfinite()).all())
                gap = float((a - b).nan_to_num().abs().max()) if same else torch.inf
                unit = f"largest difference to {peer}; values up to {float(a.nan_to_num().abs().max()):.3g}"
                rows.append(Row(f"{shape}: {words}", float(f"{gap:.2g}"), unit, BAR))
    return finish("parity", rows, write=not chosen.no_write, label=chosen.label)


def save(folder: str, shapes: Sequence[str] = SHAPES) -> None:
    """Seeded random models and a tokenizer of numbered words, one folder a shape."""
    import torch
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(WORDS)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = f"t{WORDS - 1}"
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, bos_token=last, eos_token=last, pad_token=last)
    for shape in shapes:
        model, g = built(shape), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * (0.12 if p.ndim > 1 else 0.1))
            for m in model.modules():
                if type(m).__name__.endswith(("LayerNorm", "RMSNorm")):
                    m.weight.add_(1.0)
        model.save_pretrained(Path(folder, shape))
        tokenizer.save_pretrained(Path(folder, shape))
        rename_tokenizer(Path(folder, shape))


def built(shape: str) -> Any:
    """A small transformers model of a shape, its weights to be set."""
    import transformers as tf

    ends: dict[str, Any] = {"bos_token_id": WORDS - 1, "eos_token_id": WORDS - 1, "vocab_size": WORDS}
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "max_position_embeddings": 64, **ends}
    grouped: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96}
    match shape:
        case "GPT-2":
            config = tf.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64, **ends)
            config.n_ctx = config.n_positions  # as in the published GPT-2; an older peer asks for it
            return tf.GPT2LMHeadModel(config)
        case "Llama, grouped heads":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, **grouped))
        case "Pythia":
            return tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**sizes, num_attention_heads=4, intermediate_size=128))
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**sizes, **grouped, head_dim=8, pad_token_id=WORDS - 1))


def ids() -> Any:
    """The prompt: random tokens said twice."""
    import torch

    half = torch.randperm(WORDS - 1, generator=torch.Generator().manual_seed(1))[None, :HALF]
    return torch.cat([half, half], 1)


def cutaway(folder: Path) -> dict[str, Any]:
    """Every quantity by our methods."""
    import torch

    import cutaway as ca
    from cutaway.tasks.pair import Pair
    from cutaway.tasks.task import Task

    model, tokens = ca.load(folder, check=False), ids()
    text = " ".join(f"t{i}" for i in tokens[0].tolist())
    other = " ".join(f"t{(i + 1) % WORDS}" for i in tokens[0].tolist())
    task = Task("one prompt", (Pair(text, other, f"t{ANSWER}", f"t{FOIL}"),))
    prompts = ca.tasks.as_prompts(tokens)
    acts = model.capture(prompts.bind(model), ["resid_pre", "resid_post", "head_out", "pattern"])
    shares = ca.lenses.direct_attribution(model, task)
    by_name = dict(zip(shares.labels["component"], shares.effect, strict=True))
    layers = range(model.shape.n_layers)
    parts: list[Any] = [sum(v for n, v in by_name.items() if n in ("embed", "pos_embed"))]
    for i in layers:
        attention = [v for n, v in by_name.items() if n.startswith((f"head_out.{i}.", f"attn_bias.{i}"))]
        parts += [sum(attention), by_name[f"mlp_out.{i}"]]
    types = ca.heads.classify(model, prompts)
    pairs = ca.weights.composition(model)
    streams = [acts["resid_pre.0"], *(acts[f"resid_post.{i}"] for i in layers)]
    return {
        "lens": ca.lenses.logit_lens(model, task).probability.log(),
        "stream": torch.stack(streams)[:, 0],
        "along depth": ca.lenses.accumulated_residual(model, task).effect,
        "heads": torch.stack([acts[f"head_out.{i}"][0] for i in layers]),
        "head shares": torch.stack([v for n, v in by_name.items() if n.startswith("head_out")]),
        "component shares": torch.stack(parts),
        "copying": types.copying,
        **{mode: pairs.select(mode=mode).score[0] for mode in "QKV"},
        "patterns": torch.stack([acts[f"pattern.{i}"][0] for i in layers]),
        "previous": types.select(type="previous token").score[0],
        "prefix": types.select(type="induction").score[0],
    }


def transformer_lens(folder: Path) -> dict[str, Any]:
    """Every quantity by TransformerLens' own functions."""
    import torch
    from transformer_lens import head_detector as detector
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis import logit_lens
    from transformer_lens.tools.analysis.direct_logit_attribution import direct_logit_attribution

    tokens = ids()
    plain: Any = TransformerBridge.boot_transformers(str(folder))
    _, cache = plain.run_with_cache(tokens)
    lens = logit_lens(plain, tokens, targets=[ANSWER], return_type="log_probs").values[..., 0]
    n, heads = plain.cfg.n_layers, plain.cfg.n_heads
    patterns = torch.stack([cache["pattern", i][0] for i in range(n)])
    plain.cfg.use_attn_result = True
    results = cache.stack_head_results().unflatten(0, (n, heads))[:, :, 0]
    folded: Any = TransformerBridge.boot_transformers(str(folder))
    folded.enable_compatibility_mode(fold_value_biases=False)
    share = {
        unit: direct_logit_attribution(folded, tokens, ANSWER, FOIL, unit=unit).attribution[:, 0]
        for unit in ("head", "component")
    }
    _, last = folded.run_with_cache(tokens)
    depths = last.accumulated_resid(incl_mid=False, pos_slice=-1)
    along = last.logit_attrs(depths, ANSWER, pos_slice=-1, incorrect_tokens=FOIL)
    along = along.flatten() + folded.b_U[ANSWER] - folded.b_U[FOIL]  # theirs leaves out the final biases
    component = share["component"]
    if len(component) == 2 * n + 2:  # positions have an entry of their own
        component = torch.cat([component[:1] + component[1:2], component[2:]])
    uncentred: Any = TransformerBridge.boot_transformers(str(folder))
    uncentred.enable_compatibility_mode(center_unembed=False, fold_value_biases=False)
    whole = uncentred.W_E @ uncentred.OV @ uncentred.W_U
    values = torch.stack([torch.stack([whole[i, h].eigenvalues for h in range(heads)]) for i in range(n)])
    after = torch.arange(n)[:, None] < torch.arange(n)
    blank = (~after).repeat_interleave(heads, 0).repeat_interleave(heads, 1)
    scores = {m: folded.all_composition_scores(m).scores.flatten(2).flatten(0, 1) for m in "QKV"}

    def attention_to(keys: Any) -> Any:
        given, some = (patterns * keys).sum(-1), keys.sum(-1) > 0
        some[0] = False  # the first token has only itself to look at
        return given[..., some].mean(-1)

    return {
        "lens": lens.flatten(),
        "stream": cache.accumulated_resid(incl_mid=False)[:, 0],
        "along depth": along,
        "heads": results.transpose(1, 2),
        "head shares": share["head"][: n * heads],
        "component shares": component,
        "copying": values.real.sum(-1) / values.abs().sum(-1),
        **{m: s.masked_fill(blank, torch.nan) for m, s in scores.items()},
        "patterns": patterns,
        "previous": attention_to(detector.get_previous_token_head_detection_pattern(tokens)),
        "prefix": attention_to(detector.get_induction_head_detection_pattern(tokens)),
    }


def serve_subject(name: str, folder: str) -> None:
    """Serve one subject's numbers."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    run = {"cutaway": cutaway, "transformer_lens": transformer_lens}[name]

    def answer(shape: str) -> dict[str, Any]:
        with torch.no_grad():
            found = {key: value.detach().float().contiguous() for key, value in run(Path(folder, shape)).items()}
        file = Path(folder, f"{name} {shape}.safetensors")
        save_file(found, file)
        return {"file": str(file)}

    release = version("cutaway" if name == "cutaway" else "transformer-lens")
    serve({"version": release}, answer)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--subject"]:
        serve_subject(*sys.argv[2:4])
    else:
        sys.exit(main())
