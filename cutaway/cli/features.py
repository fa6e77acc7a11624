"""`cutaway features harvest` and what else there is to do with stores of features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from cutaway.cli.dict.files import open_dictionary
from cutaway.cli.dict.source import FROM, From, open_origin
from cutaway.cli.processes import is_main_process
from cutaway.cli.repeat import repeated
from cutaway.cli.shell import Reply, stages
from cutaway.core.refuse import Refused

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cutaway.dictionaries.dictionary import Dictionary
    from cutaway.features import FeatureStore

USUAL = From()
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
        from cutaway.features.store.feature_store import named

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
