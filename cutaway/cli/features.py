"""`cutaway features harvest` and what else there is to do with stores of features."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cutaway.cli.dict.files import open_dictionary
from cutaway.cli.dict.source import FROM, From, open_origin
from cutaway.cli.method_commands import reply
from cutaway.cli.output import OUT_HELP, check_out, save
from cutaway.cli.processes import is_main_process
from cutaway.cli.repeat import repeated
from cutaway.cli.shell import Reply, as_data, stages
from cutaway.cli.subjects import load_model
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cutaway.dictionaries.dictionary import Dictionary
    from cutaway.features import CorpusDifference, Explanations, FeatureStore

USUAL = From()
By = Literal["label", "token", "phrase", "text", "raises"]
Dictionaries = Annotated[
    list[str],
    Parameter(
        help="a dictionary's file or folder, or miniworld/NAME; NAME=FILE gives it a name; may be repeated",
        negative=(),
        group=FROM,
    ),
]


def harvest(
    *,
    dictionary: Dictionaries,
    out: Annotated[Path, Parameter(help="folder of the store")],
    of: From = USUAL,
    tokens: Annotated[
        int | None, Parameter(help="read contexts until they hold this many tokens [default: all]")
    ] = None,
    across: Annotated[bool, Parameter(help="let contexts go across documents")] = True,
    top: Annotated[int, Parameter(help="largest examples of each latent")] = 20,
    samples: Annotated[int, Parameter(help="random examples from each octave of activation")] = 3,
    window: Annotated[int, Parameter(help="tokens around an example whose activations are kept")] = 32,
    codes: Annotated[float, Parameter(help="share of the documents whose whole codes are kept, for rules")] = 1.0,
    like: Annotated[Path | None, Parameter(help="a store to be merged with: its thresholds of sinks are used")] = None,
    seed: Annotated[int, Parameter(help="of random examples and of the held-out half")] = 0,
) -> Reply:
    """Write the store of features of dictionaries: statistics, examples and codes of all latents, in one pass.

    An interrupted harvest goes on when repeated. Under torchrun, processes share the contexts.
    """
    given = dict(locals())
    from cutaway.features import FeatureStore, Keep
    from cutaway.features import harvest as run
    from cutaway.streams import Masking, Packing

    with stages() as step:
        step("loading …")
        if of.acts is not None:
            raise Refused("--acts", "contexts go through the model, for their text is kept", "give --model and --text")
        origin = open_origin(of)
        documents = _finite(origin, tokens)
        named = dict(_named(word) for word in dictionary)
        if len(named) < len(dictionary):
            raise Refused("--dictionary", "two have one name", "write NAME=FILE")
        step("harvesting …")
        store = run(
            origin.model,
            {n: d.to(origin.model.device) for n, d in named.items()},
            documents,
            out,
            packing=Packing(of.context, _bos(origin, named.values()), across=across),
            masking=Masking(sinks=of.sinks or None),
            tokens=tokens,
            keep=Keep(top=top, samples=samples, window=window, codes=codes),
            like=None if like is None else FeatureStore(like),
            seed=seed,
        )
    command = repeated("features harvest", harvest, given | {"of": origin.pinned})
    data = {"folder": str(out), **store.manifest, "command": command}
    return Reply(data, lambda console: _show(console, store, command))


def merge(
    stores: Annotated[list[Path], Parameter(help="stores of different documents")],
    /,
    *,
    out: Annotated[Path, Parameter(help="a new folder")],
) -> Reply:
    """Make one store of several that were harvested alike from different documents."""
    from cutaway.features import FeatureStore
    from cutaway.features import merge as run

    with stages() as step:
        step("merging …")
        store = run([FeatureStore(s) for s in stores], out)
    return Reply({"folder": str(out), **store.manifest}, lambda console: _show(console, store, None))


def _named(word: str) -> tuple[str, Any]:
    name, equals, file = word.partition("=")
    if not equals or "?" in name or "/" in name or Path(word).exists():
        found = open_dictionary(word)
        from cutaway.features.store.dictionaries import named

        (name,) = named(found)
        return name, found
    return name, open_dictionary(file)


def _finite(origin: Any, tokens: int | None) -> Any:
    if origin.named:
        raise Refused("--model NAME=MODEL", "features are of one model", "give one model without a name")
    if origin.flags.text is None and origin.model.world is not None and tokens is None:
        raise Refused("harvest without --text and --tokens", "a world's text has no end", "give --tokens 1000000")
    return origin.documents


def _bos(origin: Any, dictionaries: Iterable[Dictionary]) -> str:
    """Return where a beginning-of-text token is put: as in the training of the dictionaries, if they say the same."""
    from cutaway.dictionaries.evaluation.reading import beginning

    policies = {beginning(origin.model, d) for d in dictionaries}
    return policies.pop() if origin.flags.bos == "auto" and len(policies) == 1 else origin.flags.bos


def _show(console: Any, store: FeatureStore, command: str | None) -> None:
    from rich.markup import escape

    m = store.manifest
    counts, size = m["counts"], sum(row["bytes"] for row in store.files())
    console.print(f"[bold]{counts['counted']:,}[/] tokens of {escape(m['model']['name'])}, {size / 2**20:.1f} MiB")
    for name in store.names:
        latents = store.latents(name)
        alive = int((latents.count > 0).sum())
        active = float(latents.count.sum()) / max(store.counted, 1)
        console.print(f"  {escape(name)}: {len(latents):,} latents, {alive:,} of them fire, {active:.1f} on a token")
    console.print(
        f"masked: {counts['special']:,} special, {counts['sinks']:,} sinks of {counts['tokens']:,}; left out: "
        f"{counts['duplicates']:,} contexts that were seen before; held out for scores: {counts['score']:,}"
    )
    console.print(escape(m["beginning"]), soft_wrap=True)
    console.print(escape(f"in Python: ca.features.FeatureStore({str(store.folder)!r})"), soft_wrap=True)
    if command is not None and is_main_process():
        console.print(escape(f"again: {command}"), soft_wrap=True)


STORE = Annotated[Path, Parameter(help="folder of `cutaway features harvest`")]
NAME = Annotated[str | None, Parameter(help="name of the dictionary in the store, where there are several")]
SOURCE = Annotated[str | None, Parameter(help="the dictionary's file [default: as when it was harvested]")]
MODEL = Annotated[str | None, Parameter(help="the model [default: as when it was harvested]")]


def card(
    store: STORE,
    latent: Annotated[int, Parameter(help="number of the latent")],
    *,
    name: NAME = None,
    model: MODEL = None,
    source: SOURCE = None,
    examples: Annotated[int, Parameter(help="largest examples that are shown, beside random ones")] = 6,
    tokens: Annotated[int, Parameter(help="raised tokens, lowered tokens and neighbours")] = 8,
    contexts: Annotated[int, Parameter(help="examples on which the latent is ablated; 0 leaves that out")] = 6,
    samples: Annotated[int, Parameter(help="random directions, and other latents that are ablated")] = 4,
    seed: Annotated[int, Parameter(help="seed of both")] = 0,
    alone: Annotated[bool, Parameter(help="open no model: leave out what needs it", negative="")] = False,
    out: Annotated[Path | None, Parameter(group="Output", help=OUT_HELP)] = None,
) -> Reply:
    """Show what a latent does: where it fires, what it writes, what it is like, and what ablating it changes."""
    from cutaway.features import FeatureStore
    from cutaway.features import card as make

    check_out(out)
    given = {"name": name, "model": model, "source": source}
    with stages() as step:
        step("opening …")
        found = FeatureStore(store)
        opened = () if alone else _opened(found, **given)
        step("reading …")
        wanted = {"examples": examples, "tokens": tokens, "contexts": contexts, "samples": samples, "seed": seed}
        made = make(found, latent, *opened, dictionary=name, **wanted)
    command = repeated(
        "features card", card, given | wanted | {"store": store, "latent": latent, "alone": alone, "out": out}
    )
    return reply(replace(made, record=made.record | {"command": command}), out)


def explain(
    store: STORE,
    latents: Annotated[list[int] | None, Parameter(help="these; all that are active often enough if left out")] = None,
    /,
    *,
    name: NAME = None,
    samples: Annotated[int, Parameter(help="random features for each latent")] = 2,
    seed: Annotated[int, Parameter(help="of tokens that are drawn, random features and resamples")] = 0,
    show: Annotated[int, Parameter(help="latents that are listed, those of largest F1")] = 20,
    out: Annotated[Path | None, Parameter(group="Output", help=OUT_HELP)] = None,
) -> Reply:
    """Find short rules for latents, score them on held-out documents, and write them into the store as labels."""
    from cutaway.features import FeatureStore
    from cutaway.features import explain as run

    check_out(out)
    with stages() as step:
        step("looking for rules …")
        found = run(FeatureStore(store), latents or (), dictionary=name, samples=samples, seed=seed)
    if out is not None:
        save(found, out)
    return Reply(as_data(found), lambda console: _show_rules(console, found, show))


def search(
    store: STORE,
    words: Annotated[str, Parameter(help="words of labels, or what a flag says")] = "",
    *,
    by: Annotated[By, Parameter(help="what is looked for")] = "label",
    like: Annotated[int | None, Parameter(help="a latent: find those with similar decoder rows")] = None,
    name: NAME = None,
    model: MODEL = None,
    source: SOURCE = None,
    most: Annotated[int, Parameter(help="latents that are listed")] = 20,
) -> Reply:
    """Find latents by label, peak token, phrase, a text they fire on, a word they raise, or a latent they are like."""
    from cutaway.features import FeatureStore
    from cutaway.features import search as room
    from cutaway.features.store.dictionaries import dictionary_of

    if (like is None) == (not words):
        raise Refused("a search", "it needs words or --like", "give one of them")
    given = {"name": name, "model": model, "source": source}
    with stages() as step:
        step("searching …")
        found = FeatureStore(store)
        known = found.latents(name).name if by != "label" or like is not None else ""
        if like is not None:
            hits = room.by_likeness(found, like, dictionary_of(found, name, source), known, most)
        elif by == "label":
            hits = room.by_label(found, words, most)
        elif by in ("token", "phrase"):
            hits = {"token": room.by_peak_token, "phrase": room.by_phrase}[by](found, words, known, most)
        else:
            way = {"text": room.by_text, "raises": room.by_raised_word}[by]
            hits = way(found, words, *_opened(found, **given), known, most)
    data = [asdict(h) | {"labels": [x.text for x in found.meta.labels(h.dictionary, h.latent)]} for h in hits]
    return Reply(data, lambda console: _show_hits(console, data, by == "label"))


def _opened(store: FeatureStore, name: str | None, model: str | None, source: str | None) -> tuple[Any, Any]:
    """Open the model and the dictionary of a store, by the words of the harvest where others are not given."""
    from cutaway.features.store.dictionaries import dictionary_of

    word = model if model is not None else store.manifest["opened"]
    if word is None:
        raise Refused("the model of the store", "the harvest does not say how it is opened", "give --model, or --alone")
    loaded = load_model(str(word))
    return loaded, dictionary_of(store, name, source).to(loaded.device)


def _show_rules(console: Any, found: Explanations, most: int) -> None:
    from rich.text import Text

    rows = found.record["rules"]
    console.print(f"{rows['with a rule']:,} of {rows['latents']:,} latents have a short rule", style="bold")
    f1 = found.labels["measure"].index("F1")
    order = found.score[:, f1].argsort(descending=True, stable=True)[:most].tolist()
    for i in order:
        low, high = found.interval[i, f1].tolist()
        line = f"F1 {float(found.score[i, f1]):.2f} [{low:.2f}, {high:.2f}]  {found.labels['latent'][i]}"
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"random features: F1 at most {float(found.null[:, f1].max()):.2f}", "dim"))


def _show_hits(console: Any, hits: list[dict[str, Any]], labelled: bool) -> None:
    from rich.text import Text

    for hit in hits:
        label = "" if labelled or not hit["labels"] else f"  {hit['labels'][0]}"
        console.print(
            Text(f"{hit['dictionary']} {hit['latent']:>6}  {hit['why']}").append(label, "dim"), soft_wrap=True
        )
    if not hits:
        console.print("no latent was found")


def export(
    store: STORE,
    out: Annotated[Path, Parameter(help="a new folder")],
    *,
    format: Annotated[
        Literal["neuronpedia", "saedashboard", "circuit-tracer", "circuit-tracer-bundle"],
        Parameter(help="format to write"),
    ] = "neuronpedia",
    model_id: Annotated[str | None, Parameter(help="name of the model there [default: its own]")] = None,
    set: Annotated[str, Parameter(help="name of the set of sources there")] = "res",
    creator: Annotated[str, Parameter(help="who made it")] = "cutaway",
    name: NAME = None,
    model: MODEL = None,
    source: SOURCE = None,
) -> Reply:
    """Write a store in the format of another tool: Neuronpedia's bulk export, SAEDashboard's batches, or the feature
    pages of circuit-tracer's viewer, loose or as a bundle.
    """
    from datetime import UTC, datetime

    from cutaway.features import FeatureStore
    from cutaway.features.formats import circuit_tracer
    from cutaway.features.formats.neuronpedia import Export, write_neuronpedia
    from cutaway.features.formats.saedashboard import write_saedashboard

    with stages() as step:
        step("opening …")
        found = FeatureStore(store)
        opened = _opened(found, name, model, source)
        own = model_id or str(found.manifest["model"]["name"]).replace("/", "-")
        about = Export(own, set, creator, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        step("writing …")
        writers = {
            "neuronpedia": write_neuronpedia,
            "saedashboard": write_saedashboard,
            "circuit-tracer": circuit_tracer.write_pages,
            "circuit-tracer-bundle": circuit_tracer.write_bundle,
        }
        folder = writers[format](found, out, about, *opened, dictionary=name)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    def show(console: Any) -> None:
        console.print(f"{len(files)} files: {folder}", style="bold", markup=False, soft_wrap=True)

    return Reply({"folder": str(folder), "format": format, "files": files}, show)


def compare(
    store: STORE,
    second: Annotated[Path | None, Parameter(help="another store of the same text [default: the same store]")] = None,
    /,
    *,
    names: Annotated[str, Parameter(help="names of both dictionaries in their stores, with a comma between")] = ",",
    tokens: Annotated[int, Parameter(help="tokens that are compared on, at most")] = 1 << 18,
    samples: Annotated[int, Parameter(help="moves of the text behind the null")] = 2,
    seed: Annotated[int, Parameter(help="seed of the moves")] = 0,
    out: Annotated[Path | None, Parameter(group="Output", help=OUT_HELP)] = None,
) -> Reply:
    """Match the latents of two dictionaries by the tokens on which they fire."""
    from cutaway.features import FeatureStore
    from cutaway.features import compare as run

    check_out(out)
    one, _, two = names.partition(",")
    with stages() as step:
        step("comparing …")
        stores = [FeatureStore(s) for s in (store, second) if s is not None]
        pair = (one.strip() or None, two.strip() or None)
        return reply(run(*stores, names=pair, tokens=tokens, samples=samples, seed=seed), out)


def corpora(
    first: STORE,
    second: Annotated[Path, Parameter(help="a store of the same dictionary, of other documents")],
    /,
    *,
    name: NAME = None,
    samples: Annotated[int, Parameter(help="permutations of the documents")] = 100,
    seed: Annotated[int, Parameter(help="seed of the permutations")] = 0,
    show: Annotated[int, Parameter(help="latents that are listed, those that differ most clearly")] = 20,
    out: Annotated[Path | None, Parameter(group="Output", help=OUT_HELP)] = None,
) -> Reply:
    """Find the latents that are active more often in one corpus than in another, at 5 % false discoveries."""
    from cutaway.features import FeatureStore
    from cutaway.features import corpora as run

    check_out(out)
    with stages() as step:
        step("comparing …")
        found = run(FeatureStore(first), FeatureStore(second), dictionary=name, samples=samples, seed=seed)
    if out is not None:
        save(found, out)
    return Reply(as_data(found), lambda console: _show_corpora(console, found, show))


def _show_corpora(console: Any, found: CorpusDifference, most: int) -> None:
    from rich.text import Text

    called = found.record["called"]
    beside = called["in permutations"]
    console.print(f"{called['latents']:,} of {len(found.q):,} latents differ (q ≤ {called['level']:g})", style="bold")
    order = found.p.argsort(stable=True)[: min(most, called["latents"])].tolist()
    for i in order:
        a, b = found.rate[i].tolist()
        low, high = found.interval[i].tolist()
        line = f"{a:.3%} → {b:.3%}  [{low:+.3%}, {high:+.3%}]  q {float(found.q[i]):.2g}  {found.labels['latent'][i]}"
        console.print(Text(line), soft_wrap=True)
    text = f"documents permuted: {sum(beside) / len(beside):.1f} latents on average, {max(beside)} at most"
    console.print(Text(text, "dim"))
