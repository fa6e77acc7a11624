"""The recipe of the miniworld: one function that trains the shipped model from a seed, on a laptop's processor.

Muon on the hidden matrices and AdamW on the rest, bfloat16 autocast, warm-up, plateau, linear decay, and a second stage
of the mixture. A run is a folder: `checkpoint.safetensors` (weights, optimizer state, and in its header the step and
the stream), `checkpoint.json` (the log, to be read), and at the end the model's own files. Nothing is pickled. A run
that was stopped goes on from its checkpoint with the same blocks and, on the same machine and thread count, the same
numbers.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cutaway.zoo.miniworld import tokenizer as tokenizers
from cutaway.zoo.miniworld.corpus import FINISH, SECOND_STAGE, Corpus, known_words
from cutaway.zoo.miniworld.world import World

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import LlamaForCausalLM

MAX_POSITIONS = 256


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


@dataclass(frozen=True, slots=True)
class Progress:
    """What the callback of `train` is told."""

    step: int
    steps: int
    loss: float  # nats per token, running mean
    tokens_per_second: float
    seconds_left: float


def initial_model(settings: Settings, vocabulary: int) -> LlamaForCausalLM:
    """An untrained model; also the control of the card."""
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
    """The factor on both learning rates at a position of the schedule, counted in steps."""
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
    settings = settings or Settings()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with _threads(threads):
        run = _Run(out, settings, minutes)
        if resume and (out / "checkpoint.json").exists():
            run.load()
        while run.position < run.length:
            run.advance()
            if progress is not None and run.step % 20 == 0:
                progress(run.progress())
            stopped = run.step == stop_after
            if stopped or run.step % checkpoint_every == 0:
                run.save()
            if stopped:
                return out
        run.save()
        export(run.model, run.tokenizer, run.world, out)
    return out


class _Run:
    """The state of one training run."""

    def __init__(self, out: Path, settings: Settings, minutes: float | None):
        self.out, self.settings, self.minutes = out, settings, minutes
        self.world = World.build(settings.seed)
        self.tokenizer = tokenizers.build(known_words(self.world))
        self.corpus = Corpus(self.world, self.tokenizer, settings.block, settings.seed + 1)
        self.model = initial_model(settings, self.tokenizer.get_vocab_size()).train()
        self.optimizers = optimizers(self.model, settings)
        self.base = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.step, self.seconds, self.loss = 0, 0.0, float("nan")
        self.log: list[tuple[int, float, float]] = []  # step, loss, seconds

    @property
    def length(self) -> int:
        """Steps of the whole run."""
        return self.settings.steps + self.settings.finish

    @property
    def position(self) -> float:
        """The place in the schedule, in steps; ahead of `step` where the clock shortens the run."""
        by_clock = self.length * self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(self.step, by_clock)

    def advance(self) -> None:
        """One optimizer step."""
        start = time.perf_counter()
        position = self.position
        if position >= self.settings.second_stage:
            self.corpus.weights = FINISH if position >= self.settings.steps else SECOND_STAGE
        factor = rate(position, self.step, self.settings)
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
        loss = _loss(self.model, torch.tensor([self.corpus.block() for _ in range(self.settings.batch)]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        value = loss.item()
        self.loss = value if self.step == 1 else 0.98 * self.loss + 0.02 * value
        self.seconds += time.perf_counter() - start
        if self.step % 100 == 0:
            self.log.append((self.step, round(self.loss, 4), round(self.seconds, 1)))

    def progress(self) -> Progress:
        """What is told to the caller."""
        tokens = self.step * self.settings.batch * self.settings.block
        done = min(1.0, self.position / self.length)
        left = self.seconds / done * (1 - done) if done else float("inf")
        return Progress(self.step, self.length, self.loss, tokens / self.seconds, left)

    def save(self) -> None:
        """Write the checkpoint; a crash in between leaves the earlier one readable."""
        tensors: dict[str, Tensor] = {f"model/{k}": v.detach() for k, v in self.model.named_parameters()}
        for i, optimizer in enumerate(self.optimizers):
            for j, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{i}/{j}/{k}": torch.as_tensor(v) for k, v in entry.items()}
        record = {
            "step": self.step, "seconds": self.seconds, "loss": self.loss, "log": self.log,
            "threads": torch.get_num_threads(),
            "corpus": self.corpus.state(), "settings": dataclasses.asdict(self.settings),
        }  # fmt: skip
        metadata = {"record": json.dumps(record)}
        partial = self.out / "checkpoint.partial"
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
        partial.replace(self.out / "checkpoint.safetensors")
        (self.out / "checkpoint.json").write_text(json.dumps({k: v for k, v in record.items() if k != "corpus"}) + "\n")

    def load(self) -> None:
        """Take up the checkpoint of the folder."""
        from cutaway.core.refuse import Refused

        with safe_open(self.out / "checkpoint.safetensors", "pt") as file:
            record = json.loads(file.metadata()["record"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if record["settings"] != dataclasses.asdict(self.settings):
            raise Refused(
                what=f"resuming the run in {self.out}",
                why="its checkpoint was written with other settings",
                instead="use the same settings, another folder, or resume=False",
            )
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model/{name}"])
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Any]] = {}
            for key, value in tensors.items():
                if key.startswith(f"optimizer/{i}/"):
                    _, _, j, name = key.split("/")
                    state.setdefault(int(j), {})[name] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        self.step, self.seconds, self.loss = record["step"], record["seconds"], record["loss"]
        self.log = [tuple(row) for row in record["log"]]
        self.corpus.restore(record["corpus"])


def _loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    run = Path(run)
    settings = Settings(**json.loads((run / "checkpoint.json").read_text())["settings"])
    state = _Run(run, settings, None)
    state.load()
    export(state.model, state.tokenizer, state.world, folder)


def summary(run: str | Path) -> dict[str, Any]:
    """Length and cost of a run, for the card."""
    record = json.loads((Path(run) / "checkpoint.json").read_text())
    settings = record["settings"]
    return {
        "steps": record["step"],
        "tokens": record["step"] * settings["batch"] * settings["block"],
        "minutes": record["seconds"] / 60,
        "threads": record.get("threads", 1),
        "loss": record["loss"],
        "settings": settings,
        "log": record["log"],
    }
