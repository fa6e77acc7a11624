"""The recipe of the induction model: half a minute on a laptop's processor, by the common training loop.

AdamW with a short warm-up and a long linear decay. The heads appear within some hundred steps, when the loss falls at
once. A run is a folder of `cutaway.training`, resumable to the bit, and at the end it has the model's own files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from cutaway.training import Loop
from cutaway.training.whole_models import ClockedPlan, NextTokens, Progress, processor_threads, telling
from cutaway.zoo.induction.texts import LENGTH, WORDS, Texts

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MAX_POSITIONS = 128
UNKNOWN = "<unk>"


@dataclass(frozen=True, slots=True)
class Settings:
    """Size of the model and shape of the run."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    batch: int = 32
    steps: int = 900
    rate: float = 5e-3
    weight_decay: float = 0.01
    spread: float = 0.1  # standard deviation of the first weights
    warmup: float = 0.05
    decay: float = 0.9  # share of the run over which the rate falls
    twin: bool = False
    seed: int = 0


def initial_model(settings: Settings) -> LlamaForCausalLM:
    """Return an untrained model, whose MLPs are held at zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS + 1,
        hidden_size=settings.width,
        intermediate_size=1,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=settings.spread,
        bos_token_id=None,
        eos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            parameter.requires_grad_(False).zero_()
    return model


class InductionUpdate(NextTokens):
    """The model in training.

    Attributes:
        size: size of the model and shape of the run.
    """

    kind = "induction training"
    model: LlamaForCausalLM

    def __init__(self, settings: Settings):
        model = initial_model(settings).train()
        learned = [p for p in model.parameters() if p.requires_grad]
        rates: Any = {"lr": settings.rate, "betas": (0.9, 0.98), "weight_decay": settings.weight_decay}
        super().__init__(model, torch.optim.AdamW(learned, **rates), settings)


def train(
    out: str | Path,
    *,
    settings: Settings | None = None,
    minutes: float | None = None,
    threads: int = 2,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    stop_after: int | None = None,
) -> Path:
    """Train the model into the folder `out` and return the folder of the finished model.

    Args:
        out: folder of the run; made if missing.
        settings: size and length; the default is the recipe of the shipped weights.
        minutes: end the run after so much time, with what it has.
        threads: processor threads.
        resume: go on from the checkpoint in `out`, if there is one.
        progress: called every 20 steps.
        stop_after: end at this step with a checkpoint and no export, as an interruption would.
    """
    size = settings or Settings()
    update = InductionUpdate(size)
    plan = ClockedPlan(size.steps * size.batch * LENGTH, size.warmup, size.decay, minutes=minutes)
    with processor_threads(threads):
        loop = Loop(update, Texts(size.batch, size.twin, size.seed), plan, out)
        loop.start(resume)
        loop.run(stop_after, telling(progress, size.steps, lambda: update.loss))
    if loop.step != stop_after:
        export(update.model, Path(out))
    return Path(out)


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the files of a Hugging Face model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().contiguous() for k, v in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = model.config.to_dict() | {"dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    ids = {f"w{i:02d}": i for i in range(WORDS)} | {UNKNOWN: WORDS}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([UNKNOWN])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNKNOWN,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
