"""What does a model write under a direction, text beside text, and how fluent is it?

Each prompt is continued greedily at several strengths of a direction, which acts at all positions, those of new tokens
included (Turner et al. 2023, arXiv:2308.10248); beside it stand the plain continuation, that of one random direction of
the same length, and that of an instruction in front of the prompt. The unsteered model then reads every continuation
behind its plain prompt.

* `loss[way]` of the continuations' tokens under the unsteered model, in nats per token, mean over prompts; `interval`:
  95 %, over prompts. exp(loss) is the perplexity (`perplexity`). Steered text is less likely by construction; text that
  falls apart is much less likely. Greedy loops are very likely: see `repeated`.
* `component[way]`: the mean component of the continuations' tokens along the direction where the unsteered model reads
  them, at its last address, in lengths of its vector: does the text itself say what the direction says?
* `repeated[way]`: the share of three tokens in a row that stood in the same continuation before.
* `each[prompt, way]`: the loss of each continuation, with its text (`texts`, `table`).
* Control: random directions of the same length at each strength (`null`, `component_null`, `repeated_null`).
* Known failures: no number here says whether a reader sees the concept in a text: read `texts`. A direction that was
  found at the ends of prompts need not say anything of the tokens of a response: `component` may fall while texts turn.
* Equivalence (test): the plain way is `model.generate`; losses are those of the continuation's tokens read by hand.
* Cost: of each prompt, one generation per strength and direction and two more, and one forward to read each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cutaway.core.method import method
from cutaway.core.refuse import Keyword, Refused
from cutaway.core.result import Result
from cutaway.core.stats import BOUNDS, mean_interval, one_prompt
from cutaway.directions.behaviour import as_prompts
from cutaway.directions.steering import Steering
from cutaway.interventions.span_losses import span_losses
from cutaway.models.edits.edit import Edit, as_edits
from cutaway.models.generate import continuation_ids
from cutaway.models.model import Model
from cutaway.models.tokens import Tokens, continued
from cutaway.tasks import chat as chats
from cutaway.tasks.answers import check_predicts
from cutaway.tasks.prompts import Prompts

_FIELDS = "loss", "component", "repeated"
_UNITS: dict[str, str] = dict.fromkeys(("loss", "each"), "nats per token")
_UNITS |= {"component": "lengths of the vector", "repeated": "probability"}
_PLAIN, _RANDOM, _PROMPTED = "plain", "random", "instruction"


@dataclass(frozen=True, kw_only=True)
class Completions(Result, kind="completions"):
    """Continuations of prompts at several strengths of a direction, and what the unsteered model says of them.

    Attributes:
        loss: of the continuations under the unsteered model, in nats per token.
        interval: 95 %, over prompts.
        null: the same of random directions; NaN where nothing is steered.
        component: of the continuations along the direction, in lengths of its vector.
        component_interval: 95 %, over prompts.
        component_null: the same of random directions.
        repeated: share of three tokens in a row that the continuation has had before.
        repeated_interval: 95 %, over prompts.
        repeated_null: the same of random directions.
        each: loss of each continuation; its labels are the texts.
    """

    page = ("component", "repeated")
    loss: Float[Tensor, "way"]
    interval: Float[Tensor, "way bound"]
    null: Float[Tensor, "way sample"]
    component: Float[Tensor, "way"]
    component_interval: Float[Tensor, "way bound"]
    component_null: Float[Tensor, "way sample"]
    repeated: Float[Tensor, "way"]
    repeated_interval: Float[Tensor, "way bound"]
    repeated_null: Float[Tensor, "way sample"]
    each: Float[Tensor, "prompt way"]

    @property
    def perplexity(self) -> Float[Tensor, "way"]:
        """The perplexity of the continuations, exp of the mean loss."""
        return self.loss.exp()

    def texts(self, way: str) -> list[str]:
        """Return the continuation of each prompt: of a strength as it is written, `plain`, `random` or `instruction`.

        Raises:
            Refused: no such way.
        """
        (i,) = self._entries("way", way)
        return [row[i] for row in self.labels["each"]]

    def table(self) -> str:
        """Return the continuations as text, those of one prompt below each other."""
        out = list[str]()
        for prompt, row in zip(self.labels["prompt"], self.labels["each"], strict=True):
            lines = (f"{way:>11} | {' '.join(text.split())}" for way, text in zip(self.labels["way"], row, strict=True))
            out.append("\n".join([prompt, *lines]))
        return "\n\n".join(out)


@dataclass(frozen=True)
class _Writer:
    """Continuations of prompts, and what the unsteered model says of them.

    Attributes:
        model: the model.
        direction: the direction.
        prompts: the plain prompts.
        new: number of new tokens.
    """

    model: Model
    direction: Steering
    prompts: Sequence[str]
    new: int

    def write(self, edits: Sequence[Edit] = (), prompts: Sequence[str] | None = None) -> list[list[int]]:
        """Return the ids of the continuations under edits, up to where a text ends."""
        tokens = self.model.tokens(list(prompts or self.prompts), side="left")
        found = continuation_ids(self.model, tokens, self.new, as_edits(edits), {})
        own = self.model.hf.generation_config.eos_token_id
        ends = {own} if isinstance(own, int) else set(own or ())
        return [list(takewhile(lambda i: i not in ends, row)) for row in found]

    def read(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "prompt 3"]:
        """Return loss per token, component and share of repeats of each continuation; NaN of an empty one."""
        out, said = torch.full((len(rows), 3), torch.nan), [i for i, row in enumerate(rows) if row]
        if not said:
            return out
        tokens = continued(self.model.tokens([self.prompts[i] for i in said]), [[rows[i]] for i in said])
        sums = span_losses(self.model, tokens, _written, [[]])[0, :, 0]
        acts = self.model.capture(tokens, self.direction.reads, logits=False)
        along, inside = self.direction.along(acts).cpu(), (tokens.tail_of > 0).cpu()
        repeats = torch.tensor([_repeated(rows[i]) for i in said])
        out[said] = torch.stack([sums[:, 0] / sums[:, 2], (along * inside).sum(1) / inside.sum(1), repeats], 1)
        return out


def _written(tokens: Tokens, prompt: Int[Tensor, "row"]) -> list[Bool[Tensor, "row column"]]:
    """Return the columns behind which a token of the continuation stands."""
    return [(tokens.tail_of > 0).roll(-1, 1)]


@method(
    answers="What does a model write under a direction, text beside text, and how fluent is it?",
    paper="Turner et al. 2023, arXiv:2308.10248",
    cost="prompts * (new_tokens + 3) * way * (1 + samples) * F",
    control="random_directions",
    rung="interventional",
)
def complete(
    model: Model,
    direction: Steering,
    prompts: Prompts,
    /,
    *,
    strengths: tuple[float, ...] = (-2.0, -1.0, 1.0, 2.0),
    new_tokens: int = 24,
    instruction: str = "",
    chat: bool = False,
    samples: int = 2,
    seed: int = 0,
) -> Completions:
    """Continue prompts at several strengths of a direction, and let the unsteered model read what was written.

    Args:
        strengths: factors of the direction's vectors, none of them 0: the plain continuation is always there.
        new_tokens: number of tokens of a continuation, unless the text ends.
        instruction: text in front of each prompt, or of what the user of a chat says, as the other way to the same end.
        chat: put each prompt into the chat template, where the model has one, as what the user says.
        samples: number of random directions; the text of the first one at the last strength is kept.
        seed: of the random directions.

    Raises:
        Refused: a direction of another width, no strength or one of 0, prompts without text, or a model that
            predicts no next token.
    """
    check_predicts(model)
    direction.check(model)
    if not strengths or 0.0 in strengths or len(set(strengths)) < len(strengths):
        raise Refused(Keyword("strengths", ",".join(map(str, strengths))), "one is 0, or twice", "use for example -1,1")
    if not all(t.strip() for t in prompts):
        raise Refused(f"completions of {len(prompts)} prompts", "they have no text", "give texts")
    texts = as_prompts(model, list(prompts), chat)
    writer = _Writer(model, direction, texts, new_tokens)

    def steered(own: Steering) -> list[list[list[int]]]:
        return [writer.write(own.add(s)) for s in strengths]

    drawn = [steered(d) for d in direction.random(samples, seed)]
    rows = [writer.write(), *steered(direction), drawn[0][-1]]
    ways = [_PLAIN, *(f"{s:g}" for s in strengths), _RANDOM]
    if instruction:
        rows.append(writer.write(prompts=[_instructed(model, t, instruction) for t in texts]))
        ways.append(_PROMPTED)
    said = [model.tokenizer.batch_decode(own, skip_special_tokens=True) for own in rows]
    found = torch.stack([writer.read(own) for own in rows])
    chance = torch.stack([torch.stack([writer.read(own) for own in each]) for each in drawn])
    fields: dict[str, Any] = _measured(found, chance)
    return Completions(
        **fields,
        each=found[..., 0].T.contiguous(),
        labels={
            "way": ways,
            "prompt": list(prompts),
            "each": [list(own) for own in zip(*said, strict=True)],
            "bound": BOUNDS,
        },
        units=_UNITS,
        neutral={name: float(fields[name][0]) for name in _FIELDS},
        reasons=one_prompt(len(prompts), *_FIELDS) | dict.fromkeys((_PLAIN, _PROMPTED), "no direction is added"),
        record={"empty": int(found[..., 0].isnan().sum()), "tokens": new_tokens},
    )


def _instructed(model: Model, prompt: str, instruction: str) -> str:
    """Return a prompt with an instruction in front: of a chat, in front of what its user says first."""
    if not isinstance(prompt, chats.Chat):
        return instruction + prompt
    first = next((n for n, m in enumerate(prompt.messages) if m["role"] == "user"), 0)
    said = [{**m, "content": instruction + m["content"]} if n == first else m for n, m in enumerate(prompt.messages)]
    return chats.chat(model, said)


def _measured(
    found: Float[Tensor, "way prompt 3"], chance: Float[Tensor, "sample strength prompt 3"]
) -> dict[str, Tensor]:
    """Return the fields per way with intervals over prompts, and what random directions do at the same strength."""
    out = dict[str, Tensor]()
    for i, name in enumerate(_FIELDS):
        own, prefix = found[..., i], "" if name == _FIELDS[0] else f"{name}_"
        within = (0.0, 1.0) if name == "repeated" else (-math.inf, math.inf)
        out[name] = own.nanmean(1)
        out[f"{prefix}interval"] = torch.stack([mean_interval(x[~x.isnan()], within=within) for x in own])
        drawn = chance[..., i].nanmean(-1).T  # [strength, sample]
        null = torch.full((len(own), drawn.shape[1]), torch.nan)
        null[1 : len(drawn) + 2] = torch.cat([drawn, drawn[-1:]])  # of the strengths, and of `random` at the last
        out[f"{prefix}null"] = null
    return out


def _repeated(ids: Sequence[int]) -> float:
    """Return the share of three tokens in a row that stood there before."""
    triples = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
    return 1 - len(set(triples)) / len(triples) if triples else 0.0
