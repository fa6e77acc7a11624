"""`cutaway harvest`: the activations of many tokens to disk, shuffled, checked and ready to train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from cutaway.cli.repeat import pinned, repeated
from cutaway.cli.shell import Reply, stages
from cutaway.cli.subjects import DEFAULT_MODEL, load_model
from cutaway.core.refuse import Refused
from cutaway.zoo.miniworld.documents import WorldDocuments

if TYPE_CHECKING:
    from cutaway.models.model import Model
    from cutaway.streams import Documents, Shards

Bos = Literal["auto", "both", "context", "document", "none"]


def harvest(
    *,
    sites: Annotated[list[str], Parameter(help="addresses or patterns, such as resid_post.3 or z", negative=())],
    out: Annotated[Path, Parameter(help="folder of the activations")],
    model: Annotated[str, Parameter(help="zoo name, folder, GGUF file, or Hugging Face id")] = DEFAULT_MODEL,
    model_dtype: Annotated[str | None, Parameter(help="dtype of the weights and of computing")] = None,
    model_device: Annotated[str | None, Parameter(help="device, such as cuda:0")] = None,
    text: Annotated[
        str | None,
        Parameter(
            help="a text file, a folder, .jsonl, ids (.npy, .safetensors) or hub:org/name; a zoo world has its own"
        ),
    ] = None,
    field: Annotated[str, Parameter(help="field with the text, in JSON lines and data sets")] = "text",
    tokens: Annotated[int | None, Parameter(help="tokens to keep [default: all]")] = None,
    context: Annotated[int, Parameter(help="tokens a context")] = 128,
    rows: Annotated[int, Parameter(help="contexts that go through the model at once")] = 8,
    bos: Annotated[Bos, Parameter(help="where a beginning-of-text token is put")] = "auto",
    eos: Annotated[bool, Parameter(help="put an end-of-text token after each document")] = False,
    across: Annotated[bool, Parameter(help="let contexts go across documents")] = True,
    special: Annotated[bool, Parameter(help="keep special tokens")] = False,
    sinks: Annotated[float, Parameter(help="leave out norms above so many medians; 0 leaves out none")] = 10.0,
    dtype: Annotated[str | None, Parameter(help="dtype on disk [default: that of the model]")] = None,
    covariance: Annotated[bool, Parameter(help="count covariances too")] = False,
    seed: Annotated[int, Parameter(help="seed of the order")] = 0,
) -> Reply:
    """Write activations to disk in a random order over everything; an interrupted harvest goes on when repeated."""
    given = dict(locals())
    from cutaway import streams

    with stages() as step:
        step(f"loading {model} …")
        source = load_model(model, model_dtype, model_device)
        step("harvesting …")
        shards = streams.harvest(
            source,
            _documents(source, text, field, tokens),
            sites,
            out,
            packing=streams.Packing(context, bos, eos, across, rows),
            masking=streams.Masking(special=not special, sinks=sinks or None),
            tokens=tokens,
            dtype=dtype,
            seed=seed,
            covariance=covariance,
        )
    command = repeated("harvest", harvest, given | {"model": pinned(source, model)})
    data = {"folder": str(out), **shards.manifest, "command": command}
    return Reply(data, lambda console: _show(console, shards, command))


def _documents(model: Model, text: str | None, field: str, tokens: int | None) -> Documents:
    if text is None and model.world is not None and tokens is None:
        raise Refused("harvest without --text and --tokens", "a world's text has no end", "give --tokens 1000000")
    return documents_of(model, text, field, "harvest")


def documents_of(model: Model, text: str | None, field: str, what: str) -> Documents:
    """Return the documents of a file, else those of the model's own world.

    Raises:
        Refused: neither is there; `what` says what they were wanted for.
    """
    from cutaway.streams import documents

    if text is not None:
        return documents(text, field)
    if model.world is None:
        raise Refused(f"{what} without --text", "only models of the zoo have text of their own", "give --text FILE")
    return WorldDocuments(model.world)


def _show(console: Any, shards: Shards, command: str) -> None:
    from rich.markup import escape

    m = shards.manifest
    counts, size = m["masking"]["counts"], sum(r["bytes"] for r in m["shards"])
    speed = f", {shards.tokens / m['cost']['seconds']:,.0f} tokens/s" if m["cost"]["seconds"] else ""
    console.print(f"[bold]{shards.tokens:,}[/] tokens of {escape(m['model']['name'])}, {size / 2**20:.1f} MiB{speed}")
    for site, width in shards.widths.items():
        console.print(f"  {site}  width {width}, {m['dtype']}, mean norm {m['mean_norm'][site]:.4g}")
    console.print(
        f"masked: {counts['special']:,} special, {counts['sinks']:,} sinks of {counts['tokens']:,}; "
        f"padding {counts['padding']:,}"
    )
    console.print(escape(shards.beginning), soft_wrap=True)
    if m["asked"] is not None and m["asked"] > shards.tokens:
        console.print(f"the documents ended before the {m['asked']:,} tokens asked for")
    console.print(escape(f"in Python: streams.Shards({str(shards.folder)!r}).stream(batch=4096)"), soft_wrap=True)
    console.print(escape(f"again: {command}"), soft_wrap=True)
