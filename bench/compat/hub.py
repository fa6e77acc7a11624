"""A local cache of Hugging Face's hub: seeded models of published shapes in place of the published weights.

Both sides of the harness read the same files: the original packages through `huggingface_hub`, offline, and cutaway by
the names of models. Where two cores do not carry a shape, it is narrower or shallower, which its row says.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMIT = "0" * 39 + "1"


@dataclass(frozen=True)
class Shape:
    """A family of transformers and its sizes; `said` is what differs from the published shape."""

    family: str
    sizes: Mapping[str, Any]
    said: str = ""


def gpt2(layers: int = 12, width: int = 768, heads: int = 12, said: str = "") -> Shape:
    """Return a shape of GPT-2."""
    return Shape("GPT2", {"n_layer": layers, "n_embd": width, "n_head": heads}, said)


MODELS = {
    "gpt2": gpt2(),
    "distilgpt2": gpt2(layers=6),
    "gpt2-medium": gpt2(24, 256, 16, "1024 wide there"),
    "gpt2-xl": gpt2(48, 400, 25, "1600 wide there"),
    "roneneldan/TinyStories-1M": Shape("GPTNeo", {
        "hidden_size": 64, "num_layers": 8, "num_heads": 16, "attention_types": [[["global", "local"], 4]],
        "max_position_embeddings": 2048,
    }),
    "EleutherAI/pythia-70m": Shape("GPTNeoX", {
        "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 2048,
        "vocab_size": 50304,
    }),
    "facebook/opt-125m": Shape("OPT", {"vocab_size": 50272}),
    "Qwen/Qwen2-0.5B": Shape("Qwen2", {
        "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 256, "vocab_size": 50257,
    }, "24 layers of 896 there"),
    "Qwen/Qwen3-0.6B": Shape("Qwen3", {
        "hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "intermediate_size": 256, "vocab_size": 50257, "tie_word_embeddings": True,
    }, "28 layers of 1024 there"),
}  # fmt: skip
#: what stands for GPT-2 in other caches, for notebooks with hundreds and with thousands of forward passes
SMALLER = {"narrow": gpt2(width=192, said="768 wide there"), "small": gpt2(4, 128, 4, "12 layers of 768 there")}
#: models that TransformerLens alone reads: layers, activation of MLPs (none: attention only), number of checkpoints
OWN = {
    "NeelNanda/Attn_Only_2L512W_C4_Code": (2, None, 64),
    "NeelNanda/SoLU_2L512W_C4_Code": (2, "solu_ln", 64),
    "NeelNanda/SoLU_1L512W_C4_Code": (1, "solu_ln", 0),
    "NeelNanda/SoLU_3L512W_C4_Code": (3, "solu_ln", 0),
    "NeelNanda/GELU_1L512W_C4_Code": (1, "gelu", 0),
}
DRAWN = 3  # sets of weights of a model with checkpoints, which take turns
TOKENIZERS = ("NeelNanda/gpt-neox-tokenizer-digits", "EleutherAI/gpt-neox-20b")  # GPT-2's in their place
TRANSCODERS = "mwhanna/gemma-scope-transcoders"  # of the small Qwen 3, in the place that the name "gemma" means
SAES, LATENTS = "jbloom/GPT2-Small-SAEs-Reformatted", 2048  # 24576 there


def main() -> None:
    """Write all caches; the smaller ones are linked to the full one where they agree."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the caches")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of GPT-2's tokenizer")
    chosen = parser.parse_args()
    full = chosen.folder / "full"
    for name, shape in MODELS.items():
        save(snapshot(full, name), shape, chosen.tokenizer)
    for name in TOKENIZERS:
        shutil.copytree(chosen.tokenizer, snapshot(full, name), dirs_exist_ok=True)
        (snapshot(full, name) / "config.json").write_text('{"model_type": "gpt2"}')
    for name, (layers, act, checkpoints) in OWN.items():
        save_own(snapshot(full, name), layers, act, checkpoints)
    save_saes(snapshot(full, SAES))
    save_transcoders(snapshot(full, TRANSCODERS), MODELS["Qwen/Qwen3-0.6B"].sizes)
    save_course(full)
    for name, shape in SMALLER.items():
        save(snapshot(chosen.folder / name, "gpt2"), shape, chosen.tokenizer)
        for repository in full.iterdir():
            if not (chosen.folder / name / repository.name).exists():
                link(chosen.folder / name / repository.name, f"../full/{repository.name}")


