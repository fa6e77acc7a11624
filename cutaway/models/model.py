"""The model: a live transformers model under the field's names. Analyses are functions elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from cutaway.core.address import Address, expand
from cutaway.core.out_of_memory import in_halves
from cutaway.core.refuse import Code, Keyword, Refused
from cutaway.core.repeat import Made
from cutaway.core.sites import SITES
from cutaway.models.access import backward, forward, taps
from cutaway.models.access.capture import Activations, Collector
from cutaway.models.access.ports import port
from cutaway.models.access.positions import frame_of
from cutaway.models.access.reading import Measure, OfLogits, measure_of, observe
from cutaway.models.anatomy import rope
from cutaway.models.anatomy.anatomy import Anatomy, Shape
from cutaway.models.anatomy.families import Family
from cutaway.models.anatomy.foreign_names import foreign
from cutaway.models.anatomy.linear import home, leading
from cutaway.models.anatomy.multiplier import measured
from cutaway.models.anatomy.recognise import family_of
from cutaway.models.anatomy.weights import Weights
from cutaway.models.edits.batch_slice import BatchSlice
from cutaway.models.edits.edit import Edit, as_edits, of_prompts
from cutaway.models.generate import continuations
from cutaway.models.loading.identity import beside, fingerprint
from cutaway.models.sweep import processes as shards
from cutaway.models.tokens import Side, Tokens, batch, tokenize
from cutaway.models.vocabulary import Vocabulary

Prompts = str | Sequence[str] | Tokens | Tensor
T = TypeVar("T")


_SEE_SITES = ("see ", Code("model.sites()"))


class Model:
    """A causal language model (or encoder) whose every named activation can be read and edited.

    `hf` stays the user's own object: nothing is folded, renamed or replaced in it, and after any call, or any
    exception, it is bit for bit what it was.
    """

    def __init__(
        self, hf: Any, tokenizer: Any = None, name: str = "", world: Any = None, disabled: dict[str, str] | None = None
    ):
        self.hf, self.tokenizer, self.world = hf, tokenizer, world
        self.anatomy = Anatomy(hf, family_of(hf), measured)
        self.name = name or getattr(hf.config, "name_or_path", "") or self.family.name
        self.program: Any = None  # the program that its weights are or that it learned, of a model of the zoo
        self.made: Made | None = None  # how it was loaded; unknown of a live model
        self.disabled = self.anatomy.disabled  # what is wrong on this model, by name, with the reason
        self.disabled.update(shards.split_sites(hf) | (disabled or {}))

    @property
    def family(self) -> Family:
        """The row of family data."""
        return self.anatomy.family

    @property
    def shape(self) -> Shape:
        """Sizes: n_layers, n_heads, n_kv_heads, d_model, d_head, d_mlp, d_vocab, context."""
        return self.anatomy.shape

    @property
    def device(self) -> torch.device:
        """Device of the embeddings, and so of the tokens."""
        return home(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings."""
        return leading(self.hf).dtype

    def __repr__(self) -> str:
        s = self.shape
        heads = f" × {s.n_heads} heads" if s.n_heads else ""
        return f"Model({self.name}: {self.family.name}, {s.n_layers} layers{heads}, d_model {s.d_model})"

    # --- what there is

    def sizes(self) -> dict[str, int]:
        """Return the sizes by axis name and plural, for addresses and cost expressions."""
        s = self.shape
        return {
            "layer": s.n_layers,
            "head": s.n_heads,
            "kv_head": s.n_kv_heads,
            "neuron": s.d_mlp,
            "expert": s.n_experts,
            "channel": s.d_inner,
            "ssm_head": s.n_ssm_heads,
            "layers": s.n_layers,
            "heads": s.n_heads,
            "neurons": s.d_mlp,
            "vocabulary": s.d_vocab,
        }

    def identity(self) -> dict[str, Any]:
        """Return the name, family, hashes, and origin and active rewrites of the weights, for records."""
        return {
            "name": self.name,
            "family": self.family.name,
            "config": self.anatomy.configuration(),
            "weights": self.fingerprint(),
            "dtype": str(self.dtype).removeprefix("torch."),
            **beside(self.hf),
        }

    def fingerprint(self, fresh: bool = False) -> str:
        """Hash of every module's type, settings and attachments, and of every byte of parameters and buffers.

        Of weights that are offloaded only names and shapes count, and it says so. Weights are hashed again only where
        a change is noticed, or with `fresh` (see `core.record.hash_tensors`).
        """
        return fingerprint(self.hf, fresh)

    def sites(self) -> dict[str, str]:
        """Return every site with "read and write", "read", or the reason why this model does not have it."""
        out = {}
        for row in SITES:
            places = (
                [Address(row.name, i) for i in range(self.shape.n_layers)]
                if row.scope == "layer"
                else [Address(row.name)]
            )
            found = [p for p in places if port(self.anatomy, p) is not None]
            if row.name in self.disabled:
                out[row.name] = f"disabled: {self.disabled[row.name]}"
            elif not found:
                out[row.name] = "absent in this family"
            else:
                some = "" if len(found) == len(places) else f" (layers {', '.join(str(p.layer) for p in found)})"
                out[row.name] = ("read and write" if row.writable else "read") + some
        return out

    def places(self, patterns: str | Address | Sequence[str | Address]) -> list[Address]:
        """Return the addresses meant by one or several patterns; a pattern over layers skips those without the site.

        Raises:
            Refused: no such site or index, or one this model does not have.
        """
        exact = [patterns] if isinstance(patterns, str | Address) else list(patterns)
        found = self.anatomy.remember(("places", *exact), lambda: self._there(exact))
        for a in {a.site: a for a in found}.values():
            if a.site in self.disabled:
                raise Refused(f"site {a.site} of {self.name}", self.disabled[a.site], _SEE_SITES)
        return list(found)

    def _there(self, patterns: Sequence[str | Address]) -> list[Address]:
        found = list(dict.fromkeys(a for p in patterns for a in self._meant(p)))
        absent = {a.place for a in found if port(self.anatomy, a) is None}
        if absent:
            exact = {str(p) for p in patterns}
            left = [a for a in found if a.place not in absent]
            gone = [a for a in found if a.place in absent]
            if any(str(a) in exact for a in gone) or {a.site for a in gone} - {a.site for a in left}:
                family = self.family.name
                raise Refused(f"site {gone[0]}", f"this {family} model has no such place", _SEE_SITES)
            found = left
        return found

    def _meant(self, pattern: str | Address) -> list[Address]:
        try:
            return expand([pattern], self.sizes())
        except Refused as refusal:
            raise foreign(refusal, pattern, self.anatomy.part(0, "gate") is not None) from None

    # --- tokens

    def tokens(self, prompts: Prompts, side: Side = "right", bos: bool | None = None) -> Tokens:
        """Return the prompts as tokens on the model's device.

        `bos` puts the beginning-of-text token in front where the tokenizer puts none (True: as streams of activations
        have it by default), or leaves it off (False). Behind the prompts stands nothing, whatever the tokenizer puts
        there; a prompt that begins with that token itself gets no second one.

        Raises:
            Refused: empty or too long prompts, ids outside the vocabulary, or no tokenizer.
        """
        if bos is not None and isinstance(prompts, Tokens | Tensor):
            raise Refused(
                (Keyword("bos", bos), " with token ids"), "ids are taken as they are", "put the id there, or give texts"
            )
        if isinstance(prompts, Tokens):
            t = prompts
        elif isinstance(prompts, Tensor):
            t = batch(torch.atleast_2d(prompts).tolist(), side=side)
        elif self.tokenizer is None:
            raise Refused(
                f"prompt {prompts!r}",
                "this model was loaded without a tokenizer",
                ("give token ids, or ", Code("load(…, tokenizer=…)")),
            )
        else:
            t = tokenize(self.tokenizer, prompts, side, self.shape.context, bos, self.family.causal)
        least, most = t.extremes
        rows = getattr(self.hf.get_input_embeddings(), "num_embeddings", None) or self.shape.d_vocab
        if least < 0 or most >= rows:
            raise Refused("prompt", f"it needs token ids from 0 to {rows - 1}", "give ids of this model's vocabulary")
        if t.ids.device != (device := self.device):
            t = t.to(device)
        if t.ids.shape[1] > self.shape.context:
            raise Refused(
                "prompt", f"it has {t.ids.shape[1]} tokens, the model takes {self.shape.context}", "shorten it"
            )
        return t

    @property
    def text(self) -> Vocabulary:
        """Words as tokens, tokens as words, and the most likely next tokens."""
        return Vocabulary(self.tokenizer, self.tokens, self.run_last)

    # --- running

    def run(self, prompts: Prompts, edits: Edit | Sequence[Edit] = ()) -> Float[Tensor, "batch position token"]:
        """Return the logits at every position (padding included), under edits."""
        t = self.tokens(prompts)
        return rope.in_order(*_in_parts(self, t, edits, partial(forward.all_logits, self.anatomy)))

    def run_last(self, prompts: Prompts, edits: Edit | Sequence[Edit] = ()) -> Float[Tensor, "batch token"]:
        """Return the logits after the last real token of each prompt; only those are unembedded.

        Where memory runs out, the prompts are run in halves (but not inside `edited`, whose values are of them all).
        """
        t = self.tokens(prompts)
        return rope.in_order(*_in_parts(self, t, edits, partial(forward.last_logits, self.anatomy), halves=True))

    def capture(
        self,
        prompts: Prompts,
        sites: str | Address | Sequence[str | Address],
        edits: Edit | Sequence[Edit] = (),
        logits: bool = True,
        bos: bool | None = None,
    ) -> Activations:
        """Return the activations at the asked addresses (patterns allowed), under edits.

        With `logits=False` the model stops as soon as the deepest of them, and every edit, has been reached. `bos` is
        that of `tokens`.
        """
        t, asked = self.tokens(prompts, bos=bos), self.places(sites)

        def run(some: Tokens) -> Activations:
            collector = Collector(self.anatomy, asked, live=False, stops=not logits)
            with taps.attached(self.anatomy, {p: collector.see(p) for p in collector.places}):
                if logits:
                    forward.all_logits(self.anatomy, some)
                else:
                    forward.streams(self.anatomy, some, collector.share)
            collector.notice(some)
            return collector.activations(some)

        rows, parts = _in_parts(self, t, edits, run)
        if len(parts) == 1:
            return parts[0]
        places = dict.fromkeys(a.place for a in asked)
        return Activations({a: rope.in_order(rows, [part[a] for part in parts]) for a in places}, t)

    def measure(
        self, prompts: Prompts, metric: Measure | OfLogits, edits: Edit | Sequence[Edit] = ()
    ) -> Float[Tensor, "batch *metric"]:
        """Return the metric of each prompt, under edits.

        The metric takes the last logits and the index of each row's prompt, or is a `Measure` of whatever it reads.
        """
        t, what = self.tokens(prompts), measure_of(metric)
        done, parts = _in_parts(self, t, edits, lambda some: observe(self.anatomy, some, what.reads), halves=True)
        with torch.no_grad():
            pairs = zip(parts, done, strict=True)
            values = [what(seen, torch.tensor(rows, device=t.ids.device)) for seen, rows in pairs]
        return rope.in_order(done, values)

    def gradients(
        self,
        prompts: Prompts,
        sites: str | Address | Sequence[str | Address],
        metric: Measure | Callable[[Float[Tensor, "batch token"]], Float[Tensor, "batch"]],
        edits: Edit | Sequence[Edit] = (),
    ) -> tuple[Float[Tensor, "batch"], Activations, Activations]:
        """Return the metric of each prompt, its gradients at the asked sites, and the activations there.

        The metric takes the last logits, or is a `Measure` of whatever it reads. Gradients are those of each prompt's
        own metric; parameters' `.grad` stay untouched.

        Raises:
            Refused: the metric does not depend on an asked site, or not on what it reads at all.
        """
        t, asked = self.tokens(prompts), self.places(sites)
        with self.edited(*as_edits(edits)):
            values, slopes, given = backward.gradients(self.anatomy, t, asked, metric)
        return values, slopes[0], given

    def generate(
        self, prompts: Prompts, max_new_tokens: int = 20, edits: Edit | Sequence[Edit] = (), **options: Any
    ) -> list[str]:
        """Greedy continuations under edits, with the key-value cache.

        Edits with a position act on that position of the prompt; edits without one act on every new token too.
        `options` go to transformers' `generate` (do_sample, temperature, num_beams, cache_implementation …). What the
        checkpoint's own generation settings ask for (penalties, sampling, suppressed tokens) is left out, unless it is
        given as an option; only its end-of-text tokens are kept.

        Raises:
            Refused: an encoder, too many tokens, or an option that is unknown, has its own place here, or does not fit.
        """
        return continuations(self, self.tokens(prompts, side="left"), max_new_tokens, as_edits(edits), options)

    @contextmanager
    def edited(self, *edits: Edit) -> Iterator[Model]:
        """Everything run inside, `model.hf` included, runs with these edits; nested contexts add up.

        Other threads' runs of this model wait until the context is left.

        Raises:
            Refused: an edit that cannot be made, or one that was never reached by a forward.
        """
        if not edits:
            with forward.alone(self.hf), forward.evaluating(self.anatomy):
                yield self
            return
        sees: dict[Address, list[Edit]] = {}
        for e in as_edits(edits):
            self.places([e.where])
            sees.setdefault(e.where.place, []).append(e)
        scratch = dict[Any, Any]()
        chains = {p: _chain(es, scratch) for p, es in sees.items()}
        placed = any(e.placed for es in sees.values() for e in es)
        guard = forward.refuse_cached_forwards(self.anatomy) if placed else nullcontext()
        with forward.alone(self.hf), forward.evaluating(self.anatomy), guard, taps.attached(self.anatomy, chains):
            yield self

    @property
    def weights(self) -> Weights:
        """Weights as views under the field's names."""
        return Weights(self.anatomy)


