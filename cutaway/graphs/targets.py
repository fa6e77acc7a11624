"""Targets of an attribution graph: the logits that are explained, differences of two, or directions of the last stream.

The logit of a token counts from the mean over the vocabulary, for what all tokens share changes no probability. Where
the family caps logits, values are uncapped, for these are linear in the stream; shares are the model's probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cutaway.core.files import read_tensors
from cutaway.core.node import Direction, Logit, parse_node
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.stats import generator
from cutaway.graphs.frozen import Frozen
from cutaway.graphs.sweep import Readers
from cutaway.lenses.closure import uncapped
from cutaway.lenses.decode import question
from cutaway.models.anatomy.unembedding import readable
from cutaway.models.anatomy.weights import unembed_rows
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens
from cutaway.tasks.answers import single_tokens
from cutaway.tasks.prompts import Prompts
from cutaway.tasks.spelling import spelled
from cutaway.tasks.task import Task

Wanted = Logit | tuple[Direction, Float[Tensor, "d_model"]]


@dataclass(frozen=True, eq=False)
class Targets:
    """The targets of one run, and random ones in their place.

    Attributes:
        nodes: their nodes.
        vector: readers of the last stream, its norm folded in.
        constant: the part of their values that is there whatever the stream is.
        value: the model's own values.
        share: the weight of each in influences: probabilities of the likeliest tokens, else equal.
        null: readers of random targets of the same kind [sample d_model].
    """

    nodes: list[Logit | Direction]
    vector: Float[Tensor, "target d_model"]
    constant: Float[Tensor, "target"]
    value: Float[Tensor, "target"]
    share: Float[Tensor, "target"]
    null: Float[Tensor, "sample d_model"]

    def readers(self, layers: int, position: int) -> Readers:
        """Return the readers of the targets, and behind them those of the random ones."""
        vector = torch.cat([self.vector, self.null])
        layer = torch.full((len(vector),), layers, device=vector.device)
        return Readers(layer, torch.full_like(layer, position), vector)

    @property
    def together(self) -> Float[Tensor, "d_model"]:
        """Their readers, weighted by their shares."""
        return self.share.to(self.vector) @ self.vector


def first_prompt(model: Model, about: Task | Prompts, targets: Sequence[str]) -> tuple[Tokens, list[Wanted] | None]:
    """Return the first prompt without padding, and what is asked about it; None leaves it to the model's own logits.

    Raises:
        Refused: a target that is none, or targets beside those of a task.
    """
    if isinstance(about, Task):
        if targets:
            raise Refused((Keyword("targets", list(targets)), " with a task"), "the task has its own", "give prompts")
        asked = question(model, about)
        assert asked.answers is not None
        assert asked.foils is not None
        return asked.prompts.row(0), [Logit(int(asked.answers[0]), -1, foil=int(asked.foils[0]))]
    tokens = about.bind(model).row(0)
    return tokens, [_wanted(model, about, t) for t in targets] if targets else None


def _wanted(model: Model, about: Prompts, text: str) -> Wanted:
    """Read one target: a token, two with a hyphen between, a logit by its number, or a direction in a file."""
    if text.endswith(".safetensors"):
        return _direction(model, Path(text))
    if text.startswith("logit."):
        node = parse_node(text)
        assert isinstance(node, Logit)
        if node.position is not None or node.model:
            raise Refused(f"target {text!r}", "targets stand at the last position", "leave the position and model out")
        if max(node.token, node.foil or 0) >= model.shape.d_vocab:
            raise Refused(f"target {text!r}", f"the vocabulary has {model.shape.d_vocab} tokens", "give one of them")
        return Logit(node.token, -1, foil=node.foil)
    pair = re.fullmatch(r'"(.+)"\s*-\s*"(.+)"', text) or re.fullmatch(r"(.+?) - (.+)", text)
    words = [pair[1], pair[2]] if pair else [text]
    if about.ids is None:
        prompt = about.texts[0]
        ids = single_tokens(model, [prompt] * len(words), spelled(model, prompt, words), "target", task=False)
    else:
        ids = [model.text.token_id(w) for w in words]
    return Logit(ids[0], -1, foil=ids[1] if pair else None)


def _direction(model: Model, path: Path) -> tuple[Direction, Tensor]:
    if not path.is_file():
        raise Refused(f"target {str(path)!r}", "there is no such file", "give a .safetensors file of one direction")
    held, instead = read_tensors(path)[0], f"give one vector of {model.shape.d_model} numbers, not all zero"
    if len(held) != 1 or next(iter(held.values())).shape != (model.shape.d_model,):
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in held.items()) or "nothing"
        raise Refused(f"target {str(path)!r}", f"it holds {shapes}", instead)
    (vector,) = held.values()
    if not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise Refused(f"target {str(path)!r}", "its vector is zero or not finite", instead)
    return Direction(re.sub(r"[^\w-]+", "-", path.stem), -1), vector


def read_targets(
    frozen: Frozen, asked: list[Wanted] | None, logits: int, mass: float, samples: int, seed: int
) -> Targets:
    """Return the targets of a run: what is asked, or the likeliest tokens that hold `mass`, at most `logits`.

    Raises:
        Refused: a number out of range, or logits that do not follow from the last stream in a known way.
    """
    if logits < 1 or not 0 < mass <= 1:
        wrong = Keyword("logits", logits) if logits < 1 else Keyword("mass", mass)
        raise Refused(wrong, "it leaves no token to explain", "give logits from 1 on and a mass up to 1")
    own, p = _own_logits(frozen), None
    if asked is None:
        probability = frozen.acts["logits"][0, -1].double().softmax(-1)
        top = probability.topk(min(logits, len(probability)))
        n = int((top.values.cumsum(0) < mass).sum()) + 1
        asked = [Logit(i, -1) for i in top.indices[:n].tolist()]
        p = top.values[:n]
    last = frozen.width - 1
    nodes = [node if isinstance(node, Logit) else node[0] for node in asked]
    nodes = [type(n)(**{**vars(n), "position": last}) for n in nodes]
    if len(set(nodes)) < len(nodes):
        raise Refused(f"targets {', '.join(map(str, nodes))}", "one is there twice", "give each once")
    pairs = [_row(frozen, own, node) for node in asked]
    vector, constant, value = (torch.stack(part).to(frozen.dtype) for part in zip(*pairs, strict=True))
    share = p if p is not None else torch.full((len(nodes),), 1 / len(nodes), device=value.device)
    return Targets(
        nodes, vector, constant, value, share.to(frozen.dtype), _null(frozen, asked[0], vector, samples, seed)
    )


def _own_logits(frozen: Frozen) -> Float[Tensor, "token"]:
    """Return the model's own last logits, before its soft cap if it has one."""
    model = frozen.model
    way, own = readable(model.anatomy, f"attribution graph of {model.name}"), frozen.acts["logits"][:, -1]
    if way.cap:
        last = frozen.acts[f"resid_post.{frozen.layers - 1}"][:, -1]
        uncapped(model, own, last)  # refuses logits that miss those of the last stream
        own = way.logits(way.read(last), capped=False)
    return own[0].to(frozen.dtype)