def snapshot(cache: Path, name: str) -> Path:
    """Return the folder of a repository in the cache, made if it is not there, its main branch entered."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    folder = root / "snapshots" / COMMIT
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save(folder: Path, shape: Shape, tokenizer: Path) -> None:
    """Write a seeded model of a shape with its tokenizer."""
    import transformers as tf

    config = getattr(tf, f"{shape.family}Config")(bos_token_id=50256, eos_token_id=50256, **shape.sizes)
    if shape.family == "GPT2":
        config.n_ctx = config.n_positions  # as in the published one; an older peer asks for it
    model = tf.AutoModelForCausalLM.from_config(config)
    drawn(model)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    model.save_pretrained(folder)


def drawn(model: Any, scale: float = 1.2) -> None:
    """Draw the weights of a model so that attention is peaked, and norms and biases are not the identity."""
    import torch

    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (scale / min(p.shape) ** 0.5 if p.ndim > 1 else 0.1))
        for m in model.modules():
            if type(m).__name__.endswith(("LayerNorm", "RMSNorm")):
                m.weight.add_(1.0)


def save_own(folder: Path, layers: int, act: str | None, checkpoints: int) -> None:
    """Write a model in the form of TransformerLens' own: a configuration and pickled weights, which only peers read."""
    import torch

    d, heads, d_head, words, d_mlp = 512, 8, 64, 50257, 2048
    config: dict[str, Any] = {
        "d_model": d, "n_layers": layers, "n_heads": heads, "d_head": d_head, "n_ctx": 1024, "d_vocab": words,
        "d_mlp": d_mlp, "act_fn": act or "relu", "attn_only": act is None, "normalization": "LN",
        "use_attn_scale": True, "use_local_attn": False, "tokenizer_name": TOKENIZERS[0],
    }  # fmt: skip
    shapes = {"embed.W_E": (words, d), "pos_embed.W_pos": (1024, d), "unembed.W_U": (d, words), "unembed.b_U": (words,)}
    norms = ["ln_final"]
    for i in range(layers):
        for c in "QKV":
            shapes |= {f"blocks.{i}.attn.W_{c}": (heads, d, d_head), f"blocks.{i}.attn.b_{c}": (heads, d_head)}
        shapes |= {f"blocks.{i}.attn.W_O": (heads, d_head, d), f"blocks.{i}.attn.b_O": (d,)}
        norms.append(f"blocks.{i}.ln1")
        if act:
            shapes |= {f"blocks.{i}.mlp.W_in": (d, d_mlp), f"blocks.{i}.mlp.W_out": (d_mlp, d)}
            shapes |= {f"blocks.{i}.mlp.b_in": (d_mlp,), f"blocks.{i}.mlp.b_out": (d,)}
            norms.append(f"blocks.{i}.ln2")
        if act == "solu_ln":
            shapes |= {f"blocks.{i}.mlp.ln.w": (d_mlp,), f"blocks.{i}.mlp.ln.b": (d_mlp,)}
    for norm in norms:
        shapes |= {f"{norm}.w": (d,), f"{norm}.b": (d,)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoints").mkdir(exist_ok=True)
    for seed in range(min(checkpoints, DRAWN) or 1):
        g = torch.Generator().manual_seed(seed)
        sizes = {key: 0.05 if len(shape) > 1 else 0.1 for key, shape in shapes.items()}
        weights = {key: torch.randn(shape, generator=g) * sizes[key] for key, shape in shapes.items()}
        weights |= {key: value + 1 for key, value in weights.items() if key.endswith(".w")}
        torch.save(weights, folder / f"drawn{seed}.pt")
    for i in range(checkpoints):
        link(folder / "checkpoints" / f"model_{10**10 + i * 10**8}.pth", f"../drawn{i % DRAWN}.pt")
    link(folder / "model_final.pth", "drawn0.pt")


def save_saes(folder: Path, layers: int = 12, width: int = 768) -> None:
    """Write a seeded SAE of each block's input in SAELens' first form."""
    import torch
    from safetensors.torch import save_file

    for i in range(layers):
        g = torch.Generator().manual_seed(i)
        encoder, decoder = (torch.randn(LATENTS, width, generator=g) / width**0.5 for _ in range(2))
        b_enc, b_dec = torch.randn(LATENTS, generator=g) - 1.0, 0.1 * torch.randn(width, generator=g)
        weights = {"W_enc": encoder.T.contiguous(), "b_enc": b_enc, "W_dec": decoder, "b_dec": b_dec}
        hook = f"blocks.{i}.hook_resid_pre"
        config = {
            "model_name": "gpt2-small", "hook_point": hook, "hook_point_layer": i, "d_in": width, "d_sae": LATENTS,
            "dtype": "torch.float32", "device": "cpu", "context_size": 32, "l1_coefficient": 8e-5,
            "dataset_path": "Skylion007/openwebtext", "hook_point_head_index": None,
        }  # fmt: skip
        (folder / hook).mkdir(exist_ok=True)
        (folder / hook / "cfg.json").write_text(json.dumps(config))
        save_file(weights, folder / hook / "sae_weights.safetensors")
        save_file({"sparsity": -torch.rand(LATENTS, generator=g) * 8}, folder / hook / "sparsity.safetensors")


def save_transcoders(folder: Path, sizes: Mapping[str, Any]) -> None:
    """Write seeded transcoders of every MLP in circuit-tracer's form."""
    from bench import graph_parity
    from cutaway.dictionaries.formats.circuit_tracer import write

    graph_parity.LATENTS = 512
    write(graph_parity.transcoders("relu", sizes["num_hidden_layers"], sizes["hidden_size"]), folder)


def save_course(cache: Path) -> None:
    """Write seeded weights for a course's chapters on induction heads and modular arithmetic."""
    import torch

    g = torch.Generator().manual_seed(0)
    d, heads, head, context = 768, 12, 64, 2048
    shapes = {"embed.W_E": (50278, d), "pos_embed.W_pos": (context, d), "unembed.W_U": (d, 50278)}
    weights = {"unembed.b_U": torch.zeros(50278)}
    for i in range(2):
        at = f"blocks.{i}.attn"
        shapes |= {f"{at}.W_{c}": (heads, d, head) for c in "QKV"} | {f"{at}.W_O": (heads, head, d)}
        weights |= {f"{at}.b_{c}": torch.zeros(heads, head) for c in "QKV"} | {f"{at}.b_O": torch.zeros(d)}
        weights |= {f"{at}.mask": torch.ones(context, context).tril().bool(), f"{at}.IGNORE": torch.tensor(-torch.inf)}
    weights |= {key: torch.randn(shape, generator=g) * 0.05 for key, shape in shapes.items()}
    torch.save(weights, snapshot(cache, "callummcdougall/attn_only_2L_half") / "attn_only_2L_half.pth")
    d, heads, mlp, words = 128, 4, 512, 114
    shapes = {
        "embed.W_E": (d, words), "pos_embed.W_pos": (3, d), "unembed.W_U": (d, words), "blocks.0.attn.W_O": (d, d),
        "blocks.0.mlp.W_in": (mlp, d), "blocks.0.mlp.W_out": (d, mlp), "blocks.0.mlp.b_in": (mlp,),
        "blocks.0.mlp.b_out": (d,),
    }  # fmt: skip
    shapes |= {f"blocks.0.attn.W_{c}": (heads, d // heads, d) for c in "QKV"}
    drawn = [{key: torch.randn(shape, generator=g) * 0.1 for key, shape in shapes.items()} for _ in range(DRAWN)]
    epochs = list(range(0, 50_000, 1000))
    losses = {f"{part}_losses": [3.0 / (1 + i) for i in range(len(epochs))] for part in ("train", "test")}
    run = {"epochs": epochs, "state_dicts": [drawn[i % DRAWN] for i in range(len(epochs))], **losses}
    torch.save(run, snapshot(cache, "callummcdougall/grokking_full_run_data") / "full_run_data.pth")


def link(path: Path, to: str) -> None:
    """Make a link of the name, in place of what is there."""
    path.unlink(missing_ok=True)
    path.symlink_to(to)


if __name__ == "__main__":
    main()
