"""Training of tuned lenses: translators that start as the identity and learn to say what the model says in the end.

Each depth minimises the mean of KL(final distribution ‖ its own) over tokens of a stream of activations, by Adam; the
model's final norm and unembedding are used as they are. Depths share nothing but the tokens. A run is a folder of
`cutaway.training` (checkpoint, log), which holds the lens as well in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cutaway.core.refuse import Code, Keyword, NoTokens, Refused
from cutaway.lenses.decode import divergence, read_out, unembedded
from cutaway.lenses.tuned import TunedLens, identity_lens, open_lens, translated
from cutaway.models.anatomy.unembedding import readable
from cutaway.models.model import Model
from cutaway.streams import Documents, LiveStream, Packing, Stream, from_texts
from cutaway.training.guard import Guard
from cutaway.training.loop import Loop, Update
from cutaway.training.plan import Plan
from cutaway.zoo.miniworld.documents import WorldDocuments

CHUNK = 1 << 24  # logits that are held at once
WINDOW = 1 << 24  # numbers of activations that are shuffled together
RATE = 0.4  # of Adam, over the width: what is added to a stream then moves by a like share of it at any width


class TunedLensUpdate(Update):
    """A tuned lens in training.

    Attributes:
        model: the model whose final norm and unembedding read the translated streams.
        rate: highest learning rate of Adam.
        places: addresses of the streams, by depth; the last is the stream that the model unembeds.
        weight: the translators so far [depth d_model d_model].
        bias: their biases [depth d_model].
        steps: steps of the whole run, known from the first on.
        sums: divergence of each depth in the steps since the last report, summed over tokens.
    """

    kind = "tuned lens training"

    def __init__(self, model: Model, rate: float | None = None):
        start = identity_lens(model)
        self.model, self.about = model, dict(start.about)
        self.rate = RATE / model.shape.d_model if rate is None else rate
        self.places = lens_sites(model)
        self.weight = start.weight.to(model.device).requires_grad_()
        self.bias = start.bias.to(model.device).requires_grad_()
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr=self.rate, betas=(0.9, 0.98))
        self.guard, self.sums = Guard(), torch.zeros(len(self.weight), dtype=torch.double)
        self.steps = 0

    def step(self, batch: Any, loop: Loop) -> int:
        """Learn from the activations of some tokens."""
        missing = [p for p in self.places if p not in batch.acts]
        if missing:
            raise Refused(
                f"a stream without {missing[0]}", "a translator reads it", ("stream ", Code("lens_sites(model)"))
            )
        acts = [batch.acts[p][batch.mask].to(self.model.device) for p in self.places]
        if not len(acts[0]):
            return 0
        losses = self.gradients(acts)
        if self.guard.passes(bool(losses.isfinite().all()), loop):
            self.steps = self.steps or loop.plan.steps(len(acts[0]))
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * loop.plan.factor(loop.step, max(self.steps, loop.step + 1))
            self.optimizer.step()
            self.sums += losses * len(acts[0])
        self.guard.check("training a tuned lens", "use a lower rate")
        self.optimizer.zero_grad(set_to_none=True)
        return len(acts[0])

    def gradients(self, acts: Sequence[Tensor]) -> Tensor:
        """Set the gradients of the translators to those of the mean divergence, and return that of each depth [depth].

        The weights of the model get none.
        """
        n, size = len(acts[0]), max(1, CHUNK // self.model.shape.d_vocab)
        self.weight.grad, self.bias.grad = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        losses = torch.zeros_like(self.bias[:, 0])
        for at in range(0, n, size):
            own, *xs = (x[at : at + size].float() for x in (acts[-1], *acts[:-1]))
            own = read_out(self.model, own)
            for d, x in enumerate(xs):
                weight, bias = self.weight[d].detach().requires_grad_(), self.bias[d].detach().requires_grad_()
                with torch.enable_grad():
                    kl = divergence(own, unembedded(self.model, translated(x, weight, bias))).sum()
                    parts = torch.autograd.grad(kl / n, (weight, bias))
                self.weight.grad[d] += parts[0]
                self.bias.grad[d] += parts[1]
                losses[d] += kl.detach() / n
        return losses.double().cpu()  # once a step: the steps wait for it

    def report(self, loop: Loop) -> list[dict[str, Any]]:
        """Return the mean divergence since the last report, over depths and of each."""
        each = (self.sums / max(1, loop.tokens - loop.logged_tokens)).tolist()
        self.sums.zero_()
        return [{"loss": math.fsum(each) / len(each), "divergence": [round(kl, 6) for kl in each]}]

    def settings(self, loop: Loop) -> dict[str, Any]:
        return {**super().settings(loop), "rate": self.rate, "lens": self.about}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"weight": self.weight.detach(), "bias": self.bias.detach(), "sums": self.sums}
        for i, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{n}": torch.as_tensor(v) for n, v in entry.items()}
        return tensors, {"lost": self.guard.lost, "steps": self.steps}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any], loop: Loop) -> None:
        self.weight.copy_(tensors["weight"])
        self.bias.copy_(tensors["bias"])
        self.steps = record["steps"]
        self.sums, self.guard = tensors["sums"].clone(), Guard(record["lost"])
        state: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer/"):
                _, i, part = name.split("/")
                state.setdefault(int(i), {})[part] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def lens(self, loop: Loop) -> TunedLens:
        """Return the lens as it stands."""
        source = getattr(loop.source, "identity", dict)()
        about = {**self.about, "training": {"tokens": loop.tokens, "rate": self.rate, "stream": source}}
        return TunedLens(self.weight.detach().cpu().clone(), self.bias.detach().cpu().clone(), about)


def lens_sites(model: Model) -> list[str]:
    """Return the addresses of the streams that a lens of the model reads, the last being the one it unembeds."""
    return [str(place) for place in model.places(["resid_pre.0", "resid_post"])]


def train_tuned_lens(
    model: Model,
    text: Documents | Sequence[str] | Stream | None = None,
    *,
    tokens: int = 200_000,
    rate: float | None = None,
    batch: int = 512,
    context: int = 96,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = True,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> TunedLens:
    """Train a tuned lens on text, or on a stream of activations.

    Args:
        model: the model; its weights stay as they are.
        text: documents, a list of texts, or a stream of `lens_sites(model)`; None means the text of the model's own
            world.
        tokens: number of tokens to train on; text is read again where it ends.
        rate: highest learning rate of Adam; None means 0.4 over the width of the model.
        batch: tokens per step, of text.
        context: tokens per context, of text.
        seed: seed of the order of tokens, of text.
        out: folder for checkpoints, the log and the lens; None keeps nothing.
        resume: go on from the checkpoint in `out`, if there is one.
        on_log: called with every line of the log.

    Raises:
        Refused: no text, a model whose stream shares no basis with its unembedding, or a checkpoint of another run.
        KeyboardInterrupt: as it came; with `out`, the last whole step is in the checkpoint, and the same call goes on.
    """
    if model.family.post_norm or model.anatomy.unembed is None:
        why = "it has no unembedding that reads its residual stream directly"
        raise Refused(f"lens on {model.name}", why, "use a causal language model")
    readable(model.anatomy, f"lens on {model.name}")
    update = TunedLensUpdate(model, rate)
    stream = text if isinstance(text, Stream) else _stream(model, text, tokens, batch, context, seed)
    loop = Loop(update, stream, Plan(tokens=tokens), out, on_log=on_log)
    loop.start(resume)
    loop.run()
    if not loop.tokens:
        raise NoTokens("training a tuned lens", "the source gave no tokens", "give more text")
    lens = update.lens(loop)
    return lens if out is None else open_lens(lens.save(out))


def _stream(
    model: Model, text: Documents | Sequence[str] | None, tokens: int, batch: int, context: int, seed: int
) -> LiveStream:
    """Return the activations of text, as many of them shuffled together as memory allows."""
    documents = documents_of(model, text, "training a tuned lens")
    window = min(tokens, WINDOW // (model.shape.d_model * (model.shape.n_layers + 1)))
    return LiveStream(
        model,
        documents,
        lens_sites(model),
        packing=Packing(context),
        batch=batch,
        window=max(1, window),
        seed=seed,
        epochs=None,
    )


def documents_of(model: Model, text: Documents | Sequence[str] | None, what: str) -> Documents:
    """Return text as documents; None stands for the text of the model's own world.

    Raises:
        Refused: none, for a model that has no text of its own.
    """
    if text is None:
        if model.world is None:
            why = "only models of the zoo have text of their own"
            raise Refused(f"{what} on {model.name} without text", why, ("give ", Keyword("text")))
        return WorldDocuments(model.world)
    return text if isinstance(text, Documents) else from_texts(list(text))
