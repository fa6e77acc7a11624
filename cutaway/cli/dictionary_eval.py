"""`cutaway dict eval`: how good a dictionary is, beside its controls."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cutaway.cli.dictionary_files import CHOICE, FILE, FORMAT, opened
from cutaway.cli.shell import Reply, as_data, stages
from cutaway.cli.subjects import DEFAULT_MODEL, load_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from cutaway.dictionaries.dictionary import Dictionary
    from cutaway.dictionaries.judge.evidence import Evidence, Seen
    from cutaway.dictionaries.judge.scores import Scores
    from cutaway.models.model import Model
    from cutaway.streams import Documents

HELD_OUT = 1_000_003  # seed of a world's documents that no training run uses


def evaluate(
    file: Annotated[str, Parameter(help=f"the dictionary: {FILE}")],
    /,
    *,
    choice: Annotated[list[str] | None, Parameter(help=CHOICE)] = None,
    format: Annotated[str | None, Parameter(help=FORMAT)] = None,
    model: Annotated[str, Parameter(help="zoo name, folder, or Hugging Face id")] = DEFAULT_MODEL,
    text: Annotated[
        str | None, Parameter(help="held-out text: a file, a folder of them, or .jsonl; a zoo world has its own")
    ] = None,
    truth: Annotated[str | None, Parameter(help="judge on a synthetic benchmark (1k, 4k, 16k), not on a model")] = None,
    tokens: Annotated[int, Parameter(help="tokens judged on")] = 32768,
    sequences: Annotated[int, Parameter(help="sequences on which the loss is recovered; 0 leaves that out")] = 32,
    context: Annotated[int, Parameter(help="tokens a context")] = 96,
    features: Annotated[int, Parameter(help="show so many of the clearest latents in context")] = 0,
    other: Annotated[str | None, Parameter(help="another dictionary of the same site to compare with")] = None,
    random_weights: Annotated[
        int, Parameter(help="train the same recipe for so many tokens on the model with shuffled weights, as a control")
    ] = 0,
    nulls: Annotated[int, Parameter(help="random dictionaries with the same norms")] = 2,
    seed: Annotated[int, Parameter(help="of controls and intervals")] = 0,
    out: Annotated[Path | None, Parameter(group="Output", help="file to save the scores in (.safetensors)")] = None,
) -> Reply:
    """Judge a dictionary on held-out activations: every score with its interval, its null and its controls."""
    dictionary = opened(file, choice or (), format, options=True)
    with stages() as step:
        if truth is not None:
            scores, beside = _on_truth(dictionary, truth, tokens, nulls, seed, step), {}
        else:
            job = _Job(dictionary, load_model(model), text, tokens, sequences, context, nulls, seed, step)
            scores, beside = job.judge(features, other, random_weights)
    scores = replace(scores, record=scores.record | {"file": file})
    saved = None if out is None else scores.save(out)
    data = {"scores": as_data(scores), **{n: b if isinstance(b, list) else as_data(b) for n, b in beside.items()}}
    return Reply(data, lambda console: _show(console, scores, beside, saved))


def _on_truth(d: Dictionary, name: str, tokens: int, nulls: int, seed: int, step: Callable[[str], None]) -> Scores:
    from cutaway.dictionaries.judge.evaluate import evaluate as judge
    from cutaway.dictionaries.judge.evidence import Evidence
    from cutaway.dictionaries.truth import synthetic

    step(f"making the truth {name} …")
    made = synthetic(name)
    step("judging …")
    return judge(d, Evidence.gather(made.batches(4096, seed=HELD_OUT), tokens), truth=made, nulls=nulls, seed=seed)


class _Job:
    """One dictionary judged on one model's activations."""

    def __init__(
        self, dictionary: Dictionary, model: Model, text: str | None, tokens: int, sequences: int, context: int,
        nulls: int, seed: int, step: Callable[[str], None],
    ):  # fmt: skip
        self.dictionary, self.model, self.tokens, self.sequences = dictionary, model, tokens, sequences
        self.context, self.nulls, self.seed, self.step = context, nulls, seed, step
        self.documents = _documents(model, text)

    def judge(self, features: int, other: str | None, random_weights: int) -> tuple[Scores, dict[str, Any]]:
        """The scores, and what else was asked for."""
        from cutaway.dictionaries.judge.evaluate import evaluate as judge
        from cutaway.dictionaries.judge.evidence import observe
        from cutaway.dictionaries.judge.scores import joined

        self.step("reading activations …")
        evidence, identity = self.evidence(self.model)
        others = {"random weights": self.untaught(random_weights)} if random_weights else {}
        self.step("judging …")
        scores = judge(self.dictionary, evidence, nulls=self.nulls, others=others, seed=self.seed)
        if self.sequences:
            self.step("recovering the loss …")
            scores = joined([scores, self.loss(evidence)])
        beside: dict[str, Any] = {}
        if features:
            beside["features"] = self.features(observe(self.dictionary, evidence), features)
        if other is not None:
            self.step("comparing …")
            beside |= self.compared(other, evidence)
        trained = self.dictionary.about.get("stream", {})
        seen = trained.get("documents") == identity["documents"] if isinstance(trained, dict) else False
        return replace(
            scores, record=scores.record | {"documents": identity["documents"], "trained on them": seen}
        ), beside

    def evidence(self, model: Model) -> tuple[Evidence, dict[str, Any]]:
        """Held-out activations of what the dictionary reads and writes."""
        from cutaway.dictionaries.judge.evidence import Evidence
        from cutaway.streams import LiveStream, Packing

        sites = tuple(dict.fromkeys((*self.dictionary.reads, *self.dictionary.writes)))
        packing = Packing(context=self.context)
        stream = LiveStream(model, self.documents, sites, packing=packing, batch=2048, window=self.tokens)
        return Evidence.gather(stream, self.tokens), stream.identity()

    def loss(self, evidence: Evidence) -> Scores:
        """What the model can still do with the dictionary in it."""
        from cutaway.dictionaries.judge.controls import controls, random_dictionary
        from cutaway.dictionaries.judge.evidence import observe
        from cutaway.dictionaries.judge.loss import loss_recovered
        from cutaway.models.tokens import batch

        read = islice(self.documents.read(0), self.sequences)
        rows: list[Any] = [self.model.tokenizer(d)["input_ids"] if isinstance(d, str) else list(d) for d in read]
        prompts = batch([r[: self.context] for r in rows if len(r) > 1])
        fit, _ = evidence.parted()
        l0 = observe(self.dictionary, fit).l0
        null = [random_dictionary(self.dictionary, fit, l0, seed=self.seed + i) for i in range(self.nulls)]
        beside = controls(self.dictionary, fit, l0)
        return loss_recovered(self.model, self.dictionary, prompts, null=null, control=beside, seed=self.seed)

    def untaught(self, tokens: int) -> tuple[Dictionary, Evidence]:
        """The same recipe on the model with shuffled weights: a dictionary and its evidence."""
        from cutaway.core.refuse import Refused
        from cutaway.dictionaries import train as tr
        from cutaway.dictionaries.judge.evaluate import shuffled_model
        from cutaway.streams import LiveStream, Packing

        if "recipe" not in self.dictionary.about:
            why = "the dictionary does not say how it was trained"
            raise Refused("--random-weights", why, "give one that `cutaway dict train` made")
        self.step("training on shuffled weights …")
        model, recipe = shuffled_model(self.model, self.seed), tr.recipe_of(self.dictionary.about["recipe"])
        sites = tuple(dict.fromkeys((*recipe.reads, *recipe.writes)))
        packing = Packing(context=self.context)
        stream = LiveStream(model, self.documents, sites, packing=packing, batch=2048, epochs=None)
        made = tr.train(stream, replace(recipe, rate=self.dictionary.about.get("rate")), tr.Plan(tokens=tokens))
        return (made[0] if isinstance(made, list) else made).dictionary, self.evidence(model)[0]

    def features(self, seen: Seen, n: int) -> list[dict[str, Any]]:
        """The clearest latents, with the contexts in which they are largest."""
        from cutaway.core.refuse import Refused
        from cutaway.dictionaries.judge.features import context, features

        found, rows = features(seen, n=n), []
        for i, latent in enumerate(found.latent.tolist()):
            shown = []
            for value, token in zip(found.largest[i].tolist(), found.token[i].tolist(), strict=True):
                if token < 0:
                    continue
                try:
                    ids, at = context(seen, token)
                except Refused:
                    ids, at = [int(seen.evidence.ids[token])], 0  # type: ignore[index]
                words = self.model.token_texts(ids, running=True)
                shown.append({"value": value, "before": "".join(words[:at]), "token": words[at],
                              "after": "".join(words[at + 1 :])})  # fmt: skip
            rows.append({"latent": latent, "focus": float(found.focus[i]), "frequency": float(found.frequency[i]),
                         "mean active": float(found.mean_active[i]), "contexts": shown})  # fmt: skip
        return rows

    def compared(self, other: str, evidence: Evidence) -> dict[str, Any]:
        """The dictionary beside another one: partners, and what the narrower one's latents split into."""
        from cutaway.dictionaries.judge.evidence import observe
        from cutaway.dictionaries.judge.stability import compare, splitting

        here, there = observe(self.dictionary, evidence), observe(opened(other), evidence)
        narrow, wide = sorted((here, there), key=lambda s: s.dictionary.n_latents)
        return {"comparison": compare(here, there), "splitting": splitting(narrow, wide)}


