"""The recipe of the miniworld: one function that trains the shipped model from a seed, on a laptop's processor.

Muon on the hidden matrices and AdamW on the rest, bfloat16 autocast, warm-up, plateau, linear decay, and a second stage
of the mixture. A run is a folder of `cutaway.training` (checkpoint, `log.jsonl`), and at the end it has the model's own
files. Nothing is pickled. A run that was stopped goes on from its checkpoint with the same blocks and, on the same
machine and thread count, the same numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cutaway.training import Checkpoints, Loop
from cutaway.training.checkpoints import ALONE
from cutaway.training.whole_models import (
    ClockedPlan,
    Progress,
    WholeModel,
    processor_threads,
    take_weights,
    telling,
)
from cutaway.zoo.miniworld import tokenizer as tokenizers
from cutaway.zoo.miniworld.corpus import FINISH, SECOND_STAGE, Corpus, known_words
from cutaway.zoo.miniworld.world import World

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

MAX_POSITIONS = 256
KIND = "miniworld training"


@dataclass(frozen=True, slots=True)
class Settings:
    """Size of the model and shape of the run."""

    layers: int = 6
    width: int = 128
    heads: int = 4
    mlp: int = 384
    block: int = 96
    batch: int = 32
    steps: int = 9000  # up to the finishing stage
    finish: int = 1200  # steps of the finishing stage, at a tenth of the rate
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    weight_decay: float = 0.1
    warmup: int = 100
    plateau: float = 0.4  # share of the run before the rate decays
    second_stage: int = 5000  # step from which documents are mixed by `corpus.SECOND_STAGE`
    seed: int = 0


def initial_model(settings: Settings, vocabulary: int) -> LlamaForCausalLM:
    """Return an untrained model; also the control of the card."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=tokenizers.BOS_ID,
        eos_token_id=tokenizers.BOS_ID,
        pad_token_id=tokenizers.PAD_ID,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # at this length twice as fast on a processor as the fused kernel
    return model


def optimizers(model: torch.nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings and norms, Muon for every other matrix."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.AdamW(rest, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.Muon(hidden, lr=settings.muon_rate, weight_decay=settings.weight_decay, momentum=0.95),
    ]


def rate(position: float, step: int, settings: Settings) -> float:
    """Return the factor on both learning rates at a position of the schedule, counted in steps."""
    if position >= settings.steps:
        return max(0.01, 0.1 * (1 - (position - settings.steps) / settings.finish))
    done = position / settings.steps
    decay = 1.0 if done < settings.plateau else max(0.02, (1 - done) / (1 - settings.plateau))
    return min(1.0, (step + 1) / settings.warmup) * decay


def train(
    out: str | Path,
    *,
    settings: Settings | None = None,
    minutes: float | None = None,
    threads: int = 2,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    checkpoint_every: int = 250,
    stop_after: int | None = None,
) -> Path:
    """Train the miniworld into the folder `out` and return the folder of the finished model.

    Args:
        out: folder of the run; made if missing.
        settings: size and length; the default is the recipe of the shipped weights.
        minutes: shorten the run to so much training time (the schedule follows the clock; results then depend on it).
        threads: processor threads.
        resume: go on from the checkpoint in `out`, if there is one.
        progress: called every 20 steps.
        checkpoint_every: steps between checkpoints.
        stop_after: end at this step with a checkpoint and no export, as an interruption would.
    """
    update = MiniworldUpdate(settings or Settings(), minutes)
    with processor_threads(threads):
        loop = Loop(update, Blocks(update.corpus, update.size.batch), update.plan(checkpoint_every), out)
        _checkpoints(out)
        loop.start(resume)
        loop.run(stop_after, telling(progress, update.length, lambda: update.loss))
        if loop.step != stop_after:
            export(update.model, update.tokenizer, update.world, out)
    return Path(out)


