"""The notebooks of the differential harness: where they come from, what they load, and the bar of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_GPT2 = {"gpt2": "gpt2", "gpt2-small": "gpt2", "openai-community/gpt2": "gpt2"}
_OWN = {"attn-only-2l": "NeelNanda/Attn_Only_2L512W_C4_Code", "solu-2l": "NeelNanda/SoLU_2L512W_C4_Code",
        "gelu-1l": "NeelNanda/GELU_1L512W_C4_Code"}  # fmt: skip


@dataclass(frozen=True)
class Notebook:
    """A notebook: its file, its origin, the environment of its packages, and the least share of equal cells.

    `models` says which repository of the cache `hub` (`bench.compat.hub`) each name means; `edits` are made on both
    sides; `said` names what is not of the published shape. `deliberate` says, of what differs by a row of the table in
    docs/compat.md, how its words begin (a pattern) and the row; a cell with no other difference is counted apart.
    """

    file: str
    origin: str
    environment: str = "b"
    bar: float = 0.98
    models: Mapping[str, str] = field(default_factory=lambda: _GPT2)
    edits: Mapping[str, str] = field(default_factory=dict)
    hub: str = "full"
    said: str = ""
    deliberate: Mapping[str, str] = field(default_factory=dict)


def chapter(number: int, name: str, **named: Any) -> Notebook:
    """Return the solutions of a chapter of ARENA 3.0's course."""
    file = f"arena/exercises/part{number}_{name}/solutions.py"
    return Notebook(file, "ARENA 3.0, chapter 1", bar=0.9, **named)


def circuits(name: str, said: str = "", **more: str) -> Notebook:
    """Return a demo of circuit-tracer, on a small Qwen 3 and random transcoders."""
    edits = more | {
        "google/gemma-2-2b": "Qwen/Qwen3-0.6B", "torch.bfloat16": "torch.float32", "layer=20": "layer=10",
        "1454": "154", "▁": " ",
    }  # fmt: skip
    models = {"Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B", "gemma": "mwhanna/gemma-scope-transcoders"}
    said = f"a Qwen 3 of 12 layers, 128 wide, with 512 latents a layer, in place of Gemma 2 2B{said}"
    return Notebook(
        f"CT_{name}.ipynb", "circuit-tracer 0.5, demos", "d", models=models, edits=edits, said=said,
        deliberate={
            r"<drawn \d+>": "circuit_tracer.utils.demo_utils.display_*",
            r"<last>\[2\]: here float\[8306\]": "prune_graph, cumulative scores",
        },
    )  # fmt: skip