def _documents(model: Model, text: str | None) -> Documents:
    from cutaway.core.refuse import Refused
    from cutaway.streams import documents

    if text is not None:
        return documents(text)
    if model.world is None:
        raise Refused("judging without --text", "only models of the zoo have text of their own", "give --text FILE")
    from cutaway.zoo.miniworld.documents import WorldDocuments

    return WorldDocuments(model.world, seed=HELD_OUT)


def _show(console: Console, scores: Scores, beside: dict[str, Any], saved: Path | None) -> None:
    from rich.table import Table

    from cutaway.views.spec import number, span

    controls = [str(n) for n in scores.labels["control"]]
    units = scores.record.get("units", {})
    shown = Table("score", "value", "95 % interval", "random", *controls, title=f"{scores.record['file']}")
    shown.columns[0].no_wrap = shown.columns[2].no_wrap = True
    for i, name in enumerate(scores.labels["score"]):
        low, high = scores.interval[i].tolist()
        random = ", ".join(number(v) for v in scores.null[i].tolist() if v == v)
        inside = span(low, high) if low == low else "–"
        values = [number(v) for v in scores.control[i].tolist()]
        shown.add_row(name, number(float(scores.score[i])), inside, random, *values)
    console.print(shown)
    by_unit = {u: ", ".join(n for n in units if units[n] == u) for u in dict.fromkeys(units.values())}
    console.print("; ".join(f"{names}: {unit}" for unit, names in by_unit.items()), style="dim")
    if scores.record.get("trained on them"):
        console.print("[yellow]the dictionary was trained on these documents: give others with --text[/]")
    for row in beside.get("features", []):
        console.print(f"[bold]latent {row['latent']}[/]  focus {row['focus']:.2f}, on {row['frequency']:.2%} of tokens")
        for c in row["contexts"][:4]:
            console.print(_line(c), soft_wrap=True)
    for name in ("comparison", "splitting"):
        if name in beside:
            from cutaway.cli.picture import draw

            draw(console, beside[name])
    if saved is not None:
        console.print(f"saved to {saved}; show it again with [bold]cutaway open {saved}[/]")


def _line(c: dict[str, Any]) -> Any:
    from rich.text import Text

    before, token, after = (c[k].replace("\n", "↵") for k in ("before", "token", "after"))
    return Text(f"  {c['value']:6.2f}  …{before}").append(token, "bold reverse").append(after)
