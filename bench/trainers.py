"""Who is measured by `bench.training` and `bench.tuned`: each tool's own training step on given activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

LAYERS = 3  # of the cross-layer transcoder
SITE = "resid_post.0"
STEPS = 1000  # of the run that a measured step is part of


@dataclass(frozen=True)
class Job:
    """What is trained: gate, sizes, tokens a step, learning rate (None: the tool's own) and steps of the whole run."""

    gate: str
    d: int
    latents: int
    k: int
    tokens: int
    rate: float | None = None
    steps: int = STEPS
    adam: bool = False  # where another optimiser is the tool's own


@dataclass(frozen=True)
class Trainer:
    """A dictionary in training: `step` on a batch, `rebuilt` activations, `silence` the first n latents (until they
    fire), and `narrow` the gate by its biases until so many latents are active on a token."""

    step: Callable[[Any], None]
    rebuilt: Callable[[Any], Any]
    silence: Callable[[int], None] | None = None
    narrow: Callable[[Any, int], None] | None = None
    notes: str = ""


def batch(job: Job, seed: int) -> Any:
    """Tokens that are sums of 16 of 2048 directions, with an uneven mean."""
    import torch

    g = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(2048, job.d, generator=fixed), dim=-1)
    index = torch.randint(0, 2048, (job.tokens, 16), generator=g)
    value = torch.rand(job.tokens, 16, generator=g) + 0.5
    return torch.nn.functional.embedding_bag(index, rows, per_sample_weights=value, mode="sum") * 5


def make(name: str, job: Job, first: Any) -> Trainer:
    """A subject's trainer, on the first batch's moments if it needs any."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return {"saelens": saelens, "sparsify": sparsify, "cutaway": cutaway, "cutaway_bfloat16": bfloat16}[name](
        job, first
    )


def release(name: str) -> str:
    """The version of a subject."""
    if name in ("saelens", "sparsify"):
        return version({"saelens": "sae-lens", "sparsify": "eai-sparsify"}[name])
    import cutaway as ca

    return ca.__version__


def bfloat16(job: Job, first: Any) -> Trainer:
    """cutaway with candidates chosen in bfloat16."""
    return cutaway(job, first, "bfloat16")


def cutaway(job: Job, first: Any, select: Any = "float32") -> Trainer:
    """One step of a run of `training.train`, with the bookkeeping around it."""
    import torch

    from cutaway.dictionaries import training as train
    from cutaway.dictionaries.kernels import precision
    from cutaway.dictionaries.training.update import DictionaryUpdate
    from cutaway.training import Loop

    gating = {"relu": train.TrainRelu(), "jumprelu": train.TrainJumpRelu(), "topk": train.TrainTopK(job.k)}[
        job.gate.split()[-1]
    ]
    layers = LAYERS if job.gate.startswith("clt") else 1
    reads, writes = ([f"{site}.{i}" for i in range(layers)] for site in ("resid_mid", "mlp_out"))
    rate = job.rate or 2e-4
    if layers == 1:
        reads = [SITE]
        recipe = train.autoencoder(SITE, job.latents, gating, rate=rate)
    else:
        recipe = train.cross_layer(reads, writes, job.latents, gating, rate=rate)
    plan = train.Plan(tokens=job.tokens * job.steps, select=select, checkpoint_every=10**9)

    def named(x: Any) -> dict[str, Any]:
        return dict.fromkeys(recipe.reads, x) | dict.fromkeys(recipe.writes, x)

    update = DictionaryUpdate([recipe], plan, "cpu")
    run = Loop(update, train.Held(named(first), job.tokens), plan)
    run.start()
    run.waiting.clear()
    learner = update.entries[0].learner

    def step(x: Any) -> None:
        with precision.products(update.choice):
            run.advance(named(x))

    @torch.no_grad()
    def narrow(x: Any, active: int) -> None:
        for b in range(layers):
            w, bias, _ = learner.encoder(b)
            pre = learner.inputs(b, named(x))[:256] @ w.T + bias
            floor = learner._own(b).get("log_threshold")
            pre = pre if floor is None else pre - floor.exp()
            learner.weights[f"b_enc.{b}"].sub_(pre.flatten().topk(active * len(pre)).values[-1])
            learner.dense[b] = False

    def silence(n: int) -> None:
        learner.buffers["silent.0"][:n] = learner.silent_after

    def rebuilt(x: Any) -> Any:
        return learner.dictionary().forward(x)

    notes = f"products by {'oneDNN' if update.choice.onednn else 'the default library'}"
    return Trainer(step, rebuilt, silence, narrow, notes)


def saelens(job: Job, first: Any) -> Trainer:
    """`SAETrainer.step`, its loop's own count of steps, nothing logged."""
    import sae_lens
    import torch
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    kind = {"topk": "TopK", "relu": "Standard", "jumprelu": "JumpReLU"}[job.gate]
    own: dict[str, Any] = {"k": job.k} if kind == "TopK" else {}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=job.d, d_sae=job.latents, **own)
    sae: Any = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    rate, fall = job.rate or 3e-4, job.steps // 5
    settings = SAETrainerConfig(
        job.tokens * job.steps, job.tokens, lr=rate, lr_end=rate, lr_warm_up_steps=max(2, job.steps // 100),
        lr_decay_steps=fall,
    )  # fmt: skip
    trainer = SAETrainer(settings, sae, iter([]))

    def step(x: Any) -> None:
        trainer.maybe_reset_sparsity()
        trainer.step(x)
        trainer.n_training_steps += 1

    def silence(n: int) -> None:
        trainer.n_forward_passes_since_fired[:n] = 2 * settings.dead_feature_window

    return Trainer(step, torch.no_grad()(sae), silence)


def sparsify(job: Job, first: Any) -> Trainer:
    """`Trainer.fit` on one batch at a time; the model that it hooks returns the activations that are given."""
    import torch
    from sparsify import SparseCoderConfig, TrainConfig
    from sparsify import Trainer as TheirTrainer

    data, model = Batches(job.tokens, job.steps), _given(first)
    config = TrainConfig(
        SparseCoderConfig(k=job.k, num_latents=job.latents), batch_size=1, hookpoints=["site"], log_to_wandb=False,
        optimizer="adam" if job.adam else "signum", lr=job.rate, lr_warmup_steps=max(2, job.steps // 100),
    )  # fmt: skip
    trainer: Any = TheirTrainer(config, data, model)
    trainer.save = lambda: None  # a checkpoint a call would be counted otherwise
    coder = trainer.saes["site"]

    def step(x: Any) -> None:
        data.steps, model.acts = 1, x[None]
        trainer.fit()

    @torch.no_grad()
    def rebuilt(x: Any) -> Any:
        return coder(x).sae_out

    return Trainer(step, rebuilt)


class Batches:
    """A data set of so many batches of numbered tokens, each one sequence."""

    def __init__(self, tokens: int, steps: int):
        self.tokens, self.steps = tokens, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, n: int) -> dict[str, Any]:
        import torch

        return {"input_ids": torch.arange(self.tokens)}

    def select(self, numbers: range) -> Batches:
        """Those that are left; there is always another."""
        return self


def _given(first: Any) -> Any:
    import torch

    class Given(torch.nn.Module):
        """A model of one module, whose output is what it is given."""

        device = torch.device("cpu")
        dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.site, self.acts = torch.nn.Identity(), first[None]

        @property
        def base_model(self) -> Any:
            return self

        def forward(self, input_ids: Any) -> Any:
            return self.site(self.acts)

    return Given()