_TL, _SL = "TransformerLens 2.16.1, demos", "SAELens 6.18, tutorials"
_SMALL = "GPT-2 of 4 layers, 128 wide"
_SAES = "SAEs of 2048 latents for 24576"
_FEWER = {"10_000": "200", "20_000": "400", "30_000": "600"}
NOTEBOOKS = {
    "main": Notebook(
        "Main_Demo.ipynb", _TL, models=_GPT2 | _OWN | {"distilgpt2": "distilgpt2"},
        deliberate={r"printed here \"<class '": "names of TransformerLens' classes when printed"},
    ),
    "exploratory": Notebook("Exploratory_Analysis_Demo.ipynb", _TL, hub="narrow", said="GPT-2 192 wide"),
    "activation patching": Notebook(
        "Activation_Patching_in_TL_Demo.ipynb", _TL, models=_GPT2 | _OWN, hub="small", said=_SMALL
    ),
    "attribution patching": Notebook(
        "Attribution_Patching_Demo.ipynb", _TL, models=_GPT2 | {"gpt2-xl": "gpt2-xl"}, hub="narrow",
        said="GPT-2 192 wide, GPT-2 XL 400 wide",
        # the demo's own filter names hooks that are off in 2.16.1, which fails there
        edits={'"_input" not in name': '"_input" not in name and not name.endswith("_in")'},
    ),
    "head detector": Notebook("Head_Detector_Demo.ipynb", _TL),
    "sae loading": Notebook("SL_basic_loading_and_analysing.ipynb", _SL, said=_SAES),
    "sae logit lens": Notebook(
        "SL_logits_lens_with_features.ipynb", _SL, said=f"{_SAES}; token sets for 256 of them",
        # a vocabulary comes in an order of chance, and the sets of its tokens with it
        edits={
            "head(5000)": "head(256)",
            "= model.tokenizer.get_vocab()": "= dict(sorted(model.tokenizer.get_vocab().items()))",
        },
    ),
    "sae steering": Notebook(
        "SL_using_an_sae_as_a_steering_vector.ipynb", _SL, said=f"GPT-2 in place of Gemma 2B; {_SAES}",
        edits={
            '"gemma-2b"': '"gpt2-small"', "gemma-2b-res-jb": "gpt2-small-res-jb", "W_dec[10200]": "W_dec[1020]",
            "blocks.{layer}.hook_resid_post": "blocks.{layer}.hook_resid_pre",
        },
    ),
    "sae demo": Notebook("SL_Hooked_SAE_Transformer_Demo.ipynb", _SL, said=_SAES),
    "sae tutorial": Notebook("SL_tutorial_2_0.ipynb", _SL, said=_SAES),
    "circuit-tracer attribution": circuits("attribute_demo"),
    "circuit-tracer targets": circuits(
        "attribution_targets_demo", said="; the prompt is its last two words",
        **{"Fact: the capital of the state containing Dallas is": "Dallas is"},
    ),
    "circuit-tracer interventions": circuits("intervention_demo"),
    "transformer from scratch": chapter(
        1, "transformer_from_scratch", said="5 steps of training",
        deliberate={  # the printed configuration, whose last lines these are
            r"printed here .*use_split_qkv_input': False,\\n 'window_size': None}.* there .*yarn_truncate'":
                "HookedTransformerConfig",
        },
        edits={
            "epochs = 5": "epochs = 1", "max_steps_per_epoch = 500": "max_steps_per_epoch = 5",
            "test_size=1000": "test_size=50",
        },
    ),
    "induction heads": chapter(2, "intro_to_mech_interp", hub="narrow", said="GPT-2 192 wide"),
    "IOI": chapter(3, "indirect_object_identification", hub="narrow", said="GPT-2 192 wide"),
    "toy models": chapter(4, "superposition_and_saes", models=_GPT2 | _OWN, edits=_FEWER, said="2 % of the steps"),
    "brackets": chapter(
        7, "balanced_bracket_classifier", said="500 brackets for 5000",
        edits={"N_SAMPLES = 5000": "N_SAMPLES = 500", '_dict.pt")': '_dict.pt", map_location="cpu")'},
    ),
    "modular arithmetic": chapter(
        8, "grokking_and_modular_arithmetic",
        edits={
            "local_dir = large_root,": "", "t.load(large_root / 'full_run_data.pth')": "t.load(weights_path)",
            "[400]": "[40]",
        },
    ),
}  # fmt: skip


TEST_MODELS = _GPT2 | _OWN | {
    "solu-1l": "NeelNanda/SoLU_1L512W_C4_Code",
    "solu-3l": "NeelNanda/SoLU_3L512W_C4_Code",
    "tiny-stories-1M": "roneneldan/TinyStories-1M",
    "pythia-70m": "EleutherAI/pythia-70m",
    "opt-125m": "facebook/opt-125m",
    "Qwen/Qwen2-0.5B": "Qwen/Qwen2-0.5B",
}  # fmt: skip
VERSIONS = ("2.16.1", "3.5.1")  # of the tests, each in its folder
#: files of TransformerLens' tests, but for those of its own layout, of encoders, several GPUs and loading
TESTS = (
    "tests/unit/factored_matrix",
    "tests/unit/components",
    "tests/unit/test_hook_points.py",
    "tests/unit/test_hooked_root_module.py",
    "tests/unit/test_hooked_transformer_config.py",
    "tests/unit/test_split_qkv.py",
    "tests/unit/test_svd_interpreter.py",
    "tests/unit/test_use_attn_result.py",
    "tests/unit/test_utils.py",
    "tests/integration/test_attention_mask.py",
    "tests/integration/test_cache_hook_names.py",
    "tests/integration/test_cache_pos_slice.py",
    "tests/integration/test_cross_entropy_loss.py",
    "tests/integration/test_d_vocab.py",
    "tests/integration/test_grouped_query_attention.py",
    "tests/integration/test_head_detector.py",
    "tests/integration/test_hooks.py",
    "tests/integration/test_kv_cache.py",
    "tests/integration/test_left_padding.py",
    "tests/integration/test_match_huggingface.py",
    "tests/integration/test_only_tokenizer.py",
    "tests/integration/test_prepend_bos.py",
    "tests/integration/test_start_at_layer.py",
    "tests/integration/test_stop_at_layer.py",
    "tests/integration/test_tokenization_methods.py",
    "tests/integration/test_utils_tokens.py",
    "tests/acceptance/test_activation_cache.py",
    "tests/acceptance/test_evals.py",
    "tests/acceptance/test_hook_tokens.py",
    "tests/acceptance/test_hooked_transformer.py",
    "tests/acceptance/test_tokenizer_special_tokens.py",
)