def _row(frozen: Frozen, own: Tensor, target: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reader of one target, its constant part and its value."""
    if not isinstance(target, Logit):
        vector = target[1].to(own)
        return vector, own.new_zeros(()), vector @ frozen.at(f"resid_post.{frozen.layers - 1}")[-1]
    foil = None if target.foil is None else torch.tensor([target.foil])
    vector, constant = logit_readers(frozen, torch.tensor([target.token]), foil)
    other = own.mean() if target.foil is None else own[target.foil]
    return vector[0], constant[0], own[target.token] - other


def logit_readers(
    frozen: Frozen, tokens: Int[Tensor, "row"], foils: Int[Tensor, "row"] | None
) -> tuple[Float[Tensor, "row d_model"], Float[Tensor, "row"]]:
    """Return readers of the last stream at the last position for logits less those of foils, or less the mean."""
    anatomy = frozen.anatomy
    rows, own = unembed_rows(anatomy, tokens.to(frozen.model.device), frozen.dtype)
    if foils is None:
        table, biases = unembed_rows(anatomy)
        rows, own = rows - table.mean(0, dtype=frozen.dtype), own - biases.mean(dtype=frozen.dtype)
    else:
        other, theirs = unembed_rows(anatomy, foils.to(frozen.model.device), frozen.dtype)
        rows, own = rows - other, own - theirs
    vector, shift = frozen.final_readers(rows)
    return vector, own + shift


def _null(frozen: Frozen, like: Wanted, vector: Tensor, samples: int, seed: int) -> Float[Tensor, "sample d_model"]:
    """Return readers of random targets: tokens, pairs of tokens, or directions as long as the first one."""
    g = generator(seed)
    if not isinstance(like, Logit):
        drawn = torch.randn(samples, vector.shape[1], generator=g).to(vector)
        return drawn / drawn.norm(dim=1, keepdim=True) * vector[0].norm()
    tokens, foils = torch.randint(frozen.model.shape.d_vocab, (2, samples), generator=g)
    return logit_readers(frozen, tokens, None if like.foil is None else foils)[0]