def _in_parts(
    model: Model, t: Tokens, edits: Edit | Sequence[Edit], run: Callable[[Tokens], T], halves: bool = False
) -> tuple[list[Sequence[int]], list[T]]:
    """Call `run` on the prompts that may run together under edits, and return the rows and outcome of each call.

    With `halves`, prompts are halved where memory runs out. Under edits already open, all prompts run at once.
    """
    made, done, out = as_edits(edits), list[Sequence[int]](), list[T]()

    def work(rows: Sequence[int]) -> None:
        prompts = BatchSlice.of(t, rows, False)
        with model.edited(*of_prompts(made, prompts)), torch.no_grad():
            out.append(run(t if prompts.everything else prompts.tokens(t)))
        done.append(rows)

    if taps.busy(model.anatomy):
        work(range(len(t)))
    else:
        for rows in rope.apart(model.anatomy, t):
            in_halves(rows, len(rows), work) if halves else work(rows)
    return done, out


def _chain(edits: Sequence[Edit], scratch: dict[Any, Any]) -> Callable[[Tensor], Tensor]:
    axes = edits[0].where.row.axes.split()

    def see(x: Tensor) -> Tensor:
        frame = frame_of(x, axes, scratch)
        for e in edits:
            x = e.apply(x, frame)
        return x

    return see