class Blocks:
    """Batches of blocks of a corpus, with its cursor."""

    def __init__(self, corpus: Corpus, batch: int):
        self.corpus, self.batch = corpus, batch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        return torch.tensor([self.corpus.block() for _ in range(self.batch)])  # [batch position]

    def state(self) -> dict[str, Any]:
        """Return the cursor of the corpus."""
        return self.corpus.state()

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Go to where `state` was taken."""
        self.corpus.restore(dict(state))
        return self


class MiniworldUpdate(WholeModel):
    """The model in training, with the corpus whose mixture follows the schedule.

    Attributes:
        size: size of the model and shape of the run.
        loss: running mean, in nats per token.
        log: rows of step, loss and seconds, for the card.
    """

    kind, clip = KIND, 1.0
    model: LlamaForCausalLM

    def __init__(self, settings: Settings, minutes: float | None = None):
        self.size, self.minutes = settings, minutes
        self.world = World.build(settings.seed)
        self.tokenizer = tokenizers.build(known_words(self.world))
        self.corpus = Corpus(self.world, self.tokenizer, settings.block, settings.seed + 1)
        model = initial_model(settings, self.tokenizer.get_vocab_size()).train()
        super().__init__(model, *optimizers(model, settings))
        self.base = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.log: list[tuple[int, float, float]] = []

    @property
    def length(self) -> int:
        """Steps of the whole run."""
        return self.size.steps + self.size.finish

    def plan(self, checkpoint_every: int) -> ClockedPlan:
        """Return the plan of the run: 20 steps between reports."""
        tokens = self.length * self.size.batch * self.size.block
        return ClockedPlan(tokens, checkpoint_every=checkpoint_every, minutes=self.minutes)

    def position(self, step: int, seconds: float) -> float:
        """Return the place in the schedule, in steps; ahead of `step` where the clock shortens the run."""
        by_clock = self.length * seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(step, by_clock)

    def begin(self, loop: Loop) -> None:
        self._mix(loop, 0)

    def step(self, batch: Tensor, loop: Loop) -> int:
        """Do a step of both optimizers."""
        factor = rate(self.position(loop.step, loop.seconds), loop.step, self.size)
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
        self.learn(_loss(self.model, batch), loop)
        self._mix(loop, loop.step + 1)
        return batch.numel()

    def running(self, loss: float) -> float:
        return 0.98 * self.loss + 0.02 * loss if math.isfinite(self.loss) else loss

    def after_step(self, loop: Loop) -> None:
        if loop.step % 100 == 0:
            self.log.append((loop.step, round(self.loss, 4), round(loop.seconds, 1)))

    def settings(self, loop: Loop) -> dict[str, Any]:
        return {"settings": dataclasses.asdict(self.size)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, record = super().state()
        return tensors, record | {"log": self.log}

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], loop: Loop) -> None:
        super().restore(tensors, record, loop)
        self.log = [tuple(row) for row in record["log"]]
        self._mix(loop, loop.step)

    def _mix(self, loop: Loop, step: int) -> None:
        """Set the mixture of documents for the batch of a step."""
        position = self.position(step, loop.seconds)
        if position >= self.size.second_stage:
            self.corpus.weights = FINISH if position >= self.size.steps else SECOND_STAGE


def _checkpoints(run: str | Path) -> Checkpoints:
    """Return the checkpoints of a run; one of the first layout, before the common loop, is rewritten."""
    found, path = Checkpoints(Path(run), KIND), Path(run) / ALONE
    if not path.is_file():
        return found
    with safe_open(path, "pt") as file:
        if (text := (file.metadata() or {}).get("record")) is None:
            return found
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    old = json.loads(text)
    tokens = old["step"] * old["settings"]["batch"] * old["settings"]["block"]
    counted = {"tokens": tokens, "logged_tokens": tokens, "events": [], "lines": 0, "lost": 0}
    kept = {n: old[n] for n in ("step", "seconds", "loss", "log", "settings")}
    found.write(tensors, kept | counted | {"source": old["corpus"], "threads": old.get("threads", 1)})
    return found


def _loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, world: World, folder: str | Path) -> None:
    """Write the files of a Hugging Face model (weights in float16, read back as float32) and the world beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to(torch.float16).contiguous() for k, v in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = model.config.to_dict() | {"dtype": "float32", "architectures": ["LlamaForCausalLM"]}
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizers.save(tokenizer, folder, MAX_POSITIONS)
    world.save(folder / "world.json")


def export_checkpoint(run: str | Path, folder: str | Path) -> None:
    """Export the newest checkpoint of an unfinished run."""
    tensors, record = _checkpoints(run).read()
    update = MiniworldUpdate(Settings(**record["settings"]))
    take_weights(update.model, tensors)
    export(update.model, update.tokenizer, update.world, folder)


def summary(run: str | Path) -> dict[str, Any]:
    """Return the length and cost of a run, for the card."""
    _, record = _checkpoints(run).read()
    settings = record["settings"]
    return {
        "steps": record["step"],
        "tokens": record["step"] * settings["batch"] * settings["block"],
        "minutes": record["seconds"] / 60,
        "threads": record["threads"],
        "loss": record["loss"],
        "settings": settings,
        "log": record["log"],
    }
