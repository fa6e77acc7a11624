"""What `cutaway dict eval` reads from a model: evidence, contexts for the loss, and dictionaries to compare with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from cutaway.core.address import parse
from cutaway.core.refuse import Refused
from cutaway.dictionaries import training as tr
from cutaway.dictionaries.about import trained_bos
from cutaway.dictionaries.dictionary import Dictionary
from cutaway.dictionaries.evaluation.controls import controls, mlp_neurons, neuron_sites, random_dictionary
from cutaway.dictionaries.evaluation.evidence import Evidence, Seen, observe
from cutaway.dictionaries.evaluation.loss import loss_recovered
from cutaway.dictionaries.evaluation.scores import Scores, control_seed
from cutaway.dictionaries.gates import row_of
from cutaway.dictionaries.transforms import alone, together
from cutaway.models import shuffled
from cutaway.models.tokens import batch
from cutaway.streams import LiveStream, Packing, documents, from_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

    from cutaway.models.model import Model
    from cutaway.streams import Documents

HELD_OUT = 1_000_003  # seed of a world's documents that no training run uses
BATCH = 2048
NEURONS = 1 << 28  # values of MLP neurons that are held as evidence at most


@dataclass
class Job:
    """One dictionary judged on one model's activations; `tokens` of `text` in contexts of `context` tokens."""

    dictionary: Dictionary
    model: Model
    text: str | None
    tokens: int
    context: int
    nulls: int
    seed: int
    step: Callable[[str], None]

    def __post_init__(self) -> None:
        if models := self.dictionary.models:
            why = f"its sites name models ({', '.join(models)}), and activations are read from one model here"
            way = "judge it in Python: judge.evaluate(dictionary, Evidence({site: activations, …}))"
            raise Refused(f"judging {self.dictionary!r}", why, way)
        self.documents = _documents(self.model, self.text)

    @cached_property
    def neurons(self) -> tuple[str, ...]:
        """Sites of the model's own MLP neurons that are a control."""
        found = tuple(neuron_sites(self.model, self.dictionary).values())
        d_mlp = self.model.weights.mlp_out(parse(found[0]).layer or 0).shape[0] if found else 0
        return found if len(found) * d_mlp * self.tokens <= NEURONS else ()

    def stream(self, model: Model, sites: Sequence[str], batch: int = BATCH) -> LiveStream:
        """Activations of the documents from their beginning."""
        packing = Packing(self.context, self.bos)
        return LiveStream(model, self.documents, sites, packing=packing, batch=batch, window=self.tokens)

    @cached_property
    def bos(self) -> str:
        """Where a beginning-of-text token stands: as in the training, if the dictionary's file says it."""
        policy = trained_bos(self.dictionary.about)
        has = getattr(self.model.tokenizer, "bos_token_id", None) is not None
        return policy if policy is not None and (has or policy == "none") else "auto"

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """What the dictionary reads and writes."""
        return tuple(dict.fromkeys((*self.dictionary.reads, *self.dictionary.writes)))

    @cached_property
    def _reading(self) -> LiveStream:
        return self.stream(self.model, tuple(dict.fromkeys((*self.sites, *self.neurons))))

    @cached_property
    def evidence(self) -> Evidence:
        """Held-out activations of what the dictionary reads and writes, and of MLP neurons."""
        self.step("reading activations …")
        return Evidence.gather(self._reading, self.tokens)

    @cached_property
    def parts(self) -> tuple[Evidence, Evidence]:
        """The evidence that controls are fitted on, and the one that is judged on."""
        return self.evidence.parted()

    @cached_property
    def fit_l0(self) -> float:
        """Active latents a token where controls are fitted."""
        return observe(self.dictionary, self.parts[0]).l0

    @cached_property
    def seen(self) -> Seen:
        """The dictionary on what is judged on."""
        return observe(self.dictionary, self.parts[1])

    @cached_property
    def random(self) -> list[Dictionary]:
        """Random dictionaries with the same norms and L0."""
        fit = self.parts[0]
        return [random_dictionary(self.dictionary, fit, self.fit_l0, seed=self.seed + i) for i in range(self.nulls)]

    def mlp_neurons(self) -> dict[str, Dictionary]:
        """The model's own neurons as a control, where they are one."""
        made = mlp_neurons(self.model, self.dictionary, self.parts[0], self.fit_l0) if self.neurons else None
        return {} if made is None else {"mlp neurons": made}

    def trained_here(self) -> bool:
        """Whether the dictionary's file says that it was trained on these documents."""
        trained = self.dictionary.about.get("stream", {})
        return isinstance(trained, dict) and trained.get("documents") == self.documents.identity()

    def loss(self, sequences: int) -> Scores:
        """What the model can still do with the dictionary in it, on contexts that no control was fitted on."""
        self.step("recovering the loss …")
        fit, rest = self.parts
        assert fit.context is not None
        assert rest.context is not None
        chosen = sorted(set(rest.context.tolist()) - set(fit.context.tolist()))[:sequences]
        reader = self._reading.reader
        rows = [ids.tolist() for _, ids in sorted(self.contexts(chosen).items())]
        if not rows:
            raise Refused("the loss", "no context is free of tokens that controls were fitted on", "give more text")
        tokens = batch(rows, pad=reader.packer.pad)
        special = torch.isin(tokens.ids, reader.rule.special)
        beside = controls(self.dictionary, fit, self.fit_l0) | self.mlp_neurons()
        return loss_recovered(self.model, self.dictionary, tokens, special=special, null=self.random, control=beside)

    def untaught(self, tokens: int) -> tuple[Dictionary, Evidence, str]:
        """The same recipe on the model with shuffled weights: a dictionary, its evidence, and how it was made.

        It is judged on the same tokens as the dictionary, and trained on those behind them.
        """
        self.step("training on shuffled weights …")
        recipes, note = self._recipes()
        model = shuffled(self.model, control_seed(self.seed))
        stream = self.stream(model, self.sites, min(BATCH, tokens))
        evidence = Evidence.gather(stream, self.tokens)
        try:
            made = tr.train(stream, recipes, tr.Plan(tokens=tokens))
        except Refused as refusal:
            if "no tokens" not in refusal.why:
                raise
            why = "all of the text is judged on, and nothing is left to train on"
            raise Refused("--random-weights", why, "give more text, or fewer --tokens") from None
        done = made if isinstance(made, list) else [made]
        d = done[0].dictionary if len(done) == 1 else together([t.dictionary for t in done])
        return d, evidence.parted()[1], f"{note}, on {done[0].tokens} tokens behind those judged on"

    def _recipes(self) -> tuple[list[tr.Recipe], str]:
        about = self.dictionary.about
        parts = about.get("parts", [about])
        if all("recipe" in p for p in parts):
            return [replace(tr.recipe_of(p["recipe"]), rate=p.get("rate")) for p in parts], "the same recipe"
        d = self.dictionary
        made = [d] if len(d.blocks) == 1 or len(d.writes) > len(d.blocks) else [
            alone(d, b) for b in range(len(d.blocks))]  # fmt: skip
        return [recipe_like(m, self.fit_l0) for m in made], "no recipe in the file: the same sizes and kind of gate"

    def compared(self, other: Dictionary, name: str) -> dict[str, Any]:
        """The dictionary beside another one: partners, and what the narrower one's latents split into."""
        from cutaway.dictionaries.evaluation.stability import compare, splitting

        missing = [s for s in (*other.reads, *other.writes) if s not in self.sites]
        if missing or set(other.writes) != set(self.dictionary.writes):
            own, its = (" → ".join(", ".join(s) for s in (d.reads, d.writes)) for d in (self.dictionary, other))
            why = f"it is of {its}, and the dictionary judged of {own}"
            raise Refused(f"--other {name}", why, "compare dictionaries of the same sites")
        self.step("comparing …")
        here, there = self.seen, observe(other, self.parts[1])
        narrow, wide = sorted((here, there), key=lambda s: s.dictionary.n_latents)
        return {"comparison": compare(here, there), "splitting": splitting(narrow, wide)}

    @property
    def fed(self) -> str:
        """What the contexts that it is judged on begin with, and whether that is known of its training."""
        known = "as in its training" if trained_bos(self.dictionary.about) == self.bos else "its training is not known"
        return f"{self._reading.beginning} ({known})"

    def contexts(self, numbers: Collection[int]) -> dict[int, Tensor]:
        """The ids of some contexts of the text, special tokens and sinks included."""
        return self._reading.reader.texts(numbers)

    def texts(self, texts: Sequence[str]) -> Evidence:
        """The activations of texts, one sequence each."""
        longest = max(len(ids) for ids in self.model.tokenizer(list(texts))["input_ids"]) + 2
        packing = Packing(context=min(self.context, longest), across=False, rows=32)
        given = from_texts(list(texts), "labelled texts")
        stream = LiveStream(self.model, given, self.sites, packing=packing, batch=BATCH, window=BATCH)
        return Evidence.gather(stream, 1 << 40)


def recipe_like(d: Dictionary, l0: float) -> tr.Recipe:
    """A recipe for a dictionary of the same blocks and kind of gate, as many latents active."""
    gate = d.gates[0]
    gating = row_of(type(gate).__name__).train.like(gate, max(1, round(l0 / len(d.blocks))))
    own = gating.fixed and all(b.reads == b.writes and len(b.reads) == 1 for b in d.blocks)
    return tr.Recipe(
        d.blocks, gating, gating.customary(), decoder="unit" if own else "free", subtract=own, skip=bool(d.skip)
    )


def _documents(model: Model, text: str | None) -> Documents:
    if text is not None:
        return documents(text)
    if model.world is None:
        raise Refused("judging without --text", "only models of the zoo have text of their own", "give --text FILE")
    from cutaway.zoo.miniworld.documents import WorldDocuments

    return WorldDocuments(model.world, seed=HELD_OUT)
